"""Where the suite's requests come from: simulated platforms, films, judged searches, files.

Every source gives requests in the order of time. The later ones are scored; the earlier ones are
what was known by then: in-context examples and the popularity baseline come from them alone.
"""

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np

from rankonce.datasets.common_form import MANIFEST, Dataset, open_dataset
from rankonce.datasets.domains import SIMULATED, TASK_SOURCES, films, platform
from rankonce.datasets.domains.films import film_examples_by_member
from rankonce.datasets.domains.platform import Domain, Platform, build_platform
from rankonce.datasets.examples import make_examples_by_member
from rankonce.datasets.rating_examples import ExampleConfig, newest
from rankonce.datasets.sources import find_adapter, prepare_dataset
from rankonce.errors import DataError
from rankonce.records import Event, TrainingExample

# The part of the time that the simulator calls test.
_SIMULATED_TEST_SHARE = 0.15
_MOST_SIMULATED = 2000
_FILM_SET = "ml-latest-small"


@dataclass(frozen=True, kw_only=True)
class SuiteRequest:
    """A request whose answers are known, with what only the evaluation may see.

    Attributes:
        member: whose rows are drawn together by the bootstrap.
        history: all that the data hold of what the member did before, in the order of time; the
            request may carry less. ``None`` where it carries everything.
        truth: for every candidate the exact probability of each label, where a simulator knows it.
        is_new_member: the data hold nothing of the member before, where that is known.
        new_candidates: the same for every candidate.
    """

    example: TrainingExample
    member: str
    history: tuple[Event, ...] | None = None
    truth: tuple[Mapping[str, float], ...] | None = None
    is_new_member: bool | None = None
    new_candidates: tuple[bool, ...] | None = None

    @property
    def whole_history(self) -> tuple[Event, ...]:
        """Everything that the member did before."""
        return self.example.request.history if self.history is None else self.history


@dataclass(frozen=True, kw_only=True)
class TaskRequests:
    """The requests of a task, cut at a moment.

    Attributes:
        source: the data's name, for people.
        earlier: asked before the moment; never scored.
        later: what is scored.
    """

    source: str
    earlier: Sequence[SuiteRequest]
    later: Sequence[SuiteRequest]


@dataclass(frozen=True, kw_only=True)
class TimeCut:
    """What counts as later, and how many of it are scored.

    Attributes:
        late_share: the part of the requests, the newest, that is scored; simulators have their own
            test part of the time instead.
        since: score what was asked from this moment on (Unix seconds), in place of a share.
        limit: at most so many requests of a task are scored, spread evenly over the later time.
    """

    late_share: float = 0.15
    since: float | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.late_share <= 1:
            raise DataError(f"late_share: should lie in (0, 1], not {self.late_share}")
        if self.limit is not None and self.limit < 1:
            raise DataError(f"limit: should be at least 1, not {self.limit}")

    def cut(self, requests: Sequence[SuiteRequest], source: str) -> TaskRequests:
        """Cut requests by their times, or by their order where some have none.

        Requests of one moment are never on both sides.
        """
        times = [one.example.request.time for one in requests]
        dated = [time for time in times if time is not None]
        if len(dated) < len(times):
            if self.since is not None:
                raise DataError(f"since: {source} has requests without a time")
            first = len(requests) - math.ceil(self.late_share * len(requests))
            return self.keep(requests[:first], requests[first:], source)
        place = min(len(dated) - 1, int(len(dated) * (1 - self.late_share)))
        moment = sorted(dated)[place] if self.since is None else self.since
        ordered = sorted(requests, key=lambda one: float(one.example.request.time or 0.0))
        earlier = [one for one in ordered if float(one.example.request.time or 0.0) < moment]
        return self.keep(earlier, ordered[len(earlier) :], source)

    def keep(
        self, earlier: Sequence[SuiteRequest], later: Sequence[SuiteRequest], source: str
    ) -> TaskRequests:
        """Take as many of the later requests as are wanted."""
        if self.limit is not None and len(later) > self.limit:
            places = np.linspace(0, len(later) - 1, self.limit).round().astype(int).tolist()
            later = [later[place] for place in places]
        return TaskRequests(source=source, earlier=tuple(earlier), later=tuple(later))


# Reads the requests of one task when its turn comes.
Loader = Callable[[], TaskRequests]


