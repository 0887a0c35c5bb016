"""A feed: members who follow authors and subjects, and posts that are read, liked or hidden."""

from dataclasses import dataclass

import numpy as np

from rankonce.datasets.domains.platform import Domain, Fields, Surface, names
from rankonce.datasets.domains.surfaces import home, messages, newcomers, newest_items
from rankonce.datasets.simulator import (
    Attribute,
    Outcome,
    Scene,
    SimulatorConfig,
    World,
    draw_requests,
    stream,
    yes_or_no,
)

_SUBJECTS = (
    "gardening", "football", "astronomy", "street food", "local politics", "knitting",
    "electric cars", "parenting", "hiking", "old computers", "investing", "cats",
)  # fmt: skip
_OPENINGS = {
    "funny": "You will laugh:",
    "practical": "Five things that I learnt about",
    "personal": "What changed my mind about",
    "angry": "Why nobody should put up with",
}
_MATTERS = ("beginners", "the weekend", "small budgets", "the winter", "this town", "the long run")

_LOG = Outcome(
    labels=("0", "1", "2", "3"),
    slopes=(-0.6, 0.0, 0.7, 1.2),
    biases=(0.8, 0.5, -0.4, -2.2),
    attention=(0.0, 0.5, 0.8, 1.0),
)


@dataclass(frozen=True, kw_only=True)
class PostsConfig(SimulatorConfig):
    """A feed; posts are stale after days."""

    attributes: tuple[Attribute, ...] = (
        Attribute(name="subject", values=_SUBJECTS, weight=1.1),
        Attribute(
            name="author",
            values=tuple(
                f"{first} {last}"
                for last in ("Okafor", "Lind", "Moreau", "Sato")
                for first in ("Ana", "Ben", "Chloe", "Dev", "Ella", "Finn")
            ),
            weight=0.8,
        ),
        Attribute(name="tone", values=tuple(_OPENINGS), weight=0.6),
        Attribute(name="format", values=("text", "photo", "video", "link", "poll"), weight=0.5),
        Attribute(name="length", values=("short", "medium", "long"), weight=0.4),
    )
    log: Outcome = _LOG
    freshness_effect: float = 0.3
    position_effect: float = 0.5


def _items(world: World) -> list[Fields]:
    fields: list[Fields] = []
    for item in range(world.config.num_items):
        (subject,), (author,) = world.words("subject", item), world.words("author", item)
        (tone,), (form,) = world.words("tone", item), world.words("format", item)
        (length,) = world.words("length", item)
        matter = _MATTERS[item % len(_MATTERS)]
        fields.append(
            {
                "text": f"{_OPENINGS[tone]} {subject} for {matter}",
                "author": author,
                "subject": subject,
                "format": form,
                "reading_minutes": {"short": 0.5, "medium": 3.0, "long": 9.0}[length],
            }
        )
    return fields


def _members(world: World) -> list[Fields]:
    subjects, authors = world.attribute("subject").values, world.attribute("author").values
    return [
        {
            "interests": [subjects[code] for code in liked],
            "follows": [authors[code] for code in followed],
        }
        for liked, followed in zip(
            world.favourites("subject", 3).tolist(),
            world.favourites("author", 3).tolist(),
            strict=True,
        )
    ]


