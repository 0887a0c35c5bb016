"""The tokens and spans of one pass as tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rankonce.kernels.segment_attention.spans import COLUMNS, SegmentSpans, last_queries
from rankonce.kernels.segment_attention.tiles import TileKey, query_tables
from rankonce.layout import PassPart, SegmentLayout, TokenizedRequest, lay_out_pass
from rankonce.model.attention import SegmentPass
from rankonce.model.prefix_cache import KeysValues


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One pass, ready for the model.

    Attributes:
        token_ids_T, positions_T: int32.
        segment_pass: what the layers share; takes up the prefixes that are to be kept.
        kept_requests: the request of each kept prefix.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    segment_pass: SegmentPass
    kept_requests: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class HostPass:
    """One pass in host memory: the arrays that are moved to the device in one copy.

    Attributes:
        token_ids_T, positions_T, score_rows_C: int32.
        spans, score_spans: of all tokens and of the score rows.
        tables: for the spans and the score spans in turn, their tables by key.
        front_rows_F: int32; as in ``SegmentLayout``.
        kept_rows, kept_requests: the prefixes to be kept, of each what is not known yet.
        num_cached: rows of the known keys and values.
    """

    token_ids_T: NDArray[np.int32]
    positions_T: NDArray[np.int32]
    score_rows_C: NDArray[np.int32]
    front_rows_F: NDArray[np.int32]
    spans: SegmentSpans
    score_spans: SegmentSpans
    tables: tuple[dict[TileKey, tuple[NDArray[np.int32], ...]], ...]
    kept_rows: list[tuple[int, int]]
    kept_requests: tuple[int, ...]
    num_cached: int

    def arrays(self) -> list[NDArray[np.int32]]:
        """Return everything that the device needs, in the order of ``on_device``."""
        tables = [table for part in self.tables for pair in part.values() for table in pair]
        first = [self.token_ids_T, self.positions_T, self.score_rows_C, self.front_rows_F]
        return [*first, *tables]

    def on_device(self, tensors: Sequence[Tensor], cached: Sequence[KeysValues]) -> PackedBatch:
        """Put a pass together from its arrays on the device.

        Args:
            tensors: of the arrays of ``arrays``.
            cached: the known keys and values, in the order of their rows.
        """
        token_ids_T, positions_T, score_rows_C, front_rows_F, *rest = tensors
        tables = iter(rest)
        for spans, part in zip((self.spans, self.score_spans), self.tables, strict=True):
            spans.tables.update({key: (next(tables), next(tables)) for key in part})
        return PackedBatch(
            token_ids_T=token_ids_T,
            positions_T=positions_T,
            segment_pass=SegmentPass(
                spans=self.spans,
                score_spans=self.score_spans,
                score_rows_C=score_rows_C,
                cached=join_prefixes(cached),
                front_rows_F=front_rows_F if len(front_rows_F) else None,
                kept_rows=self.kept_rows,
            ),
            kept_requests=self.kept_requests,
        )


def pack_pass(
    parts: Sequence[PassPart],
    requests: Sequence[TokenizedRequest],
    prefixes: Mapping[int, KeysValues],
    *,
    keep_prefixes: bool,
    device: torch.device | str = "cpu",
    table_keys: Sequence[TileKey] = (),
) -> PackedBatch:
    """Pack the parts of one pass and move them to the device in one copy.

    Args:
        parts: whose ``request`` indexes ``requests``.
        prefixes: known keys and values of the requests whose part has some.
        keep_prefixes: take up the keys and values of the prefixes that this pass computes.
        table_keys: the attention tables that the model's layers will ask for.
    """
    host = pack_on_host(parts, requests, keep_prefixes=keep_prefixes, table_keys=table_keys)
    return host.on_device(
        move_together(host.arrays(), device), cached_of(parts, requests, prefixes)
    )


def pack_on_host(
    parts: Sequence[PassPart],
    requests: Sequence[TokenizedRequest],
    *,
    keep_prefixes: bool,
    table_keys: Sequence[TileKey] = (),
    cached_rows: int = 0,
    front_rows: int = 0,
) -> HostPass:
    """Lay out the parts of one pass.

    Args:
        cached_rows, front_rows: reserved, as in ``lay_out_pass``.
    """
    prefix_lengths = [len(requests[part.request].prefix_ids) for part in parts]
    segments = [requests[part.request].segment_ids[part.first : part.last] for part in parts]
    layout = lay_out_pass(
        parts,
        prefix_lengths,
        [[len(ids) for ids in s] for s in segments],
        cached_rows=cached_rows,
        front_rows=front_rows,
    )
    pieces: list[Sequence[int]] = []
    row = 0
    kept_rows, kept_requests = [], []
    for part, part_segments in zip(parts, segments, strict=True):
        if not part.cached:
            rest_ids = requests[part.request].prefix_ids[part.known :]
            if keep_prefixes and rest_ids:
                kept_rows.append((row, row + len(rest_ids)))
                kept_requests.append(part.request)
            pieces.append(rest_ids)
            row += len(rest_ids)
        pieces += part_segments
        row += sum(map(len, part_segments))
    spans = spans_of(layout)
    score_spans = last_queries(spans, layout.score_rows_C)
    return HostPass(
        token_ids_T=np.fromiter(chain.from_iterable(pieces), dtype=np.int32, count=row),
        positions_T=layout.positions_T.astype(np.int32),
        score_rows_C=layout.score_rows_C.astype(np.int32),
        front_rows_F=layout.front_rows_F.astype(np.int32),
        spans=spans,
        score_spans=score_spans,
        tables=tuple(
            {key: query_tables(one, key) for key in _needed(one, table_keys)}
            for one in (spans, score_spans)
        ),
        kept_rows=kept_rows,
        kept_requests=tuple(kept_requests),
        num_cached=layout.num_cached,
    )


def pack_texts(
    texts: Sequence[Sequence[int]], *, device: torch.device | str = "cpu"
) -> PackedBatch:
    """Pack whole texts, of which each sees itself alone; every token is a score row."""
    parts = [PassPart(request=i, first=0, last=0, cached=False) for i in range(len(texts))]
    layout = lay_out_pass(parts, [len(ids) for ids in texts], [[] for _ in texts])
    spans = spans_of(layout)
    host = HostPass(
        token_ids_T=np.fromiter(chain.from_iterable(texts), np.int32, count=layout.num_tokens),
        positions_T=layout.positions_T.astype(np.int32),
        score_rows_C=np.arange(layout.num_tokens, dtype=np.int32),
        front_rows_F=np.zeros(0, dtype=np.int32),
        spans=spans,
        score_spans=spans,
        tables=({}, {}),
        kept_rows=[],
        kept_requests=(),
        num_cached=0,
    )
    return host.on_device(move_together(host.arrays(), device), [])


def cached_of(
    parts: Sequence[PassPart],
    requests: Sequence[TokenizedRequest],
    prefixes: Mapping[int, KeysValues],
) -> list[KeysValues]:
    """Return what is known of a pass's prefixes in the order of its rows."""
    return [
        prefixes[part.request]
        for part in parts
        if part.known_of(len(requests[part.request].prefix_ids))
    ]


