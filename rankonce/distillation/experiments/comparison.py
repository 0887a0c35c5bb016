"""Runs against a baseline on the same rows, and the rules that were written before."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from rankonce.distillation.experiments.plan import Rule
from rankonce.errors import ExperimentError
from rankonce.evaluation.metrics import Estimate, bootstrap
from rankonce.evaluation.weighted_metrics import METRICS, WeightedMetric

_COLUMNS = ("user_id", "label", "score")
_NUM_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A run minus another, the same members drawn for both.

    Attributes:
        settings: of the grid; empty where all settings are taken together: the mean of their
            differences, each resample drawing members for all of them.
        spread: standard deviation of the difference between the settings, where there are several.
        low_90, high_90: the middle 90 % of the resamples.
    """

    run: str
    against: str
    metric: str
    settings: str
    estimate: Estimate
    low_90: float
    high_90: float
    spread: float | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of a rule; ``holds`` is None where a run that it needs failed."""

    rule: Rule
    comparison: Comparison | None
    holds: bool | None


def compare_runs(
    run: str,
    against: str,
    scores: Mapping[tuple[str, str], Path],
    *,
    metric: str,
    num_resamples: int = _NUM_RESAMPLES,
) -> list[Comparison]:
    """Compare two runs at every setting that both finished, and over all of these.

    Args:
        scores: files of user_id, label and score by run and settings.
        metric: of the evaluation: auc, uauc, log_loss …

    Raises:
        ExperimentError: the metric is not known, or two files hold other rows.
    """
    if metric not in METRICS:
        raise ExperimentError(f"metric: should be one of {', '.join(METRICS)}, is {metric!r}")
    shared = [setting for name, setting in scores if name == run and (against, setting) in scores]
    if not shared:
        return []
    pairs: dict[str, tuple[WeightedMetric, WeightedMetric]] = {}
    members = labels = None
    for setting in shared:
        first, second = (_read(scores[name, setting]) for name in (run, against))
        for frame in (first, second):
            members = frame["user_id"] if members is None else members
            labels = frame["label"] if labels is None else labels
            if not (frame["user_id"].equals(members) and frame["label"].equals(labels)):
                raise ExperimentError(
                    f"compare: {run} and {against} should be measured on the same rows"
                )
        pairs[setting] = (
            METRICS[metric](first["label"], first["score"], first["user_id"]),
            METRICS[metric](second["label"], second["score"], second["user_id"]),
        )
    assert members is not None

    def difference(names: Sequence[str]) -> WeightedMetric:
        return lambda weights: float(
            np.mean([pairs[name][0](weights) - pairs[name][1](weights) for name in names])
        )

    groups = [(setting, [setting]) for setting in shared]
    if len(shared) > 1:
        groups.append(("", shared))
    found = []
    for setting, names in groups:
        estimates = [
            bootstrap(difference(names), members, num_resamples=num_resamples, middle=middle)
            for middle in (0.95, 0.9)
        ]
        each = [difference([name])(np.ones(len(members))) for name in names]
        found.append(
            Comparison(
                run=run,
                against=against,
                metric=metric,
                settings=setting,
                estimate=estimates[0],
                low_90=estimates[1].low,
                high_90=estimates[1].high,
                spread=float(np.std(each, ddof=1)) if len(each) > 1 else None,
            )
        )
    return found


def judge(rule: Rule, comparisons: Sequence[Comparison], *, num_settings: int) -> Verdict:
    """Apply a rule to the comparison over all settings.

    Args:
        num_settings: without all of them nothing is decided.
    """
    each = [one for one in comparisons if one.settings or num_settings == 1]
    if len(each) < num_settings:
        return Verdict(rule=rule, comparison=None, holds=None)
    whole = comparisons[-1]
    if rule.above is not None:
        holds = whole.estimate.low > rule.above
    else:
        assert rule.within is not None
        holds = -rule.within < whole.low_90 and whole.high_90 < rule.within
    return Verdict(rule=rule, comparison=whole, holds=bool(holds))


def _read(path: Path) -> pl.DataFrame:
    try:
        frame = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ExperimentError(f"{path}: cannot be read: {error}") from error
    if missing := [name for name in _COLUMNS if name not in frame.columns]:
        raise ExperimentError(f"{path}: should have the columns {', '.join(missing)}")
    return frame
