"""The report's three forms hold the same numbers."""

import io
import json
import math

from rich.console import Console

from rankonce.evaluation.report import EvaluationRow, render_table, to_json, to_markdown

ROWS = [
    EvaluationRow(
        name="item mean",
        metrics={"auc": 0.69012, "log_loss": 0.63512},
        standard_errors={"auc": 0.01054},
    ),
    EvaluationRow(name="a|b", metrics={"auc": math.nan, "uauc": 0.7}),
]


def test_markdown_has_every_metric_once_and_a_dash_where_it_is_not_defined() -> None:
    assert to_markdown(ROWS) == (
        "| ranker | auc | log_loss | uauc |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| item mean | 0.6901 ± 0.0105 | 0.6351 | – |\n"
        "| a\\|b | – | – | 0.7000 |\n"
    )


def test_the_table_shows_value_and_standard_error() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(render_table(ROWS))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "0.6901 ± 0.0105" in text
    assert "uauc" in text


def test_names_with_brackets_stay_as_they_are_in_the_table() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(render_table([EvaluationRow(name="ranker [fp8]", metrics={"auc": 0.7})]))
    assert isinstance(console.file, io.StringIO)
    assert "ranker [fp8]" in console.file.getvalue()


def test_json_keeps_full_precision_and_writes_null_for_nan() -> None:
    first, second = json.loads(to_json(ROWS))
    assert first == {
        "name": "item mean",
        "metrics": {"auc": 0.69012, "log_loss": 0.63512},
        "standard_errors": {"auc": 0.01054},
    }
    assert second["metrics"] == {"auc": None, "uauc": 0.7}
