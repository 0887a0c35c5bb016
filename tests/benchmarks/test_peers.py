"""Whoever is timed computes the same; whoever computes something else is not timed."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rankonce.benchmarks import attention, command, kernels, passes, peers, results, separate
from rankonce.benchmarks.attention import AttentionInputs, draw_inputs, measure_peer, values_of
from rankonce.benchmarks.peers import AttentionPeer
from rankonce.benchmarks.timing import Timing
from rankonce.benchmarks.workloads import HeadShape, PassShape

SHAPE = PassShape(prefix_tokens=21, num_candidates=5, candidate_tokens=7)
HEADS = HeadShape(queries=4, groups=2, size=16)


def inputs_of(*, backward: bool) -> AttentionInputs:
    return draw_inputs(SHAPE, HEADS, device="cpu", dtype=torch.float32, backward=backward)


def peers_of(inputs: AttentionInputs) -> dict[str, AttentionPeer]:
    built = {
        "ours": attention.ours(inputs),
        "dense": peers.sdpa_dense(inputs.layout, None, device="cpu", dtype=torch.float32),
        "per candidate": peers.sdpa_per_candidate(SHAPE),
    }
    if not inputs.backward:
        built["halves"] = peers.sdpa_merged_halves(SHAPE, on_gpu=False)
        built["flex"] = peers.flex(inputs.layout, device="cpu", compiled=False)
    return built


@pytest.mark.parametrize("backward", [False, True])
def test_attention_peers_give_the_values_and_gradients_of_the_reference(backward: bool) -> None:
    inputs = inputs_of(backward=backward)
    expected = values_of(attention.reference(inputs), inputs)
    for name, peer in peers_of(inputs).items():
        for found, right in zip(values_of(peer, inputs), expected, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5, msg=name)


def plainly_causal(inputs: AttentionInputs) -> AttentionPeer:
    """Let candidates see those before them: the mask that a careless peer would use."""
    peer = peers.sdpa_dense(inputs.layout, None, device="cpu", dtype=torch.float32)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        return (F.scaled_dot_product_attention(q, k, v, is_causal=True),)

    return AttentionPeer(prepare=peer.prepare, attend=attend, unpack=peer.unpack)


@pytest.mark.parametrize("backward", [False, True])
def test_a_peer_with_a_wrong_mask_is_not_timed(backward: bool) -> None:
    measurement = measure_peer(plainly_causal, 1.0, inputs_of(backward=backward))
    assert measurement.timing is None
    assert measurement.difference is not None
    assert measurement.difference.is_wrong


def test_nan_counts_as_wrong() -> None:
    inputs = inputs_of(backward=False)

    def broken(inputs: AttentionInputs) -> AttentionPeer:
        peer = attention.ours(inputs)
        return AttentionPeer(
            prepare=peer.prepare, attend=lambda q, k, v: (q * torch.nan,), unpack=peer.unpack
        )

    assert measure_peer(broken, 1.0, inputs).timing is None


def test_every_arm_that_runs_on_a_cpu_agrees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def once(call: object, device: str, *, queued: bool = False) -> Timing:
        assert callable(call)
        call()
        return Timing(median_ms=1.0, p20_ms=1.0, p80_ms=1.0)

    for module in (attention, kernels, passes, separate):
        monkeypatch.setattr(module, "time_call", once)
    options = command.BenchmarkOptions(small=True, device="cpu", output=tmp_path)
    assert command.run_benchmarks(options) == 0
    (path,) = tmp_path.glob("*/*.json")
    assert capsys.readouterr().out.startswith(str(path))
    rows = results.load(path).rows
    assert len({row.key for row in rows}) == len(rows)
    failed = {row.key: row.reason for row in rows if row.status in (results.FAILED, results.WRONG)}
    assert not failed
    measured = {row.arm for row in rows if row.status == results.MEASURED}
    assert {"rankonce", "FlexAttention", "SDPA per candidate", "reference"} <= measured
    assert {passes.PLAIN, "transformers, separate prompts"} <= measured
    absent = [row for row in rows if row.status == results.NOT_MEASURED]
    assert all(row.reason for row in absent)


def test_every_tile_shape_to_be_measured_has_a_name_of_its_own() -> None:
    from rankonce.benchmarks.attention import tile_cases
    from rankonce.benchmarks.workloads import HEADS, SHAPES

    cases = tile_cases(SHAPES[:2], HEADS[:2], device="cuda", dtype=torch.bfloat16)
    for case in cases:
        names = [arm.name for arm in case.arms]
        assert len(names) == len(set(names)) >= 10
