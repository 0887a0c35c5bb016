"""Requests of a comparison and their labels: from text, or tokenised already.

Only what renders needs the ranker: tokenised requests run where its libraries are missing.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from rankonce.errors import DataError, ModelError, RankOnceError
from rankonce.layout import TokenizedRequest
from rankonce.model.loading import LoadedModel

_TOKEN_FIELDS = ("prefix_ids", "segment_ids", "label_ids")


@dataclass(frozen=True, kw_only=True)
class LabelledRequest:
    """A tokenised request and, where known, whether each candidate's label is the first one."""

    tokens: TokenizedRequest
    labels: tuple[int | None, ...]

    @property
    def num_texts(self) -> int:
        """Candidates with different tokens."""
        return len(set(self.tokens.segment_ids))


def check_requests(requests: Sequence[LabelledRequest], model: LoadedModel) -> None:
    """Refuse requests that a model cannot score, and those that leave nothing to compare.

    Raises:
        RankOnceError: says which and why.
    """
    for number, one in enumerate(requests, start=1):
        try:
            model.check_ids(one.tokens)
        except ModelError as error:
            raise ModelError(f"request {number}: {error}") from error
    if all(one.num_texts < 2 for one in requests):
        raise DataError("requests: should hold a request with two different candidates")


def describe_requests(requests: Sequence[LabelledRequest]) -> dict[str, Any]:
    """Count what there is, and hash it."""
    return {
        "num_requests": len(requests),
        "num_candidates": sum(len(one.labels) for one in requests),
        "num_tokens": sum(
            len(one.tokens.prefix_ids) + sum(map(len, one.tokens.segment_ids)) for one in requests
        ),
        "tokens_sha256": sha256("".join(map(_tokens_line, requests)).encode()).hexdigest(),
    }


def read_tokens(path: Path) -> list[LabelledRequest]:
    """Read tokenised requests.

    Raises:
        DataError: names the line and the field.
    """
    return list(_each_line(path, _read_tokens_line))


def write_tokens(path: Path, requests: Iterable[LabelledRequest]) -> None:
    """Write tokenised requests as ``read_tokens`` takes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{_tokens_line(one)}\n" for one in requests)


def read_requests(path: Path, model: LoadedModel) -> list[LabelledRequest]:
    """Read requests, and their labels where they have any, and render them for a model.

    Lines that are tokenised already, as ``write_tokens`` writes them, are taken as they are.

    Raises:
        DataError: names the line and the field.
    """
    prepare = preparation(model)

    def read(data: Any) -> LabelledRequest:
        if isinstance(data, dict) and "segment_ids" in data:
            return _read_tokens_line(data)
        labels = data.pop("labels", None) if isinstance(data, dict) else None
        return prepare(data, labels)

    return list(_each_line(path, read))


def preparation(model: LoadedModel) -> Callable[[Any, Any], LabelledRequest]:
    """Return a function that renders a request, with its labels or ``None``, for a model."""
    # Only what renders needs the ranker, whose libraries a borrowed machine lacks.
    from rankonce.ranker import Ranker

    ranker = Ranker(model)

    def prepare(request: Any, labels: Any) -> LabelledRequest:
        prepared = ranker.prepare(request)
        task, tokens = prepared.task, prepared.rendered.tokens
        if task.ranking.label != task.label_names[0]:
            raise DataError(f"task: {task.name} does not rank by its first label")
        known = [None] * len(tokens.segment_ids) if labels is None else labels
        if not isinstance(known, list | tuple) or len(known) != len(tokens.segment_ids):
            raise DataError("labels: should be a list with one label a candidate")
        if not all(label is None or label in task.label_names for label in known):
            raise DataError(f"labels: should be of {', '.join(task.label_names)} or null")
        first = task.label_names[0]
        return LabelledRequest(
            tokens=tokens,
            labels=tuple(None if label is None else int(label == first) for label in known),
        )

    return prepare


def _each_line(path: Path, read: Callable[[Any], LabelledRequest]) -> Iterator[LabelledRequest]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield read(json.loads(line))
            except (json.JSONDecodeError, RecursionError, RankOnceError) as error:
                raise DataError(f"{path}: line {number}: {error}") from error
    if not any(line.strip() for line in lines):
        raise DataError(f"{path}: should hold at least one request")


def _read_tokens_line(data: Any) -> LabelledRequest:
    names = set(_TOKEN_FIELDS)
    if not isinstance(data, dict) or not names <= set(data) <= names | {"labels"}:
        raise DataError(f"should be an object of {', '.join(sorted(names))} and perhaps labels")
    tokens = TokenizedRequest(
        prefix_ids=_token_ids("prefix_ids", data["prefix_ids"]),
        segment_ids=_lists_of_ids("segment_ids", data["segment_ids"]),
        label_ids=_lists_of_ids("label_ids", data["label_ids"]),
    )
    if not tokens.segment_ids:
        raise DataError("segment_ids: should hold at least one candidate")
    if len(tokens.label_ids) < 2:
        raise DataError(f"label_ids: should hold two labels or more, holds {len(tokens.label_ids)}")
    labels = data.get("labels")
    known = [None] * len(tokens.segment_ids) if labels is None else labels
    if (
        not isinstance(known, list)
        or len(known) != len(tokens.segment_ids)
        or not all(label is None or (type(label) is int and label in (0, 1)) for label in known)
    ):
        raise DataError("labels: should be a list of 1, 0 or null, one a candidate")
    return LabelledRequest(tokens=tokens, labels=tuple(known))


def _lists_of_ids(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, list):
        raise DataError(f"{name}: should be a list of lists of token ids")
    lists = tuple(_token_ids(f"{name}[{index}]", ids) for index, ids in enumerate(value))
    for index, ids in enumerate(lists):
        if not ids:
            raise DataError(f"{name}[{index}]: should hold at least one token id")
    return lists


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(x) is int and x >= 0 for x in value):
        raise DataError(f"{name}: should be a list of token ids")
    return tuple(value)


def _tokens_line(one: LabelledRequest) -> str:
    tokens = {name: getattr(one.tokens, name) for name in _TOKEN_FIELDS}
    return json.dumps({**tokens, "labels": one.labels})
