"""``python -m rankonce.benchmarks.report``: tables, plots and bars from files of results alone."""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rankonce.benchmarks import bars
from rankonce.benchmarks.attention import OPERATION
from rankonce.benchmarks.pages import update_page
from rankonce.benchmarks.results import MEASURED, Results, Row, first_line, load
from rankonce.errors import DataError, RankOnceError


def merge(paths: Sequence[Path]) -> dict[str, Results]:
    """Read files of results, one result a chip; a measured row of a later file counts.

    Raises:
        DataError: a file is not one of results.
    """
    merged: dict[str, Results] = {}
    for path in paths:
        results = load(path)
        before = merged.get(results.chip)
        rows = {} if before is None else {row.key: row for row in before.rows}
        for row in results.rows:
            if row.status == MEASURED or row.key not in rows or rows[row.key].status != MEASURED:
                rows[row.key] = row
        merged[results.chip] = Results(
            environment=results.environment, ceilings=results.ceilings, rows=tuple(rows.values())
        )
    return merged


def render_environment(results: Results) -> str:
    """List where the numbers come from and the ceilings."""
    environment, ceilings = results.environment, results.ceilings
    names = ("gpu", "processor", "commit", "began", "python", "torch", "transformers", "triton")
    lines = [f"- {name}: {environment[name]}" for name in names if name in environment]
    if ceilings is not None:
        lines.append(f"- ceiling of dense products: {ceilings.matmul_tflops:.4g} TFLOP/s")
        if ceilings.fp8_tflops is not None:
            lines.append(f"- ceiling of FP8 products: {ceilings.fp8_tflops:.4g} TFLOP/s")
        lines.append(f"- ceiling of copies: {ceilings.copy_tb_s:.3g} TB/s")
    return "\n".join(lines)


def render_kernels(results: Results) -> str:
    """Attention with a table for each direction and heads, the others with one an operation."""
    rows = [row for row in results.rows if row.suite == "kernels"]
    attention = [row for row in rows if row.operation == OPERATION]
    others = [row for row in rows if row.operation != OPERATION]
    parts = [
        _table(title, group, lambda row: row.arm, lambda row: row.shape)
        for title, group in _grouped(
            attention, lambda row: f"{row.operation}, {row.direction}, {row.subject}"
        )
    ]
    parts += [
        _table(title, group, lambda row: row.subject, lambda row: row.arm)
        for title, group in _grouped(others, lambda row: f"{row.operation}, {row.shape}")
    ]
    return "\n\n".join(part for part in (*parts, _notes(rows), _reasons(rows)) if part)


