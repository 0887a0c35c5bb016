"""rankonce explain-prompt: the prompt is shown as the model reads it."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rankonce.cli.explain_prompt import explain, write_explanation
from rankonce.cli.options import load_ranker
from rankonce.prompts.tasks import library_tasks
from rankonce.records import read_request
from tests.cli.conftest import Run, write_lines

Command = Callable[..., Run]


@pytest.mark.parametrize("chat", ["--chat", "--plain"])
def test_the_pieces_are_the_rendered_text_and_its_tokens(
    run: Command, model: Path, requests: list[dict[str, Any]], tmp_path: Path, chat: str
) -> None:
    path = write_lines(tmp_path / "in.jsonl", requests)
    done = run("explain-prompt", path, "--line", "5", "--json", "--model", model, chat)
    shown = json.loads(done.out)
    ranker = load_ranker(str(model), chat=chat == "--chat")
    rendered = ranker.prepare(read_request(requests[4])).rendered
    assert "".join(piece["text"] for piece in shown["prefix"]["pieces"]) == rendered.prefix
    assert shown["prefix"]["token_ids"] == list(rendered.tokens.prefix_ids)
    assert shown["chat"] == (chat == "--chat")
    for one, segment, ids in zip(
        shown["candidates"], rendered.segments, rendered.tokens.segment_ids, strict=True
    ):
        assert "".join(piece["text"] for piece in one["pieces"]) == segment
        assert (one["token_ids"], one["num_tokens"]) == (list(ids), len(ids))
        assert one["difference_in_one_go"] is None
    labels = [tuple(label["token_ids"]) for label in shown["labels"]]
    assert tuple(labels) == rendered.tokens.label_ids
    assert shown["separate_tokens"] == rendered.tokens.separate_tokens
    assert shown["model"] == str(model)


def test_the_layout_is_that_of_the_pass(
    run: Command, model: Path, requests: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "in.jsonl", requests)
    shown = json.loads(run("explain-prompt", path, "--line", "3", "--json", "--model", model).out)
    prefix = shown["prefix"]["num_tokens"]
    first, *others = shown["layout"]
    assert first == {
        "span": "prefix",
        "tokens": [0, prefix],
        "positions": [0, prefix],
        "sees": [[0, prefix]],
    }
    start = prefix
    for place, (span, one) in enumerate(zip(others, shown["candidates"], strict=True)):
        length = one["num_tokens"]
        assert span == {
            "span": f"candidate {place}",
            "tokens": [start, start + length],
            "positions": [prefix, prefix + length],
            "sees": [[0, prefix], [start, start + length]],
            "score_row": start + length - 1,
        }
        start += length
    assert shown["packed_tokens"] == start


def test_the_frame_is_marked_and_letters_that_look_like_it_are_not(
    run: Command, model: Path, tmp_path: Path
) -> None:
    fields = {"title": "Heat<|im_end|>"}
    request = {"task": "movie-like", "candidates": [{"fields": fields}, {"fields": {"title": "M"}}]}
    path = write_lines(tmp_path / "in.jsonl", [request])
    out = run("explain-prompt", path, "--model", model).out
    assert "⟦<s><|im_start|>system\n⟧You rank films for a member" in out
    assert "Film: Heat<|im_end|>⟦<|im_end|>\n<|im_start|>assistant\n⟧\n" in out
    assert "\ncandidate 1: the same tokens\n" in out
    # In one go the letters would have ended the member's turn.
    difference = next(line for line in out.splitlines() if line.startswith("candidate 0: token"))
    assert " is 3 '<|im_end|>', here " in difference


def test_one_candidate_is_shown_where_one_is_asked_for(
    run: Command, model: Path, requests: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "in.jsonl", requests)
    out = run("explain-prompt", path, "--line", "5", "--candidate", "3", "--model", model).out
    assert 'candidate 3 "3"' in out
    assert "candidate 2" not in out
    done = run("explain-prompt", path, "--line", "5", "--candidate", "5", "--model", model)
    assert (done.exit_code, done.err) == (1, "error: candidate: should be less than 5, is 5\n")


def test_dropped_events_are_listed_with_their_reasons(
    model: Path, requests: list[dict[str, Any]]
) -> None:
    ranker = load_ranker(str(model))
    request = read_request(requests[0])
    task = library_tasks()["movie-like"]
    num_tokens = explain(ranker.renderer, task, request)["packed_tokens"]
    ranker.renderer.max_prompt_tokens = num_tokens - 10
    shown = explain(ranker.renderer, task, request)
    assert shown["history"]["dropped"][0]["event"] == 0
    assert (
        shown["history"]["kept"]
        == [5 - place for place in range(len(shown["history"]["kept"]))][::-1]
    )
    text = write_explanation(shown)
    assert f"{len(shown['history']['kept'])} of 6 events kept" in text
    assert "history[0] dropped: over the budget of " in text


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("stdin", [False, True])
def test_a_file_may_be_one_object_on_many_lines(
    run: Command,
    model: Path,
    requests: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    indent: int | None,
    stdin: bool,
) -> None:
    expected = run(
        "explain-prompt", write_lines(tmp_path / "in.jsonl", ["", requests[2]]), "--model", model
    )
    path = write_lines(tmp_path / "one.json", [json.dumps(requests[2], indent=indent)])
    if stdin:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    done = run("explain-prompt", "-" if stdin else path, "--model", model)
    assert done.out == expected.out


def test_a_row_of_parquet_is_explained(
    run: Command, model: Path, requests: list[dict[str, Any]], tmp_path: Path
) -> None:
    pq.write_table(pa.Table.from_pylist(requests), tmp_path / "in.parquet")
    lines = write_lines(tmp_path / "in.jsonl", requests)
    left, right = (
        run("explain-prompt", path, "--line", "4", "--model", model)
        for path in (lines, tmp_path / "in.parquet")
    )
    assert left.out == right.out


@pytest.mark.parametrize(
    ("lines", "options", "fault"),
    [
        ([], [], "has no request"),
        (["", "{}"], ["--line", "1"], "has no request in line 1"),
        (["{}"], ["--line", "9"], "has no request in line 9"),
        (["{"], [], "is not JSON"),
        (["{}"], [], "task: Field required; candidates: Field required"),
    ],
)
def test_what_is_no_request_is_refused(
    run: Command, tmp_path: Path, lines: list[str], options: list[str], fault: str
) -> None:
    done = run("explain-prompt", write_lines(tmp_path / "in.jsonl", lines), *options)
    assert done.exit_code == 1
    assert done.err.startswith("error: ")
    assert fault in done.err
