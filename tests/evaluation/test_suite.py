"""The suite measures what it says: floor, ceiling and arms, without a glance at the answers."""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from rankonce.errors import DataError
from rankonce.evaluation.metrics import auc
from rankonce.evaluation.suite import run_suite
from rankonce.evaluation.suite_arms import (
    InapplicableArmError,
    make_arms,
    newest_events,
    title_field,
)
from rankonce.evaluation.suite_baselines import popularity
from rankonce.evaluation.suite_data import (
    SuiteRequest,
    TaskRequests,
    TimeCut,
    example_loaders,
    library_loaders,
)
from rankonce.evaluation.suite_metrics import (
    Scores,
    bucket_rows,
    estimate_all,
    read_rows,
    reliability,
    scores_of,
    weighted_concordance,
)
from rankonce.evaluation.suite_report import long_table, render_suite, write_suite
from rankonce.evaluation.suite_results import (
    BASE,
    CEILING,
    FLOOR,
    RANKER,
    SuiteConfig,
    SuiteReport,
)
from rankonce.model.loading import LoadedModel
from rankonce.prompts.tasks import Task, library_tasks
from rankonce.ranker import Ranker
from rankonce.records import (
    CandidateScore,
    Event,
    HistoryReport,
    Item,
    ScoreRequest,
    ScoreResult,
    TokenUsage,
    TrainingExample,
)
from rankonce.training.checkpoint import trained_tasks
from tests.conftest import data_folder

# Two domains; yes or no, three labels and grades; with a history and without.
TASKS = ("product-rating", "product-similar", "song-next", "song-like")
SMALL = SuiteConfig(num_resamples=20, examples=(2, 5), history=(0, 3))
by_task = pytest.mark.parametrize("name", TASKS)


@cache
def requests_of(name: str) -> TaskRequests:
    loaders, _ = library_loaders(None, TimeCut(limit=12))
    return loaders[name]()


class FormulaScorer:
    """Scores with a function of request and candidate: P(label) by the label's name."""

    def __init__(self, formula: Callable[[ScoreRequest, int], Mapping[str, float]]) -> None:
        self.tasks = library_tasks()
        self.formula = formula
        self.num_scored = 0

    def score_many(
        self, requests: Iterable[ScoreRequest], *, progress: bool = True
    ) -> Iterator[ScoreResult]:
        for request in requests:
            self.num_scored += 1
            yield self._score(request, self.tasks[request.task])

    def _score(self, request: ScoreRequest, task: Task) -> ScoreResult:
        found = [self.formula(request, place) for place in range(len(request.candidates))]
        log_probs = [{name: math.log(p) for name, p in one.items()} for one in found]
        return ScoreResult(
            id=request.id,
            task=task.name,
            candidates=tuple(
                CandidateScore(id=None, log_probs=one, value=task.ranking_value(one), rank=1)
                for one in log_probs
            ),
            history=HistoryReport(policy="none", num_events=0, num_kept=len(request.history)),
            usage=TokenUsage(
                prompt_tokens=10, computed_tokens=10, cached_tokens=0, separate_tokens=20
            ),
            distinct_score_ratio=1.0,
        )


def say(task: Task, share: float) -> dict[str, float]:
    """Give the label that a task ranks by a probability, and the others the rest."""
    best = task.label_names.index(task.ranking.label or task.label_names[-1])
    rest = (1 - share) / (len(task.labels) - 1)
    return {name: share if i == best else rest for i, name in enumerate(task.label_names)}


def measure(scorer: Any, *names: str, **options: Any) -> SuiteReport:
    loaders: dict[str, Any] = {name: (lambda name=name: requests_of(name)) for name in names}
    return run_suite(
        scorer,
        {**loaders, **options.pop("loaders", {})},
        model="a model",
        trained_on=options.pop("trained_on", None),
        config=options.pop("config", SMALL),
        progress=False,
        **options,
    )


# Floor and ceiling


