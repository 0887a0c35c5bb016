"""Examples become steps: tokenised, shuffled by a seed, packed under a token budget."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankonce.errors import DataError, RankOnceError, TaskError
from rankonce.layout import PassPart, TokenizedRequest
from rankonce.model.packing import PackedBatch, pack_pass
from rankonce.prompts.rendering import Renderer
from rankonce.prompts.tasks import Task, find_task
from rankonce.records import TrainingExample, read_request

Target = tuple[float, ...] | None


@dataclass(frozen=True, kw_only=True)
class TokenizedExample:
    """A request as token ids with every candidate's target: a probability for each label.

    ``None`` stands where the label is not known.
    """

    tokens: TokenizedRequest
    targets: tuple[Target, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the prefix, once, and of all segments."""
        return len(self.tokens.prefix_ids) + sum(map(len, self.tokens.segment_ids))

    @property
    def num_labels(self) -> int:
        """Candidates whose label is known."""
        return sum(target is not None for target in self.targets)


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """Examples of one forward pass.

    Attributes:
        label_groups: rows that share their labels' tokens: token ids, rows, targets R x L.
    """

    batch: PackedBatch
    label_groups: tuple[tuple[tuple[tuple[int, ...], ...], Tensor, Tensor], ...]


def read_examples(path: Path) -> list[TrainingExample]:
    """Read JSON lines: a request and its ``labels``, one a candidate.

    A label is a name, or ``{"Yes": 0.7, "No": 0.3}``, or null where it is not known.

    Raises:
        DataError: names the line and the field.
    """
    examples = []
    try:
        with path.open(encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        examples.append(_read_example(json.loads(line)))
                    except (json.JSONDecodeError, RecursionError, RankOnceError) as error:
                        raise DataError(f"{path}: line {number}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not examples:
        raise DataError(f"{path}: should hold at least one example")
    return examples


def _read_example(data: Any) -> TrainingExample:
    if not isinstance(data, dict):
        raise DataError("should be a JSON object")
    labels = data.pop("labels", None)
    request = read_request(data)
    if not isinstance(labels, list) or len(labels) != len(request.candidates):
        raise DataError(
            f"labels: should hold one label for each of {len(request.candidates)} candidates"
        )
    for label in labels:
        if not (label is None or isinstance(label, str | dict)):
            raise DataError(f"labels: should be names, null or shares by name, hold {label!r}")
    return TrainingExample(request=request, labels=tuple(labels))


def tokenize_examples(
    examples: Iterable[TrainingExample], renderer: Renderer, tasks: dict[str, Task]
) -> Iterator[TokenizedExample]:
    """Render and tokenise, exactly as for scoring.

    Raises:
        DataError: says which example cannot be rendered, and why.
    """
    for number, example in enumerate(examples, start=1):
        try:
            yield _tokenize(example, renderer, tasks)
        except RankOnceError as error:
            raise DataError(f"example {number}: {error}") from error


def _tokenize(
    example: TrainingExample, renderer: Renderer, tasks: dict[str, Task]
) -> TokenizedExample:
    task = find_task(example.request.task, tasks)
    return TokenizedExample(
        tokens=renderer.render(task, example.request).tokens,
        targets=tuple(_target(label, task.label_names) for label in example.labels),
    )


def _target(label: str | Mapping[str, float] | None, names: tuple[str, ...]) -> Target:
    if label is None:
        return None
    shares = {label: 1.0} if isinstance(label, str) else dict(label)
    if not set(shares) <= set(names) or not all(
        isinstance(x, int | float) for x in shares.values()
    ):
        raise TaskError(f"labels: should be of {', '.join(names)}, is {label!r}")
    if min(shares.values()) < 0 or not math.isclose(sum(shares.values()), 1.0, abs_tol=1e-6):
        raise TaskError(f"labels: probabilities should be from 0 and sum to 1, are {label!r}")
    return tuple(shares.get(name, 0.0) for name in names)


def shuffle_into_steps(
    examples: Sequence[TokenizedExample], *, labels_per_step: int, seed: int
) -> list[list[TokenizedExample]]:
    """Shuffle and cut into optimiser steps of about ``labels_per_step`` labels each."""
    order = np.random.default_rng(seed).permutation(len(examples))
    steps: list[list[TokenizedExample]] = []
    labels = labels_per_step
    for index in order.tolist():
        if labels >= labels_per_step:
            steps.append([])
            labels = 0
        steps[-1].append(examples[index])
        labels += examples[index].num_labels
    return steps


def split_by_tokens(
    examples: Sequence[TokenizedExample], *, max_tokens_per_pass: int
) -> list[list[TokenizedExample]]:
    """Cut a step into passes under a token budget; an example is never cut."""
    passes: list[list[TokenizedExample]] = [[]]
    tokens = 0
    for example in examples:
        if passes[-1] and tokens + example.num_tokens > max_tokens_per_pass:
            passes.append([])
            tokens = 0
        passes[-1].append(example)
        tokens += example.num_tokens
    return passes


def pack_examples(
    examples: Sequence[TokenizedExample], device: torch.device | str = "cpu"
) -> TrainingBatch:
    """Pack examples into one pass, each prefix computed once."""
    requests = [example.tokens for example in examples]
    parts = [
        PassPart(request=index, first=0, last=len(request.segment_ids), cached=False)
        for index, request in enumerate(requests)
    ]
    groups: dict[tuple[tuple[int, ...], ...], tuple[list[int], list[tuple[float, ...]]]] = {}
    row = 0
    for example in examples:
        rows, targets = groups.setdefault(example.tokens.label_ids, ([], []))
        for target in example.targets:
            if target is not None:
                rows.append(row)
                targets.append(target)
            row += 1
    return TrainingBatch(
        batch=pack_pass(parts, requests, {}, keep_prefixes=False, device=device),
        label_groups=tuple(
            (ids, torch.tensor(rows, device=device), torch.tensor(targets, device=device))
            for ids, (rows, targets) in groups.items()
            if rows
        ),
    )
