"""The suite: every task, as it is and in arms, measured in buckets, between floor and ceiling.

T1 is a task that the model was trained on, asked later in time; T2 one that it never saw. The floor
is how popular candidates were before, the ceiling a simulator's own probabilities. Boosted trees
over the prompt's own fields say what a table of them is worth.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Protocol

import numpy as np

from rankonce.errors import DataError, PromptTooLongError
from rankonce.evaluation.metrics import Estimate
from rankonce.evaluation.suite_arms import Arm, InapplicableArmError, make_arms
from rankonce.evaluation.suite_baselines import popularity, trees
from rankonce.evaluation.suite_data import Loader, TaskRequests
from rankonce.evaluation.suite_metrics import (
    Rows,
    Scores,
    bucket_rows,
    estimate_all,
    estimate_difference,
    estimate_main,
    main_metric,
    read_rows,
    reliability,
    scores_of,
)
from rankonce.evaluation.suite_results import (
    BASE,
    CEILING,
    FLOOR,
    RANKER,
    TREES,
    ArmReport,
    BucketReport,
    Group,
    SuiteConfig,
    SuiteReport,
    TaskReport,
)
from rankonce.prompts.tasks import Task, find_task
from rankonce.records import ScoreRequest, ScoreResult

logger = logging.getLogger(__name__)


class Scorer(Protocol):
    """What the suite needs of a ``Ranker``."""

    @property
    def tasks(self) -> MutableMapping[str, Task]:
        """The tasks it knows, by name; an arm may ask in another form of one."""

    def score_many(
        self, requests: Iterable[ScoreRequest], *, progress: bool = True
    ) -> Iterator[ScoreResult]:
        """Score requests in their order."""


def run_suite(
    scorer: Scorer,
    loaders: Mapping[str, Loader],
    *,
    model: str,
    trained_on: Iterable[str] | None,
    left_out: Mapping[str, str] | None = None,
    config: SuiteConfig | None = None,
    progress: bool = True,
) -> SuiteReport:
    """Measure a ranker on every task.

    A task that fails is reported with its reason, and the others go on.

    Args:
        loaders: read the requests of each task.
        model: its name, for the report.
        trained_on: tasks that the model was trained on; ``None`` where nothing says.
        left_out: tasks without data, with the reason.
        progress: show a bar on stderr, or a line a task where that is no terminal.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    config = config or SuiteConfig()
    known = None if trained_on is None else tuple(sorted(set(trained_on)))
    arms = make_arms(
        examples=config.examples, history=config.history, titles=config.titles, seed=config.seed
    )
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not (progress and console.is_terminal),
    )
    began = time.monotonic()
    reports = []
    with bar:
        row = bar.add_task("suite", total=len(loaders) * (1 + len(arms)))
        for place, (name, load) in enumerate(loaders.items()):
            group: Group = "unknown" if known is None else "T1" if name in known else "T2"

            def tell(done: str, name: str = name) -> None:
                bar.update(row, description=f"{name}: {done}", advance=1)

            bar.update(row, description=f"{name}: reading")
            started = time.monotonic()
            try:
                report = _Measurement(scorer, name, load(), config, tell).report(group, arms)
            except Exception as error:  # one task's fault must not cost the figures of the others
                logger.info("task %s failed", name, exc_info=True)
                reason = str(error) or type(error).__name__
                report = TaskReport(task=name, group=group, failure=reason)
            reports.append(report)
            bar.update(row, completed=(place + 1) * (1 + len(arms)))
            if progress and not console.is_terminal:
                took = time.monotonic() - started
                console.print(f"{place + 1} of {len(loaders)}, {name}: {took:.0f} s", markup=False)
    return SuiteReport(
        model=model,
        trained_on=known,
        config=config,
        tasks=tuple(reports),
        left_out=dict(left_out or {}),
        seconds=time.monotonic() - began,
    )