def test_a_ranker_that_knows_the_truth_reaches_the_ceiling() -> None:
    truths = {one.example.request.id: one.truth for n in TASKS for one in requests_of(n).later}

    def know(request: ScoreRequest, place: int) -> Mapping[str, float]:
        return (truths[request.id] or ())[place]

    report = measure(FormulaScorer(know), *TASKS)
    for task in report.tasks:
        assert not task.failure
        for metric, ceiling in task.rankers[CEILING].items():
            reached = task.rankers[RANKER][metric]
            assert reached.value == pytest.approx(ceiling.value, abs=1e-9)
            assert reached.standard_error == pytest.approx(ceiling.standard_error, abs=1e-9)
        assert task.reach == pytest.approx(1)
        # The simulator plants taste, so that popularity alone is no match for it.
        assert task.rankers[FLOOR][task.main].value < task.rankers[CEILING][task.main].value


@by_task
def test_the_floor_counts_labels_of_earlier_requests_alone(name: str) -> None:
    task, data = library_tasks()[name], requests_of(name)
    guessed = popularity(task, data.earlier, data.later)
    turned = [
        replace(one, example=replace(one.example, labels=one.example.labels[::-1]))
        for one in data.later
    ]
    assert popularity(task, data.earlier, turned) == guessed
    counts = dict.fromkeys(task.label_names, 0)
    seen: dict[str | None, dict[str, int]] = {}
    for one in data.earlier:
        for item, label in zip(one.example.request.candidates, one.example.labels, strict=True):
            counts[str(label)] += 1
            seen.setdefault(item.id, dict.fromkeys(task.label_names, 0))[str(label)] += 1
    total = sum(counts.values()) + len(counts)
    for one, guesses in zip(data.later, guessed, strict=True):
        for item, guess in zip(one.example.request.candidates, guesses, strict=True):
            own = seen.get(item.id, dict.fromkeys(task.label_names, 0))
            for label, share in guess.items():
                expected = own[label] + 4 * (counts[label] + 1) / total
                assert share == pytest.approx(expected / (sum(own.values()) + 4))


def test_a_ranker_of_the_label_shares_has_a_normalised_entropy_of_one() -> None:
    def shares_of(name: str) -> dict[str, float]:
        labels = [str(x) for one in requests_of(name).later for x in one.example.labels]
        return {k: labels.count(k) / len(labels) for k in library_tasks()[name].label_names}

    names = ("product-rating", "song-next")
    shares = {name: shares_of(name) for name in names}
    report = measure(FormulaScorer(lambda request, place: shares[request.task]), *names)
    for task in report.tasks:
        metrics = task.rankers[RANKER]
        assert metrics["normalised_entropy"].value == pytest.approx(1)
        assert metrics[task.main].value == 0.5
        assert task.label_shares == pytest.approx(shares[task.task])


# Arms


def stable_share(*parts: object) -> float:
    """A number between 0 and 1 that says nothing of taste but tells its parts apart."""
    return np.random.default_rng(list(repr(parts).encode())).uniform(0.05, 0.95)


def test_shuffled_titles_leave_a_title_blind_ranker_as_it_was_to_the_bit() -> None:
    tasks = library_tasks()

    def blind(request: ScoreRequest, place: int) -> dict[str, float]:
        task = tasks[request.task]
        title = title_field(task.candidate.lines)
        fields = request.candidates[place].fields
        rest = sorted((name, str(value)) for name, value in fields.items() if name != title)
        return say(task, stable_share(rest, len(request.history)))

    def reading(request: ScoreRequest, place: int) -> dict[str, float]:
        task = tasks[request.task]
        title = request.candidates[place].fields[str(title_field(task.candidate.lines))]
        return say(task, stable_share(title))

    for task in measure(FormulaScorer(blind), *TASKS).tasks:
        base, mixed = task.arm(BASE), task.arm("titles shuffled")
        assert base is not None
        assert mixed is not None
        assert mixed.metrics == base.metrics
        assert mixed.difference is not None
        assert (mixed.difference.value, mixed.difference.standard_error) == (0, 0)
    for task in measure(FormulaScorer(reading), *TASKS).tasks:
        mixed = task.arm("titles shuffled")
        assert mixed is not None
        assert mixed.difference is not None
        assert mixed.difference.value != 0


