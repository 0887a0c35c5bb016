"""Run passes through a network: eagerly, or by replaying a CUDA graph where the pass is short.

Below a few thousand tokens a GPU waits for Python. Such a pass is padded to a bucket of tokens,
score rows and cached rows; the kernels of a bucket are recorded once and replayed afterwards. What
a pass changes lies in one buffer of integers, which one copy fills, and in the cached keys and
values. Padding has no tiles in the attention tables: nobody attends to it and it attends to nobody.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rankonce.kernels.segment_attention.tiles import TileKey
from rankonce.layout import PassPart, TokenizedRequest, count_front_rows
from rankonce.model.packing import (
    HostPass,
    PackedBatch,
    cached_of,
    forward_pass,
    join_prefixes,
    move_together,
    pack_on_host,
    split_like,
)
from rankonce.model.prefix_cache import KeysValues

logger = logging.getLogger(__name__)

# Returns a function that runs the recorded work again.
Capture = Callable[[Callable[[], None]], Callable[[], None]]
_MIN_CANDIDATES = 16
_TILES_STEP = 32
# Recordings kept; the least recently used one goes first.
_MAX_RECORDINGS = 48


def bucket_of(num_rows: int) -> int:
    """Round up a number of rows, by less than a quarter of it above 1,024."""
    step = max(256, (1 << (num_rows - 1).bit_length()) // 8)
    return -(-num_rows // step) * step


@dataclass(frozen=True, kw_only=True)
class _Bucket:
    """What a recorded pass fixes: its arrays' shapes, its attention tables and its adapter."""

    shapes: tuple[tuple[int, ...], ...]
    table_keys: tuple[tuple[TileKey, ...], ...]
    cached_rows: int
    adapter: str | None


class _Recording:
    """One bucket's buffers and the work recorded over them."""

    def __init__(
        self, network: Any, bucket: _Bucket, host: HostPass, cached: KeysValues, capture: Capture
    ) -> None:
        device = network.device
        sizes = [int(np.prod(shape)) for shape in bucket.shapes]
        self.bucket = bucket
        self.flat = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        self.cached = [
            (
                k.new_zeros((bucket.cached_rows, *k.shape[1:])),
                v.new_zeros((bucket.cached_rows, *v.shape[1:])),
            )
            for k, v in cached
        ]
        self.fill(host, cached)
        self.hidden_CD = torch.empty(0)
        self.keys_values: KeysValues = []

        def run() -> None:
            batch = self._batch(host)
            self.hidden_CD = forward_pass(network, batch)
            self.keys_values = batch.segment_pass.recorded or []

        self.replay = capture(run)

    def fill(self, host: HostPass, cached: KeysValues) -> None:
        """Put a pass into the buffers."""
        arrays = [
            _padded(array, shape)
            for array, shape in zip(host.arrays(), self.bucket.shapes, strict=True)
        ]
        flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
        if self.flat.device.type == "cuda":
            flat = flat.pin_memory()
        self.flat.copy_(flat, non_blocking=True)
        if cached:
            num_rows = len(cached[0][0])
            torch._foreach_copy_(
                [buffer[:num_rows] for pair in self.cached for buffer in pair],
                [tensor for pair in cached for tensor in pair],
            )

    def _batch(self, host: HostPass) -> PackedBatch:
        """Describe a pass over the buffers, whatever the pass that is in them."""
        shapes = [np.empty(shape, dtype=np.int32) for shape in self.bucket.shapes]
        padded = replace(
            host,
            spans=host.spans.padded(self.bucket.shapes[0][0]),
            score_spans=host.score_spans.padded(self.bucket.shapes[2][0]),
            kept_rows=[],
        )
        batch = padded.on_device(
            split_like(self.flat, shapes), [self.cached] if self.cached else []
        )
        batch.segment_pass.recorded = []
        return batch


