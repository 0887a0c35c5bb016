"""Items and histories as texts of their own, for pretraining, each in several wordings.

The wordings are data: ``styles/film.yaml``, ``item.yaml`` and ``history.yaml``. All styles of a
file write the same facts, whichever fields a row has; values are spelled as in prompts.
"""

from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from typing import Any

import yaml
from pydantic import ValidationError, model_validator

from rankonce.errors import TaskError
from rankonce.prompts.spelling import FieldSpec, spell
from rankonce.prompts.tasks import Lines, check_same_facts, field_names
from rankonce.records import Value, describe_faults


class DocumentStyle(Lines):
    """One wording: the lines of an item or event, and what stands around all events.

    Attributes:
        opening, between, closing: of a text with several events.
    """

    opening: str = ""
    between: str = "\n"
    closing: str = ""


class DocumentWordings(Lines):
    """Fields and the styles that write them.

    Attributes:
        styles: by name, in the order of the file; all write the same facts.
    """

    styles: Mapping[str, DocumentStyle]

    @model_validator(mode="before")
    @classmethod
    def _share_fields(cls, data: Any) -> Any:
        # Fields stand once in the file and belong to every style.
        fields, styles = data.get("fields", {}), data.get("styles", {})
        shared = {name: {**style, "fields": fields} for name, style in styles.items()}
        return {**data, "styles": shared}

    @model_validator(mode="after")
    def _check_facts(self) -> "DocumentWordings":
        if not self.styles:
            raise ValueError("styles: should hold at least one")
        first = next(iter(self.styles.values()))
        bare = [set(names) for names in map(field_names, first.lines) if self.always >= set(names)]
        if missing := ", ".join(sorted(self.always.difference(*bare))):
            raise ValueError(f"styles: should write {missing} without any optional field")
        for name, style in self.styles.items():
            check_same_facts(
                first.lines, style.lines, always=self.always, path=f"styles.{name}.lines"
            )
            names = {field for line in style.lines for field in field_names(line)}
            if missing := ", ".join(sorted(set(self.fields) - names)):
                raise ValueError(f"styles.{name}.lines: should name {missing}")
        return self


class DocumentWriter:
    """Writes items or histories in the styles of one file.

    Attributes:
        styles: names, one of which every text is written in.
    """

    def __init__(self, wordings: DocumentWordings) -> None:
        self.styles = tuple(wordings.styles)
        self._wordings = wordings
        # A line with the names in it: parsing each anew would take longer than writing.
        self._lines = {
            name: [(line, field_names(line)) for line in style.lines]
            for name, style in wordings.styles.items()
        }

    def spell(self, fields: Mapping[str, Value]) -> dict[str, str]:
        """Turn the values of an item or event into words; empty ones are left out.

        Raises:
            RequestError: names the field that is missing or has a value of another type.
        """
        specs = self._wordings.fields
        return {
            name: spell(value, spec, path=name)
            for name, spec in specs.items()
            if not _is_blank(value := fields.get(name), spec)
        }

    def write(self, events: Iterable[Mapping[str, str]], style: str) -> str:
        """Write spelled items or events, one after the other, in a style."""
        chosen = self._wordings.styles[style]
        written = (
            chosen.separator.join(
                line.format_map(words)
                for line, names in self._lines[style]
                if all(name in words for name in names)
            )
            for words in events
        )
        return f"{chosen.opening}{chosen.between.join(written)}{chosen.closing}"


def _is_blank(value: Value, spec: FieldSpec) -> bool:
    empty = value is None or value == [] or (isinstance(value, str) and not value.strip())
    return empty and not spec.required


@cache
def document_writer(kind: str) -> DocumentWriter:
    """Return the writer of ``film``, ``item`` or ``history``.

    Raises:
        TaskError: names the file and what is wrong in it.
    """
    path = resources.files("rankonce.prompts") / "styles" / f"{kind}.yaml"
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    return DocumentWriter(read_wordings(data, name=path.name))


def read_wordings(data: Any, *, name: str) -> DocumentWordings:
    """Check the content of a file of styles.

    Raises:
        TaskError: names the file and what is wrong in it.
    """
    try:
        return DocumentWordings.model_validate(data)
    except ValidationError as error:
        raise TaskError(f"{name}: {describe_faults(error.errors())}") from error
