"""What the surfaces of a platform show: a page of its own, search, similar items, messages, …

A surface's requests are its own; histories and statistics come from the log of the main surface, in
which its labels never stand.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from rankonce.datasets.simulator import (
    DAY,
    Scene,
    World,
    draw_items,
    draw_one_item,
    draw_requests,
    stream,
)
from rankonce.prompts.features import Floats, Ints

Draw = Callable[[World, str, int], Scene]
PARTS_OF_DAY = ("morning", "midday", "afternoon", "evening", "night")
# Utility of a message at the hour that a member likes best, and lost by each one of this week.
_HOUR_EFFECT, _FATIGUE = 1.0, 0.3


def home(world: World, name: str, count: int) -> Scene:
    """Items by popularity, for nothing in particular."""
    members, times = draw_requests(world, name, count)
    return _scene(world, members, times, draw_items(world, name, times))


def newcomers(world: World, name: str, count: int) -> Scene:
    """The page that a member sees on joining, before doing anything."""
    late = np.flatnonzero(world.joined_M >= world.config.start)
    members = stream(world.config, f"{name} requests").choice(late, count)
    members = members[np.argsort(world.joined_M[members], kind="stable")]
    times = world.joined_M[members]
    return _scene(world, members, times, draw_items(world, name, times))


def newest_items(world: World, name: str, count: int) -> Scene:
    """The items that came out last, of which little or nothing is known."""
    members, times = draw_requests(world, name, count)
    by_release = np.argsort(world.released_N, kind="stable")
    out = np.searchsorted(world.released_N[by_release], times, side="right")
    size = world.config.candidates_per_request
    newest = by_release[out[:, None] - 1 - np.arange(size)]
    items = stream(world.config, f"{name} items").permuted(newest, axis=1)
    return _scene(world, members, times, items)


def beside_source(
    *, weight: float, fields: Sequence[str], of: Sequence[str], personal: float = 1.0
) -> Draw:
    """Items on the page of a source item: the more they share with it, the better.

    Args:
        weight: utility of an item that shares every attribute.
        fields: fields of the source that the profile shows, as ``source_<field>``.
        of: the attributes that count.
        personal: how much of the member's taste comes to it.
    """

    def draw(world: World, name: str, count: int) -> Scene:
        members, times = draw_requests(world, name, count)
        sources = draw_one_item(world, f"{name} sources", times)
        towards = only(world, world.items_NK[sources], of)
        items = draw_items(world, name, times, towards_RK=towards, pull=2.5)
        # The page does not show its own item again.
        is_source = items == sources[:, None]
        spare = draw_items(world, f"{name} spare", times)
        taken = (spare[:, :, None] == items[:, None, :]).any(axis=2)
        taken |= spare == sources[:, None]
        first_free = spare[np.arange(count), np.argmin(taken, axis=1)]
        items = np.where(is_source & ~taken.all(axis=1)[:, None], first_free[:, None], items)
        scene = _scene(world, members, times, items)
        shared = np.einsum("rk,rck->rc", towards, world.items_NK[items]) / len(of)
        return replace(
            scene,
            utility_RC=personal * scene.utility_RC + weight * (shared - 0.4),
            profile={f"source_{field}": ("item", field, sources) for field in fields},
        )

    return draw


def for_query(
    *, parts: Sequence[str], weight: float, personal: float = 1.0, field: str = "query"
) -> Draw:
    """Items for a query that names some attribute values, the first of ``parts`` always.

    Args:
        weight: utility of an item that has all that the query names.
        personal: how much of the member's taste comes to it; 0 for judged relevance.
    """

    def draw(world: World, name: str, count: int) -> Scene:
        members, times = draw_requests(world, name, count)
        random = stream(world.config, f"{name} queries")
        targets = draw_one_item(world, f"{name} targets", times)
        asked = random.random((count, len(parts))) < 0.55
        asked[:, 0] = True
        towards = np.stack(
            [
                only(
                    world,
                    world.items_NK[target],
                    [p for p, on in zip(parts, row, strict=True) if on],
                )
                for target, row in zip(targets.tolist(), asked.tolist(), strict=True)
            ]
        )
        items = draw_items(world, name, times, towards_RK=towards, pull=1.8)
        met = np.einsum("rk,rck->rc", towards, world.items_NK[items]) / asked.sum(axis=1)[:, None]
        utility = personal * world.item_utility(members, times, items) + weight * (met - 0.5)
        queries = [
            query_text(world, target, [p for p, on in zip(parts, row, strict=True) if on])
            for target, row in zip(targets.tolist(), asked.tolist(), strict=True)
        ]
        return Scene(
            members_R=members,
            times_R=times,
            candidates_RC=items,
            utility_RC=utility,
            profile={field: queries},
        )

    return draw


def messages(world: World, name: str, count: int) -> Scene:
    """A message to a member's phone: the hour and the messages of the week matter as well."""
    members, times = draw_requests(world, name, count)
    scene = _scene(world, members, times, draw_items(world, name, times))
    random = stream(world.config, f"{name} messages")
    usual = random.integers(0, len(PARTS_OF_DAY), world.config.num_members)
    hours = (times % DAY) * 24 // DAY
    parts = np.select(
        [hours < 6, hours < 11, hours < 14, hours < 18, hours < 23], [4, 0, 1, 2, 3], 4
    )
    sent = random.poisson(1.5, count)
    fits = np.where(parts == usual[members], _HOUR_EFFECT, 0.0) - _FATIGUE * sent
    return replace(
        scene,
        utility_RC=scene.utility_RC + fits[:, None],
        profile={
            "part_of_day": [PARTS_OF_DAY[part] for part in parts.tolist()],
            "usual_part_of_day": [PARTS_OF_DAY[part] for part in usual[members].tolist()],
            "messages_this_week": sent.tolist(),
        },
    )


def only(world: World, features: Floats, names: Sequence[str]) -> Floats:
    """Feature rows with all attributes but these set to 0."""
    kept = np.zeros(features.shape[-1])
    for name in names:
        kept[world.columns(name)] = 1
    masked: Floats = features * kept
    return masked


def query_text(world: World, item: int, parts: Sequence[str]) -> str:
    """What somebody types who looks for these attributes of an item; the first part comes last."""
    words = [world.words(part, item)[0] for part in (*parts[1:], parts[0])]
    return " ".join(word.lower() for word in words)


def _scene(world: World, members: Ints, times: Ints, items: Ints) -> Scene:
    return Scene(
        members_R=members,
        times_R=times,
        candidates_RC=items,
        utility_RC=world.item_utility(members, times, items),
    )