def library_loaders(
    folder: Path | None, cut: TimeCut, *, seed: int = 0
) -> tuple[dict[str, Loader], dict[str, str]]:
    """Find the data of the library's tasks.

    Args:
        folder: holds MovieLens latest-small (as in ``datasets.ml_small``), Cranfield
            (qrels.parquet) or a folder that ``rankonce datasets`` made, itself or in its own
            folders.
        seed: of the films that stand beside those that members chose.

    Returns:
        What reads each task, and for every other task why it is left out.
    """
    loaders: dict[str, Loader] = {}
    left_out: dict[str, str] = {}
    domains = {domain.name: domain for domain in SIMULATED}
    # Simulated when first wanted, once for all tasks of the domain.
    platform_of = cache(lambda name: build_platform(domains[name]))
    found = _find_folders(folder)
    for task, source in TASK_SOURCES.items():
        if isinstance(source, Domain):
            loaders[task] = partial(_load_simulated, platform_of, source.name, task, cut)
        elif "films" in found:
            loaders[task] = partial(_load_films, task, found["films"], cut, seed)
        else:
            left_out[task] = (
                f"needs {_FILM_SET}: rankonce datasets {_FILM_SET} --out FOLDER, then --data FOLDER"
            )
    if "cranfield" in found:
        loaders["search-relevance"] = partial(_load_cranfield, found["cranfield"], cut)
    if "prepared" in found:
        dataset = open_dataset(found["prepared"])
        for task in dataset.tasks:
            loaders[task] = partial(_load_dataset, dataset, task, cut)
            left_out.pop(task, None)
    return loaders, left_out


def example_loaders(examples: Iterable[TrainingExample], cut: TimeCut) -> dict[str, Loader]:
    """Group labelled requests by their task.

    The data name no members, so that every request counts as one of its own.
    """
    by_task: dict[str, list[SuiteRequest]] = {}
    for number, example in enumerate(examples):
        group = by_task.setdefault(example.request.task, [])
        group.append(SuiteRequest(example=example, member=f"request {number}"))
    return {task: partial(cut.cut, group, "files") for task, group in by_task.items()}


def _find_folders(folder: Path | None) -> dict[str, Path]:
    """Find the first folder of each kind."""
    if folder is None:
        return {}
    found: dict[str, Path] = {}
    for place in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        is_prepared = (place / MANIFEST).exists()
        is_film_set = is_prepared and open_dataset(place).name == _FILM_SET
        kinds = {
            "prepared": is_prepared and not is_film_set,
            "films": is_film_set or (place / "ratings.parquet").exists(),
            "cranfield": (place / "qrels.parquet").exists(),
        }
        for kind, is_one in kinds.items():
            if is_one:
                found.setdefault(kind, place)
    if not found:
        raise DataError(
            f"data: {folder} should hold ratings.parquet, qrels.parquet or {MANIFEST}, itself or "
            "in its folders"
        )
    return found


def _load_simulated(
    platform_of: Callable[[str], Platform], domain: str, task: str, cut: TimeCut
) -> TaskRequests:
    # More than the share asks for, since not every surface is visited evenly; never fewer than
    # the examples and the popularity of earlier requests can do with.
    wanted = max(300, math.ceil(1.5 * (cut.limit or _MOST_SIMULATED) / _SIMULATED_TEST_SHARE))
    parts: dict[str, list[SuiteRequest]] = {"train": [], "valid": [], "test": []}
    made = platform_of(domain).examples(task, min(_MOST_SIMULATED, wanted), max_events=None)
    for one in made:
        request_id = str(one.example.request.id)
        parts[one.split].append(
            SuiteRequest(
                example=_as_asked(one.example, platform.MAX_EVENTS),
                history=one.example.request.history,
                member=request_id if one.member < 0 else str(one.member),
                truth=one.truth,
                is_new_member=one.cold_member,
                new_candidates=one.cold_candidates,
            )
        )
    # The part between stays out of both, which leaves a gap in time.
    return cut.keep(parts["train"], parts["test"], f"simulator: {domain}")


def _load_films(task: str, folder: Path, cut: TimeCut, seed: int) -> TaskRequests:
    made = film_examples_by_member(task, folder, seed=seed, max_events=None)
    requests = [
        SuiteRequest(
            example=_as_asked(example, films.MAX_EVENTS),
            history=example.request.history,
            member=str(user),
        )
        for user, example in made
    ]
    return cut.cut(requests, "MovieLens latest-small")


def _load_cranfield(folder: Path, cut: TimeCut) -> TaskRequests:
    with tempfile.TemporaryDirectory() as work:
        dataset = prepare_dataset(find_adapter("cranfield"), Path(work), given=folder)
        return _load_dataset(dataset, "search-relevance", cut)


def _load_dataset(dataset: Dataset, task: str, cut: TimeCut) -> TaskRequests:
    most = ExampleConfig().max_history
    made = make_examples_by_member(dataset, task, ExampleConfig(max_history=None))
    requests = [
        SuiteRequest(
            example=_as_asked(example, films.MAX_EVENTS if task in films.FILM_TASKS else most),
            history=example.request.history,
            member=member,
        )
        for member, example in made
    ]
    return cut.cut(requests, dataset.name)


def _as_asked(example: TrainingExample, max_events: int | None) -> TrainingExample:
    """Carry as many events as the requests of recipes do."""
    request = example.request
    return replace(example, request=replace(request, history=newest(request.history, max_events)))
