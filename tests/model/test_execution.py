"""Recorded passes: padded to a bucket and run over fixed buffers, they give the same scores."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from rankonce.kernels.segment_attention.tiles import TileKey
from rankonce.kernels.segment_attention.triton import (
    forward_config,
    segment_attention_triton,
    tile_key,
)
from rankonce.layout import PassPart, TokenizedRequest
from rankonce.model import acceleration
from rankonce.model.execution import PassRunner, bucket_of
from rankonce.model.loading import prepare_model
from tests.conftest import build_network

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def replay_eagerly(run: Callable[[], None]) -> Callable[[], None]:
    """Stand in for a CUDA graph: what is recorded runs again over the same buffers."""
    run()
    return run


def request(prefix: int, segments: list[int], *, seed: int) -> TokenizedRequest:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: tuple(torch.randint(2, 600, (n,), generator=generator).tolist())  # noqa: E731
    return TokenizedRequest(
        prefix_ids=draw(prefix),
        segment_ids=tuple(draw(n) for n in segments),
        label_ids=((5,), (9,)),
    )


# Passes of one bucket that differ in everything else.
REQUESTS = [
    [request(40, [7, 3, 20], seed=0)],
    [request(90, [5] * 12, seed=1)],
    [request(11, [30, 2], seed=2), request(60, [1, 1, 44], seed=3)],
    [request(0, [9, 4], seed=4), request(5, [3], seed=5)],
]


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the kernel, which sees its tables only, wherever the tensors are."""
    monkeypatch.setattr(acceleration, "segment_attention", segment_attention_triton)


def build_runners(
    architecture: str, **shape: object
) -> tuple[PassRunner, PassRunner, list[TileKey]]:
    network = build_network(architecture, num_hidden_layers=2, **shape).to(DEVICE)
    model = prepare_model(network, None, name=architecture)
    config = forward_config(16, torch.float32, 80)
    windows = {None, shape.get("sliding_window")}
    keys = [tile_key(4, 2, config, window) for window in windows]
    recorded = PassRunner(
        model.network,
        keys,
        max_graph_tokens=1000,
        capture=replay_eagerly if DEVICE == "cpu" else None,
    )
    return PassRunner(model.network), recorded, keys


def parts_of(requests: list[TokenizedRequest], *, cached: bool) -> list[PassPart]:
    return [
        PassPart(request=i, first=0, last=len(one.segment_ids), cached=cached)
        for i, one in enumerate(requests)
    ]


@pytest.mark.parametrize(
    ("architecture", "shape"),
    [("qwen3", {}), ("gemma2", {"sliding_window": 16})],
)
@torch.inference_mode()
def test_recorded_passes_equal_plain_ones(on_triton, architecture: str, shape: dict) -> None:
    plain, recorded, _ = build_runners(architecture, **shape)
    for requests in REQUESTS:
        parts = parts_of(requests, cached=False)
        expected, expected_kept = plain.run(parts, requests, {}, keep_prefixes=True)
        actual, kept = recorded.run(parts, requests, {}, keep_prefixes=True)
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)
        assert kept.keys() == expected_kept.keys()
        for index, layers in expected_kept.items():
            for pair, wanted in zip(kept[index], layers, strict=True):
                torch.testing.assert_close(pair, wanted, atol=2e-5, rtol=1e-5)
        parts = parts_of(requests, cached=True)
        prefixes = {i: kept.get(i, []) for i in range(len(requests))}
        hit, none_kept = recorded.run(parts, requests, prefixes, keep_prefixes=True)
        torch.testing.assert_close(hit, expected, atol=2e-5, rtol=1e-5)
        assert not none_kept


@pytest.mark.parametrize(
    ("architecture", "shape"),
    [("qwen3", {}), ("gemma2", {"sliding_window": 16})],
)
@torch.inference_mode()
def test_prefixes_known_in_part_give_the_scores_of_fresh_ones(
    on_triton, architecture: str, shape: dict
) -> None:
    plain, recorded, _ = build_runners(architecture, **shape)
    for requests in REQUESTS:
        parts = parts_of(requests, cached=False)
        expected, kept = plain.run(parts, requests, {}, keep_prefixes=True)
        known = {i: max(1, len(requests[i].prefix_ids) * (i + 1) // 3) for i in kept}
        prefixes = {
            i: [(k[: known[i]], v[: known[i]]) for k, v in layers] for i, layers in kept.items()
        }
        parts = [replace(part, known=known.get(part.request, 0)) for part in parts]
        for runner in (plain, recorded):
            hidden, rest = runner.run(parts, requests, prefixes, keep_prefixes=True)
            torch.testing.assert_close(hidden, expected, atol=2e-5, rtol=1e-5)
            for index, layers in kept.items():
                for pair, wanted in zip(rest[index], layers, strict=True):
                    for tensor, whole in zip(pair, wanted, strict=True):
                        torch.testing.assert_close(
                            tensor, whole[known[index] :], atol=2e-5, rtol=1e-5
                        )


@torch.inference_mode()
def test_passes_of_a_bucket_share_a_recording(on_triton, monkeypatch: pytest.MonkeyPatch) -> None:
    _, recorded, _ = build_runners("qwen3")
    for requests in REQUESTS:
        recorded.run(parts_of(requests, cached=False), requests, {}, keep_prefixes=False)
    assert len(recorded._recordings) == 1


@torch.inference_mode()
def test_what_one_pass_returned_survives_the_next(on_triton) -> None:
    _, recorded, _ = build_runners("qwen3")
    first, second = REQUESTS[:2]
    hidden, kept = recorded.run(parts_of(first, cached=False), first, {}, keep_prefixes=True)
    before = hidden.clone(), kept[0][0][0].clone()
    recorded.run(parts_of(second, cached=False), second, {}, keep_prefixes=True)
    assert torch.equal(hidden, before[0])
    assert torch.equal(kept[0][0][0], before[1])


@torch.inference_mode()
def test_longer_passes_are_not_recorded(on_triton) -> None:
    _, recorded, _ = build_runners("qwen3")
    recorded.max_graph_tokens = 30
    requests = REQUESTS[0]
    recorded.run(parts_of(requests, cached=False), requests, {}, keep_prefixes=False)
    assert not recorded._recordings


def test_buckets_round_up_by_little() -> None:
    sizes = [1, 255, 256, 257, 2049, 4000, 30_000]
    assert [bucket_of(n) for n in sizes] == [256, 256, 256, 512, 2560, 4096, 32_768]
    assert all(n <= bucket_of(n) <= max(256, 1.25 * n) for n in range(1024, 40_000, 7))


@torch.inference_mode()
def test_a_pass_asks_the_device_for_nothing(on_triton) -> None:
    """No operation of a pass needs a value on the host, which would make it wait for the GPU."""
    from torch.utils._python_dispatch import TorchDispatchMode

    waiting = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.__name__.split(".")[0])
            return func(*args, **(kwargs or {}))

    plain, _, _ = build_runners("qwen3")
    requests = REQUESTS[0]
    with Watch():
        plain.run(parts_of(requests, cached=False), requests, {}, keep_prefixes=True)
    assert "mm" in seen or "addmm" in seen or "linear" in seen
    assert not waiting.intersection(seen)


@pytest.mark.gpu
@torch.inference_mode()
def test_a_pass_never_waits_for_the_gpu() -> None:
    plain, _, _ = build_runners("qwen3")
    requests = REQUESTS[0]
    parts = parts_of(requests, cached=False)
    plain.run(parts, requests, {}, keep_prefixes=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        plain.run(parts, requests, {}, keep_prefixes=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
