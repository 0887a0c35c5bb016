"""A platform whose truth is known: members with tastes, items with attributes, and what they do.

A member's utility of an item is the sum of the member's tastes for the item's attribute values, the
item's popularity and its freshness, and what a surface adds (a query, a source item, the hour).
The probability of every label is a known function of the utility and the position; labels are
drawn from it. Nothing else decides a label, so the truth's AUC is the best that any ranker reaches.

Shapes: R requests, C candidates of each, L labels, M members, N items, K attribute values.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rankonce.errors import DataError
from rankonce.prompts.features import Floats, Ints

DAY = 86_400
# Shares of the time that are train and valid; the rest is test.
_TRAIN, _VALID = 0.7, 0.15
# Requests whose weights over all items stand in memory at once.
_CHUNK = 1024
Split = Literal["train", "valid", "test"]
Labels = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """Something that items have and members like or do not.

    Attributes:
        weight: standard deviation of the tastes for one of its values.
        per_item: how many of the values an item has.
        parent: an earlier attribute; each of its values owns an equal block of these values, as a
            trade has its skills.
    """

    name: str
    values: tuple[str, ...]
    weight: float = 1.0
    per_item: int = 1
    parent: str | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What may happen to a candidate: P(label) is a softmax of bias + slope x utility.

    Attributes:
        attention: how much a label loses with the position, one number a label.
        one_chosen: exactly one candidate of a request gets the first label, by a softmax over them.
    """

    labels: tuple[str, ...]
    slopes: tuple[float, ...]
    biases: tuple[float, ...]
    attention: tuple[float, ...]
    one_chosen: bool = False


def yes_or_no(bias: float, *, slope: float = 1.0, attention: float = 1.0) -> Outcome:
    """Yes with probability sigmoid(bias + slope x utility)."""
    return Outcome(
        labels=("Yes", "No"),
        slopes=(slope, 0.0),
        biases=(bias, 0.0),
        attention=(attention, 0.0),
    )


def choose_one() -> Outcome:
    """Yes for exactly one candidate of a request."""
    return Outcome(
        labels=("Yes", "No"),
        slopes=(1.0, 0.0),
        biases=(0.0, 0.0),
        attention=(1.0, 0.0),
        one_chosen=True,
    )


def graded(*labels: str, slope: float = 1.0) -> Outcome:
    """Grades in ascending order, the higher the larger the utility; no position matters."""
    places = np.arange(len(labels)) - (len(labels) - 1) / 2
    return Outcome(
        labels=labels,
        slopes=tuple((slope * places).tolist()),
        biases=tuple((-0.5 * places**2).tolist()),
        attention=(0.0,) * len(labels),
    )


@dataclass(frozen=True, kw_only=True)
class SimulatorConfig:
    """What a platform is like; every domain has its own with its attributes.

    Attributes:
        log: what members do with what the main surface shows them; histories and statistics come
            from there.
        num_requests: requests of the main surface.
        zipf: an item's exposure falls with its rank to this power.
        popularity_effect, freshness_effect: utility for one standard deviation of log popularity,
            and lost with the logarithm of the age in days.
        position_effect: what the first label loses when the position doubles.
        noise: part of the labels that are drawn blindly.
        late_share: members and items that come while the time runs.
    """

    attributes: tuple[Attribute, ...]
    log: Outcome
    seed: int = 0
    num_members: int = 400
    num_items: int = 600
    num_requests: int = 2000
    candidates_per_request: int = 10
    days: int = 60
    start: int = 1_700_000_000
    zipf: float = 1.0
    popularity_effect: float = 0.4
    freshness_effect: float = 0.0
    position_effect: float = 0.4
    noise: float = 0.05
    late_share: float = 0.25

    def __post_init__(self) -> None:
        early = int(self.num_items * (1 - self.late_share))
        if not 0 < self.candidates_per_request <= early:
            raise DataError(
                f"candidates_per_request: should be from 1 to {early}, the items of the first day"
            )


