"""``python -m rankonce.benchmarks.scoring``: whole passes of models with random weights.

Ours with plain modules, accelerated, in FP8 and as graphs; beside them transformers with one prompt
a candidate and with the prefix cached. The limit of the shape stands in the same row.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from rankonce.benchmarks.passes import (
    BF16,
    BF16_GRAPH,
    FP8,
    FP8_GRAPH,
    PLAIN,
    PassInputs,
    draw_inputs,
    measure_accelerated,
    measure_compiled,
    measure_graph,
    measure_plain,
)
from rankonce.benchmarks.roofline import Ceilings
from rankonce.benchmarks.runner import Arm, Case, Measurement
from rankonce.benchmarks.separate import measure_cached_prefix, measure_separate
from rankonce.benchmarks.workloads import (
    LLAMA_8B,
    MAIN_SHAPE,
    MODELS,
    QWEN3_06B,
    SHAPES,
    SMALL_MODELS,
    SMALL_SHAPES,
    ModelShape,
    PassShape,
)


def pass_cases(
    ceilings: Callable[[], Ceilings], *, device: str, dtype: torch.dtype, small: bool
) -> list[Case]:
    """List the cases of whole passes; what the bars ask about first."""
    workloads: list[tuple[ModelShape, PassShape]] = []
    for model in SMALL_MODELS if small else MODELS:
        shapes: Sequence[PassShape] = SMALL_SHAPES if small else SHAPES
        if not small and model is not QWEN3_06B:
            shapes = [MAIN_SHAPE]
        workloads += [(model, shape) for shape in shapes]
    cases = []
    for model, shape in workloads:
        big = model.hidden_size >= 2560
        first = small or shape == MAIN_SHAPE
        essential = (
            _arm(PLAIN, measure_plain, 8),
            _arm(BF16, partial(measure_accelerated, None), 15),
            _arm(FP8, partial(measure_accelerated, "fp8"), 15, dtype="fp8"),
            _arm(BF16_GRAPH, partial(measure_graph, None), 10),
            _arm(FP8_GRAPH, partial(measure_graph, "fp8"), 10, dtype="fp8"),
        )
        peers = (
            _arm("transformers, prefix cached", measure_cached_prefix, 20 if big else 12),
            _arm("transformers, separate prompts", measure_separate, 15 if big else 8),
        )
        groups: list[tuple[tuple[Arm, ...], int]] = [
            (essential + peers, 10 if first and model in (QWEN3_06B, LLAMA_8B) else 45)
        ]
        compile_priority = 60 if first and model in (QWEN3_06B, LLAMA_8B) else 85
        groups.append(
            ((_arm("torch.compile, plain modules", measure_compiled, 45, 90),), compile_priority)
        )
        for arms, priority in groups:
            cases.append(
                Case(
                    suite="pass",
                    operation="pass",
                    direction="forward",
                    shape=shape.name,
                    subject=model.name,
                    dtype=str(dtype).removeprefix("torch."),
                    priority=priority + 5 * (not first),
                    prepare=partial(
                        draw_inputs, model, shape, ceilings, device=device, dtype=dtype
                    ),
                    arms=arms,
                    prepare_s=8.0 if big else 4.0,
                )
            )
    return cases


def _arm(
    name: str,
    measure: Callable[[PassInputs], Measurement],
    expected_s: float,
    limit_s: float = 60.0,
    dtype: str | None = None,
) -> Arm:
    return Arm(name=name, measure=measure, expected_s=expected_s, limit_s=limit_s, dtype=dtype)


if __name__ == "__main__":
    from rankonce.benchmarks.command import main

    raise SystemExit(main(("pass",)))
