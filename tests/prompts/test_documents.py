"""Items and histories in words: every style writes the same facts."""

from itertools import combinations
from typing import Any

import pytest

from rankonce.errors import RequestError, TaskError
from rankonce.prompts.documents import document_writer, read_wordings

FIELDS: dict[str, dict[str, Any]] = {
    "film": {
        "title": "Heat (1995)",
        "genres": ["Crime", "Thriller"],
        "num_raters": 215,
        "like_share": 0.78,
    },
    "item": {
        "title": "Lamp",
        "categories": ["Home", "Light"],
        "brand": "Acme",
        "year": 1999,
        "text": "It shines.",
        "num_raters": 3,
        "like_share": 1 / 3,
    },
    "history": {
        "action": "liked",
        "title": "Ronin (1998)",
        "categories": ["Action"],
        "stars": "4.5",
    },
}


def test_a_film_reads_like_this() -> None:
    writer = document_writer("film")
    words = [writer.spell(FIELDS["film"])]
    assert {style: writer.write(words, style) for style in writer.styles} == {
        "sentences": "Heat (1995) is a film. Its genres are Crime, Thriller. "
        "It was liked by 80 % of 200 raters.",
        "record": "Film: Heat (1995) · Crime, Thriller · liked by 80 % of 200 raters",
        "lines": "Title: Heat (1995)\nGenres: Crime, Thriller\nRaters: 200, of whom 80 % liked it",
        "genres-first": "Crime, Thriller: Heat (1995) "
        "(200 members rated it, 80 % of them liked it)",
    }


def test_a_history_reads_like_this() -> None:
    writer = document_writer("history")
    events = [FIELDS["history"], {"action": "disliked", "title": "Up (2009)"}]
    words = list(map(writer.spell, events))
    assert {style: writer.write(words, style) for style in writer.styles} == {
        "sentence": "A member liked Ronin (1998) (Action) with 4.5 of 5 stars, "
        "then disliked Up (2009).",
        "record": "History of a member, oldest first:\n"
        "liked: Ronin (1998) · Action · 4.5 of 5\ndisliked: Up (2009)",
        "columns": "What a member did:\n"
        "Ronin (1998) | Action | 4.5 stars of 5 | liked\nUp (2009) | disliked",
        "story": "This is what a member did, in order. The member liked Ronin (1998). "
        "It is Action. It got 4.5 of 5 stars. The member disliked Up (2009).",
    }


@pytest.mark.parametrize("kind", FIELDS)
def test_all_styles_write_the_same_facts_whatever_is_missing(kind: str) -> None:
    writer, whole = document_writer(kind), FIELDS[kind]
    needed = {"title", "action"} & set(whole)
    optional = sorted(set(whole) - needed)
    for size in range(len(optional) + 1):
        for left_out in combinations(optional, size):
            words = writer.spell({k: v for k, v in whole.items() if k not in left_out})
            texts = [writer.write([words], style) for style in writer.styles]
            facts = [{k for k, word in words.items() if word in text} for text in texts]
            assert all(one == facts[0] >= needed for one in facts), left_out


def test_blank_values_are_left_out_and_a_missing_title_is_named() -> None:
    writer = document_writer("item")
    assert writer.spell({"title": "Lamp", "brand": " ", "categories": [], "year": None}) == {
        "title": "Lamp"
    }
    with pytest.raises(RequestError, match="title: should be text"):
        writer.spell({"brand": "Acme"})


@pytest.mark.parametrize(
    ("styles", "fault"),
    [
        ({}, "styles: should hold at least one"),
        ({"a": {"lines": ["{title}"]}}, "styles.a.lines: should name year"),
        ({"a": {"lines": ["{title} {year}"]}}, "should write title without any optional field"),
        (
            {"a": {"lines": ["{title}", "{year}"]}, "b": {"lines": ["{title}"]}},
            "styles.b.lines: leave out year",
        ),
        ({"a": {"lines": ["{name}"]}}, "line '{name}' names 'name', which is not under fields"),
        ({"a": {"lines": ["{title}", "{year}"], "tone": "kind"}}, "styles.a.tone: unknown field"),
    ],
)
def test_styles_of_other_facts_are_refused(styles: dict[str, Any], fault: str) -> None:
    with pytest.raises(TaskError) as caught:
        read_wordings(
            {"fields": {"title": {"required": True}, "year": {}}, "styles": styles}, name="x.yaml"
        )
    assert str(caught.value).startswith("x.yaml: ")
    assert fault in str(caught.value)
