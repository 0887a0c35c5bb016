"""Tables, pictures and bars come from files of results and from nothing else."""

from dataclasses import replace
from pathlib import Path

import pytest

from rankonce.benchmarks import bars, report
from rankonce.benchmarks.passes import BF16, FP8, PLAIN
from rankonce.benchmarks.results import (
    FAILED,
    MEASURED,
    NOT_MEASURED,
    Results,
    Row,
    chip_slug,
    choose_path,
    load,
    save,
)
from rankonce.benchmarks.roofline import Ceilings
from rankonce.benchmarks.workloads import (
    LLAMA_8B,
    MAIN_SHAPE,
    MANY_SHORT_SHAPE,
    QWEN3_06B,
    SHORT_SHAPE,
)
from rankonce.errors import DataError

CEILINGS = Ceilings(matmul_tflops=790.0, fp8_tflops=1400.0, copy_tb_s=4.3)
PAGE = """# Kernels

<!-- begin: environment h200 -->
<!-- end -->
text between
<!-- begin: kernels h200 -->
old
<!-- end -->
<!-- begin: passes h200 -->
<!-- end -->
<!-- begin: bars h200 -->
<!-- end -->
<!-- begin: kernels other-chip -->
stays
<!-- end -->
<!-- begin: machine code -->
stays too
<!-- end -->
"""


def attention(arm: str, shape: str, ms: float, ratio: float, heads: str = "H=16 G=8 K=128") -> Row:
    return Row(
        suite="kernels",
        operation="segment_attention",
        direction="forward",
        shape=shape,
        subject=heads,
        arm=arm,
        device="cuda",
        dtype="bfloat16",
        status=MEASURED,
        median_ms=ms,
        p20_ms=ms,
        p80_ms=ms,
        tflops=790.0 * ratio,
        ratio=ratio,
        ceiling="matmul_tflops",
        max_abs_difference=0.01,
    )


def whole(model: str, arm: str, ms: float, limit_ms: float, dtype: str = "bfloat16") -> Row:
    return Row(
        suite="pass",
        operation="pass",
        direction="forward",
        shape=MAIN_SHAPE.name,
        subject=model,
        arm=arm,
        device="cuda",
        dtype=dtype,
        status=MEASURED,
        median_ms=ms,
        details={"limit_ms": limit_ms, "candidates_per_s": 500 / ms * 1e3, "packing_ms": 2.0},
        note="a note",
    )


def good_rows() -> list[Row]:
    main = MAIN_SHAPE.name
    return [
        attention("rankonce", main, 1.0, 0.52),
        attention("rankonce", main, 2.0, 0.55, "H=32 G=8 K=128"),
        attention("FlexAttention", main, 2.6, 0.2),
        attention("FlexAttention", main, 5.4, 0.2, "H=32 G=8 K=128"),
        attention("rankonce", main, 1.0, 0.1, "H=32 G=8 K=64"),
        attention("rankonce", MANY_SHORT_SHAPE.name, 1.0, 0.36),
        attention("rankonce", SHORT_SHAPE.name, 0.02, 0.35),
        whole(QWEN3_06B.name, PLAIN, 120.0, 58.0),
        whole(QWEN3_06B.name, BF16, 84.0, 58.0),
        whole(QWEN3_06B.name, FP8, 59.0, 58.0, "fp8"),
        whole(LLAMA_8B.name, BF16, 840.0, 648.0),
        whole(LLAMA_8B.name, FP8, 600.0, 648.0, "fp8"),
        replace(
            attention("SDPA, dense mask", main, 1.0, 0.1),
            status=FAILED,
            reason="OutOfMemoryError: CUDA out of memory\nmore",
        ),
    ]


def written(folder: Path, rows: list[Row]) -> Path:
    path = folder / "h200" / "run.json"
    save(
        path,
        Results(
            environment={"chip": "h200", "gpu": "NVIDIA H200", "commit": "abc", "torch": "2.11"},
            ceilings=CEILINGS,
            rows=tuple(rows),
        ),
    )
    return path


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = written(tmp_path, good_rows())
    results = load(path)
    assert list(results.rows) == good_rows()
    assert results.ceilings == CEILINGS
    save(tmp_path / "again.json", results)
    assert (tmp_path / "again.json").read_text() == path.read_text()


def test_a_file_that_is_none_of_ours_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    for text in ("{", "[]", '{"rows": []}', '{"environment": {}, "ceilings": 1, "rows": []}'):
        path.write_text(text)
        with pytest.raises(DataError, match="is not a file of benchmark results"):
            load(path)


