"""A simulated platform as requests: what its log says of members and items goes into words."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from rankonce.datasets.domains.surfaces import Draw
from rankonce.datasets.simulator import (
    DAY,
    Impressions,
    Outcome,
    Scene,
    SimulatorConfig,
    Split,
    World,
    act,
    build_world,
    simulate_log,
    split_of,
)
from rankonce.datasets.statistics import statistics_from
from rankonce.prompts.features import (
    Floats,
    Ints,
    PastEvents,
    Questions,
    recency,
    smoothed_share,
    standing_percentile,
)
from rankonce.records import Event, Item, ScoreRequest, TrainingExample, Value

Fields = dict[str, Value]
# A share counts as if this many rows of the average had come before.
_STRENGTH = 4.0
# The newest events that a request carries.
MAX_EVENTS = 30


def names(*same: str, **other: str) -> dict[str, str]:
    """Fields of a task and what they are called here: the same, or as given."""
    return {**{name: name for name in same}, **other}


@dataclass(frozen=True, kw_only=True)
class Surface:
    """A task's place on a platform.

    ``profile`` and ``candidate`` map the task's fields to values: fields of the member or item, of
    the scene, or one of these, all of them of the past alone:

        profile    times_shown, times_taken, taken_share, since_joined, since_last_visit
        candidate  age, times_shown, times_taken, taken_share, percentile, member_share (part of
                   what the member was shown of this kind and took)

    Attributes:
        draw: makes the scene; ``None`` for the log's own.
        event: fields of the history's items; none, if the task takes no history.
        actions: the word for each label of the log that stands in a history.
        taken: labels of the log that statistics count.
        from_table: candidates are rows of the scene's own, whose fields it gives.
    """

    outcome: Outcome
    draw: Draw | None
    profile: Mapping[str, str]
    candidate: Mapping[str, str]
    event: Sequence[str] = ()
    actions: Mapping[str, str] = field(default_factory=dict)
    taken: Sequence[str] = ()
    from_table: bool = False


@dataclass(frozen=True, kw_only=True)
class Domain:
    """A kind of platform.

    Attributes:
        config: makes its configuration.
        kind: the attribute whose values are the kinds of items that statistics tell apart.
        item_fields, member_fields: the fields of every item and member, by their number.
        surfaces: by the name of the task.
    """

    name: str
    config: Callable[[], SimulatorConfig]
    kind: str
    item_fields: Callable[[World], list[Fields]]
    member_fields: Callable[[World], list[Fields]]
    surfaces: Mapping[str, Surface]


@dataclass(frozen=True, kw_only=True)
class SimulatedExample:
    """An example and what only the simulator knows.

    Attributes:
        truth: for every candidate the exact probability of each label.
        split: by the time of the request.
        member: who asks; -1 where it is no member.
        cold_member: the log has nothing of the member before the request.
        cold_candidates: for every candidate, whether the log has nothing of the item before.
    """

    example: TrainingExample
    truth: tuple[Mapping[str, float], ...]
    split: Split
    member: int
    cold_member: bool
    cold_candidates: tuple[bool, ...]


@dataclass(frozen=True)
class Platform:
    """A domain's world with the log of its main surface."""

    domain: Domain
    world: World
    log: Impressions

    @cached_property
    def items(self) -> list[Fields]:
        """The fields of every item."""
        return self.domain.item_fields(self.world)

    @cached_property
    def members(self) -> list[Fields]:
        """The fields of every member."""
        return self.domain.member_fields(self.world)

    def impressions(self, task: str, count: int) -> Impressions:
        """What a task's surface showed and what happened; the log's own has its own number."""
        surface = self.domain.surfaces[task]
        if surface.draw is None:
            return self.log
        scene = surface.draw(self.world, task, count)
        return act(self.world, task, scene, surface.outcome)

    def examples(
        self, task: str, count: int = 500, *, max_events: int | None = MAX_EVENTS
    ) -> Iterator[SimulatedExample]:
        """Make the examples of a task, in the order of time.

        Args:
            max_events: newest events of the member in each request; ``None`` is all of them.
        """
        surface = self.domain.surfaces[task]
        impressions = self.impressions(task, count)
        scene = impressions.scene
        profiles = self._profile_columns(surface, scene)
        candidates = self._candidate_columns(surface, scene)
        histories = _Histories(self, surface)
        known_member = profiles["times_shown"] > 0
        known_item = candidates["times_shown"] > 0
        labels, truths = impressions.labels_RC.tolist(), impressions.truth_RCL.tolist()
        label_names = surface.outcome.labels
        for row, (member, time) in enumerate(
            zip(scene.members_R.tolist(), scene.times_R.tolist(), strict=True)
        ):
            own = {} if member < 0 else self.members[member]
            profile = self._pick(surface.profile, own, profiles, scene.profile, row)
            items = tuple(
                Item(
                    id=f"{'row' if surface.from_table else 'item'}-{entry}",
                    fields=self._pick(
                        surface.candidate,
                        {} if surface.from_table else self.items[entry],
                        candidates,
                        scene.candidate,
                        (row, place),
                    ),
                )
                for place, entry in enumerate(scene.candidates_RC[row].tolist())
            )
            request = ScoreRequest(
                task=task,
                id=f"{task}-{row}",
                time=float(time),
                profile=profile,
                history=histories.before(member, time, max_events),
                candidates=items,
            )
            yield SimulatedExample(
                example=TrainingExample(
                    request=request, labels=tuple(label_names[code] for code in labels[row])
                ),
                truth=tuple(dict(zip(label_names, shares, strict=True)) for shares in truths[row]),
                split=split_of(self.world.config, time),
                member=member,
                cold_member=not known_member[row],
                cold_candidates=tuple((~known_item[row]).tolist()),
            )

    def _pick(
        self,
        wanted: Mapping[str, str],
        own: Fields,
        columns: Mapping[str, Any],
        scene: Mapping[str, Any],
        place: Any,
    ) -> Fields:
        """Collect fields from the scene, the statistics or the member or item itself."""
        picked: Fields = {}
        for name, source in wanted.items():
            value: Any
            if source in scene:
                value = self._scene_value(scene[source], place)
            elif source in columns:
                value = columns[source][place].item()
            else:
                value = own.get(source)
            if value is not None and value == value:
                picked[name] = value
        return picked

    def _scene_value(self, column: Any, place: Any) -> Any:
        if isinstance(column, tuple):
            _, name, items = column
            return self.items[items[place]].get(name)
        if isinstance(place, tuple):
            return column[place[0]][place[1]]
        return column[place]

    def _log_rows(self, taken: Sequence[str]) -> pl.DataFrame:
        scene, outcome = self.log.scene, self.log.outcome
        codes = [outcome.labels.index(name) for name in taken]
        per_request = scene.candidates_RC.shape[1]
        return pl.DataFrame(
            {
                "user_id": np.repeat(scene.members_R, per_request),
                "item_id": scene.candidates_RC.ravel(),
                "label": np.isin(self.log.labels_RC, codes).astype(np.int64).ravel(),
                "timestamp": np.repeat(scene.times_R, per_request),
            }
        )

    @cached_property
    def _kinds(self) -> dict[int, list[str]]:
        kind = self.domain.kind
        return {item: self.world.words(kind, item) for item in range(len(self.items))}

    def _profile_columns(self, surface: Surface, scene: Scene) -> dict[str, Floats]:
        rows = pl.DataFrame(
            {"user_id": scene.members_R, "item_id": 0, "timestamp": scene.times_R}
        ).with_columns(pl.col("item_id").cast(pl.Int64))
        past = statistics_from(self._log_rows(surface.taken), rows)
        shown, taken = (past[name].to_numpy() for name in ("user_count", "user_likes"))
        share = smoothed_share(
            taken, shown, prior=past["global_share"].to_numpy(), strength=_STRENGTH
        )
        return {
            "times_shown": shown,
            "times_taken": taken,
            "taken_share": np.where(shown > 0, share, np.nan),
            "since_joined": scene.times_R - self.world.joined_M[scene.members_R],
            "since_last_visit": self._since_last_visit(scene),
        }

    def _since_last_visit(self, scene: Scene) -> Floats:
        log = self.log.scene
        visits = PastEvents(
            members=log.members_R,
            items=log.members_R,
            moments=log.times_R,
            likes=np.ones_like(log.times_R),
        )
        asked = Questions(members=scene.members_R, items=scene.members_R, moments=scene.times_R)
        return recency(visits, asked)

    def _candidate_columns(self, surface: Surface, scene: Scene) -> dict[str, Floats]:
        shape = scene.candidates_RC.shape
        if surface.from_table:
            return {"times_shown": np.ones(shape)}
        rows = pl.DataFrame(
            {
                "user_id": np.repeat(scene.members_R, shape[1]),
                "item_id": scene.candidates_RC.ravel(),
                "timestamp": np.repeat(scene.times_R, shape[1]),
            }
        )
        past = statistics_from(self._log_rows(surface.taken), rows, genres_by_item=self._kinds)
        column = {name: past[name].to_numpy().reshape(shape) for name in past.columns}
        shown, kind = column["item_count"], np.nan_to_num(column["user_genre_count"])
        average = column["global_share"]
        share = smoothed_share(column["item_likes"], shown, prior=average, strength=_STRENGTH)
        own = smoothed_share(
            np.nan_to_num(column["user_genre_likes"]), kind, prior=average, strength=_STRENGTH
        )
        return {
            "age": scene.times_R[:, None] - self.world.released_N[scene.candidates_RC],
            "times_shown": shown,
            "times_taken": column["item_likes"],
            "taken_share": np.where(shown > 0, share, np.nan),
            "percentile": self._percentiles(scene),
            "member_share": np.where(kind > 0, own, np.nan),
        }

    def _percentiles(self, scene: Scene) -> Floats:
        """Popularity of every candidate when the day of its request began, R x C."""
        log, shape = self.log.scene, scene.candidates_RC.shape
        # The platform's days begin with it.
        start = self.world.config.start

        def flat(numbers_R: Ints, count: int) -> Ints:
            return np.repeat(numbers_R, count)

        shown = PastEvents(
            members=flat(log.members_R, log.candidates_RC.shape[1]),
            items=log.candidates_RC.ravel(),
            moments=flat(log.times_R - start, log.candidates_RC.shape[1]),
            likes=np.ones(log.candidates_RC.size, dtype=np.int64),
        )
        asked = Questions(
            members=flat(scene.members_R, shape[1]),
            items=scene.candidates_RC.ravel(),
            moments=flat(scene.times_R - start, shape[1]),
        )
        num_items = self.world.config.num_items
        ranks = standing_percentile(shown, asked, num_items=num_items, period_s=DAY)
        # On the first day nothing had been shown.
        return np.nan_to_num(ranks).reshape(shape)


