"""Values become words."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rankonce.errors import RequestError
from rankonce.prompts.spelling import COUNT_BUCKETS, FieldSpec, spell, spell_age


def say(value: Any, **spec: Any) -> str:
    return spell(value, FieldSpec(**spec), path="candidates[3].fields.name")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("Heat (1995)", "Heat (1995)"),
        ("  two\nlines\tand  spaces ", "two lines and spaces"),
        ("a\u2028b\x0bc\x85d\u00a0e", "a b c d e"),
        (1995, "1995"),
        (7.5, "7.5"),
    ],
)
def test_text_stays_on_one_line(value: Any, words: str) -> None:
    assert say(value) == words


@given(st.text())
def test_no_text_opens_a_line_of_its_own(value: str) -> None:
    if value.split():
        assert len(say(value).splitlines()) == 1


@pytest.mark.parametrize(
    ("value", "words"),
    [(["Action", "Drama"], "Action, Drama"), (["Action"], "Action"), ([], "none"), ("War", "War")],
)
def test_lists_are_joined_by_commas(value: Any, words: str) -> None:
    assert say(value, type="list") == words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0"),
        (7, "7"),
        (14, "10"),
        (15, "15"),
        (42, "30"),
        (999_999, "100000"),
        (10**9, "1000000"),
    ],
)
def test_counts_are_rounded_down_to_a_bucket(value: int, words: str) -> None:
    assert say(value, type="count") == words


@given(st.integers(min_value=0, max_value=10**12))
def test_a_count_is_never_spelled_larger_than_it_is(value: int) -> None:
    assert int(say(value, type="count")) in COUNT_BUCKETS
    assert int(say(value, type="count")) <= value


def test_a_task_may_bring_its_own_count_buckets() -> None:
    assert [say(value, type="count", buckets=(0, 100, 1000)) for value in (99, 100, 5000)] == [
        "0",
        "100",
        "1000",
    ]


@pytest.mark.parametrize(
    ("value", "words"), [(0, "0 %"), (1, "100 %"), (0.62, "60 %"), (0.63, "65 %"), (True, None)]
)
def test_shares_are_percentages_in_steps_of_five(value: Any, words: str | None) -> None:
    if words is None:
        with pytest.raises(
            RequestError, match=r"candidates\[3\]\.fields\.name: should be a number"
        ):
            say(value, type="share")
    else:
        assert say(value, type="share") == words


def test_a_share_with_buckets_takes_the_last_bound_that_it_reaches() -> None:
    spoken = [say(value, type="share", buckets=(0, 0.1, 0.5)) for value in (0.05, 0.1, 0.49, 0.9)]
    assert spoken == ["0 %", "10 %", "10 %", "50 %"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "bottom quarter"),
        (24.9, "bottom quarter"),
        (25, "top 75 %"),
        (94.9, "top 10 %"),
        (97, "top 5 %"),
        (100, "top 1 %"),
    ],
)
def test_percentiles_say_how_far_up_a_value_is(value: float, words: str) -> None:
    assert say(value, type="percentile") == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "just now"),
        (59.9, "just now"),
        (60, "1 minute ago"),
        (3_599, "59 minutes ago"),
        (86_400, "1 day ago"),
        (2 * 86_400, "2 days ago"),
        (13 * 86_400, "1 week ago"),
        (40 * 86_400, "1 month ago"),
        (3 * 31_536_000, "3 years ago"),
    ],
)
def test_ages_are_spelled_in_the_largest_whole_unit(seconds: float, words: str) -> None:
    assert spell_age(seconds) == say(seconds, type="age") == words


@pytest.mark.parametrize(("value", "word"), [(-5, "low"), (2.99, "low"), (3, "fair"), (4, "high")])
def test_a_number_becomes_the_word_of_its_bucket(value: float, word: str) -> None:
    assert say(value, type="number", buckets=(3, 4), words=("low", "fair", "high")) == word


@given(
    st.sets(st.floats(-1e6, 1e6), min_size=1, max_size=6),
    st.lists(st.floats(-1e7, 1e7), min_size=2, max_size=2),
)
def test_a_larger_number_never_takes_an_earlier_word(bounds: set[float], pair: list[float]) -> None:
    words = tuple(chr(ord("a") + place) for place in range(len(bounds) + 1))
    low, high = sorted(pair)
    spec = {"type": "number", "buckets": tuple(sorted(bounds)), "words": words}
    assert say(low, **spec) <= say(high, **spec)


@pytest.mark.parametrize(
    ("value", "spec"),
    [
        (["a"], {}),
        (True, {}),
        ("   ", {}),
        ([""], {"type": "list"}),
        ("many", {"type": "count"}),
        (-1, {"type": "count"}),
        (math.nan, {"type": "count"}),
        (1.01, {"type": "share"}),
        (True, {"type": "share"}),
        (-0.1, {"type": "share"}),
        (101, {"type": "percentile"}),
        (-1, {"type": "age"}),
        (math.inf, {"type": "age"}),
        ("3", {"type": "number", "buckets": (1,), "words": ("a", "b")}),
        (["1"], {"type": "number", "buckets": (1,), "words": ("a", "b")}),
    ],
)
def test_a_value_of_another_type_is_refused_with_its_path(value: Any, spec: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"candidates\[3\]\.fields\.name: should"):
        say(value, **spec)


@pytest.mark.parametrize(
    ("spec", "fault"),
    [
        ({"type": "count", "buckets": (0, 5, 5)}, "buckets should ascend"),
        ({"type": "count", "buckets": (5, 0)}, "buckets should ascend"),
        ({"type": "number", "buckets": (1, 2), "words": ("a", "b")}, "one word more"),
        ({"type": "count", "words": ("a",)}, "words belong to type number"),
        ({"type": "text", "buckets": (1,)}, "buckets do not belong to type text"),
        ({"type": "colour"}, "type"),
        ({"kind": "text"}, "kind"),
    ],
)
def test_a_field_whose_buckets_and_words_do_not_fit_is_refused(
    spec: dict[str, Any], fault: str
) -> None:
    with pytest.raises(ValidationError, match=fault):
        FieldSpec(**spec)
