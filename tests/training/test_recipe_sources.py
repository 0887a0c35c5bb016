"""What the film recipes learn from: which rows, which labels, and what is kept from them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from rankonce.datasets.ml_small import read_ml_small
from rankonce.errors import DataError, ModelError
from rankonce.prompts.tasks import library_tasks
from rankonce.ranker import Ranker
from rankonce.training.embedded import demo_requests, write_embedded
from rankonce.training.recipes import find_recipe
from rankonce.training.stages import StageSource
from tests.conftest import build_network, build_tokenizer

NUM_FILMS = 40
# In the time of MovieLens-1M, and long after it.
THEN, LATER = 960_000_000, 1_300_000_000


def draw_ratings(seed: int, count: int, start: int, first_member: int = 1) -> pl.DataFrame:
    """Draw dated rows in which films of an even number are good."""
    random = np.random.default_rng(seed)
    pairs = random.permutation(30 * NUM_FILMS)[:count]
    members, films = pairs // NUM_FILMS + first_member, pairs % NUM_FILMS + 1
    likes = (films % 2 == 0) ^ (random.random(count) < 0.1)
    return pl.DataFrame(
        {
            "user_id": members,
            "item_id": films,
            "rating": np.where(likes, 5.0, 1.0),
            "timestamp": start + 100 * np.arange(count),
        }
    )


def write_items(folder: Path, names: dict[int, str]) -> None:
    pl.DataFrame(
        {"item_id": list(names), "title": list(names.values()), "genres": ["Drama"] * len(names)}
    ).write_parquet(folder / "items.parquet")


def with_histories(rows: pl.DataFrame) -> pl.DataFrame:
    rows = rows.with_columns(label=(pl.col("rating") > 3).cast(pl.Int8)).drop("rating")
    liked: dict[int, list[int]] = {}
    histories = []
    for member, film, label in rows.select("user_id", "item_id", "label").iter_rows():
        histories.append(list(liked.setdefault(member, [])))
        if label:
            liked[member].append(film)
    return rows.with_columns(history_ids=pl.Series(histories, dtype=pl.List(pl.Int64)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split of 800 and 200 rows, with another catalogue inside."""
    folder = tmp_path_factory.mktemp("ml1m")
    rows = with_histories(draw_ratings(0, 1000, THEN))
    rows.head(800).write_parquet(folder / "train.parquet")
    rows.tail(200).write_parquet(folder / "valid.parquet")
    write_items(folder, {film: f"Film {film} (1990)" for film in range(1, NUM_FILMS + 1)})
    other = folder / "ml-small"
    other.mkdir()
    # Members of that time may be the same people: one of them alone knows a film.
    shared = draw_ratings(2, 10, THEN, first_member=501).with_columns(
        item_id=pl.lit(99, dtype=pl.Int64)
    )
    pl.concat([draw_ratings(1, 900, LATER), shared]).write_parquet(other / "ratings.parquet")
    names = {film: f"Film {film} (1990)" for film in range(1, NUM_FILMS + 1)}
    write_items(other, names | {99: "Theirs alone (1999)"})
    return folder


def load(recipe: str, stage: str, folder: Path) -> StageSource | None:
    (found,) = (one for one in find_recipe(recipe).stages if one.name == stage)
    return found.load(folder, found.config, library_tasks())


def epoch(source: StageSource | None) -> list[Any]:
    assert source is not None
    assert source.examples is not None
    return list(source.examples(0))


def is_of_catalogue(example: Any) -> bool:
    return not example.request.history and all(
        set(item.fields) <= {"title", "genres"} for item in example.request.candidates
    )


def test_another_catalogue_is_learnt_by_heart(folder: Path) -> None:
    source = load("ml1m", "catalogue", folder)
    assert source is not None
    asked: dict[str, list[float]] = {}
    for example in epoch(source):
        assert is_of_catalogue(example)
        for item, label in zip(example.request.candidates, example.labels, strict=True):
            asked.setdefault(str(item.fields["title"]), []).append(label["Yes"])
    # The film of members who were there in that time is not known.
    assert set(asked) == {f"Film {film} (1990)" for film in range(1, NUM_FILMS + 1)}
    assert {len(shares) for shares in asked.values()} == {10}
    means = [np.mean(asked[f"Film {film} (1990)"]) for film in range(1, NUM_FILMS + 1)]
    assert min(means[1::2]) > max(means[::2])
    assert set(source.fingerprint) == {"ml-small/ratings.parquet", "ml-small/items.parquet"}