def changed(name: str, arm_name: str, data: TaskRequests | None = None) -> list[ScoreRequest]:
    (arm,) = (arm for arm in make_arms(examples=(2, 8)) if arm.name == arm_name)
    return arm.change(library_tasks()[name], data or requests_of(name))


@by_task
def test_shuffled_titles_are_renamed_the_same_way_everywhere(name: str) -> None:
    task = library_tasks()[name]
    candidate = str(title_field(task.candidate.lines))
    event = title_field(task.history.lines) if task.history else None
    renamed: dict[Any, set[Any]] = {}
    pairs = zip(requests_of(name).later, changed(name, "titles shuffled"), strict=True)
    for one, mixed in pairs:
        before = one.example.request
        assert (mixed.id, mixed.time, len(mixed.history)) == (
            before.id,
            before.time,
            len(before.history),
        )
        for old, new in zip(before.candidates, mixed.candidates, strict=True):
            renamed.setdefault(old.fields[candidate], set()).add(new.fields[candidate])
            assert {**old.fields, candidate: 0} == {**new.fields, candidate: 0}
        for old_event, new_event in zip(before.history, mixed.history, strict=True):
            old_fields, new_fields = old_event.item.fields, new_event.item.fields
            renamed.setdefault(old_fields[str(event)], set()).add(new_fields[str(event)])
            assert {**old_fields, event: 0} == {**new_fields, event: 0}
            assert (old_event.action, old_event.time) == (new_event.action, new_event.time)
    assert all(len(names) == 1 for names in renamed.values())
    targets = [next(iter(names)) for names in renamed.values()]
    assert sorted(targets) == sorted(renamed)
    assert all(old != new for old, new in zip(renamed, targets, strict=True))


def test_a_source_named_in_the_profile_is_renamed_with_its_item() -> None:
    data = requests_of("product-similar")
    title = str(title_field(library_tasks()["product-similar"].candidate.lines))
    renamed = {
        old.fields[title]: new.fields[title]
        for one, mixed in zip(
            data.later, changed("product-similar", "titles shuffled"), strict=True
        )
        for old, new in zip(one.example.request.candidates, mixed.candidates, strict=True)
    }
    named = 0
    for one, mixed in zip(data.later, changed("product-similar", "titles shuffled"), strict=True):
        source = one.example.request.profile["source_title"]
        named += source in renamed
        assert mixed.profile["source_title"] == renamed.get(source, source)
    assert named


@by_task
@pytest.mark.parametrize("count", [2, 8])
def test_in_context_examples_are_solved_candidates_of_earlier_requests(
    name: str, count: int
) -> None:
    data, task = requests_of(name), library_tasks()[name]
    solved: list[tuple[float, Item, str]] = [
        (float(one.example.request.time or 0), item, str(label))
        for one in data.earlier
        for item, label in zip(one.example.request.candidates, one.example.labels, strict=True)
    ]
    for one, shown in zip(data.later, changed(name, f"{count} examples"), strict=True):
        request = one.example.request
        assert replace(shown, examples=()) == request
        assert len(shown.examples) == count
        for example in shown.examples:
            times = [t for t, i, label in solved if (i, label) == (example.item, example.label)]
            assert times
            assert min(times) < float(request.time or 0)
        counts = [sum(x.label == label for x in shown.examples) for label in task.label_names]
        assert max(counts) - min(counts) <= 1
    few, many = changed(name, "2 examples"), changed(name, "8 examples")
    assert [one.examples for one in few] == [one.examples[:2] for one in many]
    assert len({repr(one.examples) for one in few}) == len(few)


@by_task
def test_no_arm_looks_at_the_labels_of_what_is_scored(name: str) -> None:
    data, task = requests_of(name), library_tasks()[name]
    other = [
        replace(
            one,
            truth=None,
            example=replace(one.example, labels=(task.label_names[0],) * len(one.example.labels)),
        )
        for one in data.later
    ]
    for arm in make_arms():
        try:
            requests = arm.change(task, data)
        except InapplicableArmError:
            continue
        assert arm.change(task, replace(data, later=other)) == requests


