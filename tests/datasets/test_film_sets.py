"""A set of MovieLens serves the same requests in Parquet files and in the common form."""

from pathlib import Path

import polars as pl
import pytest

from rankonce.datasets.common_form import Dataset
from rankonce.datasets.domains.films import FILM_TASKS, film_examples, film_examples_by_member
from rankonce.datasets.examples import make_examples, make_examples_by_member
from rankonce.datasets.ml_small import files_of, read_ratings, read_tags
from rankonce.datasets.rating_examples import RATING_TASKS, ExampleConfig
from rankonce.datasets.sources import find_adapter, prepare_dataset
from rankonce.errors import DataError
from rankonce.evaluation.suite_data import TimeCut, library_loaders
from rankonce.prompts.tasks import library_tasks
from rankonce.training.loop import TrainConfig
from rankonce.training.pretraining import PretrainingData, pretrain_source
from rankonce.training.recipes import find_recipe
from tests.datasets.test_simulator import write_films

TASKS = (*FILM_TASKS, *RATING_TASKS)


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_films(tmp_path_factory.mktemp("films"), turn_after=None)


@pytest.fixture(scope="module")
def dataset(films: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The same films in the files of GroupLens, brought into the common form."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "given").mkdir()
    names = {"user_id": "userId", "item_id": "movieId"}
    for source, name in (("items", "movies"), ("ratings", "ratings"), ("tags", "tags")):
        frame = pl.read_parquet(films / f"{source}.parquet")
        keys = [key for key in names if key in frame.columns]
        frame.rename(names, strict=False).sort(*(names[key] for key in keys)).write_csv(
            folder / "given" / f"{name}.csv"
        )
    adapter = find_adapter("ml-latest-small")
    return prepare_dataset(adapter, folder / "ml-small", given=folder / "given")


def test_ratings_films_and_tags_are_those_of_the_files(films: Path, dataset: Dataset) -> None:
    for (known, made), keys in zip(
        zip(
            (*read_ratings(films), read_tags(films)),
            (*read_ratings(dataset.folder), read_tags(dataset.folder)),
            strict=True,
        ),
        (("user_id", "item_id"), ("item_id",), ("user_id", "item_id", "tag", "timestamp")),
        strict=True,
    ):
        assert made.select(known.columns).sort(keys).equals(known.unique().sort(keys))
    assert [path.name for path in files_of(films)] == ["ratings.parquet", "items.parquet"]
    assert all(path.is_file() for path in files_of(dataset.folder, with_tags=True))


@pytest.mark.parametrize("task", TASKS)
def test_every_film_task_is_made_of_either(films: Path, dataset: Dataset, task: str) -> None:
    known = list(film_examples(task, films))
    assert list(film_examples(task, dataset.folder)) == known
    assert task in dataset.tasks
    if task in FILM_TASKS:
        assert list(make_examples(dataset, task)) == known


@pytest.mark.parametrize("task", sorted(FILM_TASKS))
def test_of_some_members_requests_are_made_and_of_all_ratings_count(
    dataset: Dataset, task: str
) -> None:
    config = ExampleConfig(max_members=3)
    some = list(make_examples_by_member(dataset, task, config))
    assert some
    assert {member for member, _ in some} <= {"0", "1", "2"}
    if task in ("movie-next", "movie-search"):
        # What is drawn beside them differs.
        return
    every = film_examples_by_member(task, dataset.folder)
    wanted = [one for member, one in every if str(member) in {"0", "1", "2"}]
    numbered = {repr((one.request.profile, one.request.candidates, one.labels)) for one in wanted}
    assert numbered == {
        repr((one.request.profile, one.request.candidates, one.labels)) for _, one in some
    }


def test_sets_without_tags_serve_no_search_and_others_no_films(
    dataset: Dataset, tmp_path: Path
) -> None:
    assert "movie-search" not in find_adapter("ml-1m").tasks
    assert "movie-search" in find_adapter("ml-32m").tasks
    for file in dataset.folder.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace("ml-latest-small", "goodbooks"))
    with pytest.raises(DataError, match="should hold a set of MovieLens, holds goodbooks"):
        read_ratings(tmp_path)


def test_recipes_and_the_suite_take_what_the_command_made(dataset: Dataset) -> None:
    folder = dataset.folder
    for stage in find_recipe("ml-small").stages:
        source = stage.load(folder, TrainConfig(epochs=1), library_tasks())
        assert source is not None
        assert {Path(name).name for name in source.fingerprint} == {
            "events.parquet",
            "items.parquet",
        }
        assert source.examples is not None
        assert any(True for _ in source.examples(0))
    texts = pretrain_source(PretrainingData(weights={folder: 1.0}), TrainConfig(epochs=1))
    assert any("Film 7" in text for text in texts.texts(None))  # type: ignore[arg-type]
    loaders, left_out = library_loaders(folder.parent, TimeCut(limit=5))
    assert not left_out
    assert loaders["movie-search"]().source == "MovieLens latest-small"
