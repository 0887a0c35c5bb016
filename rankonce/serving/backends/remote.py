"""What all engines behind a URL share: connections, one retry, checks, and errors that say why.

A question is asked again once where its connection died, since scoring changes nothing; a second
death is an error. An engine that answers with an error is not asked again.
"""

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from rankonce.errors import EngineError
from rankonce.serving.backends.base import Backend, GroupScores, PromptGroup

# Questions on their way to an engine, which forms its batches itself.
_MAX_QUESTIONS = 16
_CHECK_S = 5.0
_RETRY_AFTER_S = 0.5
_MAX_ERROR = 300


@dataclass(frozen=True, kw_only=True)
class RemoteConfig:
    """How an engine is reached.

    Attributes:
        model: what the engine calls the model.
        api_key: that the engine wants; ``None`` where it wants none.
        timeout_s: of one question.
        tell_fate: says more of an engine that does not answer, such as the end of its log.
    """

    url: str
    model: str
    api_key: str | None = None
    timeout_s: float = 600.0
    tell_fate: Callable[[], str] = str


class RemoteEngine(Backend):
    """An engine behind a URL.

    Raises:
        EngineError: it does not answer, or does not serve the model.
    """

    num_passes = 4
    # Of an engine's longest sequence, what it needs beside a prompt: the token that it answers.
    num_extra_tokens = 1

    def __init__(self, config: RemoteConfig) -> None:
        self.config = config
        headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
        self._http = httpx.Client(
            base_url=config.url.rstrip("/"),
            headers=headers,
            # A question waits for its thread, never for a connection.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=_MAX_QUESTIONS),
            timeout=httpx.Timeout(config.timeout_s, connect=_CHECK_S),
        )
        self._threads = ThreadPoolExecutor(_MAX_QUESTIONS, f"rankonce-{self.engine}")
        try:
            self.max_prompt_tokens = self._find_model()
        except Exception:
            self.close()
            raise

    @abstractmethod
    def questions(self, group: PromptGroup) -> list[list["Question"]]:
        """Cut a group into questions; those of one list may be asked together, after the last."""

    def score(self, groups: Sequence[PromptGroup]) -> list[GroupScores]:
        """Ask all questions of all groups, as many at one time as there are threads.

        The first round of every group comes before the second of any.
        """
        rounds = [self.questions(group) for group in groups]
        scores = [GroupScores() for _ in groups]
        for number in range(max(map(len, rounds))):
            asked = [
                (place, self._threads.submit(self._answer, question))
                for place, own in enumerate(rounds)
                if number < len(own)
                for question in own[number]
            ]
            # Wait for all of them: an error should leave no question behind that still runs.
            errors = [error for _, one in asked if (error := one.exception()) is not None]
            if errors:
                raise errors[0]
            for place, one in asked:
                scores[place].extend(one.result())
        return scores

    def check(self) -> None:
        """Ask whether the engine is well."""
        try:
            answer = self._http.get("/health", timeout=_CHECK_S)
        except httpx.HTTPError as error:
            raise self._silent(error) from error
        if answer.status_code != 200:
            raise EngineError(f"engine: {self._name} is not well: {_reason(answer)}")

    def tokenize(self, text: str) -> list[int] | None:
        """Ask for the tokens of a text; an engine may keep them to itself."""
        body = {"model": self.config.model, "prompt": text, "add_special_tokens": False}
        answer = self._send("POST", "/tokenize", body)
        if answer.status_code in (404, 405):
            return None
        tokens = self._read(answer).get("tokens")
        if not isinstance(tokens, list):
            raise EngineError(f"engine: {self._name} gave no tokens of {text!r}")
        return tokens

    def close(self) -> None:
        """Close the connections."""
        self._threads.shutdown()
        self._http.close()

    @property
    def _name(self) -> str:
        return f"{self.engine} at {self.config.url}"

    def ask(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Send a question and read its answer.

        Raises:
            EngineError: there is none, or it is an error.
        """
        return self._read(self._send("POST", path, body))

    def broken(self, what: str) -> EngineError:
        """Make the error of an answer that is not what was asked for."""
        return EngineError(f"engine: {self._name} answered {what}")

    def _answer(self, question: "Question") -> GroupScores:
        answer = self.ask(question.path, question.body)
        try:
            return question.read(answer)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            kind = f"{type(error).__name__}: {error}"
            raise self.broken(f"in another form than {question.path} has here ({kind})") from error

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> httpx.Response:
        try:
            return self._http.request(method, path, json=body)
        except httpx.TimeoutException as error:
            raise self._silent(error) from error
        except httpx.TransportError:
            # It died, or closed a connection that was idle: whoever watches it may start it again.
            time.sleep(_RETRY_AFTER_S)
        try:
            return self._http.request(method, path, json=body)
        except httpx.TransportError as error:
            raise self._silent(error) from error

    def _read(self, answer: httpx.Response) -> dict[str, Any]:
        if answer.status_code != 200:
            raise EngineError(f"engine: {self._name} refused {answer.url.path}: {_reason(answer)}")
        try:
            read = answer.json()
        except ValueError as error:
            raise self.broken("what is not JSON") from error
        if not isinstance(read, dict):
            raise self.broken("JSON that is not an object")
        return read

    def _silent(self, error: httpx.HTTPError) -> EngineError:
        kind = str(error) or type(error).__name__
        fate = self.config.tell_fate()
        return EngineError(
            f"engine: {self._name} does not answer: {kind}" + (f"\n{fate}" if fate else "")
        )

    def _find_model(self) -> int:
        """Find the model among those served; its longest prompt."""
        cards = self._read(self._send("GET", "/v1/models", None)).get("data", [])
        by_name = {card["id"]: card for card in cards}
        card = by_name.get(self.config.model)
        if card is None:
            served = ", ".join(map(repr, by_name)) or "no model"
            raise EngineError(
                f"engine: {self._name} serves {served}, not {self.config.model!r}; say with "
                "--engine-model what it calls the model"
            )
        return (card.get("max_model_len") or 2**31) - self.num_extra_tokens


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question to an engine, about some prompts of a group.

    Attributes:
        read: reads its answer; a ``KeyError``, ``IndexError``, ``TypeError`` or ``ValueError`` says
            that the answer has another form.
    """

    path: str
    body: Mapping[str, Any]
    read: Callable[[Any], GroupScores]


def _reason(answer: httpx.Response) -> str:
    """Read the message of an error in the forms that engines give it."""
    message = answer.text
    try:
        told = answer.json()
        told = told.get("error", told) if isinstance(told, dict) else told
        message = str(told.get("message", told)) if isinstance(told, dict) else str(told)
    except ValueError:
        pass
    return f"status {answer.status_code}: {message[:_MAX_ERROR]}".rstrip(": ")
