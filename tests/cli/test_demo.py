"""The embedded ranker: it comes along, loads without a network and ranks by taste."""

import json
from collections.abc import Callable

import pytest

from rankonce.ranker import EMBEDDED_MODEL, Ranker
from rankonce.records import ScoreResult, read_request
from tests.cli.conftest import Run

Command = Callable[..., Run]


@pytest.fixture(scope="module")
def results() -> list[tuple[dict[str | None, list[str]], ScoreResult]]:
    """For each member the genres of every film and the scores."""
    ranker = Ranker.from_pretrained()
    lines = (EMBEDDED_MODEL / "demo.jsonl").read_text().splitlines()
    requests = [read_request(json.loads(line)) for line in lines]
    return [
        ({c.id: c.fields["genres"] for c in request.candidates}, ranker.score(request))
        for request in requests
    ]


def test_the_demo_shows_two_rankings_and_what_was_saved(run: Command) -> None:
    done = run("demo", "--num-repeats", 1)
    assert done.exit_code == 0, done.err
    assert "Ada" in done.out
    assert "Bo" in done.out
    assert "measured just now" in done.out
    saving = json.loads(run("demo", "--num-repeats", 1, "--json").out)["savings"][0]
    assert saving["num_films"] == 100
    assert saving["separate_tokens"] > 5 * saving["packed_tokens"]
    assert saving["largest_difference"] < 1e-5


def test_every_film_has_a_score_of_its_own(
    results: list[tuple[dict[str | None, list[str]], ScoreResult]],
) -> None:
    for _, result in results:
        assert len(result.candidates) == 100
        assert result.distinct_score_ratio == 1.0
        assert not result.warnings


def test_members_of_opposite_taste_get_the_films_of_their_genres_first(
    results: list[tuple[dict[str | None, list[str]], ScoreResult]],
) -> None:
    def share_of(genres: set[str], place: int) -> float:
        names, result = results[place]
        top = [names[candidate.id] for candidate in result.ranked()[:20]]
        return sum(bool(genres & set(film)) for film in top) / len(top)

    gentle, dark = {"Animation", "Children", "Musical", "Romance"}, {"Horror", "Thriller", "Sci-Fi"}
    assert share_of(gentle, 0) > share_of(gentle, 1) + 0.2
    assert share_of(dark, 1) > share_of(dark, 0) + 0.2


def test_the_embedded_folder_is_small_and_documented() -> None:
    files = list(EMBEDDED_MODEL.iterdir())
    assert sum(path.stat().st_size for path in files) < 10_000_000
    assert {"README.md", "LICENSE-ml-small.txt"} <= {path.name for path in files}
