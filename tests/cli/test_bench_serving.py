import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.benchmarks.test_serve_report import capacity_record
from tests.cli.conftest import Run


def test_a_record_of_a_load_benchmark_is_printed_and_put_on_its_page(
    run: Callable[..., Run], tmp_path: Path
) -> None:
    record, page = tmp_path / "serve.json", tmp_path / "page.md"
    record.write_text(json.dumps(capacity_record()))
    page.write_text("# Load\n<!-- begin: serve -->\nold\n<!-- end -->\nafter\n")
    done = run("bench", "serve", "--record", record, "--page", page)
    assert done.exit_code == 0
    assert "3.50× at equal p99" in done.out
    text = page.read_text()
    assert done.out.strip() in text
    assert "old" not in text
    assert text.endswith("<!-- end -->\nafter\n")


@pytest.mark.parametrize(
    "arguments",
    [("serve", "--arm", "sglang"), ("serve", "--workload", "x"), ("soak", "--rate", "0")],
)
def test_bad_usage_exits_with_2(run: Callable[..., Run], arguments: tuple[str, ...]) -> None:
    assert run("bench", *arguments).exit_code == 2
