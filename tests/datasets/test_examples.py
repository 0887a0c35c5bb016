"""Examples of prepared datasets: no prompt holds anything of its own moment or a later one."""

import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankonce.datasets.common_form import Dataset
from rankonce.datasets.domains.films import FILM_TASKS, film_examples_by_member
from rankonce.datasets.examples import (
    make_examples,
    make_examples_by_member,
    movie_rows_of,
)
from rankonce.datasets.rating_examples import RATING_TASKS, ExampleConfig
from rankonce.datasets.sources import find_adapter, prepare_dataset
from rankonce.errors import DataError
from rankonce.prompts.encoding import TextEncoder
from rankonce.prompts.rendering import Renderer
from rankonce.prompts.tasks import library_tasks
from rankonce.records import ScoreRequest, TrainingExample, read_request
from tests.conftest import build_tokenizer, data_folder

# member, film, rating, time
Rating = tuple[int, int, float, int]
TASKS = tuple(RATING_TASKS)
NUM_FILMS = 8


def prepare_ratings(folder: Path, ratings: Sequence[Rating]) -> Dataset:
    source = folder / "given"
    source.mkdir(parents=True, exist_ok=True)
    films = "".join(f"{film},Film {film} (1999),Drama|War\n" for film in range(1, NUM_FILMS + 1))
    (source / "movies.csv").write_text(f"movieId,title,genres\n{films}")
    rows = "".join(f"{','.join(map(str, rating))}\n" for rating in ratings)
    (source / "ratings.csv").write_text(f"userId,movieId,rating,timestamp\n{rows}")
    (source / "tags.csv").write_text("userId,movieId,tag,timestamp\n1,1,slow,500\n")
    return prepare_dataset(find_adapter("ml-latest-small"), folder / "out", given=source)


def known_then(examples: Sequence[TrainingExample], before: int) -> list[Any]:
    """Give the requests of the time until ``before``, which speak of the past alone."""
    return [
        example.request
        for example in examples
        if example.request.time is not None and example.request.time <= before
    ]