def test_examples_come_from_before_the_request_even_if_the_data_are_not_cut() -> None:
    data = requests_of("song-next")
    both = TaskRequests(source="", earlier=[*data.earlier, *data.later], later=data.later)
    times = {id(i): one.example.request.time for one in both.earlier for i in _items(one)}
    for shown in changed("song-next", "8 examples", both):
        for example in shown.examples:
            assert float(times[id(example.item)] or 0) < float(shown.time or 0)


def _items(one: SuiteRequest) -> Sequence[Item]:
    return one.example.request.candidates


def test_the_newest_events_stay_in_their_order() -> None:
    times = (5.0, 1.0, 5.0, 3.0)
    events = [Event(item=Item(fields={}), action=str(i), time=t) for i, t in enumerate(times)]
    assert [event.action for event in newest_events(events, 1)] == ["2"]
    assert [event.action for event in newest_events(events, 3)] == ["0", "2", "3"]
    assert newest_events(events, 0) == ()
    assert newest_events(events, 9) == tuple(events)


def test_a_request_that_an_arm_leaves_alone_is_not_scored_again() -> None:
    task, data = library_tasks()["song-next"], requests_of("song-next")
    scorer = FormulaScorer(lambda request, place: say(task, stable_share(place)))
    config = SuiteConfig(num_resamples=20, examples=(), titles=False, history=(0, 3, 10_000, None))
    report = measure(scorer, "song-next", config=config).tasks[0]
    # Requests carry 30 events as they are; the arms know of all.
    lengths = [len(one.whole_history) for one in data.later]
    assert max(lengths) > 100
    longer = [sum(length > kept for length in lengths) for kept in (0, 3, 30, 30)]
    assert scorer.num_scored == len(lengths) + sum(longer)
    kept = {arm.name: arm.events_kept for arm in report.arms}
    assert kept["0 events"] == 0
    assert kept["3 events"] == pytest.approx(np.mean([min(3, length) for length in lengths]))
    assert kept["10000 events"] == kept["all events"] == pytest.approx(np.mean(lengths))
    assert kept[BASE] == pytest.approx(np.mean([min(30, length) for length in lengths]))


@pytest.mark.parametrize("name", ["song-next", "song-release", "post-like"])
def test_as_many_events_stand_in_the_prompt_as_an_arm_says(
    load_random: Callable[[str], LoadedModel], name: str
) -> None:
    """Whatever the policies take: the 6 newest, 14 like the candidates, 24 of all actions."""
    ranker = Ranker(load_random("qwen3"))
    data = requests_of(name)
    # Of 60 events at the most, lest the prompts be long.
    some = [one for one in data.later if len(one.whole_history) > 40][:3]
    some = [replace(one, history=one.whole_history[-60:]) for one in some]
    data = replace(data, later=tuple(some))
    lengths = np.array([len(one.whole_history) for one in data.later])
    assert lengths.max() > 40
    config = SuiteConfig(num_resamples=20, examples=(), titles=False, history=(2, 40, None))
    report = measure(ranker, loaders={name: lambda: data}, config=config).tasks[0]
    kept = {arm.name: arm.events_kept for arm in report.arms}
    assert kept["2 events"] == np.minimum(lengths, 2).mean()
    assert kept["40 events"] == np.minimum(lengths, 40).mean()
    assert kept["all events"] == lengths.mean()
    assert kept[BASE] is not None
    assert kept[BASE] < lengths.mean()
    tokens = {arm.name: arm.prompt_tokens or 0.0 for arm in report.arms}
    assert tokens["2 events"] < tokens[BASE] < tokens["all events"]
    # The ranker is left as it was.
    assert ranker.tasks[name] == library_tasks()[name]


def test_an_arm_that_says_nothing_of_a_task_tells_why() -> None:
    task = library_tasks()["product-similar"]
    scorer = FormulaScorer(lambda request, place: say(task, 0.3))
    data = replace(requests_of("product-similar"), earlier=())
    report = measure(scorer, loaders={"product-similar": lambda: data}).tasks[0]
    reasons = {arm.name: arm.left_out for arm in report.arms}
    assert reasons["0 events"] in ("the task has no history", "no request has a history")
    assert reasons["2 examples"] == "only 0 solved candidates are earlier than a request"
    assert reasons[BASE] == reasons["titles shuffled"] == ""


