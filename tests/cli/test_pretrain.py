"""``rankonce pretrain``: what it says of files, what it prints, what it refuses."""

import math
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from rankonce.cli.pretrain import read_weight
from tests.cli.conftest import Run

Command = Callable[..., Run]


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text("\n\n".join(f"A note on film {n}." for n in range(30)))
    return path


def test_it_says_what_files_are_and_prints_what_it_measured(
    run: Command, notes: Path, tmp_path: Path
) -> None:
    films = pl.DataFrame({"item_id": [1], "title": ["Heat (1995)"], "genres": ["Crime"]})
    films.write_parquet(tmp_path / "items.parquet")
    inputs = ["--data", f"{notes}=2", "--data", tmp_path / "items.parquet", "--valid", notes]
    shape = ["--size", "1m", "--max-steps", 3, "--tokens-per-step", 100, "--seed", 5]
    ran = run("pretrain", *inputs, "--out", tmp_path / "out", *map(str, shape))
    assert ran.exit_code == 0
    assert f"\n{tmp_path / 'items.parquet'}: films, 1 rows, without counts" in f"\n{ran.err}"
    assert f"\nvalid: {notes}: plain text, a document ends at a blank line" in ran.err
    (measured,) = ran.records
    assert measured["perplexity"] == pytest.approx(math.exp(measured["loss"]))
    assert 0 < measured["bits_per_byte"] < 20
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_file_with_unknown_columns_is_refused_before_anything_is_written(
    run: Command, tmp_path: Path
) -> None:
    path = tmp_path / "odd.parquet"
    pl.DataFrame({"x": [1]}).write_parquet(path)
    ran = run("pretrain", "--data", path, "--out", tmp_path / "out")
    assert (ran.exit_code, ran.out) == (1, "")
    assert ran.err.startswith(f"error: {path}: columns: should be text, or items (item, title,")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--max-steps", "3", "--epochs", "2"], "takes the place of --epochs"),
        (["--model", "m", "--size", "1m"], "is for training from scratch"),
        (["--schedule", "zigzag"], "zigzag"),
        (["--until", "yesterday"], "yesterday"),
        (["--data", "same.txt", "--data", "same.txt=2"], "should name each file once"),
    ],
)
def test_options_that_contradict_are_bad_usage(
    run: Command, notes: Path, tmp_path: Path, options: list[str], fault: str
) -> None:
    ran = run("pretrain", "--data", notes, "--out", tmp_path / "out", *options)
    assert ran.exit_code == 2
    assert fault in ran.err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("texts", ("texts", 1.0)),
        ("texts=0.5", ("texts", 0.5)),
        ("year=2024/part.txt", ("year=2024/part.txt", 1.0)),
        ("year=2024/part.txt=3", ("year=2024/part.txt", 3.0)),
    ],
)
def test_a_weight_follows_the_last_equals_sign(text: str, expected: tuple[str, float]) -> None:
    assert read_weight(text) == (Path(expected[0]), expected[1])