class _Measurement:
    """Scores and measures the requests of one task."""

    def __init__(
        self,
        scorer: Scorer,
        name: str,
        requests: TaskRequests,
        config: SuiteConfig,
        tell: Callable[[str], None],
    ) -> None:
        self.began = time.monotonic()
        if not requests.later:
            raise DataError(f"{name}: no request was asked late enough to be scored")
        self.task = find_task(name, scorer.tasks)
        self.scorer, self.requests, self.tell = scorer, requests, tell
        self.draws = {"num_resamples": config.num_resamples, "seed": config.seed}
        self.rows = read_rows(self.task, requests.later)
        self.asked = [one.example.request for one in requests.later]
        self.results = list(scorer.score_many(self.asked, progress=False))
        self.scores = _ranker_scores(self.rows, self.results)
        tell(BASE)

    def report(self, group: Group, arms: Sequence[Arm]) -> TaskReport:
        """Measure the requests as they are, in buckets and in arms."""
        rankers = self._rankers()
        base = self._arm_report(BASE, self.results, self.scores)
        measured = [base, *(self._measure_arm(arm) for arm in arms)]
        later = self.requests.later
        times = [one.example.request.time for one in later if one.example.request.time is not None]
        shares = np.bincount(self.rows.labels_N, minlength=len(self.task.label_names))
        return TaskReport(
            task=self.task.name,
            group=group,
            source=self.requests.source,
            main=main_metric(self.task),
            num_requests=len(later),
            num_members=len(set(self.rows.members_N.tolist())),
            num_rows=len(self.rows.labels_N),
            label_shares=dict(
                zip(self.task.label_names, (shares / shares.sum()).tolist(), strict=True)
            ),
            rankers={
                name: base.metrics if name == RANKER else self._estimate(scores)
                for name, scores in rankers.items()
            },
            distinct_score_ratio=float(np.mean([one.distinct_score_ratio for one in self.results])),
            arms=measured,
            buckets=self._measure_buckets(rankers),
            reliability=reliability(self.rows, self.scores),
            asked=(min(times), max(times)) if times else None,
            computed_tokens=sum(one.usage.computed_tokens for one in self.results),
            separate_tokens=sum(one.usage.separate_tokens for one in self.results),
            seconds=time.monotonic() - self.began,
        )

    def _rankers(self) -> dict[str, Scores]:
        earlier, later = self.requests.earlier, self.requests.later
        guessed = popularity(self.task, earlier, later)
        rankers = {RANKER: self.scores, FLOOR: scores_of(self.rows, guessed)}
        if (grown := trees(self.task, earlier, later)) is not None:
            rankers[TREES] = scores_of(self.rows, grown)
        truths = [one.truth for one in later if one.truth is not None]
        if len(truths) == len(later):
            rankers[CEILING] = scores_of(self.rows, truths)
        return rankers

    def _measure_arm(self, arm: Arm) -> ArmReport:
        try:
            requests = arm.change(self.task, self.requests)
            results = self._score_changed(requests, arm.ask(self.task))
        except InapplicableArmError as reason:
            return ArmReport(name=arm.name, family=arm.family, size=arm.size, left_out=str(reason))
        except PromptTooLongError as error:
            # What the arm adds does not fit this model; the task itself does.
            return ArmReport(name=arm.name, family=arm.family, size=arm.size, left_out=str(error))
        finally:
            self.tell(arm.name)
        scores = _ranker_scores(self.rows, results)
        return self._arm_report(arm.name, results, scores, arm)

    def _arm_report(
        self, name: str, results: Sequence[ScoreResult], scores: Scores, arm: Arm | None = None
    ) -> ArmReport:
        return ArmReport(
            name=name,
            family=None if arm is None else arm.family,
            size=None if arm is None else arm.size,
            metrics=self._estimate(scores),
            difference=(
                None
                if arm is None
                else estimate_difference(self.rows, scores, self.scores, **self.draws)
            ),
            events_kept=float(np.mean([one.history.num_kept for one in results])),
            prompt_tokens=float(np.mean([one.usage.prompt_tokens for one in results])),
        )

    def _measure_buckets(self, rankers: Mapping[str, Scores]) -> list[BucketReport]:
        found = []
        for kind, buckets in bucket_rows(self.rows, self.requests.later).items():
            for name, rows_N in buckets.items():
                part = self.rows.take(rows_N)
                estimates = {
                    ranker: estimate_main(part, scores.take(rows_N), **self.draws)
                    for ranker, scores in rankers.items()
                }
                found.append(
                    BucketReport(
                        kind=kind, name=name, num_rows=int(rows_N.sum()), estimates=estimates
                    )
                )
        return found

    def _estimate(self, scores: Scores) -> dict[str, Estimate]:
        return estimate_all(self.rows, scores, **self.draws)

    def _score_changed(self, requests: Sequence[ScoreRequest], task: Task) -> list[ScoreResult]:
        """Score requests; one whose prompt an arm has not changed keeps the result that it has."""
        changed = [
            i
            for i, request in enumerate(requests)
            if request != self.asked[i]
            or (task != self.task and self.results[i].history.num_kept < len(request.history))
        ]
        results = list(self.results)
        self.scorer.tasks[task.name] = task
        try:
            fresh = self.scorer.score_many([requests[i] for i in changed], progress=False)
            for place, result in zip(changed, fresh, strict=True):
                results[place] = result
        finally:
            self.scorer.tasks[task.name] = self.task
        return results


def _ranker_scores(rows: Rows, results: Sequence[ScoreResult]) -> Scores:
    names = rows.task.label_names
    scored = [
        results[number].candidates[place]
        for number, place in zip(rows.requests_N.tolist(), rows.places_N.tolist(), strict=True)
    ]
    log_probs = np.array([[one.log_probs[name] for name in names] for one in scored])
    return Scores(
        probabilities_NL=np.exp(log_probs), values_N=np.array([one.value for one in scored])
    )