class PassRunner:
    """Runs passes through one network.

    Args:
        network: on its device, its attention segment attention.
        table_keys: the attention tables that its layers ask for.
        max_graph_tokens: record and replay passes of up to this many tokens; 0 records none.
        capture: how to record; CUDA's by default.
    """

    def __init__(
        self,
        network: Any,
        table_keys: Sequence[TileKey] = (),
        *,
        max_graph_tokens: int = 0,
        capture: Capture | None = None,
    ) -> None:
        self.network = network
        self.table_keys = table_keys
        self.max_graph_tokens = max_graph_tokens
        self._capture = capture or capture_cuda
        self._recordings: OrderedDict[_Bucket, _Recording] = OrderedDict()

    def forget_recordings(self) -> None:
        """Record anew from here on: the network's weights are no longer where they were."""
        self._recordings.clear()

    def run(
        self,
        parts: Sequence[PassPart],
        requests: Sequence[TokenizedRequest],
        prefixes: Mapping[int, KeysValues],
        *,
        keep_prefixes: bool,
    ) -> tuple[Tensor, dict[int, KeysValues]]:
        """Run one pass.

        Args:
            parts, requests, prefixes, keep_prefixes: as in ``pack_pass``; the requests are of one
                adapter, which is in use.

        Returns:
            hidden_CD: the final hidden states of the score rows, in the order of the parts.
            For each request whose prefix was computed and kept, its keys and values.
        """
        cached = cached_of(parts, requests, prefixes)
        num_tokens = sum(
            sum(map(len, requests[part.request].segment_ids[part.first : part.last]))
            + (0 if part.cached else len(requests[part.request].prefix_ids) - part.known)
            for part in parts
        )
        records = num_tokens <= self.max_graph_tokens
        num_cached = sum(len(entry[0][0]) for entry in cached)
        num_front = count_front_rows(
            parts, [len(requests[part.request].prefix_ids) for part in parts]
        )
        host = pack_on_host(
            parts,
            requests,
            keep_prefixes=keep_prefixes,
            table_keys=self.table_keys,
            cached_rows=bucket_of(num_cached) if records and num_cached else 0,
            front_rows=bucket_of(num_front) if records and num_front else 0,
        )
        if records:
            return self._replay(host, cached, requests[parts[0].request].adapter)
        batch = host.on_device(move_together(host.arrays(), self.network.device), cached)
        hidden_CD = forward_pass(self.network, batch)
        kept = batch.segment_pass.kept
        return hidden_CD, dict(zip(host.kept_requests, kept, strict=True))

    def _replay(
        self, host: HostPass, cached: list[KeysValues], adapter: str | None
    ) -> tuple[Tensor, dict[int, KeysValues]]:
        num_scores = len(host.score_rows_C)
        joined = join_prefixes(cached)
        bucket = _bucket_of(host, adapter)
        recording = self._recordings.get(bucket)
        if recording is None:
            logger.info("recording a pass of %d tokens", bucket.shapes[0][0])
            recording = _Recording(self.network, bucket, host, joined, self._capture)
            self._recordings[bucket] = recording
            if len(self._recordings) > _MAX_RECORDINGS:
                self._recordings.popitem(last=False)
        else:
            self._recordings.move_to_end(bucket)
            recording.fill(host, joined)
        recording.replay()
        kept = {
            request: [
                (k_TGK[start:end].clone(), v_TGK[start:end].clone())
                for k_TGK, v_TGK in recording.keys_values
            ]
            for request, (start, end) in zip(host.kept_requests, host.kept_rows, strict=True)
        }
        # A copy: the next pass writes over the buffer.
        return recording.hidden_CD[:num_scores].clone(), kept


def capture_cuda(run: Callable[[], None]) -> Callable[[], None]:
    """Record work as a CUDA graph, after a run that compiles the kernels and loads libraries."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _bucket_of(host: HostPass, adapter: str | None) -> _Bucket:
    num_tokens = bucket_of(len(host.token_ids_T))
    num_scores = max(_MIN_CANDIDATES, 1 << (len(host.score_rows_C) - 1).bit_length())
    front = host.front_rows_F.shape
    shapes: list[tuple[int, ...]] = [(num_tokens,), (num_tokens,), (num_scores,), front]
    for part, num_queries in zip(host.tables, (num_tokens, num_scores), strict=True):
        for seen_T4, tiles_NF in part.values():
            num_tiles = -(-len(tiles_NF) // _TILES_STEP) * _TILES_STEP
            shapes += [(num_queries, seen_T4.shape[1]), (num_tiles, tiles_NF.shape[1])]
    return _Bucket(
        shapes=tuple(shapes),
        table_keys=tuple(tuple(part) for part in host.tables),
        cached_rows=host.num_cached,
        adapter=adapter,
    )


def _padded(array: NDArray[np.int32], shape: tuple[int, ...]) -> NDArray[np.int32]:
    """Add zeros: token 0 at position 0, score row 0, and tiles without queries."""
    padded = np.zeros(shape, dtype=np.int32)
    padded[: len(array)] = array
    return padded