def _authors(world: World, name: str, count: int) -> Scene:
    """Authors whom a member does not follow yet, liked as they are and for their subjects."""
    members, times = draw_requests(world, name, count)
    authors = world.attribute("author").values
    subjects = world.attribute("subject").values
    by_author = np.eye(len(authors))[world.values["author"][:, 0]]
    # An author's subjects are those of the posts that were out when the log began.
    is_early = (world.released_N < world.config.start)[:, None]
    early = by_author * is_early
    features = early.T @ world.items_NK / np.maximum(early.sum(axis=0), 1)[:, None]
    features[:, world.columns("author")] = np.eye(len(authors))
    main = np.argsort(-features[:, world.columns("subject")], axis=1, kind="stable")[:, :2]
    follows = world.favourites("author", 3)
    order = stream(world.config, f"{name} authors").random((count, len(authors)))
    np.put_along_axis(order, follows[members], np.inf, axis=1)
    size = min(world.config.candidates_per_request, len(authors) - follows.shape[1])
    shown = np.argsort(order, axis=1)[:, :size]
    num_followers = np.bincount(follows.ravel(), minlength=len(authors))
    is_out = (world.released_N <= times[:, None]).astype(np.float64)
    num_posts = np.take_along_axis(is_out @ by_author, shown, axis=1).astype(np.int64)
    return Scene(
        members_R=members,
        times_R=times,
        candidates_RC=shown,
        utility_RC=world.taste_match(members, features[shown]),
        candidate={
            "author": [[authors[code] for code in row] for row in shown.tolist()],
            "subjects": [
                [[subjects[code] for code in main[author]] for author in row]
                for row in shown.tolist()
            ],
            "num_followers": num_followers[shown].tolist(),
            "num_posts": num_posts.tolist(),
        },
    )


_ALL = {"3": "commented on", "2": "liked", "1": "read", "0": "scrolled past"}
_GOOD = {"3": "commented on", "2": "liked"}

POSTS = Domain(
    name="feed",
    config=PostsConfig,
    kind="subject",
    item_fields=_items,
    member_fields=_members,
    surfaces={
        "post-follow": Surface(
            outcome=yes_or_no(-1.0, attention=0.5),
            draw=_authors,
            profile=names("interests", "follows"),
            candidate=names("author", "subjects", "num_followers", "num_posts"),
            event=("text", "author"),
            actions=_GOOD,
            from_table=True,
        ),
        "post-fresh": Surface(
            outcome=yes_or_no(-0.6),
            draw=newest_items,
            profile=names("interests", "follows", posts_seen="times_shown"),
            candidate=names(
                "text", "author", "format", posted="age", liked_of_subject="member_share"
            ),
            event=("text", "author"),
            actions=_ALL,
            taken=("2", "3"),
        ),
        "post-hide": Surface(
            outcome=yes_or_no(-1.4, slope=-0.9, attention=0.5),
            draw=home,
            profile=names(posts_seen="times_shown", passed_share="taken_share"),
            candidate=names(
                "text",
                "author",
                "subject",
                passed_by="taken_share",
                passed_of_subject="member_share",
            ),
            event=("text", "author"),
            actions=_ALL,
            taken=("0",),
        ),
        "post-like": Surface(
            outcome=yes_or_no(-0.8),
            draw=home,
            profile=names(posts_seen="times_shown", like_share="taken_share"),
            candidate=names(
                "text",
                "author",
                "format",
                posted="age",
                num_likes="times_taken",
                like_share="taken_share",
                liked_of_subject="member_share",
            ),
            event=("text", "author", "format"),
            actions={"2": "liked", "3": "liked", "0": "scrolled past"},
            taken=("2", "3"),
        ),
        "post-newcomer": Surface(
            outcome=yes_or_no(-0.5),
            draw=newcomers,
            profile=names("interests"),
            candidate=names(
                "text", "author", "subject", popularity="percentile", like_share="taken_share"
            ),
            taken=("2", "3"),
        ),
        "post-notification": Surface(
            outcome=yes_or_no(-0.8, attention=0.0),
            draw=messages,
            profile=names(
                "interests",
                "follows",
                "part_of_day",
                "usual_part_of_day",
                "messages_this_week",
                last_visit="since_last_visit",
            ),
            candidate=names("text", "author", posted="age", num_comments="times_taken"),
            event=("text", "author"),
            actions=_GOOD,
            taken=("3",),
        ),
        "post-reaction": Surface(
            outcome=_LOG,
            draw=None,
            profile=names("interests", member_since="since_joined"),
            candidate=names(
                "text",
                "author",
                "format",
                "reading_minutes",
                posted="age",
                popularity="percentile",
            ),
            event=("text", "author"),
            actions=_ALL,
            taken=("2", "3"),
        ),
    },
)
