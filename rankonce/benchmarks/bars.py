"""What the measurements must reach, evaluated from rows of results alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from rankonce.benchmarks.attention import FLEX, OPERATION, OURS
from rankonce.benchmarks.passes import BF16, BF16_GRAPH, FP8, FP8_GRAPH, PLAIN
from rankonce.benchmarks.results import FAILED, MEASURED, WRONG, Row
from rankonce.benchmarks.workloads import (
    LLAMA_8B,
    MAIN_SHAPE,
    MANY_SHORT_SHAPE,
    QWEN3_06B,
    SHORT_SHAPE,
    ModelShape,
    PassShape,
)

PASS, FAIL, UNKNOWN = "pass", "fail", "not measured"
_BF16_ARMS, _FP8_ARMS = (PLAIN, BF16, BF16_GRAPH), (FP8, FP8_GRAPH)


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar.

    Attributes:
        value: what was measured, in ``unit``; ``None`` where a part of it was not.
        at_least: whether more is better.
        broken: an arm of ours that the bar is about failed or was wrong.
    """

    name: str
    target: float
    value: float | None
    unit: str
    at_least: bool = True
    broken: bool = False

    @property
    def ratio(self) -> float | None:
        """How far the bar is cleared; 1 is just."""
        if not self.value:
            return None
        return self.value / self.target if self.at_least else self.target / self.value

    @property
    def verdict(self) -> str:
        """Pass, fail or not measured."""
        if self.ratio is None:
            return FAIL if self.broken else UNKNOWN
        return PASS if self.ratio >= 1 else FAIL


def evaluate(rows: Sequence[Row]) -> list[Bar]:
    """Evaluate every bar; of several heads the worst counts, of several arms of ours the best."""
    qwen_bf16, qwen_fp8 = (_fastest(rows, QWEN3_06B, arms) for arms in (_BF16_ARMS, _FP8_ARMS))
    llama_bf16, llama_fp8 = (_fastest(rows, LLAMA_8B, arms) for arms in (_BF16_ARMS, _FP8_ARMS))
    limit_ms = None if llama_bf16 is None else llama_bf16.details["limit_ms"]
    bf16_broken = _broken(rows, "pass", _BF16_ARMS)
    fp8_broken = _broken(rows, "pass", _FP8_ARMS)
    attention_broken = _broken(rows, OPERATION, (OURS,))

    def part_of_ceiling(shape: PassShape, target: float) -> Bar:
        ratios = [row.ratio for row in _attention(rows, shape, OURS).values() if row.ratio]
        return Bar(
            name=f"segment_attention forward, K=128, {shape.name}: part of the bf16 ceiling",
            target=target,
            value=min(ratios, default=None),
            unit="of the ceiling",
            broken=attention_broken,
        )

    def passes(model: ModelShape, row: Row | None, target: float, kind: str, broken: bool) -> Bar:
        return Bar(
            name=f"{model.name} {MAIN_SHAPE.name}, {kind}",
            target=target,
            value=None if row is None else row.median_ms,
            unit="ms",
            at_least=False,
            broken=broken,
        )

    return [
        part_of_ceiling(MAIN_SHAPE, 0.5),
        Bar(
            name=f"segment_attention forward, K=128, {MAIN_SHAPE.name}: FlexAttention's time",
            target=2.5,
            value=_speedup_over_flex(rows),
            unit="× ours",
            broken=attention_broken,
        ),
        part_of_ceiling(MANY_SHORT_SHAPE, 0.35),
        part_of_ceiling(SHORT_SHAPE, 0.35),
        passes(QWEN3_06B, qwen_bf16, 85.0, "bf16", bf16_broken),
        passes(QWEN3_06B, qwen_fp8, 60.0, "FP8", fp8_broken),
        Bar(
            name=f"{LLAMA_8B.name} {MAIN_SHAPE.name}, bf16",
            target=1.3,
            value=_divide(llama_bf16, limit_ms),
            unit="× its limit",
            at_least=False,
            broken=bf16_broken,
        ),
        Bar(
            name=f"{LLAMA_8B.name} {MAIN_SHAPE.name}: FP8 against bf16",
            target=1.4,
            value=_divide(llama_bf16, None if llama_fp8 is None else llama_fp8.median_ms),
            unit="× faster",
            broken=fp8_broken,
        ),
    ]


def render(bars: Sequence[Bar]) -> str:
    """Write the bars as a Markdown table."""
    lines = ["| bar | target | measured | cleared by | |", "| --- | ---: | ---: | ---: | --- |"]
    for bar in bars:
        sign = "≥" if bar.at_least else "≤"
        value = "–" if bar.value is None else f"{bar.value:.3g}"
        ratio = "–" if bar.ratio is None else f"{bar.ratio:.2f}"
        lines.append(
            f"| {bar.name} | {sign} {bar.target:g} {bar.unit} | {value} | {ratio} | {bar.verdict} |"
        )
    return "\n".join(lines)


def _attention(rows: Sequence[Row], shape: PassShape, arm: str) -> dict[str, Row]:
    """Return an arm's forward rows with heads of 128, by their heads."""
    return {
        row.subject: row
        for row in rows
        if row.operation == OPERATION
        and (row.direction, row.shape, row.arm) == ("forward", shape.name, arm)
        and row.subject.endswith("K=128")
        and row.status == MEASURED
    }


def _speedup_over_flex(rows: Sequence[Row]) -> float | None:
    ours, flex = (_attention(rows, MAIN_SHAPE, arm) for arm in (OURS, FLEX))
    pairs = [(flex[heads].best_ms, ours[heads].best_ms) for heads in ours if heads in flex]
    return min((theirs / own for theirs, own in pairs if theirs and own), default=None)


def _fastest(rows: Sequence[Row], model: ModelShape, arms: Sequence[str]) -> Row | None:
    found = [
        row
        for row in rows
        if (row.suite, row.subject, row.shape) == ("pass", model.name, MAIN_SHAPE.name)
        and row.arm in arms
        and row.status == MEASURED
    ]
    return min(found, key=lambda row: row.median_ms or 0.0, default=None)


def _broken(rows: Sequence[Row], operation: str, arms: Sequence[str]) -> bool:
    return any(
        row.operation == operation and row.arm in arms and row.status in (FAILED, WRONG)
        for row in rows
    )


def _divide(row: Row | None, by: float | None) -> float | None:
    return None if row is None or row.median_ms is None or not by else row.median_ms / by
