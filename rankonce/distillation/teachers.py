"""Teachers: whoever gives log-probabilities of labels, a checkpoint on this machine or a server.

Scores pass by the names of labels, never by token: teacher and student may have nothing in common
but the task. They are the model's own, without the calibration that may lie beside it.
"""

import hashlib
import json
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from rankonce.calibration import fingerprint_weights
from rankonce.client import Client, ClientConfig
from rankonce.distillation.hidden_states import LiveTeacher
from rankonce.errors import ModelError, ServerError, TrainingError
from rankonce.model.adapters import CONFIG_FILE, is_adapter
from rankonce.model.sources import names_folder
from rankonce.prompts.tasks import Task
from rankonce.ranker import Ranker, RankerConfig
from rankonce.records import ScoreRequest
from rankonce.serving.answers import ModelCard, RankAnswer

# What decides scores beside the weights.
_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_SMALLEST = 1e-300


@dataclass(frozen=True, kw_only=True)
class TeacherScores:
    """What a teacher says of one request.

    Attributes:
        log_probs: log P(label) by name, of every candidate in the request's order.
        num_tokens: that went through the teacher.
    """

    log_probs: tuple[Mapping[str, float], ...]
    num_tokens: int


class Teacher(Protocol):
    """Whoever can be asked.

    Attributes:
        name: for people and messages.
        can_change: whether another model may come to answer under the same fingerprint.
    """

    name: str
    can_change: bool

    @property
    def fingerprint(self) -> str:
        """Identify it, without loading weights and without a call."""

    def describe(self) -> str | None:
        """Say what its server serves; ``None`` where nothing but its fingerprint counts."""

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[TeacherScores]:
        """Score requests in their order, each as soon as it is done."""

    def close(self) -> None:
        """Give back what it holds."""


class LocalTeacher:
    """A checkpoint, or an adapter over one, that is loaded when it is first asked.

    Args:
        model: its folder, or the id of a repository.
        tasks: the caller's own, beside those of the library.
        precision: of its weights; by default bf16 on a GPU and fp32 on a CPU.
        max_tokens_per_pass: bounds the memory.
    """

    can_change = False

    def __init__(
        self,
        model: str | Path,
        *,
        tasks: Sequence[Task] = (),
        precision: str | None = None,
        max_tokens_per_pass: int = 16_384,
    ) -> None:
        self.model, self.name, self.tasks = str(model), str(model), tasks
        self.precision = precision
        self.config = RankerConfig(max_tokens_per_pass=max_tokens_per_pass, calibrate=False)
        self._ranker: Ranker | None = None
        self._fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        """Identify weights, tokenizer and configuration.

        Raises:
            ModelError: there is no such checkpoint, or it has no safetensors.
        """
        if self._fingerprint is None:
            self._fingerprint = fingerprint_checkpoint(self.model, self.precision)
        return self._fingerprint

    def describe(self) -> None:
        """Nothing but the fingerprint counts."""

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[TeacherScores]:
        """Score requests, as many in a pass as fit."""
        for result in self.ranker.score_many(requests, progress=False):
            yield TeacherScores(
                log_probs=tuple(one.log_probs for one in result.candidates),
                num_tokens=result.usage.computed_tokens,
            )

    @property
    def ranker(self) -> Ranker:
        """The loaded checkpoint."""
        if self._ranker is None:
            self._ranker = Ranker.from_pretrained(
                self.model, precision=self.precision, tasks=self.tasks, config=self.config
            )
        return self._ranker

    def live(self) -> LiveTeacher:
        """Load it to run beside a student.

        Raises:
            TrainingError: it is an adapter.
        """
        if is_adapter(self.model):
            raise TrainingError(
                f"teacher: hidden states need a checkpoint, {self.name} is an adapter; merge it "
                "first (rankonce merge)"
            )
        model = self.ranker.loaded
        return LiveTeacher(
            model.network, encoder=self.ranker.renderer.encoder.fingerprint, name=self.name
        )

    def close(self) -> None:
        """Let the weights go."""
        self._ranker = None