@dataclass(frozen=True, kw_only=True)
class World:
    """Members and items, drawn once.

    Attributes:
        values: for each attribute the codes of every item's values, N x ``per_item``.
        items_NK: one column a value of an attribute; an item's row has unit weight an attribute.
        tastes_MK: what members like.
        weights_N: exposure of the items, by Zipf's law.
        popularity_N: its logarithm with mean 0 and deviation 1.
        released_N, joined_M: seconds; before the start for most.
        activity_M: how often members come.
    """

    config: SimulatorConfig
    values: Mapping[str, Ints]
    items_NK: Floats
    tastes_MK: Floats
    weights_N: Floats
    popularity_N: Floats
    released_N: Ints
    joined_M: Ints
    activity_M: Floats

    @property
    def end(self) -> int:
        """The moment at which the simulation ends."""
        return self.config.start + self.config.days * DAY

    def attribute(self, name: str) -> Attribute:
        """Look an attribute up."""
        return next(a for a in self.config.attributes if a.name == name)

    def columns(self, name: str) -> slice:
        """The columns of an attribute in ``items_NK`` and ``tastes_MK``."""
        start = 0
        for attribute in self.config.attributes:
            end = start + len(attribute.values)
            if attribute.name == name:
                return slice(start, end)
            start = end
        raise KeyError(name)

    def words(self, name: str, item: int) -> list[str]:
        """The values that an item has of an attribute."""
        return [self.attribute(name).values[code] for code in self.values[name][item].tolist()]

    def favourites(self, name: str, count: int, *, within: Ints | None = None) -> Ints:
        """Codes of the values that each member likes best, M x ``count``.

        Args:
            within: for each member a code of the attribute's parent whose block is meant.
        """
        tastes = self.tastes_MK[:, self.columns(name)]
        if within is not None:
            parent = self.attribute(str(self.attribute(name).parent))
            block = tastes.shape[1] // len(parent.values)
            owner = np.arange(tastes.shape[1]) // block
            tastes = np.where(owner == within[:, None], tastes, -np.inf)
        return np.argsort(-tastes, axis=1, kind="stable")[:, :count]

    def taste_match(self, members_R: Ints, features: Floats) -> Floats:
        """Members' utility of feature rows, R x C from R x C x K."""
        match: Floats = np.einsum("rk,rck->rc", self.tastes_MK[members_R], features)
        return match

    def item_utility(self, members_R: Ints, times_R: Ints, items_RC: Ints) -> Floats:
        """Members' utility of items at a time, without what a surface adds."""
        age_days = np.maximum(0, times_R[:, None] - self.released_N[items_RC]) / DAY
        utility = self.taste_match(members_R, self.items_NK[items_RC])
        utility += self.config.popularity_effect * self.popularity_N[items_RC]
        utility -= self.config.freshness_effect * np.log1p(age_days)
        return utility


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a surface shows, in the order of time, before anybody acts.

    Attributes:
        members_R: who asks; -1 where it is no member.
        candidates_RC: items, or rows of a table of the surface's own; a column is a position.
        profile: one value a request for fields that belong to the surface.
        candidate: the same, one value a request and candidate.
    """

    members_R: Ints
    times_R: Ints
    candidates_RC: Ints
    utility_RC: Floats
    profile: Mapping[str, Any] = field(default_factory=dict)
    candidate: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Impressions:
    """A scene with what happened.

    Attributes:
        truth_RCL: the exact probability of every label.
        labels_RC: the label that was drawn, as its place in ``outcome.labels``.
    """

    scene: Scene
    outcome: Outcome
    truth_RCL: Floats
    labels_RC: Labels


def stream(config: SimulatorConfig, name: str) -> np.random.Generator:
    """Random numbers of one purpose: no other purpose changes them."""
    return np.random.default_rng([config.seed, zlib.crc32(name.encode())])


def build_world(config: SimulatorConfig) -> World:
    """Draw members and items."""
    random = stream(config, "world")
    num_members, num_items = config.num_members, config.num_items
    values: dict[str, Ints] = {}
    features, tastes = [], []
    for attribute in config.attributes:
        codes = _draw_values(attribute, config, values, random)
        values[attribute.name] = codes
        columns = np.zeros((num_items, len(attribute.values)))
        np.put_along_axis(columns, codes, 1 / np.sqrt(attribute.per_item), axis=1)
        features.append(columns)
        tastes.append(random.normal(0, attribute.weight, (num_members, len(attribute.values))))
    rank = random.permutation(num_items) + 1
    weights: Floats = rank.astype(np.float64) ** -config.zipf
    log_weights = np.log(weights)
    spread = float(log_weights.std()) or 1.0
    return World(
        config=config,
        values=values,
        items_NK=np.concatenate(features, axis=1),
        tastes_MK=np.concatenate(tastes, axis=1),
        weights_N=weights,
        popularity_N=(log_weights - log_weights.mean()) / spread,
        released_N=_arrivals(config, num_items, random),
        joined_M=_arrivals(config, num_members, random),
        activity_M=random.lognormal(0, 0.7, num_members),
    )


def _draw_values(
    attribute: Attribute,
    config: SimulatorConfig,
    values: Mapping[str, Ints],
    random: np.random.Generator,
) -> Ints:
    if attribute.parent is None:
        first, block = np.zeros((config.num_items, 1), dtype=np.int64), len(attribute.values)
    else:
        parent = next(a for a in config.attributes if a.name == attribute.parent)
        block = len(attribute.values) // len(parent.values)
        first = values[attribute.parent][:, :1] * block
    order = np.argsort(random.random((config.num_items, block)), axis=1)
    codes: Ints = first + order[:, : attribute.per_item]
    return codes


def _arrivals(config: SimulatorConfig, count: int, random: np.random.Generator) -> Ints:
    """Most come in the year before the start, the late ones evenly while the time runs."""
    num_late = int(count * config.late_share)
    moments = config.start - random.integers(1, 365 * DAY, count)
    late = random.permutation(count)[:num_late]
    moments[late] = config.start + random.integers(0, config.days * DAY, num_late)
    return moments


def draw_requests(world: World, name: str, count: int) -> tuple[Ints, Ints]:
    """Draw who comes and when, in the order of time; nobody comes before joining."""
    random = stream(world.config, f"{name} requests")
    times = np.sort(random.integers(world.config.start, world.end, count))
    weights = np.broadcast_to(world.activity_M, (1, len(world.activity_M)))
    members = _draw(random, weights, world.joined_M, times, 1)[:, 0]
    return members, times


def draw_one_item(world: World, name: str, times_R: Ints) -> Ints:
    """Draw an item for each request, as a source or what a query is after."""
    random = stream(world.config, f"{name} items")
    return _draw(random, world.weights_N[None], world.released_N, times_R, 1)[:, 0]


def draw_items(
    world: World, name: str, times_R: Ints, *, towards_RK: Floats | None = None, pull: float = 0.0
) -> Ints:
    """Draw what is shown, by popularity among what is out by then; popular items stand first.

    Args:
        towards_RK: features that the shown items tend to share, as those of a query's target.
        pull: log of how much more often an item is shown for one unit of shared features.
    """
    random = stream(world.config, f"{name} items")
    count = world.config.candidates_per_request
    if towards_RK is None:
        return _draw(random, world.weights_N[None], world.released_N, times_R, count)
    weights = world.weights_N * np.exp(pull * (towards_RK @ world.items_NK.T))
    return _draw(random, weights, world.released_N, times_R, count)


def draw_members(
    world: World, name: str, times_R: Ints, *, towards_RK: Floats, pull: float
) -> Ints:
    """Draw members who have joined by then, those sooner who like the features towards which."""
    random = stream(world.config, f"{name} members")
    weights = world.activity_M * np.exp(pull * (towards_RK @ world.tastes_MK.T))
    count = world.config.candidates_per_request
    return _draw(random, weights, world.joined_M, times_R, count)


def _draw(
    random: np.random.Generator, weights: Floats, since: Ints, times: Ints, count: int
) -> Ints:
    """Draw without replacement in proportion to weights, likelier ones first.

    The first of independent exponential clocks to ring is drawn in proportion to its rate.
    """
    drawn = np.empty((len(times), count), dtype=np.int64)
    for start in range(0, len(times), _CHUNK):
        rows = slice(start, start + _CHUNK)
        rates = weights if len(weights) == 1 else weights[rows]
        clocks = random.standard_exponential((len(times[rows]), len(since))) / rates
        clocks[since > times[rows, None]] = np.inf
        first = np.argpartition(clocks, count - 1, axis=1)[:, :count]
        order = np.argsort(np.take_along_axis(clocks, first, axis=1), axis=1)
        drawn[rows] = np.take_along_axis(first, order, axis=1)
    return drawn


def act(world: World, name: str, scene: Scene, outcome: Outcome) -> Impressions:
    """Draw what members do with what they are shown."""
    random = stream(world.config, f"{name} labels")
    truth = label_probabilities(world.config, outcome, scene.utility_RC)
    if outcome.one_chosen:
        bounds = np.cumsum(truth[..., 0], axis=1)
        chosen = (random.random((len(bounds), 1)) * bounds[:, -1:] >= bounds).sum(axis=1)
        labels = np.ones(scene.candidates_RC.shape, dtype=np.int64)
        labels[np.arange(len(labels)), chosen] = 0
    else:
        bounds = np.cumsum(truth, axis=2)[..., :-1]
        labels = (random.random((*scene.candidates_RC.shape, 1)) >= bounds).sum(axis=2)
    return Impressions(scene=scene, outcome=outcome, truth_RCL=truth, labels_RC=labels)


def label_probabilities(config: SimulatorConfig, outcome: Outcome, utility_RC: Floats) -> Floats:
    """The exact probability of every label, R x C x L."""
    lost = config.position_effect * np.log2(1 + np.arange(utility_RC.shape[1]))
    logits = np.array(outcome.biases) + np.array(outcome.slopes) * utility_RC[..., None]
    logits -= np.array(outcome.attention) * lost[:, None]
    blind = 1 / len(outcome.labels)
    if outcome.one_chosen:
        logits, blind = logits[..., :1], 1 / utility_RC.shape[1]
    axis = 1 if outcome.one_chosen else 2
    odds = np.exp(logits - logits.max(axis=axis, keepdims=True))
    truth: Floats = odds / odds.sum(axis=axis, keepdims=True)
    truth = (1 - config.noise) * truth + config.noise * blind
    return np.concatenate([truth, 1 - truth], axis=2) if outcome.one_chosen else truth


def simulate_log(world: World) -> Impressions:
    """The main surface: what members are shown and do while the time runs."""
    members, times = draw_requests(world, "log", world.config.num_requests)
    items = draw_items(world, "log", times)
    scene = Scene(
        members_R=members,
        times_R=times,
        candidates_RC=items,
        utility_RC=world.item_utility(members, times, items),
    )
    return act(world, "log", scene, world.config.log)


def split_of(config: SimulatorConfig, time: float) -> Split:
    """Which part of the time a request belongs to."""
    share = (time - config.start) / (config.days * DAY)
    if share < _TRAIN:
        return "train"
    return "valid" if share < _TRAIN + _VALID else "test"