class _Histories:
    """Events of the log by member, in the order of time."""

    def __init__(self, platform: Platform, surface: Surface) -> None:
        scene, outcome = platform.log.scene, platform.log.outcome
        words = [surface.actions.get(label) for label in outcome.labels]
        self._events: dict[int, tuple[list[int], list[Event]]] = {}
        if not surface.actions:
            return
        items = [
            Item(fields={name: fields[name] for name in surface.event if name in fields})
            for fields in platform.items
        ]
        written = np.isin(platform.log.labels_RC, [i for i, word in enumerate(words) if word])
        for row, place in np.argwhere(written).tolist():
            time = int(scene.times_R[row])
            times, events = self._events.setdefault(int(scene.members_R[row]), ([], []))
            times.append(time)
            action = str(words[platform.log.labels_RC[row, place]])
            item = items[scene.candidates_RC[row, place]]
            events.append(Event(item=item, action=action, time=float(time)))

    def before(self, member: int, time: int, max_events: int | None) -> tuple[Event, ...]:
        """The newest events strictly before a moment, oldest first."""
        times, events = self._events.get(member, ([], []))
        end = int(np.searchsorted(times, time)) if times else 0
        return tuple(events[0 if max_events is None else max(0, end - max_events) : end])


def build_platform(domain: Domain, config: SimulatorConfig | None = None) -> Platform:
    """Simulate a domain.

    Args:
        config: the domain's own by default.
    """
    world = build_world(domain.config() if config is None else config)
    return Platform(domain, world, simulate_log(world))
