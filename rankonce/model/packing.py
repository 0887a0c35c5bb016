"""The tokens and spans of one pass as tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rankonce.kernels.segment_attention import SegmentSpans
from rankonce.layout import PassPart, SegmentLayout, TokenizedRequest, lay_out_pass
from rankonce.model.attention import SegmentPass
from rankonce.model.prefix_cache import KeysValues


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One pass, ready for the model.

    Attributes:
        token_ids_T, positions_T: int64.
        score_rows_C: int64, the last token of every candidate in the order of the parts.
        segment_pass: what the attention layers share; takes up the prefixes that are to be kept.
        kept_requests: the request of each kept prefix.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    score_rows_C: Tensor
    segment_pass: SegmentPass
    kept_requests: tuple[int, ...]


def pack_pass(
    parts: Sequence[PassPart],
    requests: Sequence[TokenizedRequest],
    prefixes: Mapping[int, KeysValues],
    *,
    keep_prefixes: bool,
    device: torch.device | str = "cpu",
) -> PackedBatch:
    """Pack the parts of one pass.

    Args:
        parts: whose ``request`` indexes ``requests``.
        prefixes: keys and values of the requests whose part is cached.
        keep_prefixes: take up the keys and values of the prefixes that this pass computes.
    """
    prefix_lengths = [len(requests[part.request].prefix_ids) for part in parts]
    segments = [requests[part.request].segment_ids[part.first : part.last] for part in parts]
    layout = lay_out_pass(parts, prefix_lengths, [[len(ids) for ids in s] for s in segments])
    tokens: list[int] = []
    kept_rows, kept_requests = [], []
    for part, part_segments in zip(parts, segments, strict=True):
        if not part.cached:
            prefix_ids = requests[part.request].prefix_ids
            if keep_prefixes and prefix_ids:
                kept_rows.append((len(tokens), len(tokens) + len(prefix_ids)))
                kept_requests.append(part.request)
            tokens.extend(prefix_ids)
        for ids in part_segments:
            tokens.extend(ids)

    def on_device(array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(device)

    return PackedBatch(
        token_ids_T=torch.tensor(tokens, dtype=torch.long, device=device),
        positions_T=on_device(layout.positions_T),
        score_rows_C=on_device(layout.score_rows_C),
        segment_pass=SegmentPass(
            spans=spans_of(layout, device),
            longest_prompt=int(layout.positions_T.max()) + 1,
            cached=[
                prefixes[part.request]
                for part in parts
                if part.cached and requests[part.request].prefix_ids
            ],
            kept_rows=kept_rows,
            kept=[[] for _ in kept_rows],
        ),
        kept_requests=tuple(kept_requests),
    )


def spans_of(layout: SegmentLayout, device: torch.device | str = "cpu") -> SegmentSpans:
    """Turn a layout's spans into int32 tensors."""
    names = ("query_start", "query_end", "key_start", "prefix_start", "prefix_end")
    columns = np.stack([getattr(layout, name) for name in names]).astype(np.int32)
    # One copy to the device for all of them.
    tensor = torch.from_numpy(columns).to(device)
    return SegmentSpans(**dict(zip(names, tensor, strict=True)))


def forward_pass(network: torch.nn.Module, batch: PackedBatch) -> Tensor:
    """Run the decoder over a pass.

    Returns:
        hidden_CD: the final hidden states of the score rows.
    """
    decoder = getattr(network, "base_model", network)
    states = decoder(
        input_ids=batch.token_ids_T[None],
        position_ids=batch.positions_T[None],
        use_cache=False,
        segment_pass=batch.segment_pass,
    )
    hidden: Tensor = states.last_hidden_state[0, batch.score_rows_C]
    return hidden
