"""``rankonce quantize``: the table, the record as JSON, and the exit codes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rankonce.benchmarks.precision import PrecisionOptions, run_precision
from rankonce.cli.quantize import Scheme
from rankonce.distillation import quantization
from rankonce.errors import NumericsError
from rankonce.model.quantized import SCHEMES
from rankonce.ranker import EMBEDDED_MODEL
from tests.cli.conftest import Run, write_lines

Command = Callable[..., Run]


def test_the_schemes_of_the_command_line_are_those_of_the_model() -> None:
    assert [scheme.value for scheme in Scheme] == list(SCHEMES)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's requests, every third candidate a Yes."""
    lines = [json.loads(line) for line in (EMBEDDED_MODEL / "demo.jsonl").read_text().splitlines()]
    for line in lines:
        line["labels"] = ["No" if place % 3 else "Yes" for place in range(len(line["candidates"]))]
    return write_lines(tmp_path_factory.mktemp("data") / "labelled.jsonl", lines)


def test_the_table_holds_both_models_beside_the_bars(
    run: Command, labelled: Path, tmp_path: Path
) -> None:
    # Every step of the table must come from these requests, tokenised ones too.
    out, tokens = tmp_path / "int8", tmp_path / "tokens.jsonl"
    run_precision(
        PrecisionOptions(
            requests=labelled, save_tokens=tokens, output=tmp_path / "p.json", device="cpu"
        )
    )
    done = run("quantize", EMBEDDED_MODEL, "--to", "cpu-int8", "--out", out, "--data", labelled)
    assert done.exit_code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].startswith("cpu-int8: accepted; ")
    rows = {cells[1].strip(): cells[2:] for cells in (line.split("|") for line in lines[3:])}
    record = json.loads((out / "quantization.json").read_text())
    for name in ("auc", "calibration_error"):
        assert rows[name][0].strip() == f"{record['arms']['unquantised'][name]:.4f}"
        assert rows[name][1].strip() == f"{record['arms']['quantised'][name]:.4f}"
    assert rows["kendall_tau"][2].strip() == "0.9800"
    # From fp16, whose embeddings stay.
    assert 0.5 < record["bytes"]["after"] / record["bytes"]["before"] < 0.75
    done = run(
        *("quantize", EMBEDDED_MODEL, "--to", "cpu-int8", "--out", tmp_path / "again"),
        *("--data", tokens, "--json"),
    )
    assert done.exit_code == 0, done.err
    assert json.loads(done.out)["arms"] == record["arms"]


def test_what_is_refused_exits_with_1_and_loads_with_a_warning(
    run: Command, labelled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "fp8"
    arguments = ("quantize", EMBEDDED_MODEL, "--to", "fp8", "--out", out, "--data", labelled)
    done = run(*arguments, "--accept", "kendall_tau=1", "--json")
    assert done.exit_code == 1
    assert done.err.splitlines()[-1].startswith("error: refused: kendall_tau should be ≥ 1.0, is ")
    assert json.loads(done.out)["verdict"] == "refused"
    kept = run(
        *("quantize", EMBEDDED_MODEL, "--to", "fp8", "--out", tmp_path / "kept"),
        *("--data", labelled, "--accept", "kendall_tau=1", "--keep-refused"),
    )
    assert kept.exit_code == 0
    assert kept.err.splitlines()[-1].startswith("refused: kendall_tau should be ≥ 1.0, is ")
    assert kept.out.startswith("fp8: refused; ")
    scored = run("score", EMBEDDED_MODEL / "demo.jsonl", "--model", out)
    assert scored.exit_code == 0, scored.err
    assert "was refused by the ranking acceptance when it was quantised" in caplog.text


def test_without_requests_nothing_is_accepted(run: Command, tmp_path: Path) -> None:
    done = run("quantize", EMBEDDED_MODEL, "--to", "cpu-int8", "--out", tmp_path / "q")
    assert done.exit_code == 0
    assert done.out.startswith("cpu-int8: unchecked; ")
    assert "unchecked: without --data" in done.err


def test_what_fails_on_the_way_leaves_no_checkpoint_without_a_verdict(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise NumericsError("request 1: not finite")

    monkeypatch.setattr(quantization, "_score", fail)
    done = run("quantize", EMBEDDED_MODEL, "--to", "cpu-int8", "--out", tmp_path / "q")
    assert (done.exit_code, "request 1: not finite" in done.err) == (1, True)
    whole = quantization._write
    monkeypatch.undo()
    monkeypatch.setattr(quantization, "_write", lambda *one: (whole(*one), fail()))
    done = run("quantize", EMBEDDED_MODEL, "--to", "cpu-int8", "--out", tmp_path / "q")
    assert done.exit_code == 1
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    done = run("quantize", EMBEDDED_MODEL, "--to", "cpu-int8", "--out", tmp_path / "q")
    assert done.exit_code == 0, done.err


@pytest.mark.parametrize(
    ("options", "exit_code", "fault"),
    [
        (("--to", "int3"), 2, "'int3'"),
        (("--to", "fp8", "--accept", "kendall_tau"), 2, "accept: should be NAME=VALUE"),
        (("--to", "fp8", "--accept", "auc_loss=0"), 1, "error: data: should be given, since"),
        (("--to", "fp8"), 1, "exists and is not empty; choose a new folder"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    run: Command, tmp_path: Path, options: tuple[str, ...], exit_code: int, fault: str
) -> None:
    (tmp_path / "file").write_text("x")
    done = run("quantize", EMBEDDED_MODEL, "--out", tmp_path, *options)
    assert (done.exit_code, done.out) == (exit_code, "")
    assert fault in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
