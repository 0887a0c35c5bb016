"""Every kernel compiles for Ampere, Hopper and Blackwell, and to what it should."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rankonce.benchmarks import machine_code

RECORD = Path(__file__).parents[2] / "results" / "machine-code.json"
TENSOR_CORES = {80: {"mma.sync"}, 90: {"wgmma.mma_async"}, 100: {"tcgen05.mma"}}
# Tiles below what the newer units take run on the older ones: few labels, and the backward pass of
# head size 256. FP32 products run on plain cores, and the rest multiplies nothing.
PLAIN_CORES = ("-fp32-", "_fp32_1024", "_fp32_2560")
SMALL_TILES = ("label_logprobs_labels", "dq-bf16-256", "dkv-bf16-256")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Compile in a process of its own: this one interprets its kernels."""
    output = tmp_path_factory.mktemp("machine-code") / "record.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "rankonce.benchmarks.machine_code", "--output", str(output)]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    return json.loads(output.read_text())["kernels"]


def test_shared_memory_fits_the_chip(compiled: list[dict]) -> None:
    assert {row["capability"] for row in compiled} == {80, 90, 100}
    for row in compiled:
        assert row["shared_bytes"] <= machine_code.SHARED_LIMITS[row["capability"]], row


def test_products_run_on_the_tensor_cores_of_the_chip(compiled: list[dict]) -> None:
    products = [
        row
        for row in compiled
        if row["name"].startswith(("segment_attention", "label_logprobs"))
        and not (
            "-fp32-" in row["name"] or "_fp32_1024" in row["name"] or "_fp32_2560" in row["name"]
        )
    ]
    assert len(products) > 60
    for row in products:
        is_small = any(part in row["name"] for part in SMALL_TILES)
        expected = {"mma.sync"} if is_small else TENSOR_CORES[row["capability"]]
        assert row["tensor_core"] in expected, row


def test_expected_instructions_are_there(compiled: list[dict]) -> None:
    assert [row for row in compiled if row["missing"]] == []


def test_registers_do_not_spill_more_than_recorded(compiled: list[dict]) -> None:
    recorded = {
        (row["name"], row["capability"]): row["spill_bytes"]
        for row in json.loads(RECORD.read_text())["kernels"]
    }
    found = {(row["name"], row["capability"]): row["spill_bytes"] for row in compiled}
    assert found.keys() == recorded.keys(), "record the variants again: see docs/kernels.md"
    worse = {key: spilled for key, spilled in found.items() if spilled > recorded[key]}
    assert not worse


def test_the_kernels_of_the_bars_do_not_spill(compiled: list[dict]) -> None:
    forward = [row for row in compiled if row["name"].startswith("segment_attention-bf16")]
    hopper = [row for row in forward if row["capability"] == 90]
    assert len(hopper) == 4
    assert all(row["spill_bytes"] == 0 for row in hopper)


def test_the_table_of_a_page_comes_from_the_record(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- begin: machine code -->\nold\n<!-- end -->\nafter\n")
    assert machine_code.main(["--record", str(RECORD), "--page", str(page)]) == 0
    text = page.read_text()
    assert "old" not in text
    assert "segment_attention-bf16-128" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    once = page.read_text()
    machine_code.main(["--record", str(RECORD), "--page", str(page)])
    assert page.read_text() == once


def test_a_page_without_markers_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing\n")
    assert machine_code.main(["--record", str(RECORD), "--page", str(page)]) == 1
    assert "begin: machine code" in capsys.readouterr().err


def test_interpreted_kernels_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as exit_info:
        machine_code.main([])
    assert exit_info.value.code == 2
