"""Measured metrics as a table for people and as JSON for machines."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from rich.table import Table
from rich.text import Text

from rankonce.evaluation.metrics import without_nan


@dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """The metrics of one ranker.

    Attributes:
        name: of the ranker.
        metrics: value by the metric's name; nan where it is not defined.
        standard_errors: by the same names, where they were estimated.
    """

    name: str
    metrics: Mapping[str, float]
    standard_errors: Mapping[str, float] = field(default_factory=dict)


def render_table(rows: Sequence[EvaluationRow]) -> Table:
    """Draw a table, one line a ranker and one column a metric, value ± standard error."""
    table = Table("ranker")
    for metric in _metric_names(rows):
        table.add_column(Text(metric), justify="right")
    for cells in _cells(rows):
        # Text, because rich would read a name's [brackets] as markup.
        table.add_row(*map(Text, cells))
    return table


def to_markdown(rows: Sequence[EvaluationRow]) -> str:
    """Write the table of ``render_table`` in Markdown, with a line feed at its end."""
    names = _metric_names(rows)
    lines = [["ranker", *names], ["---", *("---:" for _ in names)]]
    # A bar inside a cell would end it.
    lines += [[cell.replace("|", "\\|") for cell in cells] for cells in _cells(rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def to_json(rows: Sequence[EvaluationRow]) -> str:
    """Write the rows as a JSON list with full precision; what is not defined is null."""
    return json.dumps([without_nan(asdict(row)) for row in rows], indent=2, allow_nan=False)


def _metric_names(rows: Sequence[EvaluationRow]) -> list[str]:
    """Every metric of any row, in the order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.metrics))


def _cells(rows: Sequence[EvaluationRow]) -> list[list[str]]:
    names = _metric_names(rows)
    return [[row.name, *(_cell(row, name) for name in names)] for row in rows]


def _cell(row: EvaluationRow, metric: str) -> str:
    value = row.metrics.get(metric, math.nan)
    error = row.standard_errors.get(metric, math.nan)
    if math.isnan(value):
        return "–"
    return f"{value:.4f}" if math.isnan(error) else f"{value:.4f} ± {error:.4f}"
