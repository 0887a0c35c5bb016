"""Precisions side by side: the command, its record and the table that a page holds."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rankonce import ranker
from rankonce.benchmarks.precision import EMBEDDED_MODEL, PrecisionOptions, main, run_precision
from rankonce.benchmarks.precision_arms import ARMS
from rankonce.benchmarks.precision_table import render
from rankonce.cli import app
from rankonce.errors import DataError, ModelError
from rankonce.evaluation.agreement import BARS
from rankonce.evaluation.labelled_requests import LabelledRequest, read_tokens, write_tokens
from tests.benchmarks.conftest import tokens_of
from tests.conftest import build_request, data_folder

RECORD = Path(__file__).parents[2] / "results" / "precision-embedded.json"
# What a borrowed machine lacks, and what of ours would need it.
BLOCKED = """
import sys
for name in ("pydantic", "rich", "polars", "fastapi", "typer", "pyarrow", "scipy", "sklearn",
             "rankonce.ranker", "rankonce.prompts", "rankonce.cli", "rankonce.serving",
             "rankonce.datasets", "rankonce.training"):
    sys.modules[name] = None
from rankonce.benchmarks.precision import main
raise SystemExit(main(sys.argv[1:]))
"""


def test_tokens_give_what_their_requests_gave(tmp_path: Path) -> None:
    path, saved = tmp_path / "requests.jsonl", tmp_path / "saved" / "tokens.jsonl"
    lines = []
    for size, seed in ((7, 1), (4, 2)):
        labels = ["Yes", "No", None, "No", "Yes", "No", "No"][:size]
        lines.append(json.dumps({**asdict(build_request(size, seed=seed)), "labels": labels}))
    path.write_text("\n".join(lines))
    outputs = [tmp_path / "text.json", tmp_path / "tokens.json"]
    common = {"arms": ("fp8+fp8-head",), "device": "cpu"}
    run_precision(
        PrecisionOptions(requests=path, save_tokens=saved, output=outputs[0], **common)  # type: ignore[arg-type]
    )
    run_precision(PrecisionOptions(tokens=saved, output=outputs[1], **common))  # type: ignore[arg-type]
    text, tokens = (json.loads(output.read_text()) for output in outputs)
    assert text["arms"] == tokens["arms"]
    assert text["requests"] | {"source": ""} == tokens["requests"] | {"source": ""}
    assert [arm["name"] for arm in text["arms"]] == ["fp32", "bf16", "fp8+fp8-head"]
    assert text["model"]["num_parameters"] == tokens["model"]["num_parameters"] > 1_000_000
    assert text["bars"] == BARS
    assert text["environment"]["torch"]
    assert [one.labels for one in read_tokens(saved)] == [(1, 0, None, 0, 1, 0, 0), (1, 0, None, 0)]
    assert text["arms"][0]["auc"] is not None


def test_tokens_run_where_the_rankers_libraries_are_missing(tmp_path: Path) -> None:
    path, output = tmp_path / "tokens.jsonl", tmp_path / "precision.json"
    write_tokens(
        path, [LabelledRequest(tokens=tokens_of(size, seed=size), labels=()) for size in (5, 9)]
    )
    text = path.read_text().replace(', "labels": []', "")
    path.write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, f"--tokens={path}", f"--output={output}", "--device=cpu"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    assert [arm["name"] for arm in record["arms"]] == list(ARMS)
    assert record["requests"]["num_candidates"] == 14
    assert record["model"]["name"] == "embedded"
    assert str(tmp_path) not in record["command"]
    assert "auc" not in record["arms"][0]
    for name in ARMS:
        assert name in done.stdout


def test_the_command_line_reaches_it(tmp_path: Path, tokens_file: Path) -> None:
    output = tmp_path / "precision.json"
    arguments = ["--tokens", str(tokens_file), "--arm", "fp8", "--output", str(output)]
    arguments += ["--keep", "*.o_proj,*.down_proj"]
    result = CliRunner().invoke(app, ["bench", "precision", *arguments])
    assert result.exit_code == 0, result.output
    record = json.loads(output.read_text())
    names = ["fp32", "bf16", "fp8", "fp8 keeping *.o_proj, *.down_proj"]
    assert [arm["name"] for arm in record["arms"]] == names
    assert record["arms"][0]["auc"] is not None
    assert record["command"] == (
        "rankonce bench precision --tokens tokens.jsonl --arm fp8 --keep '*.o_proj,*.down_proj'"
    )


def test_options_that_make_no_sense_are_refused(tmp_path: Path, tokens_file: Path) -> None:
    options = PrecisionOptions(tokens=tokens_file, output=tmp_path / "x.json", device="cpu")
    with pytest.raises(DataError, match=r"arm: should be one of fp32, .*, is 'fp4'"):
        run_precision(replace(options, arms=("fp4",)))
    with pytest.raises(DataError, match="keep: should be patterns with commas between"):
        run_precision(replace(options, keep=("a,",)))
    with pytest.raises(ModelError, match=r"keep: '\*\.nothing' names no layer"):
        run_precision(replace(options, keep=("*.nothing",)))
    with pytest.raises(DataError, match="exactly one should be given"):
        run_precision(replace(options, requests=tokens_file))
    with pytest.raises(DataError, match="exactly one should be given"):
        run_precision(replace(options, tokens=None))
    with pytest.raises(DataError, match="exactly one should be given"):
        run_precision(replace(options, record=tokens_file))
    with pytest.raises(DataError, match="members: should be 1 or more, is 0"):
        run_precision(replace(options, tokens=None, ml_small=tmp_path, num_members=0))


def test_a_missing_file_is_an_error_not_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = f"--output={tmp_path / 'x.json'}"
    assert main([f"--tokens={tmp_path / 'none.jsonl'}", output, "--device=cpu"]) == 1
    assert "none.jsonl: cannot be read" in capsys.readouterr().err
    assert main([f"--ml-small={tmp_path / 'none'}", output, "--device=cpu"]) == 1
    assert "has no ratings.parquet; or be made by" in capsys.readouterr().err


def test_ml_small_gives_the_same_members_every_time(tmp_path: Path) -> None:
    records = []
    for run in range(2):
        output = tmp_path / f"{run}.json"
        run_precision(
            PrecisionOptions(
                ml_small=data_folder("ml-small"),
                num_members=3,
                arms=("bf16",),
                device="cpu",
                output=output,
            )
        )
        records.append(json.loads(output.read_text()))
    first, again = records
    assert first["requests"] == again["requests"]
    assert first["arms"] == again["arms"]
    assert first["requests"]["num_requests"] == 3
    assert 30 <= first["requests"]["num_candidates"] <= 150
    assert first["command"] == (
        "rankonce bench precision --ml-small ml-small --members 3 --arm bf16 --device cpu"
    )


def test_a_page_holds_the_table_of_a_record(tmp_path: Path) -> None:
    record = json.loads(RECORD.read_text())
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- begin: precision -->\nold\n<!-- end -->\nafter\n")
    arguments = ["--record", str(RECORD), "--page", str(page)]
    assert CliRunner().invoke(app, ["bench", "precision", *arguments]).exit_code == 0
    text = page.read_text()
    assert "old" not in text
    for part in ("command", "commit"):
        assert {**record, **record["environment"]}[part] in text
    (row,) = (line for line in text.splitlines() if line.startswith("| `fp8+fp8-head-at-18` |"))
    arm = next(arm for arm in record["arms"] if arm["name"] == "fp8+fp8-head-at-18")
    assert f"| {arm['against']['bf16']['kendall_tau']:.4f} |" in row
    assert row.endswith("| missed top agreement, tau-b, distinct |")
    assert main(arguments) == 0
    assert page.read_text() == text


def test_the_documentation_holds_the_table_of_the_record() -> None:
    page = (RECORD.parents[1] / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert f"<!-- begin: precision -->\n\n{render(json.loads(RECORD.read_text()))}\n\n" in page


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_what_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"record\.json: "):
        run_precision(PrecisionOptions(record=path))


def test_the_embedded_model_is_the_rankers() -> None:
    assert EMBEDDED_MODEL == ranker.EMBEDDED_MODEL
