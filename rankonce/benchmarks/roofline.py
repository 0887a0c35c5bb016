"""The work of a pass and the time that a chip needs for it at least.

Only what the mask lets through is counted. W, the weights a token meets, is
layers · [D(H + 2G)K + HKD + 3DI]; the formulas are those of docs/kernels-results.md.
"""

from dataclasses import dataclass

from rankonce.benchmarks.workloads import HeadShape, ModelShape, PassShape
from rankonce.model import work


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What the chip was seen to reach; ``None`` where it cannot or was not measured.

    Attributes:
        matmul_tflops: dense product of random numbers in the dtype of the run (bf16 on a GPU).
        fp8_tflops: the same in FP8 with one scale a row.
        copy_tb_s: device-to-device copy, bytes read and bytes written.
    """

    matmul_tflops: float
    fp8_tflops: float | None
    copy_tb_s: float


@dataclass(frozen=True, kw_only=True)
class Work:
    """Work of one pass.

    Attributes:
        gemm_flop, attention_flop, head_flop: multiplications and additions.
        elementwise_bytes: read and written outside the products.
    """

    gemm_flop: float
    attention_flop: float
    head_flop: float
    elementwise_bytes: float

    @property
    def flop(self) -> float:
        """All of it."""
        return self.gemm_flop + self.attention_flop + self.head_flop


def visible_pairs(shape: PassShape, *, packed: bool = True) -> int:
    """Count the pairs of a token and a token that it sees."""
    prefix, count, length = shape.prefix_tokens, shape.num_candidates, shape.candidate_tokens
    if not packed:
        whole = shape.prompt_tokens
        return count * whole * (whole + 1) // 2
    return prefix * (prefix + 1) // 2 + count * (length * prefix + length * (length + 1) // 2)


def attention_flop(heads: HeadShape, shape: PassShape, *, backward: bool = False) -> float:
    """Count one layer's attention: two products forward, five backward."""
    forward = work.attention_flop(heads.queries, heads.size, visible_pairs(shape))
    return 2.5 * forward if backward else forward


def work_of(model: ModelShape, shape: PassShape, *, packed: bool = True) -> Work:
    """Count one pass, or N separate prompts."""
    tokens = shape.num_tokens if packed else shape.num_candidates * shape.prompt_tokens
    weights = sum(outputs * inputs for outputs, inputs in model.linear_shapes().values())
    heads = model.heads
    attention_numbers = 2 * (heads.queries + heads.groups) * heads.size
    elementwise = 8 * model.hidden_size + attention_numbers + 3 * model.intermediate_size
    pairs = visible_pairs(shape, packed=packed)
    layers = model.num_hidden_layers
    return Work(
        gemm_flop=work.product_flop(weights * layers, tokens),
        attention_flop=layers * work.attention_flop(heads.queries, heads.size, pairs),
        head_flop=work.product_flop(model.vocab_size * model.hidden_size, shape.num_candidates),
        elementwise_bytes=2.0 * elementwise * layers * tokens,
    )


def limits_ms(model: ModelShape, shape: PassShape, ceilings: Ceilings) -> dict[str, float]:
    """Return the least times of a pass.

    ``limit_ms`` is all FLOP at the dense ceiling, ``fp8_limit_ms`` at the FP8 ceiling;
    ``fp8_linear_limit_ms`` has only the linear layers in FP8, as our FP8 has them.
    """
    packed, separate = work_of(model, shape), work_of(model, shape, packed=False)

    def at(flop: float, tflops: float) -> float:
        return flop / tflops / 1e9

    limits = {
        "limit_ms": at(packed.flop, ceilings.matmul_tflops),
        "separate_limit_ms": at(separate.flop, ceilings.matmul_tflops),
        "elementwise_ms": packed.elementwise_bytes / ceilings.copy_tb_s / 1e9,
    }
    if ceilings.fp8_tflops is not None:
        rest = at(packed.attention_flop + packed.head_flop, ceilings.matmul_tflops)
        limits["fp8_limit_ms"] = at(packed.flop, ceilings.fp8_tflops)
        limits["fp8_linear_limit_ms"] = at(packed.gemm_flop, ceilings.fp8_tflops) + rest
    return limits


def realistic_ms(work: Work, ceilings: Ceilings, *, attention_tflops: float) -> float:
    """Return the time with attention at what good kernels reach and elementwise work apart."""
    products = (work.gemm_flop + work.head_flop) / ceilings.matmul_tflops
    attention = work.attention_flop / attention_tflops
    return (products + attention + work.elementwise_bytes / ceilings.copy_tb_s) / 1e9
