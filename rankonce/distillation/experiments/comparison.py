"""Runs against a baseline on the same rows, and the rules that were written before."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from rankonce.distillation.experiments.declaration import Rule
from rankonce.errors import ExperimentError
from rankonce.evaluation.metrics import Estimate, resample, summarise
from rankonce.evaluation.weighted_metrics import METRICS, Floats

_COLUMNS = ("user_id", "label", "score")


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


class Comparer:
    """Compares runs by their files of user_id, label and score.

    The same members are drawn for every file, and each file's resamples are computed once.
    """

    def __init__(self, *, num_resamples: int = 2000) -> None:
        self._num_resamples = num_resamples
        # By file and metric: which rows it holds, and its resamples. The rows do not stay.
        self._known: dict[tuple[Path, str], tuple[str, Floats]] = {}

    def compare(
        self, run: str, against: str, scores: Mapping[tuple[str, str], Path], *, metric: str
    ) -> list[Comparison]:
        """Compare two runs at every setting that both finished, and over all of these.

        Args:
            scores: files by run and settings.
            metric: of the evaluation: auc, uauc, log_loss …

        Raises:
            ExperimentError: two files hold other rows.
        """
        settings = [one for name, one in scores if name == run and (against, one) in scores]
        pairs = [
            tuple(self.resample(scores[name, setting], metric) for name in (run, against))
            for setting in settings
        ]
        for setting, ((one, _), (other, _)) in zip(settings, pairs, strict=True):
            if one != other:
                raise ExperimentError(
                    f"compare: {run} and {against} should be measured on the same rows"
                    + (f" at {setting}" if setting else "")
                )
        differences = [first - second for (_, first), (_, second) in pairs]
        found = [
            _summarise(run, against, metric, setting, [difference])
            for setting, difference in zip(settings, differences, strict=True)
        ]
        if len(settings) > 1:
            found.append(_summarise(run, against, metric, "", differences))
        return found

    def resample(self, path: Path, metric: str) -> tuple[str, Floats]:
        """Give a digest of a file's rows, and the metric of these and of every draw of members."""
        if (path, metric) not in self._known:
            frame = _read(path)
            rows = frame.select("user_id", "label").hash_rows().to_numpy()
            weighted = METRICS[metric](frame["label"], frame["score"], frame["user_id"])
            self._known[path, metric] = (
                hashlib.sha256(rows.tobytes()).hexdigest(),
                resample(weighted, frame["user_id"], num_resamples=self._num_resamples),
            )
        return self._known[path, metric]


def _summarise(
    run: str, against: str, metric: str, settings: str, differences: Sequence[Floats]
) -> Comparison:
    value, *resampled = np.mean(differences, axis=0)
    narrow = summarise(value, resampled, middle=0.9)
    each = [one[0] for one in differences]
    return Comparison(
        run=run,
        against=against,
        metric=metric,
        settings=settings,
        estimate=summarise(value, resampled),
        low_90=narrow.low,
        high_90=narrow.high,
        spread=float(np.std(each, ddof=1)) if len(each) > 1 else None,
    )


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