def test_files_are_named_by_chip_date_and_commit_and_never_overwritten(tmp_path: Path) -> None:
    assert chip_slug("NVIDIA H200") == "h200"
    assert chip_slug("NVIDIA A100-SXM4-80GB") == "a100-sxm4-80gb"
    first = choose_path(tmp_path, "h200", "0123456789ab+changes")
    assert first.parent == tmp_path / "h200"
    assert first.name.endswith("-0123456789ab-changes.json")
    first.parent.mkdir()
    first.touch()
    assert choose_path(tmp_path, "h200", "0123456789ab+changes").name == first.stem + "-2.json"


def test_a_page_is_made_of_the_files_alone_and_comes_out_the_same_twice(tmp_path: Path) -> None:
    path, page = written(tmp_path, good_rows()), tmp_path / "page.md"
    page.write_text(PAGE)
    report.write_report([path], page=page)
    text = page.read_text()
    assert "| rankonce | 1 ms, 411 TFLOP/s, 52 % |" in text
    assert "| Qwen3-0.6B: rankonce, accelerated | 84 | 58 | 1.45 | 5952 | 2 |" in text
    assert "- segment_attention, SDPA, dense mask: failed: OutOfMemoryError: CUDA out of" in text
    assert "- commit: abc" in text
    assert "old" not in text
    assert "text between" in text
    assert "stays\n" in text
    assert "stays too" in text
    report.write_report([path], page=page)
    assert page.read_text() == text
    # Other numbers in the file are other numbers on the page.
    written(tmp_path, [replace(good_rows()[0], median_ms=7.77)])
    report.write_report([path], page=page)
    assert "7.77 ms" in page.read_text()


def test_pictures_come_out_the_same_twice(tmp_path: Path) -> None:
    path = written(tmp_path, good_rows())
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        report.write_report([path], plots=folder)
    first, second = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders)
    assert set(first) == {"attention-forward-h200.png", "passes-h200.png"}
    assert first == second


def test_a_measured_row_of_a_later_file_counts(tmp_path: Path) -> None:
    early = written(tmp_path / "early", good_rows())
    changed = [
        replace(good_rows()[0], median_ms=0.5),
        replace(good_rows()[1], status=NOT_MEASURED, reason="out of time", median_ms=None),
    ]
    late = written(tmp_path / "late", changed)
    rows = report.merge([early, late])["h200"].rows
    assert len(rows) == len(good_rows())
    assert [row.median_ms for row in rows[:2]] == [0.5, 2.0]


@pytest.mark.parametrize(
    ("page", "fault"),
    [
        ("no markers", "has no marker like"),
        ("<!-- begin: kernels a100 -->\n<!-- end -->", "has no marker like"),
        ("<!-- begin: tables h200 -->\n<!-- end -->", "'tables' should be one of environment"),
    ],
)
def test_a_page_without_a_usable_marker_is_refused(tmp_path: Path, page: str, fault: str) -> None:
    path, file = written(tmp_path, good_rows()), tmp_path / "page.md"
    file.write_text(page)
    with pytest.raises(DataError, match=fault):
        report.write_page(file, report.merge([path]))
    assert file.read_text() == page


def test_rows_that_reach_every_bar_pass_them_all() -> None:
    found = bars.evaluate(good_rows())
    assert [bar.verdict for bar in found] == [bars.PASS] * 8
    assert [bar.value for bar in found[:4]] == [0.52, 2.6, 0.36, 0.35]
    assert found[6].value == pytest.approx(840 / 648)
    assert found[7].ratio == pytest.approx(1.0)


def test_rows_short_of_every_bar_fail_them_all() -> None:
    def worse(row: Row) -> Row:
        if row.arm == "FlexAttention" or row.median_ms is None:
            return row
        # FP8 slower by more than bf16, so that its advantage shrinks too.
        factor = 1.2 if row.dtype == "fp8" else 1.1
        return replace(row, ratio=(row.ratio or 0) * 0.9, median_ms=row.median_ms * factor)

    found = bars.evaluate([worse(row) for row in good_rows()])
    assert [bar.verdict for bar in found] == [bars.FAIL] * 8


def test_bars_without_rows_are_not_measured() -> None:
    found = bars.evaluate([])
    assert [bar.verdict for bar in found] == [bars.UNKNOWN] * 8
    assert bars.render(found).count("not measured") == 8


def test_a_kernel_of_ours_that_failed_fails_its_bars_and_a_peer_that_failed_does_not() -> None:
    ours, theirs = (
        replace(attention(arm, MAIN_SHAPE.name, 1.0, 0.6), status=FAILED, ratio=None)
        for arm in ("rankonce", "FlexAttention")
    )
    verdicts = [bar.verdict for bar in bars.evaluate([ours])]
    assert verdicts[:4] == [bars.FAIL] * 4
    assert verdicts[4:] == [bars.UNKNOWN] * 4
    verdicts = [bar.verdict for bar in bars.evaluate([good_rows()[0], theirs])]
    assert verdicts[:2] == [bars.PASS, bars.UNKNOWN]