def _table(
    title: str, rows: Sequence[Row], line_of: Callable[[Row], str], column_of: Callable[[Row], str]
) -> str:
    columns = _distinct(column_of(row) for row in rows)
    lines = [f"| {title} | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for name, found in _grouped(rows, line_of):
        cells = {column_of(row): _kernel_cell(row) for row in found}
        lines.append(f"| {name} | {' | '.join(cells.get(one, '–') for one in columns)} |")
    return "\n".join(lines)


def render_passes(results: Results) -> str:
    """One table a shape: models and arms with their limits."""
    rows = [row for row in results.rows if row.suite == "pass"]
    parts = []
    for shape, group in _grouped(rows, lambda row: row.shape):
        parts.append(_roofline(shape, group))
        lines = [
            f"| {shape} | ms | its limit, ms | × limit | candidates/s | packing, ms |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in group:
            name = f"{row.subject}: {row.arm}"
            if row.status != MEASURED or row.median_ms is None:
                lines.append(f"| {name} | {row.status} | – | – | – | – |")
                continue
            limit_ms = _limit_ms(row)
            packing_ms = row.details.get("packing_ms")
            lines.append(
                f"| {name} | {row.median_ms:.4g} | {limit_ms:.4g} | {row.median_ms / limit_ms:.2f} "
                f"| {row.details['candidates_per_s']:.4g} "
                f"| {'–' if packing_ms is None else f'{packing_ms:.3g}'} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(part for part in (*parts, _notes(rows), _reasons(rows)) if part)


def _roofline(shape: str, rows: Sequence[Row]) -> str:
    """Work and least times of a shape with the ceilings of the same run."""
    columns = {
        "GEMM, TFLOP": "gemm_tflop",
        "attention, TFLOP": "attention_tflop",
        "head, TFLOP": "head_tflop",
        "limit, ms": "limit_ms",
        "FP8 limit, ms": "fp8_limit_ms",
        "with FP8 linear layers, ms": "fp8_linear_limit_ms",
        "separate prompts, ms": "separate_limit_ms",
        "elementwise, ms": "elementwise_ms",
    }
    lines = [f"| {shape} | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for subject, found in _grouped(rows, lambda row: row.subject):
        details = next((row.details for row in found if "limit_ms" in row.details), {})
        cells = [f"{details[key]:.3g}" if key in details else "–" for key in columns.values()]
        lines.append(f"| {subject} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _limit_ms(row: Row) -> float:
    if row.dtype == "fp8" and "fp8_linear_limit_ms" in row.details:
        return row.details["fp8_linear_limit_ms"]
    return row.details["separate_limit_ms" if "separate" in row.arm else "limit_ms"]


def _kernel_cell(row: Row) -> str:
    if row.status != MEASURED:
        return row.status
    parts = [f"{row.best_ms:.3g} ms"]
    if row.tflops is not None:
        parts.append(f"{row.tflops:.3g} TFLOP/s")
    elif row.tb_s is not None:
        parts.append(f"{row.tb_s:.3g} TB/s")
    if row.ratio is not None:
        parts.append(f"{100 * row.ratio:.3g} %")
    return ", ".join(parts)


def _notes(rows: Sequence[Row]) -> str:
    return "\n".join(_distinct(f"- {row.arm}: {row.note}" for row in rows if row.note))


def _reasons(rows: Sequence[Row]) -> str:
    """Say once for each arm and reason why there is no number."""
    missing = [row for row in rows if row.status != MEASURED]
    return "\n".join(
        _distinct(
            f"- {row.operation}, {row.arm}: {row.status}: {first_line(row.reason)[:200]}"
            for row in missing
        )
    )


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _grouped(rows: Sequence[Row], key: Callable[[Row], str]) -> list[tuple[str, list[Row]]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.items())


_TABLES: dict[str, Callable[[Results], str]] = {
    "environment": render_environment,
    "kernels": render_kernels,
    "passes": render_passes,
    "bars": lambda results: bars.render(bars.evaluate(results.rows)),
}


def write_page(page: Path, merged: dict[str, Results]) -> None:
    """Write the tables between the markers of a page.

    Raises:
        DataError: a marker names no table, or none of the page is about these results.
    """

    def text_of(name: str) -> str | None:
        table, _, chip = name.rpartition(" ")
        if chip not in merged:
            return None
        if table not in _TABLES:
            raise DataError(f"{page}: marker {table!r} should be one of {', '.join(_TABLES)}")
        return _TABLES[table](merged[chip])

    update_page(page, text_of, example=f"kernels {next(iter(merged))}")


def evaluate_bars(paths: Sequence[Path]) -> list[bars.Bar]:
    """Evaluate the bars over the rows of some files."""
    return bars.evaluate([row for results in merge(paths).values() for row in results.rows])


def write_report(
    paths: Sequence[Path], *, page: Path | None = None, plots: Path | None = None
) -> str:
    """Bring a page and plots up to date.

    Args:
        plots: folder of the pictures.

    Returns:
        The bars as a table.

    Raises:
        DataError, MissingDependencyError: a file cannot be used, or matplotlib is missing.
    """
    merged = merge(paths)
    if page is not None:
        write_page(page, merged)
    if plots is not None:
        from rankonce.benchmarks.plots import plot_results

        for results in merged.values():
            plot_results(plots, results)
    return bars.render(evaluate_bars(paths))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from a command line; exit 2 for bad usage, 1 for failure."""
    parser = argparse.ArgumentParser(
        prog="python -m rankonce.benchmarks.report",
        description="Tables, plots and bars from files of results.",
    )
    parser.add_argument("files", nargs="+", type=Path, help="files of results, oldest first")
    parser.add_argument("--page", type=Path, help="Markdown with <!-- begin: kernels h200 -->")
    parser.add_argument("--plots", type=Path, help="folder of the pictures")
    parsed = parser.parse_args(arguments)
    try:
        print(write_report(parsed.files, page=parsed.page, plots=parsed.plots))
    except (RankOnceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
