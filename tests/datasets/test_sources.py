"""From a download to the tables: whole or not at all, checked later, the same bytes each time."""

import json
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from rankonce.cli import main
from rankonce.datasets import sources
from rankonce.datasets.common_form import SCHEMAS, Adapter, TableWriter, open_dataset
from rankonce.datasets.download import RemoteFile
from rankonce.datasets.examples import make_examples
from rankonce.datasets.sources import ADAPTERS, find_adapter, prepare_dataset
from rankonce.errors import DataError
from rankonce.prompts.tasks import library_tasks
from rankonce.training.data import read_examples

MOVIES = "movieId,title,genres\n1,Heat (1995),Crime\n2,Up (2009),Drama\n3,M (1931),Crime\n"
RATINGS = "userId,movieId,rating,timestamp\n1,1,5,10\n1,2,4,20\n2,3,5,5\n1,3,1,30\n"
TAGS = "userId,movieId,tag,timestamp\n1,2,slow,20\n"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Keep stderr clean."""


@pytest.fixture
def adapter(tmp_path: Path) -> Iterator[Adapter]:
    """Serve MovieLens from this machine under the name of the small set."""
    served = tmp_path / "served"
    served.mkdir()
    with zipfile.ZipFile(served / "ml-latest-small.zip", "w") as zipped:
        zipped.writestr("ml-latest-small/movies.csv", MOVIES)
        zipped.writestr("ml-latest-small/ratings.csv", RATINGS)
        zipped.writestr("ml-latest-small/tags.csv", TAGS)
    handler = partial(_Quiet, directory=str(served))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}/ml-latest-small.zip"
        file = RemoteFile(name="ml-latest-small.zip", addresses=(address,))
        yield replace(find_adapter("ml-latest-small"), files=(file,))
        server.shutdown()
        thread.join()


def test_a_download_becomes_tables_and_a_manifest(adapter: Adapter, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dataset = prepare_dataset(adapter, out)
    names = sorted(path.name for path in out.iterdir())
    assert names == ["events.parquet", "items.parquet", "manifest.json", "source", "tags.parquet"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["tables"]["events"]["rows"] == 4
    assert manifest["source"]["files"][0]["name"] == "ml-latest-small.zip"
    assert manifest["source"]["licence"] == adapter.licence
    for name in ("items", "events"):
        assert dataset.read(name).collect_schema().names() == SCHEMAS[name].names


def test_a_second_run_checks_instead_of_downloading(adapter: Adapter, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_dataset(adapter, out)
    offline = replace(adapter, files=())
    assert prepare_dataset(offline, out).name == "ml-latest-small"
    with pytest.raises(DataError, match="holds ml-latest-small; choose another folder"):
        prepare_dataset(find_adapter("ml-100k"), out)
    table = out / "events.parquet"
    table.write_bytes(table.read_bytes()[:-1] + b"?")
    with pytest.raises(DataError, match=r"events\.parquet: has changed since it was made"):
        prepare_dataset(offline, out)


def test_a_new_adapter_converts_again_from_the_download(adapter: Adapter, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_dataset(adapter, out)
    nowhere = tuple(replace(file, addresses=()) for file in adapter.files)
    newer = replace(adapter, version=2, files=nowhere)
    assert prepare_dataset(newer, out).manifest["adapter_version"] == 2
    source = out / "source" / "ml-latest-small.zip"
    source.write_bytes(source.read_bytes() + b"?")
    with pytest.raises(DataError, match="has changed since it was downloaded"):
        prepare_dataset(replace(newer, version=3), out)


def test_the_same_files_give_the_same_bytes(adapter: Adapter, tmp_path: Path) -> None:
    manifests = []
    for name in ("a", "b"):
        prepare_dataset(adapter, tmp_path / name)
        manifests.append((tmp_path / name / "manifest.json").read_bytes())
    assert manifests[0] == manifests[1]


def test_a_failed_conversion_keeps_the_dataset_that_was_there(
    adapter: Adapter, tmp_path: Path
) -> None:
    out, bad = tmp_path / "out", tmp_path / "bad"
    prepare_dataset(adapter, out)
    bad.mkdir()
    (bad / "movies.csv").write_text(MOVIES)
    (bad / "ratings.csv").write_text(RATINGS + "1,1\n")
    with pytest.raises(DataError, match=r"ratings\.csv: line 6: should have 4 fields, has 2"):
        prepare_dataset(adapter, out, given=bad)
    assert open_dataset(out, verify=True).manifest["tables"]["events"]["rows"] == 4
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_a_folder_without_a_manifest_is_no_dataset(adapter: Adapter, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json: should be the manifest"):
        open_dataset(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 2}')
    with pytest.raises(DataError, match="format: should be 1, is 2"):
        open_dataset(tmp_path)
    out = tmp_path / "out"
    prepare_dataset(adapter, out)
    (out / "items.parquet").unlink()
    with pytest.raises(DataError, match=r"items\.parquet: is missing"):
        open_dataset(out)
    with pytest.raises(DataError, match="there is no such file or folder"):
        prepare_dataset(adapter, out, given=tmp_path / "nothing")


def test_events_of_many_batches_are_sorted_through_the_disk(tmp_path: Path) -> None:
    with TableWriter(tmp_path) as tables:
        tables.add_items(pl.DataFrame({"item": ["a"], "title": ["A"]}))
        for batch in range(7, 0, -1):
            members = [f"m{place}" for place in range(500)]
            frame = {"member": members, "item": "a", "action": "x", "time": batch}
            tables.add_events(pl.DataFrame(frame).with_columns(value=pl.lit(1.0)))
        facts = tables.finish()
    events = pl.read_parquet(tmp_path / "events.parquet")
    assert facts["events"]["rows"] == events.height == 3500
    assert events["member"].rle_id().max() == 499
    by_member = events.group_by("member").agg("time")["time"].to_list()
    assert all(times == list(range(1, 8)) for times in by_member)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.parquet", "items.parquet"]


def test_empty_files_are_no_dataset(adapter: Adapter, tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    (given / "movies.csv").write_text(MOVIES)
    (given / "ratings.csv").write_text("userId,movieId,rating,timestamp\n")
    (given / "tags.csv").write_text(TAGS)
    with pytest.raises(DataError, match="hold no rows of a dataset"):
        prepare_dataset(adapter, tmp_path / "out", given=given)


def test_every_adapter_is_complete_and_serves_known_tasks() -> None:
    assert {"ml-100k", "ml-1m", "ml-20m", "ml-32m", "ml-latest", "goodbooks"} <= set(ADAPTERS)
    assert {"amazon-2023:All_Beauty", "mind-small", "wands", "esci", "cranfield"} <= set(ADAPTERS)
    for name, adapter in ADAPTERS.items():
        assert adapter.name == name
        assert set(adapter.tasks) <= set(library_tasks())
        assert adapter.licence
        assert adapter.page.startswith("http")
        assert all(one.addresses[0].startswith("https://") for one in adapter.files)
    assert find_adapter("amazon-2018:Video_Games").files[0].name == "Video_Games_5.json.gz"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    code = exit_.value.code
    return code if isinstance(code, int) else 0, captured.out, captured.err


def test_the_command_lists_the_datasets(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "datasets")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == len(ADAPTERS) + 1
    assert "research use with acknowledgement" in out
    code, out, _ = run(capsys, "datasets", "--json")
    assert [row["name"] for row in json.loads(out)] == list(ADAPTERS)


def test_the_command_downloads_and_prints_examples_that_train_reads(
    adapter: Adapter,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sources.ADAPTERS, adapter.name, adapter)
    out_folder = tmp_path / "out"
    code, out, err = run(capsys, "datasets", adapter.name, "--out", out_folder)
    assert code == 0
    assert f"{out_folder}/events.parquet: 4 rows" in out
    assert "ml-latest-small.zip" in err
    assert "licence: research use" in err
    options = ("datasets", adapter.name, "--out", out_folder)
    code, out, _ = run(capsys, *options, "--task", "movie-rating")
    path = tmp_path / "examples.jsonl"
    path.write_text(out)
    assert read_examples(path) == list(make_examples(open_dataset(out_folder), "movie-rating"))
    code, out, _ = run(capsys, *options, "--task", "movie-like", "--max-examples", 1)
    assert len(out.splitlines()) == 1
    code, out, _ = run(capsys, *options, "--json")
    assert json.loads(out)["dataset"] == adapter.name


def test_bad_usage_and_failures_exit_with_2_and_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "datasets", "ml-1m")[0] == 2
    assert run(capsys, "datasets", "--out", tmp_path)[0] == 2
    assert run(capsys, "datasets", "ml-1m", "--out", tmp_path, "--max-examples", 3)[0] == 2
    code, _, err = run(capsys, "datasets", "ml-2m", "--out", tmp_path)
    assert code == 1
    assert "error: dataset: should be one of ml-100k" in err
