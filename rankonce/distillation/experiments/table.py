"""A row a run, kept in Parquet and in an Excel sheet that people may write into."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from rankonce.errors import ExperimentError, MissingDependencyError

_SHEET = "runs"
_KEY = "id"


def read_path(answer: Any, path: str) -> float | int | str | bool | None:
    """Find a number in what a measure printed: ``metrics.0.metrics.auc``.

    Raises:
        ExperimentError: names the part that is not there.
    """
    found = answer
    for part in path.split("."):
        try:
            found = found[int(part)] if isinstance(found, list) else found[part]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            there = list(found) if isinstance(found, dict) else type(found).__name__
            raise ExperimentError(f"columns: {path}: {part!r} is not in {there}") from error
    if isinstance(found, dict | list):
        raise ExperimentError(f"columns: {path}: should lead to one value, leads to {found}")
    return found  # type: ignore[no-any-return]


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write all rows; columns that a row does not have are null."""
    frames = [pl.DataFrame([dict(row)]) for row in rows]
    part = path.with_suffix(".part")
    pl.concat(frames, how="diagonal_relaxed").write_parquet(part)
    part.replace(path)


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Read all rows, by id.

    Raises:
        ExperimentError: the file cannot be read.
    """
    try:
        rows = pl.read_parquet(path).to_dicts()
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ExperimentError(f"{path}: cannot be read: {error}") from error
    return {row[_KEY]: row for row in rows}


def check_excel() -> None:
    """Find the library that writes workbooks, before anything is to be written.

    Raises:
        MissingDependencyError: openpyxl is not installed.
    """
    try:
        import openpyxl  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("openpyxl", extra="experiment") from error


def write_excel(path: Path, row: Mapping[str, Any]) -> None:
    """Put one row into the workbook: in place of the one of its id, or under the others.

    Columns and sheets that others have added stay as they are.

    Raises:
        ExperimentError: the file is no workbook, or may not be written.
    """
    from openpyxl import Workbook, load_workbook

    try:
        book = load_workbook(path) if path.exists() else Workbook()
    except Exception as error:  # openpyxl raises whatever its zip and XML readers do
        raise ExperimentError(f"{path}: is no Excel workbook: {error}") from error
    if _SHEET not in book.sheetnames:
        sheet = book.create_sheet(_SHEET) if path.exists() else book.active
        sheet.title = _SHEET
        sheet.freeze_panes = "A2"
    sheet = book[_SHEET]
    heads = {cell.value: cell.column for cell in sheet[1] if cell.value is not None}
    for name in row:
        if name not in heads:
            heads[name] = max(heads.values(), default=0) + 1
            sheet.cell(1, heads[name], name)
    number = next(
        (
            line
            for line in range(2, sheet.max_row + 1)
            if sheet.cell(line, heads[_KEY]).value == row[_KEY]
        ),
        max(2, sheet.max_row + 1),
    )
    for name, value in row.items():
        cell = sheet.cell(number, heads[name])
        cell.value = value
        if isinstance(value, str):
            # A text that begins with = would be read as a formula.
            cell.data_type = "s"
    part = path.with_suffix(".part")
    try:
        book.save(part)
        part.replace(path)
    except OSError as error:
        raise ExperimentError(
            f"{path}: cannot be written; is it open elsewhere? {error}"
        ) from error