def move_together(
    arrays: Sequence[NDArray[np.int32]], device: torch.device | str
) -> tuple[Tensor, ...]:
    """Move arrays in one copy, which a GPU need not be waited for."""
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    if torch.device(device).type == "cuda":
        flat = flat.pin_memory()
    return split_like(flat.to(device, non_blocking=True), arrays)


def split_like(flat: Tensor, arrays: Sequence[NDArray[np.int32]]) -> tuple[Tensor, ...]:
    """Cut a flat tensor into the shapes of arrays."""
    parts = flat.split([array.size for array in arrays])
    return tuple(part.view(array.shape) for part, array in zip(parts, arrays, strict=True))


def spans_of(layout: SegmentLayout) -> SegmentSpans:
    """Turn a layout's spans into the kernels' int32 ranges."""
    return SegmentSpans(**{name: getattr(layout, name).astype(np.int32) for name in COLUMNS})


def forward_pass(network: torch.nn.Module, batch: PackedBatch) -> Tensor:
    """Run the decoder over a pass.

    Returns:
        hidden_CD: the final hidden states of the score rows.
    """
    decoder = getattr(network, "base_model", network)
    segment_pass = batch.segment_pass
    states = decoder(
        input_ids=batch.token_ids_T[None],
        position_ids=batch.positions_T[None],
        # transformers takes a mask of four dimensions as it is. Without one it looks for sequences
        # in the positions and waits for the answer.
        attention_mask=batch.positions_T.new_empty((1, 1, 1, 1)),
        use_cache=False,
        segment_pass=segment_pass,
    )
    hidden: Tensor = states.last_hidden_state[0]
    return hidden if segment_pass.trimmed else hidden.index_select(0, segment_pass.score_rows_C)


def join_prefixes(cached: Sequence[KeysValues]) -> KeysValues:
    """Join the cached prefixes of a pass layer by layer, in the order of their rows."""
    if len(cached) == 1:
        return cached[0]
    return [
        (torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer]))
        for layer in zip(*cached, strict=True)
    ]


def _needed(spans: SegmentSpans, keys: Sequence[TileKey]) -> list[TileKey]:
    """Leave out windows that hide nothing: the layers then ask for the table without one."""
    return list(
        dict.fromkeys(
            key if spans.shortened(key.window) else replace(key, window=None) for key in keys
        )
    )
