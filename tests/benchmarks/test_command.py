"""The command lines of the benchmarks: one without the ranker's libraries, one with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rankonce.benchmarks.command import BenchmarkOptions, main, run_benchmarks
from rankonce.benchmarks.results import MEASURED, load
from rankonce.benchmarks.timing import time_call
from rankonce.cli import app
from rankonce.errors import DataError

# What a borrowed machine lacks, and what of ours would need it.
BLOCKED = """
import sys
for name in ("pydantic", "rich", "polars", "fastapi", "typer", "pyarrow", "tabulate", "hypothesis",
             "pytest", "rankonce.ranker", "rankonce.prompts", "rankonce.cli", "rankonce.serving",
             "rankonce.datasets", "rankonce.evaluation", "rankonce.training"):
    sys.modules[name] = None
from rankonce.benchmarks.command import main
from rankonce.benchmarks import report
raise SystemExit(main(arguments=sys.argv[1:]))
"""


def test_it_runs_where_the_rankers_libraries_are_missing(tmp_path: Path) -> None:
    arguments = ["--small", "--device=cpu", f"--output={tmp_path}", "--only=P=7", "--commit=abc"]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*/*-abc.json")
    assert done.stdout.startswith(str(path))
    results = load(path)
    assert results.environment["commit"] == "abc"
    assert results.ceilings is not None
    assert results.ceilings.matmul_tflops > 0
    rows = [row for row in results.rows if row.status == MEASURED]
    assert {row.suite for row in rows} == {"kernels", "pass"}
    assert {row.device for row in rows} == {"cpu"}
    assert all(row.max_abs_difference is not None for row in rows)
    assert all(row.median_ms and row.ratio for row in rows)
    assert "rankonce" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--minutes", "0"], "--minutes: should be more than 0, is 0"),
        (["passes"], "suite: should be one of kernels, pass, is 'passes'"),
        (["--shape", "x"], "unrecognized arguments"),
    ],
)
def test_bad_usage_exits_with_2(
    arguments: list[str], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments=arguments)
    assert caught.value.code == 2
    assert fault in capsys.readouterr().err


def test_a_device_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments=["--device", "abacus", "--output", str(tmp_path)]) == 1
    assert "error: device: 'abacus' cannot be used" in capsys.readouterr().err
    with pytest.raises(DataError, match="minutes: should be more than 0"):
        run_benchmarks(BenchmarkOptions(minutes=0))


def test_the_cli_measures_and_reports(tmp_path: Path) -> None:
    runner = CliRunner()
    output = tmp_path / "results"
    arguments = ["bench", "kernels", "--small", "--device=cpu", "--only=label_logprobs"]
    done = runner.invoke(app, [*arguments, f"--output={output}"])
    assert done.exit_code == 0, done.output
    (path,) = output.glob("*/*.json")
    assert {row.operation for row in load(path).rows} == {"label_logprobs"}
    chip = json.loads(path.read_text())["environment"]["chip"]
    page = tmp_path / "page.md"
    page.write_text(f"<!-- begin: kernels {chip} -->\n<!-- end -->\n")
    done = runner.invoke(app, ["bench", "report", str(path), f"--page={page}"])
    assert done.exit_code == 0, done.output
    assert "not measured" in done.output
    assert "| label_logprobs, " in page.read_text()


def test_the_cli_refuses_bad_options() -> None:
    runner = CliRunner()
    for arguments in (["kernels", "--minutes=0"], ["pass", "--no-such"], ["report"]):
        assert runner.invoke(app, ["bench", *arguments]).exit_code == 2


def test_a_time_on_a_cpu_has_its_quantiles_in_order() -> None:
    timing = time_call(lambda: sum(range(1000)), "cpu")
    assert 0 < timing.p20_ms <= timing.median_ms <= timing.p80_ms
    assert timing.device_ms is None
