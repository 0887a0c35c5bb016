"""docs/scale.md computes what it shows."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[3] / "docs" / "scale.md").read_text(encoding="utf-8")


def test_the_sizes_on_the_page_are_those_of_its_formula(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (shown,) = re.findall(r"```python\n(def member_flop.*?)```\n```\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(shown[0], "docs/scale.md", "exec"), {})
    assert capsys.readouterr().out == shown[1]