class ServedTeacher:
    """A model behind a server of ours.

    Args:
        config: where it is and how it is asked; without a model the server's first one answers.
        concurrency: requests under way at once, which the server packs into passes.
    """

    can_change = True

    def __init__(self, config: ClientConfig, *, concurrency: int = 16) -> None:
        self.config = replace(config, url=config.url.rstrip("/"))
        self.concurrency = concurrency
        model = "" if config.model is None else f" ({config.model})"
        self.name = f"{self.config.url}{model}"
        self._client: Client | None = None

    @property
    def fingerprint(self) -> str:
        """Identify where it is and what it is called there."""
        parts = (self.config.url, self.config.model)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def describe(self) -> str:
        """Say which model answers.

        Raises:
            ServerError: the server is not there, or has no model of this name.
        """
        cards = self._connect().models().data
        wanted = self.config.model
        for card in cards:
            if wanted is None or card.id == wanted:
                return _describe_card(card)
        raise ServerError(
            f"{self.config.url}: serves {', '.join(card.id for card in cards)}, not {wanted}",
            status=404,
        )

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[TeacherScores]:
        """Ask for requests, several at once.

        Raises:
            ServerError: one has no answer, also after the client's retries.
        """
        client, waiting = self._connect(), deque[Future[RankAnswer]]()
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                for request in requests:
                    waiting.append(pool.submit(client.rank, request))
                    if len(waiting) >= 2 * self.concurrency:
                        yield _read_answer(waiting.popleft().result())
                while waiting:
                    yield _read_answer(waiting.popleft().result())
            finally:
                pool.shutdown(cancel_futures=True)

    def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def _connect(self) -> Client:
        if self._client is None:
            self._client = Client(self.config)
        return self._client


def find_teacher(
    source: str,
    *,
    tasks: Sequence[Task] = (),
    precision: str | None = None,
    served: ClientConfig | None = None,
    concurrency: int = 16,
) -> Teacher:
    """Make a teacher of what was given: a URL, or a checkpoint.

    Args:
        served: how a server is asked; its URL is ``source``.

    Raises:
        ModelError: a path leads to no folder.
        TrainingError: the precision of a server's model is the server's own.
    """
    if source.startswith(("http://", "https://")):
        if precision is not None:
            raise TrainingError(f"precision: is for a teacher that is loaded here, not {source}")
        config = replace(served or ClientConfig(), url=source)
        return ServedTeacher(config, concurrency=concurrency)
    if names_folder(source) and not Path(source).is_dir():
        raise ModelError(f"teacher: there is no folder {source}; should be a checkpoint's or a URL")
    return LocalTeacher(source, tasks=tasks, precision=precision)


def fingerprint_checkpoint(model: str, precision: str | None) -> str:
    """Identify what decides the scores of a checkpoint, without calibrations.

    Args:
        model: folder of a checkpoint or an adapter, or id of a repository.

    Raises:
        ModelError: there is no such folder or repository.
    """
    folder = Path(model)
    names: tuple[str, ...] = (*_FILES, CONFIG_FILE) if folder.is_dir() else ()
    if folder.is_dir() and not any((folder / name).is_file() for name in names):
        raise ModelError(f"teacher: {model} holds no checkpoint and no adapter")
    parts = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in parts.items()}
    try:
        digests["weights"] = fingerprint_weights(folder)
    except ModelError as error:
        if folder.is_dir():
            raise
        raise ModelError(
            f"teacher: there is no folder {model}, nor a repository that can be read: {error}"
        ) from error
    if precision is not None:
        digests["precision"] = precision
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _describe_card(card: ModelCard) -> str:
    # Not when it was loaded: a server that is started again serves what it did.
    above = f" over {card.parent}" if card.parent else ""
    weights = f", weights {card.fingerprint[:16]}" if card.fingerprint else ""
    return f"{card.id}{above}, context {card.max_model_len}{weights}"


def _read_answer(answer: RankAnswer) -> TeacherScores:
    found: list[dict[str, float]] = []
    for one in sorted(answer.results, key=lambda result: result.index):
        raw = one.raw_probabilities
        found.append(
            dict(one.log_probs)
            if raw is None
            else {name: math.log(max(share, _SMALLEST)) for name, share in raw.items()}
        )
    return TeacherScores(log_probs=tuple(found), num_tokens=answer.usage.computed_tokens)
