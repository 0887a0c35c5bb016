"""The marked parts of a Markdown page that are written from records."""

import re
from collections.abc import Callable
from pathlib import Path

from rankonce.errors import DataError

_MARKED = re.compile(r"(<!-- begin: ([^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def update_page(page: Path, text_of: Callable[[str], str | None], *, example: str) -> None:
    """Write what stands between ``<!-- begin: NAME -->`` and ``<!-- end -->``.

    Args:
        text_of: gives the text for a NAME, or ``None`` to leave what is there.
        example: a NAME, for the error.

    Raises:
        DataError: ``text_of`` had a text for none of the page's markers.
    """
    before = page.read_text(encoding="utf-8")
    count = 0

    def fragment(marked: re.Match[str]) -> str:
        nonlocal count
        begin, name, end = marked.groups()
        text = text_of(name)
        if text is None:
            return marked[0]
        count += 1
        return f"{begin}\n{text}\n\n{end}"

    after = _MARKED.sub(fragment, before)
    if not count:
        raise DataError(f"{page}: has no marker like <!-- begin: {example} --> … <!-- end -->")
    page.write_text(after, encoding="utf-8")