# Sets of tasks and failures


def test_tasks_that_the_model_never_saw_are_t2() -> None:
    scorer = FormulaScorer(lambda request, place: say(library_tasks()[request.task], 0.3))
    groups = {
        trained: [task.group for task in measure(scorer, *TASKS[:3], trained_on=trained).tasks]
        for trained in (None, (), (TASKS[1], "movie-like"))
    }
    assert groups == {
        None: ["unknown"] * 3,
        (): ["T2"] * 3,
        (TASKS[1], "movie-like"): ["T2", "T1", "T2"],
    }


def test_the_run_record_names_the_tasks_of_training(tmp_path: Path) -> None:
    assert trained_tasks(tmp_path) is None
    record = tmp_path / "run.json"
    record.write_text(json.dumps({"tasks": {"movie-like": "0ab", "song-next": "1cd"}}))
    assert trained_tasks(tmp_path) == ("movie-like", "song-next")
    later = {"tasks": {"song-next": "1cd", "song-like": "2ef"}, "earlier_tasks": ["movie-like"]}
    record.write_text(json.dumps(later))
    assert trained_tasks(tmp_path) == ("song-next", "song-like", "movie-like")
    record.write_text(json.dumps({"recipe": "ml1m"}))
    assert trained_tasks(tmp_path) is None
    record.write_text("{")
    with pytest.raises(DataError, match=r"run.json: should be the record of a model"):
        trained_tasks(tmp_path)


def test_a_task_that_fails_does_not_cost_the_others() -> None:
    tasks = library_tasks()

    def formula(request: ScoreRequest, place: int) -> dict[str, float]:
        if request.task == "song-next":
            raise ZeroDivisionError
        return say(tasks[request.task], 0.3)

    def missing() -> TaskRequests:
        raise DataError("ratings: should have the columns rating")

    report = measure(
        FormulaScorer(formula), "song-next", "song-like", loaders={"movie-like": missing}
    )
    assert [(task.task, task.failure) for task in report.failures] == [
        ("song-next", "ZeroDivisionError"),
        ("movie-like", "ratings: should have the columns rating"),
    ]
    assert report.tasks[1].rankers[RANKER]["auc"].value == 0.5