def test_without_another_catalogue_its_stage_is_left_out(folder: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("train", "valid", "items"):
        (alone / f"{name}.parquet").write_bytes((folder / f"{name}.parquet").read_bytes())
    assert load("ml1m", "catalogue", alone) is None
    assert not any(map(is_of_catalogue, epoch(load("ml1m", "finetune", alone))))
    (alone / "ml-small").mkdir()
    write_items(alone / "ml-small", {1: "Film"})
    pl.DataFrame({"user_id": [1]}).write_parquet(alone / "ml-small" / "ratings.parquet")
    with pytest.raises(DataError, match="ratings: should have the columns item_id, rating, time"):
        load("ml1m", "catalogue", alone)


def test_later_train_rows_are_asked_with_a_teacher_s_shares(folder: Path) -> None:
    source = load("ml1m", "finetune", folder)
    assert source is not None
    examples = epoch(source)
    members = [example for example in examples if not is_of_catalogue(example)]
    # Twice all films, 24 at once.
    assert len(examples) - len(members) == 4
    train = pl.read_parquet(folder / "train.parquet")
    start = np.quantile(train["timestamp"].to_numpy(), 0.3)
    moments = [example.request.time for example in members]
    assert min(moments) >= start
    assert max(moments) <= train["timestamp"].max()
    asked = sum(len(example.labels) for example in members)
    later = train.filter(pl.col("timestamp") >= start).height
    assert later < asked < 3 * later
    shares: dict[bool, list[float]] = {True: [], False: []}
    for example in members:
        for item, label in zip(example.request.candidates, example.labels, strict=True):
            assert 0 < label["Yes"] < 1
            is_good = int(str(item.fields["title"]).split()[1]) % 2 == 0
            shares[is_good].append(label["Yes"])
    assert np.mean(shares[True]) > 0.7 > 0.3 > np.mean(shares[False])
    # What is held out has the members' own answers.
    valid = [label for example in source.valid for label in example.labels]
    assert len(valid) == 200
    assert valid.count("Yes") == pl.read_parquet(folder / "valid.parquet")["label"].sum()
    assert set(source.fingerprint) == {"train.parquet", "valid.parquet", "items.parquet"}


def test_the_teacher_knows_of_the_other_catalogue_and_alone_does_not(
    folder: Path, tmp_path: Path
) -> None:
    turned = tmp_path / "turned"
    (turned / "ml-small").mkdir(parents=True)
    for name in ("train.parquet", "valid.parquet", "items.parquet", "ml-small/items.parquet"):
        (turned / name).write_bytes((folder / name).read_bytes())
    ratings = pl.read_parquet(folder / "ml-small" / "ratings.parquet")
    ratings.with_columns(rating=6 - pl.col("rating")).write_parquet(
        turned / "ml-small" / "ratings.parquet"
    )
    labels = {
        (recipe, place.name): [
            label["Yes"]
            for example in epoch(load(recipe, "finetune", place))
            if not is_of_catalogue(example)
            for label in example.labels
        ]
        for recipe in ("ml1m", "ml1m-alone")
        for place in (folder, turned)
    }
    assert labels["ml1m", folder.name] != labels["ml1m", "turned"]
    assert labels["ml1m-alone", folder.name] == labels["ml1m-alone", "turned"]


@pytest.fixture(scope="module")
def ml_small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty members; a film of its own, 99, is rated last by everybody."""
    folder = tmp_path_factory.mktemp("ml-small")
    rows = draw_ratings(3, 900, LATER)
    last = pl.DataFrame(
        {
            "user_id": np.arange(1, 31),
            "item_id": np.full(30, 99),
            "rating": np.full(30, 5.0),
            "timestamp": LATER + 200_000 + np.arange(30),
        }
    )
    pl.concat([rows, last]).write_parquet(folder / "ratings.parquet")
    names = {film: f"Film {film} (1990)" for film in range(1, NUM_FILMS + 1)}
    write_items(folder, names | {99: "Film 99 (1999)"})
    return folder


def test_every_member_s_newest_rows_are_held_out_of_both_stages(ml_small: Path) -> None:
    source = load("ml-small", "finetune", ml_small)
    assert source is not None
    train, valid = source.split["train"], source.split["valid"]
    rated, _ = read_ml_small(ml_small)
    assert train.height < rated.height
    own = valid.join(rated, on=["user_id", "item_id", "timestamp"], how="semi")
    assert own.height + train.height == rated.height
    bounds = train.group_by("user_id").agg(end=pl.max("timestamp"))
    assert (
        own.join(bounds, on="user_id")["timestamp"] >= own.join(bounds, on="user_id")["end"]
    ).all()
    assert set(own["user_id"].to_list()) == set(range(1, 31))
    # The other held-out rows are films that the member never rated.
    passed_over = valid.join(rated, on=["user_id", "item_id"], how="anti")
    assert passed_over.height + own.height == valid.height
    assert passed_over["label"].sum() == 0
    assert 0 < passed_over.height <= own["label"].sum()
    for stage in ("catalogue", "finetune"):
        titles = {
            item.fields["title"]
            for example in epoch(load("ml-small", stage, ml_small))
            for item in example.request.candidates
        }
        assert len(titles) == NUM_FILMS
        assert "Film 99 (1999)" not in titles
    assert "Film 99 (1999)" in {
        item.fields["title"] for example in source.valid for item in example.request.candidates
    }


# Films that the two members of the demo name; Ada's first.
DEMO_TITLES = (
    "Lion King, The (1994)", "Snow White and the Seven Dwarfs (1937)", "Mary Poppins (1964)",
    "Toy Story (1995)", "Little Mermaid, The (1989)", "Sound of Music, The (1965)",
    "Finding Nemo (2003)", "Pretty Woman (1990)", "My Fair Lady (1964)", "Shrek (2001)",
    "Cinderella (1950)", "You've Got Mail (1998)", "Saw (2004)", "Scream (1996)",
    "Terminator, The (1984)", "From Dusk Till Dawn (1996)", "Predator (1987)",
    "Blade Runner (1982)", "Thing, The (1982)", "RoboCop (1987)", "Evil Dead II (1987)",
    "Seven (a.k.a. Se7en) (1995)", "Twelve Monkeys (1995)", "28 Days Later (2002)",
)  # fmt: skip


def write_demo_data(folder: Path) -> None:
    titles = [*DEMO_TITLES, *(f"Song {i} (1990)" for i in range(60))]
    genres = ["Musical|Romance"] * 12 + ["Horror|Thriller"] * 12 + ["Musical"] * 60
    titles += [f"Scream on {i} (1990)" for i in range(60)]
    genres += ["Horror"] * 60
    films = range(1, len(titles) + 1)
    pl.DataFrame({"item_id": films, "title": titles, "genres": genres}).write_parquet(
        folder / "items.parquet"
    )
    random = np.random.default_rng(0)
    rows = [
        (member, film, 5.0 if (film + member) % 2 else 2.0, LATER + int(random.integers(10**6)))
        for member in range(1, 9)
        for film in films
    ]
    names = ("user_id", "item_id", "rating", "timestamp")
    pl.DataFrame(rows, schema=names, orient="row").write_parquet(folder / "ratings.parquet")
    (folder / "LICENSE.txt").write_text("theirs")


def test_the_embedded_folder_is_a_ranker_with_two_requests(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    network = build_network("qwen3")
    network.save_pretrained(run)
    build_tokenizer().save_pretrained(run)
    write_demo_data(tmp_path)
    out.mkdir()
    (out / "demo.jsonl").write_text("older")
    write_embedded(run, tmp_path, out)

    weights = load_file(out / "model.safetensors")
    assert {one.dtype for one in weights.values()} == {torch.float16}
    assert (out / "LICENSE-ml-small.txt").read_text() == "theirs"
    written = [json.loads(line) for line in (out / "demo.jsonl").read_text().splitlines()]
    assert [one["id"].split(",")[0] for one in written] == ["Ada", "Bo"]
    requests = demo_requests(tmp_path)
    films = [[item.fields["title"] for item in one.candidates] for one in requests]
    assert films[0] == films[1]
    assert len(set(films[0])) == 100
    assert sum(str(title).startswith("Song") for title in films[0]) == 50
    told = [{str(event.item.fields["title"]) for event in one.history} for one in requests]
    assert all(events <= set(DEMO_TITLES) for events in told)
    assert not told[0] & {"Blade Runner (1982)"}
    assert "Blade Runner (1982)" in told[1]
    for one in requests:
        assert one.time is not None
        assert all(event.time is not None and event.time < one.time for event in one.history)
    scores = Ranker.from_pretrained(out).score(requests[0])
    assert len(scores.candidates) == 100


def test_an_embedded_folder_needs_a_finished_run_and_the_named_films(tmp_path: Path) -> None:
    write_demo_data(tmp_path)
    with pytest.raises(ModelError, match=r"run: .*nothing holds no finished model"):
        write_embedded(tmp_path / "nothing", tmp_path, tmp_path / "out")
    items = pl.read_parquet(tmp_path / "items.parquet")
    items.filter(~pl.col("title").str.starts_with("Shrek")).write_parquet(
        tmp_path / "items.parquet"
    )
    with pytest.raises(DataError, match=r"title: no film begins with 'Shrek \('"):
        demo_requests(tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(1, 1, 4.0)], "should hold a member with two ratings of 4 stars and more or 3 and less"),
        ([(1, 1, 3.5), (1, 2, 3.5)], "should hold a member with two ratings"),
        ([(1, 1, 4.0), (1, 2, 4.0)], "should hold a film that two members rated"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_too_few_ratings_are_refused_by_name(
    tmp_path: Path, rows: list[tuple[int, int, float]], message: str
) -> None:
    write_items(tmp_path, {1: "One", 2: "Two"})
    columns = ["user_id", "item_id", "rating"]
    ratings = pl.DataFrame(rows, schema=columns, orient="row").with_columns(timestamp=LATER)
    ratings.write_parquet(tmp_path / "ratings.parquet")
    with pytest.raises(DataError, match=f"{tmp_path.name}: {message}"):
        load("ml-small", "catalogue", tmp_path)
