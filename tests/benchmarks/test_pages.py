"""Marked parts of a page: which are written, and what stays."""

from pathlib import Path

import pytest

from rankonce.benchmarks.pages import update_page
from rankonce.errors import DataError

PAGE = """before
<!-- begin: one -->
old
<!-- end -->
between – as it was
<!-- begin: another one -->
stays
<!-- end -->
after
"""


def test_only_the_named_part_changes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    for _ in range(2):
        update_page(page, {"one": r"new \1"}.get, example="one")
        assert page.read_text(encoding="utf-8") == PAGE.replace("old\n", "\nnew \\1\n\n")


def test_a_page_without_the_marker_is_refused_and_stays(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    with pytest.raises(DataError, match="has no marker like <!-- begin: two -->"):
        update_page(page, {"two": "new"}.get, example="two")
    assert page.read_text(encoding="utf-8") == PAGE