def test_a_label_that_is_no_name_is_refused_by_its_place() -> None:
    request = ScoreRequest(task="movie-like", candidates=(Item(fields={"title": "Up"}),) * 2)
    for label in ("Maybe", {"Yes": 0.5, "No": 0.5}):
        example = TrainingExample(request=request, labels=("Yes", label))
        load = example_loaders([example], TimeCut(late_share=1))["movie-like"]
        with pytest.raises(
            DataError, match=r"labels\[1\]: should be one of Yes, No to be measured"
        ):
            read_rows(library_tasks()["movie-like"], load().later)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"examples": (0, 2)}, "examples: should be different numbers from 1"),
        ({"history": (5, 5)}, "history: should be different numbers from 0"),
        ({"history": (None, 5, None)}, r"history: should be .* are \['all', 5, 'all'\]"),
        ({"num_resamples": 1}, "num_resamples: should be at least 2"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        SuiteConfig(**options)


# Data


def dated(*times: float | None) -> list[SuiteRequest]:
    item = Item(fields={"title": "Up"})
    return [
        SuiteRequest(
            example=TrainingExample(
                request=ScoreRequest(task="movie-like", candidates=(item,), time=time, id=str(i)),
                labels=("Yes",),
            ),
            member=str(i),
        )
        for i, time in enumerate(times)
    ]


def ids(requests: Sequence[SuiteRequest]) -> list[str | None]:
    return [one.example.request.id for one in requests]


def test_what_is_scored_is_later_than_all_that_is_known() -> None:
    made = dated(5, 1, 3, 3, 2, 9, 4, 3)
    parts = TimeCut(late_share=0.3).cut(made, "x")
    assert ids(parts.earlier) == ["1", "4", "2", "3", "7"]
    assert ids(parts.later) == ["6", "0", "5"]
    # The three requests of one moment stay together.
    assert ids(TimeCut(late_share=0.4).cut(made, "x").earlier) == ["1", "4"]
    since = TimeCut(since=3.0).cut(made, "x")
    assert ids(since.earlier) == ["1", "4"]
    whole = TimeCut(late_share=1).cut(made, "x")
    assert (len(whole.earlier), len(whole.later)) == (0, 8)
    few = TimeCut(since=3.0, limit=3).cut(made, "x")
    assert ids(few.later) == ["2", "7", "5"]
    assert ids(few.earlier) == ids(since.earlier)


def test_requests_without_a_time_are_cut_by_their_order() -> None:
    parts = TimeCut(late_share=0.25).cut(dated(None, 7, None, 3, None), "x")
    assert (ids(parts.earlier), ids(parts.later)) == (["0", "1", "2"], ["3", "4"])
    with pytest.raises(DataError, match="since: x has requests without a time"):
        TimeCut(since=1.0).cut(dated(None), "x")


@by_task
def test_a_simulated_task_is_scored_in_the_simulators_test_time(name: str) -> None:
    data = requests_of(name)
    known = max(float(one.example.request.time or 0) for one in data.earlier)
    asked = min(float(one.example.request.time or 0) for one in data.later)
    # The valid part of the time, 9 days, lies between.
    assert asked - known > 8 * 86_400
    assert 0 < len(data.later) <= 12
    assert all(one.truth is not None for one in data.later)


def test_every_task_of_the_library_is_loaded_or_left_out_by_name() -> None:
    loaders, left_out = library_loaders(None, TimeCut())
    assert set(loaders) | set(left_out) == set(library_tasks())
    assert set(left_out) == {name for name in library_tasks() if name.startswith("movie-")} | {
        "similar-item"
    }
    assert all("needs ml-latest-small" in reason for reason in left_out.values())


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"data: .* should hold ratings.parquet"):
        library_loaders(tmp_path, TimeCut())


def test_films_and_judged_searches_are_found_in_a_folder_of_folders() -> None:
    folder = data_folder("ml-small").parent
    data_folder("cranfield")
    loaders, left_out = library_loaders(folder, TimeCut(limit=10))
    assert not left_out
    searches = loaders["search-relevance"]()
    assert searches.source == "cranfield"
    assert len(searches.later) == 10
    films = loaders["movie-search"]()
    assert films.source == "MovieLens latest-small"
    members = {one.member for one in (*films.earlier, *films.later)}
    assert 1 < len(members) < len(films.earlier)
    last = max(float(one.example.request.time or 0) for one in films.earlier)
    assert all(float(one.example.request.time or 0) > last for one in films.later)


# Metrics


def test_concordance_counts_pairs_of_one_request() -> None:
    random = np.random.default_rng(3)
    grades = random.integers(0, 4, 63).astype(float)
    values = random.normal(size=63).round(1)
    groups = random.integers(0, 9, 63)
    won = pairs = 0.0
    for i, j in permutations(range(63), 2):
        if groups[i] == groups[j] and grades[i] > grades[j]:
            pairs += 1
            won += 1.0 if values[i] > values[j] else 0.5 if values[i] == values[j] else 0.0
    measured = weighted_concordance(grades, values, groups)
    assert measured(np.ones(63)) == pytest.approx(won / pairs)
    one = groups == 4
    alone = weighted_concordance(grades[one] > 1, values[one], groups[one])(np.ones(one.sum()))
    assert alone == pytest.approx(auc(grades[one] > 1, values[one]))
    # Weights are those of members drawn several times.
    weights = np.where(groups < 3, 2.0, np.where(groups < 6, 0.0, 1.0))
    rows = np.repeat(np.arange(63), weights.astype(int))
    copies = np.concatenate([np.arange(int(w)) for w in weights])
    repeated = weighted_concordance(grades[rows], values[rows], groups[rows] * 10 + copies)
    assert measured(weights) == pytest.approx(repeated(np.ones(len(rows))))
    assert math.isnan(weighted_concordance(np.ones(3), np.ones(3), np.zeros(3, int))(np.ones(3)))


