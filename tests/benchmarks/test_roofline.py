"""The roofline of passes is that of the reference page, and follows from the shapes."""

import pytest

from rankonce.benchmarks.roofline import (
    Ceilings,
    attention_flop,
    limits_ms,
    realistic_ms,
    visible_pairs,
    work_of,
)
from rankonce.benchmarks.workloads import (
    LLAMA_1B,
    LLAMA_8B,
    MAIN_SHAPE,
    QWEN3_06B,
    QWEN3_4B,
    ModelShape,
    PassShape,
    build_network,
)

H200 = Ceilings(matmul_tflops=790.0, fp8_tflops=1580.0, copy_tb_s=4.3)


# GEMM, attention and head in TFLOP, then ms: bf16, FP8, unpacked, elementwise, realistic.
@pytest.mark.parametrize(
    ("model", "row"),
    [
        (QWEN3_06B, "30.0 15.8 0.16 58 29 1502 10 74"),
        (LLAMA_1B, "66.3 9.0 0.26 96 48 2787 12 110"),
        (QWEN3_4B, "247 40.5 0.39 365 183 10547 34 413"),
        (LLAMA_8B, "475 36.0 0.53 648 324 19400 44 704"),
    ],
)
def test_the_table_of_the_reference_comes_out(model: ModelShape, row: str) -> None:
    work, limits = work_of(model, MAIN_SHAPE), limits_ms(model, MAIN_SHAPE, H200)
    found = (
        work.gemm_flop / 1e12,
        work.attention_flop / 1e12,
        work.head_flop / 1e12,
        limits["limit_ms"],
        limits["fp8_limit_ms"],
        limits["separate_limit_ms"],
        limits["elementwise_ms"],
        realistic_ms(work, H200, attention_tflops=620.0),
    )
    for number, printed in zip(found, row.split(), strict=True):
        # One unit of the last digit: the page halves and adds what it has rounded.
        unit = 10.0 ** -len(printed.partition(".")[2])
        assert number == pytest.approx(float(printed), rel=1e-4, abs=unit), row


def test_fp8_in_the_linear_layers_alone_lies_between_the_limits() -> None:
    limits = limits_ms(LLAMA_8B, MAIN_SHAPE, H200)
    assert limits["fp8_limit_ms"] < limits["fp8_linear_limit_ms"] < limits["limit_ms"]


def test_a_chip_without_fp8_has_no_fp8_limit() -> None:
    ceilings = Ceilings(matmul_tflops=300.0, fp8_tflops=None, copy_tb_s=1.5)
    assert "fp8_limit_ms" not in limits_ms(QWEN3_06B, MAIN_SHAPE, ceilings)


@pytest.mark.parametrize("packed", [True, False])
def test_pairs_are_those_that_a_mask_would_count(packed: bool) -> None:
    shape = PassShape(prefix_tokens=5, num_candidates=3, candidate_tokens=4)
    one = sum(range(1, 10))
    prefix = sum(range(1, 6))
    expected = prefix + 3 * (one - prefix) if packed else 3 * one
    assert visible_pairs(shape, packed=packed) == expected


def test_the_backward_pass_is_two_and_a_half_forward_passes() -> None:
    forward = attention_flop(QWEN3_06B.heads, MAIN_SHAPE)
    assert attention_flop(QWEN3_06B.heads, MAIN_SHAPE, backward=True) == 2.5 * forward


@pytest.mark.parametrize("model", [QWEN3_06B, QWEN3_4B, LLAMA_1B, LLAMA_8B])
def test_the_published_shapes_have_the_published_numbers_of_parameters(model: ModelShape) -> None:
    import torch

    network = build_network(model, device="meta", dtype=torch.bfloat16)
    count = sum(weight.numel() for weight in network.parameters())
    published = {"Qwen3-0.6B": 596_049_920, "Qwen3-4B": 4_022_468_096}
    published |= {"Llama-3.2-1B": 1_235_814_400, "Llama-3.1-8B": 8_030_261_248}
    assert count == published[model.name]
    assert {weight.dtype for weight in network.parameters()} == {torch.bfloat16}
