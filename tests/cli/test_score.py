"""rankonce score: what goes in, what comes out, what is rejected, and how a run goes on."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rankonce.cli import result_files
from rankonce.cli.options import load_ranker
from rankonce.cli.request_files import RequestLine
from rankonce.cli.score import score_groups
from rankonce.ranker import Ranker, RankerConfig
from rankonce.records import read_request
from tests.cli.conftest import Run, write_lines

ROOT = Path(__file__).parents[2]
BAD_LINES = [
    ('{"task": ', "is not JSON: Expecting value"),
    ('{"task": "movie-like", "candidates": [], "time": NaN}', "is not JSON: NaN"),
    ("[1, 2]", "request: Input should be a dictionary"),
    ('{"task": "movie-like"}', "candidates: Field required"),
    ('{"task": "movie-like", "candidates": []}', "candidates: should hold at least one"),
    ('{"task": "song-skip", "candidates": [{"fields": {}}]}', "no task is called 'song-skip'"),
    ('{"task": "movie-like", "candidates": [{"fields": {}}]}', "fields.title: is required"),
    (
        '{"task": "movie-like", "candidates": [{"fields": {"title": "a", "year": 1}}]}',
        "candidates[0].fields.year: unknown field",
    ),
    (
        '{"task": "movie-like", "candidates": [{"fields": {"title": "' + "long " * 5000 + '"}}]}',
        "candidates[0]: the prompt has",
    ),
    (
        '{"task": "movie-like", "candidates": [{"fields": {"title": "\\ud800"}}]}',
        "candidates[0].fields.title: should be text, holds half of a surrogate pair",
    ),
    ("[" * 100_000, "is not JSON"),
]
Command = Callable[..., Run]


def values(records: list[dict[str, Any]]) -> list[list[float]]:
    return [[candidate["value"] for candidate in record["candidates"]] for record in records]


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def num_results(path: Path) -> int:
    if path.suffix == ".parquet":
        return int(pq.read_metadata(path).num_rows)
    return len(read_json_lines(path))


def assert_same_scores(records: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [r["line"] for r in records] == [r["line"] for r in expected]
    for left, right in zip(values(records), values(expected), strict=True):
        assert left == pytest.approx(right, abs=2e-5)


def test_json_lines_are_scored_as_each_request_by_itself(
    run: Command, model: Path, requests: list[dict[str, Any]], tmp_path: Path
) -> None:
    done = run("score", write_lines(tmp_path / "in.jsonl", requests), "--model", model)
    assert done.exit_code == 0
    ranker = load_ranker(str(model))
    assert [record["line"] for record in done.records] == list(range(1, 13))
    for record, request in zip(done.records, requests, strict=True):
        alone = ranker.score(read_request(request))
        assert record["id"] == request["id"]
        assert record["task"] == "movie-like"
        for one, other in zip(record["candidates"], alone.candidates, strict=True):
            assert (one["id"], one["rank"]) == (other.id, other.rank)
            assert one["log_probs"] == pytest.approx(dict(other.log_probs), abs=1e-5)
            assert one["probabilities"].keys() == one["log_probs"].keys()
            assert sum(one["probabilities"].values()) == pytest.approx(1)
            assert math.exp(one["log_probs"]["Yes"]) == one["probabilities"]["Yes"]
            assert "label_mass" not in one
        assert record["history"] == {
            "policy": "chronological",
            "num_events": 6,
            "num_kept": alone.history.num_kept,
            "dropped": [],
        }
        assert record["usage"]["separate_tokens"] == alone.usage.separate_tokens
        assert record["distinct_score_ratio"] == 1.0
        assert record["warnings"] == []


def test_stdout_holds_nothing_but_results_and_stderr_sums_up(
    run: Command, model: Path, requests: list[dict[str, Any]], tmp_path: Path
) -> None:
    done = run("score", write_lines(tmp_path / "in.jsonl", requests), "--model", model)
    assert len(done.records) == 12
    lines = done.err.splitlines()
    num_candidates = sum(len(request["candidates"]) for request in requests)
    assert lines[0].startswith(f"scored 12 requests with {num_candidates} candidates in ")
    assert lines[0].endswith(" candidates/s")
    usage = [record["usage"] for record in done.records]
    computed = sum(one["computed_tokens"] for one in usage)
    separate = sum(one["separate_tokens"] for one in usage)
    assert f"computed {computed:,} tokens" in lines[1]
    assert f"has {separate:,}: {1 - computed / separate:.0%} saved" in lines[1]
    assert lines[2:] == ["distinct-score ratio 1.000"]


@pytest.mark.parametrize("budget", ["1", "700", "1000000"])
def test_the_size_of_a_pass_does_not_change_the_scores(
    run: Command, model: Path, requests: list[dict[str, Any]], tmp_path: Path, budget: str
) -> None:
    path = write_lines(tmp_path / "in.jsonl", requests[:5])
    whole = run("score", path, "--model", model).records
    done = run("score", path, "--model", model, "--max-tokens-per-pass", budget)
    assert_same_scores(done.records, whole)


def test_a_dash_reads_stdin(
    run: Command,
    model: Path,
    requests: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_lines(tmp_path / "in.jsonl", requests[:3])
    from_file = run("score", path, "--model", model)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    from_stdin = run("score", "-", "--model", model)
    assert from_stdin.out == from_file.out


def test_blank_lines_are_left_out_and_counted(
    run: Command, model: Path, requests: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "in.jsonl", ["", requests[0], "  ", "", requests[1]])
    assert [r["line"] for r in run("score", path, "--model", model).records] == [2, 5]


def test_an_empty_file_gives_no_results(run: Command, model: Path, tmp_path: Path) -> None:
    done = run("score", write_lines(tmp_path / "in.jsonl", []), "--model", model)
    assert (done.exit_code, done.out) == (0, "")
    assert done.err.startswith("scored 0 requests")


def test_a_candidate_without_a_line_is_rejected_and_the_run_goes_on(
    run: Command, model: Path, tmp_path: Path
) -> None:
    task = tmp_path / "song-skip.yaml"
    task.write_text(
        "{name: song-skip, description: d, instruction: i, question: q, "
        "candidate: {fields: {title: {}}, lines: ['Song: {title}']}, "
        "labels: [{name: 'Yes'}, {name: 'No'}], ranking: {kind: log_odds, label: 'No'}}"
    )
    titles: list[dict[str, str]] = [{"title": "Help!"}, {}, {"title": "Yesterday"}]
    lines = [
        {"task": "song-skip", "candidates": [{"fields": {"title": "Girl"}}, {"fields": fields}]}
        for fields in titles
    ]
    path, out = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    assert run("score", path, "--model", model, "--task-file", task, "--out", out).exit_code == 0
    assert [record["line"] for record in read_json_lines(out)] == [1, 3]
    (reject,) = read_json_lines(tmp_path / "out.jsonl.rejects.jsonl")
    reason = "candidates[1].fields: leave no line of the task to write"
    assert (reject["line"], reject["reason"]) == (2, reason)


@pytest.mark.parametrize(
    "as_text", [(), ("candidates",), ("profile", "history", "examples", "candidates")]
)
def test_parquet_rows_score_as_json_lines(
    run: Command,
    model: Path,
    requests: list[dict[str, Any]],
    tmp_path: Path,
    as_text: tuple[str, ...],
) -> None:
    # Fields that only some rows have are null in the others.
    varied = [dict(request) for request in requests]
    varied[1] = {k: v for k, v in varied[1].items() if k not in ("profile", "history", "time")}
    varied[2]["candidates"] = [{"fields": {"title": "Up", "num_raters": 7}}]
    varied[3]["examples"] = [{"item": {"fields": {"title": "Ran"}}, "label": "No"}]
    rows = [
        {k: json.dumps(v) if k in as_text else v for k, v in request.items()} for request in varied
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet", row_group_size=5)
    lines = write_lines(tmp_path / "in.jsonl", varied)
    from_parquet = run("score", tmp_path / "in.parquet", "--model", model)
    from_json = run("score", lines, "--model", model)
    assert from_parquet.out == from_json.out


def test_parquet_times_may_be_timestamps(
    run: Command, model: Path, requests: list[dict[str, Any]], tmp_path: Path
) -> None:
    request = {**requests[0], "history": [], "task": "movie-rating", "profile": {}}
    table = pa.Table.from_pylist([request, request])
    moments = pa.array([1_000_000_000, 0], pa.timestamp("s"))
    table = table.set_column(table.schema.get_field_index("time"), "time", moments)
    table = table.drop_columns(["history", "profile"])
    pq.write_table(table, tmp_path / "in.parquet")
    done = run("score", tmp_path / "in.parquet", "--model", model)
    assert (done.exit_code, len(done.records)) == (0, 2)


def test_parquet_results_hold_what_json_lines_hold(
    run: Command, model: Path, requests: list[dict[str, Any]], tmp_path: Path
) -> None:
    mixed = [*requests[:4], {**requests[4], "task": "movie-rating", "profile": {}, "history": []}]
    path = write_lines(tmp_path / "in.jsonl", mixed)
    expected = run("score", path, "--model", model, "--label-mass").records
    out = tmp_path / "out.parquet"
    done = run("score", path, "--model", model, "--label-mass", "--out", out)
    assert (done.exit_code, done.out) == (0, "")
    assert pq.read_table(out).to_pylist(maps_as_pydicts="strict") == expected
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.parquet"}


def test_label_mass_is_reported_where_it_is_asked_for(
    run: Command, model: Path, requests: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "in.jsonl", requests[:2])
    plain = run("score", path, "--model", model).records
    done = run("score", path, "--model", model, "--label-mass")
    assert_same_scores(done.records, plain)
    masses = [one["label_mass"] for record in done.records for one in record["candidates"]]
    assert all(0 < mass < 1 for mass in masses)
    assert "warnings stand in the results of 2 requests" in done.err
    assert "labels: their probability" in done.records[0]["warnings"][0]


def test_chat_and_plain_prompts_score_differently(
    run: Command, model: Path, requests: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "in.jsonl", requests[:1])
    default, chat, plain = (
        values(run("score", path, "--model", model, *option).records)
        for option in ([], ["--chat"], ["--plain"])
    )
    assert default == chat != plain


def test_a_task_of_ones_own_is_scored(run: Command, model: Path, tmp_path: Path) -> None:
    task = tmp_path / "song-skip.yaml"
    task.write_text(
        "{name: song-skip, description: d, instruction: i, question: q, "
        "candidate: {fields: {title: {required: true}}, lines: ['Song: {title}']}, "
        "labels: [{name: 'Yes'}, {name: 'No'}], ranking: {kind: log_odds, label: 'No'}}"
    )
    request = {"task": "song-skip", "candidates": [{"fields": {"title": "Help!"}}]}
    path = write_lines(tmp_path / "in.jsonl", [request])
    done = run("score", path, "--model", model, "--task-file", task)
    assert done.records[0]["task"] == "song-skip"


def test_bad_lines_are_rejected_with_their_reason_and_the_run_goes_on(
    run: Command, model: Path, requests: list[dict[str, Any]], tmp_path: Path
) -> None:
    lines = [requests[0], *(text for text, _ in BAD_LINES), requests[1]]
    path, out = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    done = run("score", path, "--model", model, "--out", out)
    assert done.exit_code == 0
    assert [record["line"] for record in read_json_lines(out)] == [1, len(lines)]
    rejects = read_json_lines(tmp_path / "out.jsonl.rejects.jsonl")
    assert [reject["line"] for reject in rejects] == list(range(2, len(lines)))
    for reject, (text, reason) in zip(rejects, BAD_LINES, strict=True):
        assert reason in reject["reason"]
        assert reject["input"] == text
    assert f"rejected {len(BAD_LINES)} requests, see {out}.rejects.jsonl" in done.err


def test_a_line_that_is_not_utf_8_is_rejected(
    run: Command, model: Path, requests: list[dict[str, Any]], tmp_path: Path
) -> None:
    path, rejects = write_lines(tmp_path / "in.jsonl", requests[:1]), tmp_path / "bad.jsonl"
    with path.open("ab") as file:
        file.write(b'{"task": "\xff"}')
    done = run("score", path, "--model", model, "--rejects", rejects)
    assert (done.exit_code, len(done.records)) == (0, 1)
    (reject,) = read_json_lines(rejects)
    assert "is not JSON: 'utf-8' codec" in reject["reason"]


def test_a_bad_row_of_parquet_is_rejected(run: Command, model: Path, tmp_path: Path) -> None:
    rows = [
        {"task": "movie-like", "candidates": [{"fields": {"title": title, "like_share": share}}]}
        for title, share in [("Up", 0.5), (None, 0.5), ("Heat", math.nan), ("M", None)]
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    out = tmp_path / "out.jsonl"
    assert run("score", tmp_path / "in.parquet", "--model", model, "--out", out).exit_code == 0
    assert [record["line"] for record in read_json_lines(out)] == [1, 4]
    rejects = read_json_lines(tmp_path / "out.jsonl.rejects.jsonl")
    assert [(reject["line"], reject["reason"]) for reject in rejects] == [
        (2, "candidates[0].fields.title: is required and missing"),
        (3, "candidates[0].fields.like_share: should be a finite number"),
    ]
    assert json.loads(rejects[0]["input"]) == rows[1]


def test_a_column_of_broken_json_is_rejected_by_name(
    run: Command, model: Path, tmp_path: Path
) -> None:
    rows = [{"task": "movie-like", "candidates": text} for text in ('[{"fields": {}', "[]")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    rejects = tmp_path / "rejects.jsonl"
    run("score", tmp_path / "in.parquet", "--model", model, "--rejects", rejects)
    assert [reject["reason"].split(":")[:2] for reject in read_json_lines(rejects)] == [
        ["candidates", " is not JSON"],
        ["candidates", " should hold at least one candidate"],
    ]


def test_without_a_place_for_rejects_the_first_bad_line_stops_the_run(
    run: Command, model: Path, requests: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "in.jsonl", [requests[0], '{"task": 3}', requests[1]])
    done = run("score", path, "--model", model)
    assert done.exit_code == 1
    assert [record["line"] for record in done.records] == [1]
    assert done.err.startswith("error: line 2: task: Input should be a valid string")
    assert "--rejects" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_run_that_scores_nothing_fails(run: Command, model: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", [text for text, _ in BAD_LINES])
    done = run("score", path, "--model", model, "--out", tmp_path / "out.jsonl")
    assert done.exit_code == 1
    assert f"none of the {len(BAD_LINES)} requests could be scored" in done.err
    assert "line 1: is not JSON" in done.err


@pytest.mark.parametrize("budget", ["1", "100000"])
def test_only_the_requests_that_give_nan_are_rejected(
    run: Command,
    model_without_z: Path,
    requests: list[dict[str, Any]],
    tmp_path: Path,
    budget: str,
) -> None:
    lines = [json.loads(json.dumps(request)) for request in requests[:6]]
    lines[1]["candidates"][0]["fields"]["title"] = "Z"
    lines[3]["history"][0]["item"]["fields"]["title"] = "Z"
    out = tmp_path / "out.jsonl"
    path = write_lines(tmp_path / "in.jsonl", lines)
    options = ["--model", model_without_z, "--max-tokens-per-pass", budget]
    done = run("score", path, "--out", out, *options)
    assert done.exit_code == 0
    rejects = read_json_lines(tmp_path / "out.jsonl.rejects.jsonl")
    assert [reject["line"] for reject in rejects] == [2, 4]
    assert all("candidates[0]: the model gave [nan" in reject["reason"] for reject in rejects)
    clean = run("score", write_lines(path, requests[:6]), *options).records
    clean = [record for record in clean if record["line"] not in (2, 4)]
    assert_same_scores(read_json_lines(out), clean)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("num_forwards", [0, 1, 4])
def test_a_run_that_was_stopped_goes_on_where_it_was(
    run: Command,
    model: Path,
    requests: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
    num_forwards: int,
) -> None:
    monkeypatch.setattr(result_files, "_CANDIDATES_A_PART", 4)
    lines = [*requests[:3], "broken", "", *requests[3:9], "broken", requests[9]]
    path = write_lines(tmp_path / "in.jsonl", lines)
    options = ["--model", model, "--max-tokens-per-pass", "600"]
    whole, out = tmp_path / f"whole{suffix}", tmp_path / f"out{suffix}"
    run("score", path, *options, "--out", whole)

    forward = Ranker.forward
    calls: list[int] = []

    def stop(self: Ranker, *args: Any, **kwargs: Any) -> Any:
        if len(calls) == num_forwards:
            raise KeyboardInterrupt
        calls.append(1)
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Ranker, "forward", stop)
        assert run("score", path, *options, "--out", out).exit_code == 130
    done = run("score", path, *options, "--out", out, "--resume")
    assert done.exit_code == 0
    read: Callable[[Path], Any] = (
        read_json_lines
        if suffix == ".jsonl"
        else lambda path: pq.read_table(path).to_pylist(maps_as_pydicts="strict")
    )
    assert_same_scores(read(out), read(whole))
    rejects = [path.with_name(path.name + ".rejects.jsonl") for path in (out, whole)]
    assert rejects[0].read_text() == rejects[1].read_text()
    assert not (tmp_path / "out.parquet.parts").exists()
    # Whatever ended may be resumed as well, and finds nothing to do.
    before = read(out)
    done = run("score", path, *options, "--out", out, "--resume")
    assert "scored 0 requests" in done.err
    assert "resumed after 10 requests that were done" in done.err
    assert read(out) == before


def test_a_torn_last_line_is_scored_again(
    run: Command, model: Path, requests: list[dict[str, Any]], tmp_path: Path
) -> None:
    path, out = write_lines(tmp_path / "in.jsonl", requests), tmp_path / "out.jsonl"
    run("score", path, "--model", model, "--out", out)
    whole = read_json_lines(out)
    content = out.read_bytes()
    ends = [place + 1 for place, byte in enumerate(content) if byte == ord("\n")]
    for end in (ends[4] + 60, ends[5] - 1, ends[5], 7, 0):
        out.write_bytes(content[:end])
        done = run("score", path, "--model", model, "--out", out, "--resume")
        assert done.exit_code == 0
        assert_same_scores(read_json_lines(out), whole)


def test_a_killed_process_is_resumed(
    run: Command, model: Path, requests: list[dict[str, Any]], tmp_path: Path
) -> None:
    lines = [{**requests[place % 12], "id": str(place)} for place in range(400)]
    lines[7] = {"task": "nothing"}
    path, out = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    arguments = ["score", str(path), "--model", str(model), "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", "from rankonce.cli import main; main()", *arguments,
         "--max-tokens-per-pass", "300"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    while not (out.exists() and out.read_bytes().count(b"\n") > 20):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    num_before = out.read_bytes().count(b"\n")
    assert num_before < 399
    done = run(*arguments, "--resume")
    assert f"resumed after {num_before} requests" in done.err
    records = read_json_lines(out)
    assert [record["line"] for record in records] == [n for n in range(1, 401) if n != 8]
    assert [r["line"] for r in read_json_lines(tmp_path / "out.jsonl.rejects.jsonl")] == [8]
    expected = run("score", write_lines(path, lines[8:20]), "--model", model).records
    for record, other in zip(records[7:19], expected, strict=True):
        assert values([record])[0] == pytest.approx(values([other])[0], abs=2e-5)


def test_results_of_another_run_are_not_resumed(
    run: Command, model: Path, requests: list[dict[str, Any]], tmp_path: Path
) -> None:
    path, out = write_lines(tmp_path / "in.jsonl", requests[:4]), tmp_path / "out.jsonl"
    out.write_text('{"hello": 1}\n')
    done = run("score", path, "--model", model, "--out", out, "--resume")
    assert (done.exit_code, out.read_text()) == (1, '{"hello": 1}\n')
    assert "line 1 was not written by rankonce score" in done.err
    # Line 2 stands neither in the results nor in the rejects.
    out.write_text('{"line": 1, "id": "0"}\n{"line": 3, "id": "2"}\n')
    done = run("score", path, "--model", model, "--out", out, "--resume")
    assert done.exit_code == 1
    assert "2 of the 3 requests up to line 3" in done.err


def test_without_resume_results_and_rejects_start_anew(
    run: Command, model: Path, requests: list[dict[str, Any]], tmp_path: Path
) -> None:
    for suffix in (".jsonl", ".parquet"):
        out = tmp_path / f"out{suffix}"
        rejects = tmp_path / f"out{suffix}.rejects.jsonl"
        for lines in ([requests[0], "broken", requests[1]], [requests[2]]):
            path = write_lines(tmp_path / "in.jsonl", lines)
            assert run("score", path, "--model", model, "--out", out).exit_code == 0
            assert rejects.exists() == ("broken" in lines)
            assert num_results(out) == len(lines) - ("broken" in lines)


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["missing.jsonl"], "no file 'missing.jsonl'"),
        (["."], "no file '.'"),
        ([], "requests"),
        (["in.jsonl", "--resume"], "--out"),
        (["in.jsonl", "--out", "out.csv"], "should end in .jsonl or .parquet"),
        (["in.jsonl", "--out", "in.jsonl"], "three files"),
        (["in.jsonl", "--out", "out.jsonl", "--rejects", "./out.jsonl"], "three files"),
        (["in.jsonl", "--precision", "fp7"], "--precision"),
        (["in.jsonl", "--max-tokens-per-pass", "0"], "--max-tokens-per-pass"),
        (["in.jsonl", "--task-file", "missing.yaml"], "missing.yaml"),
        (["in.jsonl", "--colour"], "--colour"),
    ],
)
def test_bad_usage_exits_with_2(
    run: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    fault: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    write_lines(tmp_path / "in.jsonl", ["{}"])
    done = run("score", *arguments)
    assert (done.exit_code, done.out) == (2, "")
    assert fault in done.err
    assert (tmp_path / "in.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["in.jsonl", "--device", "abacus"], "error: device: 'abacus' cannot be used"),
        (["broken.parquet"], "error: broken.parquet: is not a Parquet file"),
        (["in.jsonl", "--out", "missing/out.jsonl"], "missing/out.jsonl"),
        (["in.jsonl", "--task-file", "in.jsonl"], "error: in.jsonl: name: Field required"),
        (["in.jsonl", "--model", "."], "error: model: . has no config.json"),
    ],
)
def test_failures_exit_with_1_and_name_what_is_wrong(
    run: Command,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    fault: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "in.jsonl", ["{}"])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    done = run("score", "--model", model, *arguments)
    assert done.exit_code == 1
    assert done.err.startswith("error: ")
    assert fault in done.err


def test_requests_are_read_no_further_than_the_pass_that_is_full(
    model: Path, requests: list[dict[str, Any]]
) -> None:
    taken: list[int] = []

    def endless() -> Iterator[RequestLine]:
        for number in range(1, 10**9):
            taken.append(number)
            content = json.dumps(requests[number % 12]).encode()
            yield RequestLine(number=number, content=content)

    ranker = load_ranker(str(model), max_tokens_per_pass=2000)
    groups = score_groups(ranker, endless())
    for _ in range(3):
        done = [line.number for line, _ in next(groups)]
        assert len(taken) <= done[-1] + 1


def test_the_options_say_the_defaults_of_the_ranker() -> None:
    from rankonce.cli.options import MaxTokensPerPassOption, PrefixCacheOption

    shown = [option.__metadata__[0].show_default for option in  # type: ignore[attr-defined]
             (MaxTokensPerPassOption, PrefixCacheOption)]  # fmt: skip
    config = RankerConfig()
    assert shown == [str(config.max_tokens_per_pass), str(config.prefix_cache_mb)]