ratings_lists = st.lists(
    st.tuples(
        st.integers(1, 4),
        st.integers(1, NUM_FILMS),
        st.sampled_from([1.0, 2.0, 4.0, 5.0]),
        # Few moments, so that many events share one.
        st.integers(100, 112),
    ),
    min_size=1,
    max_size=40,
    unique_by=lambda one: one[:2],
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(ratings=ratings_lists, present=st.integers(100, 112), task=st.sampled_from(TASKS))
def test_nothing_of_the_same_moment_or_later_is_in_a_request(
    tmp_path_factory: pytest.TempPathFactory, ratings: list[Rating], present: int, task: str
) -> None:
    folder = tmp_path_factory.mktemp("ratings")
    config = ExampleConfig(candidates_per_example=3)
    examples = list(make_examples(prepare_ratings(folder / "a", ratings), task, config))
    for example in examples:
        request = read_request(asdict(example.request))
        assert request.time is not None
        assert all(event.time < request.time for event in request.history)
        assert len(example.labels) == len(request.candidates)
    # Ratings of the present and later turn round; what requests until then say does not.
    turned = [(u, f, 6 - r if t >= present else r, t) for u, f, r, t in ratings]
    if task != "similar-item":
        # There, which requests there are depends on the likes of their own moment.
        others = make_examples(prepare_ratings(folder / "b", turned), task, config)
        assert known_then(list(others), present) == known_then(examples, present)


def key_of(request: ScoreRequest) -> str:
    title = request.candidates[0].fields["title"]
    return f"{request.time} {title} {request.profile} {request.history}"


def test_ratings_of_the_future_do_not_change_what_is_said_of_candidates(tmp_path: Path) -> None:
    generator = random.Random(0)
    pairs = [(user, film) for user in range(1, 30) for film in range(1, NUM_FILMS + 1)]
    ratings = [
        (user, film, generator.choice([1.0, 3.5, 5.0]), generator.randrange(1000))
        for user, film in pairs
    ]
    past = [rating for rating in ratings if rating[3] < 500]
    whole = prepare_ratings(tmp_path / "whole", ratings)
    early = prepare_ratings(tmp_path / "early", past)
    config = ExampleConfig(candidates_per_example=1)
    for task in ("movie-like", "movie-rating"):
        said = {key_of(e.request): e.request for e in make_examples(whole, task, config)}
        compared = 0
        for example in make_examples(early, task, config):
            (found,), (expected,) = (
                said[key_of(example.request)].candidates,
                example.request.candidates,
            )
            assert found.fields == expected.fields
            compared += 1
        assert compared > 50


def test_stars_are_words_and_half_stars_round_up(tmp_path: Path) -> None:
    ratings = [(1, 1, 0.5, 10), (1, 2, 3.5, 20), (1, 3, 5.0, 30), (2, 3, 2.0, 5)]
    config = ExampleConfig(candidates_per_example=1)
    dataset = prepare_ratings(tmp_path, ratings)
    examples = {
        (e.request.time, e.request.candidates[0].id): e
        for e in make_examples(dataset, "movie-rating", config)
    }
    assert {key: e.labels for key, e in examples.items()} == {
        (10.0, "1"): ("1",),
        (20.0, "2"): ("4",),
        (30.0, "3"): ("5",),
        (5.0, "3"): ("2",),
    }
    last = examples[30.0, "3"].request
    assert [event.action for event in last.history] == ["1 star", "4 stars"]
    assert last.profile == {"num_ratings": 2, "mean_rating": 2.0}
    assert last.candidates[0].fields["num_raters"] == 1
    assert "num_raters" not in examples[20.0, "2"].request.candidates[0].fields


def test_films_are_placed_among_all_by_the_ratings_until_the_year_began(tmp_path: Path) -> None:
    year = 31_556_952
    ratings = [(1, 1, 5.0, 10), (2, 1, 5.0, 20), (2, 2, 5.0, 30), (3, 3, 5.0, year + 1)]
    ratings += [(1, film, 5.0, year + 2) for film in (2, 3)] + [(2, 4, 5.0, year + 2)]
    config = ExampleConfig(candidates_per_example=1)
    dataset = prepare_ratings(tmp_path, ratings)
    places = {
        (e.request.time, e.request.candidates[0].id): fields.get("popularity")
        for e in make_examples(dataset, "movie-rating", config)
        for fields in [e.request.candidates[0].fields]
    }
    # Of eight films one had two raters and one had one; nothing was known in the first year.
    assert places == {
        (10.0, "1"): None,
        (20.0, "1"): None,
        (30.0, "2"): None,
        (year + 1.0, "3"): 0.0,
        (year + 2.0, "2"): 75.0,
        (year + 2.0, "3"): 0.0,
        (year + 2.0, "4"): 0.0,
    }


def test_a_folder_of_tables_gives_the_examples_of_the_prepared_dataset(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    pairs = [(user, film) for user in range(1, 6) for film in range(1, NUM_FILMS + 1)]
    moments = random.integers(900_000_000, 1_000_000_000, len(pairs)).tolist()
    stars = (random.integers(1, 11, len(pairs)) / 2).tolist()
    ratings = [(*pair, *rest) for pair, *rest in zip(pairs, stars, moments, strict=True)]
    dataset = prepare_ratings(tmp_path, ratings)
    columns = ("user_id", "item_id", "rating", "timestamp")
    pl.DataFrame(ratings, schema=columns, orient="row").write_parquet(tmp_path / "ratings.parquet")
    films = [(film, f"Film {film} (1999)", "Drama|War") for film in range(1, NUM_FILMS + 1)]
    items = pl.DataFrame(films, schema=("item_id", "title", "genres"), orient="row")
    items.write_parquet(tmp_path / "items.parquet")
    config = ExampleConfig(candidates_per_example=10, max_history=40, co_likes=True)
    for task in TASKS:
        prepared, read = (
            sorted(made, key=lambda one: str(one[1]))
            for made in (
                make_examples_by_member(dataset, task, config),
                film_examples_by_member(task, tmp_path),
            )
        )
        assert [example for _, example in prepared] == [example for _, example in read]
        # A prepared dataset numbers its members anew.
        numbers = {(number, user) for (number, _), (user, _) in zip(prepared, read, strict=True)}
        users, renamed = ({one[place] for one in numbers} for place in (0, 1))
        assert len(numbers) == len(users) == len(renamed) >= 3


def test_a_history_is_what_was_liked_before_the_source(tmp_path: Path) -> None:
    ratings = [(1, film, 5.0, 10 * film) for film in range(1, 7)] + [(2, 7, 5.0, 1)]
    dataset = prepare_ratings(tmp_path, ratings)
    *_, last = make_examples(dataset, "similar-item", ExampleConfig(max_history=2))
    assert last.request.profile["source_title"] == "Film 5 (1999)"
    told = [(event.item.fields["title"], event.time) for event in last.request.history]
    assert told == [("Film 3 (1999)", 30.0), ("Film 4 (1999)", 40.0)]


def test_candidates_of_one_request_share_its_past(tmp_path: Path) -> None:
    ratings = [(1, film, 5.0, 10 * film) for film in range(1, 6)]
    config = ExampleConfig(candidates_per_example=2)
    examples = list(make_examples(prepare_ratings(tmp_path, ratings), "movie-rating", config))
    assert [(e.request.time, len(e.request.history), len(e.labels)) for e in examples] == [
        (10.0, 0, 2),
        (30.0, 2, 2),
        (50.0, 4, 1),
    ]


def test_the_source_is_the_last_like_and_others_were_never_rated(tmp_path: Path) -> None:
    ratings = [
        (1, 1, 5.0, 10),
        (1, 2, 1.0, 20),
        (1, 3, 4.0, 30),
        (1, 4, 4.0, 40),
        *[(2, film, 5.0, 1) for film in range(4, 8)],
    ]
    dataset = prepare_ratings(tmp_path, ratings)
    examples = list(make_examples(dataset, "similar-item"))
    by_time = {e.request.time: e for e in examples}
    # Member 2 liked everything at once, so that no source is earlier; nor is there one at 10.
    assert sorted(by_time) == [30.0, 40.0]
    last = by_time[40.0]
    assert last.request.profile["source_title"] == "Film 3 (1999)"
    assert [event.item.fields["title"] for event in last.request.history] == ["Film 1 (1999)"]
    labels = dict(zip([c.id for c in last.request.candidates], last.labels, strict=True))
    assert labels.pop("4") == "Yes"
    assert set(labels) <= {"5", "6", "7"}
    assert set(labels.values()) == {"No"}
    again = list(make_examples(dataset, "similar-item"))
    assert again == examples


def test_statistics_of_chosen_members_count_everybody(tmp_path: Path) -> None:
    ratings = [(user, film, 5.0, 10 * user + film) for user in range(1, 6) for film in (1, 2)]
    dataset = prepare_ratings(tmp_path, ratings)
    everybody = movie_rows_of(dataset)
    some = movie_rows_of(dataset, max_members=2)
    assert some.rows.height == 4
    joined = everybody.rows.with_row_index().filter(user_id=0)["index"].to_list()
    mine = some.rows.with_row_index().filter(user_id=0)["index"].to_list()
    for name, numbers in everybody.numbers.items():
        np.testing.assert_array_equal(some.numbers[name][mine], numbers[joined])
    for task in TASKS:
        config = ExampleConfig(max_members=2, candidates_per_example=1)
        fewer = list(make_examples(dataset, task, config))
        assert 0 < len(fewer) < len(list(make_examples(dataset, task, ExampleConfig()))) + 5


def test_a_task_that_the_dataset_does_not_serve_is_refused(tmp_path: Path) -> None:
    dataset = prepare_ratings(tmp_path, [(1, 1, 5.0, 10)])
    with pytest.raises(DataError, match=r"task: ml-latest-small serves movie-like, .* 'job-apply'"):
        make_examples(dataset, "job-apply")


def test_every_example_can_be_rendered(tmp_path: Path) -> None:
    ratings = [
        (user, film, 5.0 if user == 1 else 0.5 * (1 + (user * film) % 10), 86_400 * film + user)
        for user in range(1, 6)
        for film in range(1, NUM_FILMS + 1)
    ]
    dataset = prepare_ratings(tmp_path / "films", ratings)
    cranfield = prepare_dataset(
        find_adapter("cranfield"), tmp_path / "cranfield", given=data_folder("cranfield")
    )
    renderer = Renderer(TextEncoder(build_tokenizer()), max_prompt_tokens=100_000)
    rendered: dict[str, int] = {}
    for source in (dataset, cranfield):
        for task in source.tasks:
            for example in list(make_examples(source, task))[:5]:
                request: ScoreRequest = example.request
                renderer.render(library_tasks()[task], request)
                labels = library_tasks()[task].label_names
                assert set(example.labels) <= {*labels, None}
                rendered[task] = rendered.get(task, 0) + 1
    assert set(rendered) == {*TASKS, *FILM_TASKS, "search-relevance"}
