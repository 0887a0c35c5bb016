"""Histories of likes, against a slow count."""

import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from rankonce.datasets.ml_small import add_histories

# Few members and moments, so that many ratings meet in one second.
ROWS = st.lists(
    st.tuples(st.integers(3, 5), st.integers(0, 99), st.integers(0, 1), st.integers(0, 9)),
    max_size=150,
)


def frame(rows: list[tuple[int, ...]]) -> pl.DataFrame:
    names = ("user_id", "item_id", "label", "timestamp")
    return pl.DataFrame(rows, schema=dict.fromkeys(names, pl.Int64), orient="row")


@settings(deadline=None, max_examples=50)
@given(rows=ROWS, ratings=ROWS)
def test_a_history_is_the_newest_sixty_likes_strictly_before_the_row(
    rows: list[tuple[int, ...]], ratings: list[tuple[int, ...]]
) -> None:
    found = add_histories(frame(rows), frame(ratings))
    assert found.drop("history_ids").rows() == rows
    assert found.schema["history_ids"] == pl.List(pl.Int64)
    for (user, _, _, moment), history in zip(rows, found["history_ids"].to_list(), strict=True):
        likes = [(when, film) for who, film, like, when in ratings if who == user and like]
        assert history == [film for when, film in sorted(likes) if when < moment][-60:]
