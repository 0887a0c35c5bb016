"""Values become words: text, lists, counts, shares, percentiles, ages and numbers in buckets.

Numbers are put into buckets before they are spelled, so that a model meets the same few words
often instead of every number once.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rankonce.errors import RequestError

# Exact while they are small and then the 1-2-5 series, as people round.
COUNT_BUCKETS = (
    *range(11), 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700,
    1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 1_000_000,
)  # fmt: skip
_AGES = ((31_536_000, "year"), (2_592_000, "month"), (604_800, "week"), (86_400, "day"),
         (3_600, "hour"), (60, "minute"))  # fmt: skip


class FieldSpec(BaseModel):
    """How one field of a task is read and spelled.

    Attributes:
        type: ``text`` as it is, ``list`` joined by commas, ``count`` rounded down to a bucket,
            ``share`` (0..1) as a percentage, ``percentile`` (0..100) as "top 5 %", ``age`` in
            seconds as "2 days ago", ``number`` as the word of its bucket.
        required: an item without it is refused.
        buckets: ascending lower bounds; a value takes the last bound that it reaches. For a
            ``share`` the bounds are shares; without any, it is rounded to steps.
        step: bucket width of a ``share`` without buckets.
        words: one word a bucket, for ``number``: one more than there are buckets.
        impute_from: another field of the same part whose value stands in when this one is missing.
        description: what the field means, for people.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["text", "list", "count", "share", "percentile", "age", "number"] = "text"
    required: bool = False
    buckets: tuple[float, ...] = ()
    step: Annotated[float, Field(ge=0.01, le=0.5)] = 0.05
    words: tuple[str, ...] = ()
    impute_from: str | None = None
    description: str = ""

    @model_validator(mode="after")
    def _check_buckets(self) -> "FieldSpec":
        if list(self.buckets) != sorted(set(self.buckets)):
            raise ValueError("buckets should ascend without repeats")
        if self.type == "number" and len(self.words) != len(self.buckets) + 1:
            raise ValueError("words should hold one word more than there are buckets")
        if any(not word or word[0].isspace() for word in self.words):
            raise ValueError("words should not be empty or begin with white space")
        if self.words and self.type != "number":
            raise ValueError(f"words belong to type number, not {self.type}")
        if self.buckets and self.type in ("text", "list", "age"):
            raise ValueError(f"buckets do not belong to type {self.type}")
        return self


def spell(value: Any, spec: FieldSpec, *, path: str) -> str:
    """Turn a value into words.

    Args:
        path: where the value stands in the request, for the error.

    Raises:
        RequestError: the value is not what the field's type takes.
    """
    return _SPELLERS[spec.type](value, spec, path)


def spell_age(seconds: float) -> str:
    """Say how long ago something was, in the largest whole unit: ``2 days ago``."""
    for unit_seconds, unit in _AGES:
        if seconds >= unit_seconds:
            count = int(seconds // unit_seconds)
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"


def _text(value: Any, spec: FieldSpec, path: str) -> str:
    if isinstance(value, list | bool) or value is None:
        raise RequestError(f"{path}: should be text, is {type(value).__name__}")
    # One line a value: text from outside cannot open a line of its own in the prompt.
    text = " ".join(str(value).split())
    if not text:
        raise RequestError(f"{path}: should be text, is empty")
    return text


def _list(value: Any, spec: FieldSpec, path: str) -> str:
    parts = value if isinstance(value, list) else [value]
    return ", ".join(_text(part, spec, path) for part in parts) if parts else "none"


def _number(value: Any, path: str, low: float = -math.inf, high: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RequestError(f"{path}: should be a number, is {value!r}")
    if not low <= value <= high:
        raise RequestError(f"{path}: should lie between {low:g} and {high:g}, is {value:g}")
    return float(value)


def _bucket(value: float, bounds: tuple[float, ...]) -> float:
    return bounds[max(0, bisect_right(bounds, value) - 1)]


def _count(value: Any, spec: FieldSpec, path: str) -> str:
    bound = _bucket(_number(value, path, low=0), spec.buckets or COUNT_BUCKETS)
    return f"{bound:.0f}"


def _share(value: Any, spec: FieldSpec, path: str) -> str:
    share = _number(value, path, low=0, high=1)
    rounded = _bucket(share, spec.buckets) if spec.buckets else round(share / spec.step) * spec.step
    return f"{100 * min(rounded, 1.0):.0f} %"


def _percentile(value: Any, spec: FieldSpec, path: str) -> str:
    percentile = _number(value, path, low=0, high=100)
    top = 100 - _bucket(percentile, spec.buckets or (0, 25, 50, 75, 90, 95, 99))
    return "bottom quarter" if top == 100 and not spec.buckets else f"top {top:.0f} %"


def _age(value: Any, spec: FieldSpec, path: str) -> str:
    return spell_age(_number(value, path, low=0))


def _words(value: Any, spec: FieldSpec, path: str) -> str:
    return spec.words[bisect_right(spec.buckets, _number(value, path))]


_SPELLERS: dict[str, Callable[[Any, FieldSpec, str], str]] = {
    "text": _text,
    "list": _list,
    "count": _count,
    "share": _share,
    "percentile": _percentile,
    "age": _age,
    "number": _words,
}