def test_graded_metrics_by_hand() -> None:
    task = library_tasks()["movie-rating"]
    made = [
        replace(
            dated(float(place))[0],
            member=str(place),
            example=TrainingExample(
                request=ScoreRequest(
                    task="movie-rating", candidates=(Item(fields={"title": "Up"}),) * 2
                ),
                labels=labels,
            ),
        )
        for place, labels in enumerate([("5", "1"), ("4", None), ("2", "4")])
    ]
    rows = read_rows(task, made)
    assert rows.requests_N.tolist() == [0, 0, 1, 2, 2]
    flat = {"1": 0.1, "2": 0.1, "3": 0.1, "4": 0.6, "5": 0.1}
    high = {"1": 0.1, "2": 0.1, "3": 0.1, "4": 0.1, "5": 0.6}
    scores = scores_of(rows, [[high, flat], [flat, high], [high, flat]])
    found = {k: v.value for k, v in estimate_all(rows, scores, num_resamples=20, seed=0).items()}
    assert found["concordance"] == 0.5
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["log_loss"] == pytest.approx(-(3 * math.log(0.6) + 2 * math.log(0.1)) / 5)
    shares = np.array([0.2, 0.2, 0.4, 0.2])
    assert found["normalised_entropy"] == pytest.approx(
        found["log_loss"] / -(shares @ np.log(shares))
    )
    second = (3 + 15 / math.log2(3)) / (15 + 3 / math.log2(3))
    assert found["ndcg@10"] == pytest.approx((1 + 1 + second) / 3)


def test_one_member_tells_nothing_of_the_spread() -> None:
    data = requests_of("song-next")
    task = library_tasks()["song-next"]
    rows = read_rows(task, [replace(one, member="one") for one in data.later])
    scores = scores_of(rows, popularity(task, data.earlier, data.later))
    for estimate in estimate_all(rows, scores, num_resamples=20, seed=0).values():
        assert not math.isnan(estimate.value)
        assert math.isnan(estimate.standard_error)


@by_task
def test_buckets_cut_the_rows_into_parts(name: str) -> None:
    data = requests_of(name)
    rows = read_rows(library_tasks()[name], data.later)
    kinds = bucket_rows(rows, data.later)
    assert "place in the list" in kinds
    for buckets in kinds.values():
        assert all(inside.sum() >= 20 for inside in buckets.values())
        for one, other in combinations(buckets.values(), 2):
            assert not (one & other).any()
    assert sum(kinds["place in the list"].values()).all()
    for bucket, low, high in (("0", 0, 0), ("1–5", 1, 5), ("6–10", 6, 10), (">100", 101, math.inf)):
        inside = kinds.get("events in the history", {}).get(bucket)
        if inside is not None:
            expected = (rows.histories_N >= low) & (rows.histories_N <= high)
            assert (inside == expected).all()


def test_reliability_puts_the_same_number_of_rows_into_bins() -> None:
    data = requests_of("song-next")
    rows = read_rows(library_tasks()["song-next"], data.later)
    share = np.linspace(0.9, 0.1, len(rows.labels_N))
    scores = Scores(probabilities_NL=np.stack([share, 1 - share], axis=1), values_N=share)
    bins = reliability(rows, scores)
    assert len(bins) == len(rows.labels_N) // 30
    assert sum(count for _, _, count in bins) == len(rows.labels_N)
    newest = slice(len(share) - bins[0][2], None)
    assert bins[0][:2] == pytest.approx((share[newest].mean(), (rows.labels_N[newest] == 0).mean()))


# The whole trip


@pytest.fixture(scope="module")
def measured(load_random: Callable[[str], LoadedModel]) -> SuiteReport:
    def broken() -> TaskRequests:
        raise DataError("a <b>fault</b> & more")

    return measure(
        Ranker(load_random("qwen3")),
        "song-next",
        "product-rating",
        loaders={"song-like": broken},
        trained_on=("song-next",),
        left_out={"movie-like": "needs films"},
    )


def test_the_suite_gives_the_scores_of_the_ranker(
    measured: SuiteReport, load_random: Callable[[str], LoadedModel]
) -> None:
    data = requests_of("song-next")
    asked = [one.example.request for one in data.later]
    results = list(Ranker(load_random("qwen3")).score_many(asked, progress=False))
    values = [c.value for one in results for c in one.candidates]
    labels = [label == "Yes" for one in data.later for label in one.example.labels]
    song = measured.tasks[0]
    assert song.rankers[RANKER]["auc"].value == pytest.approx(auc(labels, values), abs=1e-6)
    assert song.computed_tokens == sum(one.usage.computed_tokens for one in results)
    assert song.num_rows == len(values)
    base = song.arm(BASE)
    shown = song.arm("5 examples")
    assert base is not None
    assert shown is not None
    assert (shown.prompt_tokens or 0) > (base.prompt_tokens or 0)


def test_a_prompt_that_examples_make_too_long_leaves_the_arm_out(
    load_random: Callable[[str], LoadedModel],
) -> None:
    ranker = Ranker(load_random("qwen3"))
    asked = [one.example.request for one in requests_of("song-next").later]
    tokens = [ranker.prepare(replace(one, history=())).rendered.tokens for one in asked]
    ranker.renderer.max_prompt_tokens = max(
        len(one.prefix_ids) + max(map(len, one.segment_ids)) for one in tokens
    )
    task = measure(ranker, "song-next", config=replace(SMALL, titles=False)).tasks[0]
    assert not task.failure
    left_out = {arm.name: arm.left_out for arm in task.arms if arm.left_out}
    assert set(left_out) == {"2 examples", "5 examples"}
    assert re.match(r"examples: the prompt has \d+ tokens", left_out["2 examples"])


def test_every_number_stands_in_the_json_and_in_the_table(
    measured: SuiteReport, tmp_path: Path
) -> None:
    write_suite(tmp_path, measured)
    record = json.loads((tmp_path / "suite.json").read_text())
    table = pl.read_parquet(tmp_path / "suite.parquet")
    assert record["environment"]["python"]
    assert record["left_out"] == {"movie-like": "needs films"}
    for task, written in zip(measured.tasks, record["tasks"], strict=True):
        for arm in written["arms"]:
            for metric, estimate in arm["metrics"].items():
                found = table.filter(
                    (pl.col("task") == task.task)
                    & (pl.col("arm") == arm["name"])
                    & (pl.col("metric") == metric)
                    & (pl.col("ranker") == RANKER)
                    & (pl.col("bucket") == "all")
                )
                assert found["value"].to_list() == [estimate["value"]]
                assert found["standard_error"].to_list() == [estimate["standard_error"]]
    assert long_table(measured).equals(table)
    assert {"popularity", "trees", "truth"} < set(table["ranker"])
    assert table.filter(pl.col("bucket_kind") == "place in the list").height > 0


def test_the_page_needs_nothing_beside_itself(measured: SuiteReport, tmp_path: Path) -> None:
    write_suite(tmp_path, measured)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)=["'](?!#)[^"']*""", page)
    assert "@import" not in page
    assert "url(http" not in page
    assert "<script" not in page
    targets = set(re.findall(r'href="#([^"]+)"', page)) - set(re.findall(r'id="([^"]+)"', page))
    assert not targets
    assert page.count("<svg") == 5 + 2  # the overview's five, and one a measured task
    assert "a &lt;b&gt;fault&lt;/b&gt; &amp; more" in page
    assert "needs films" in page
    for task in measured.tasks[:2]:
        estimate = task.rankers[RANKER][task.main]
        assert f"{estimate.value:.3f}<small>±{estimate.standard_error:.3f}</small>" in page


def test_the_table_has_a_line_for_every_task(measured: SuiteReport) -> None:
    from rich.console import Console

    console = Console(width=300, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(render_suite(measured))
    text = captured.get()
    for task in measured.tasks:
        (line,) = (one for one in text.splitlines() if one.strip().startswith(task.task))
        assert ("failed" in line) == bool(task.failure)
        assert task.group in line
