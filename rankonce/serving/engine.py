"""From question to answer: prepare on the text thread, forward in the batcher, write the answer."""

import math
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from rankonce.errors import ModelError, RequestError
from rankonce.prompts.tasks import Task, find_task
from rankonce.ranker import Ranker, RawScores
from rankonce.records import Item, ScoreRequest, ScoreResult
from rankonce.serving.answers import (
    AssistantMessage,
    CachedTokens,
    ChatAnswer,
    ChatChoice,
    CompletionAnswer,
    CompletionChoice,
    DocumentPart,
    RankAnswer,
    RerankAnswer,
    RerankedDocument,
    RerankUsage,
    ScoreAnswer,
    Usage,
    rank_answer,
)
from rankonce.serving.batcher import Batcher
from rankonce.serving.batches.config import BatchConfig
from rankonce.serving.failures import ServingError, TooLargeError
from rankonce.serving.logprobs import NextToken, next_tokens, write_chat, write_completion
from rankonce.serving.packing import PackedPrompts, pack_prompts
from rankonce.serving.prompts import PromptReader
from rankonce.serving.schemas import (
    ChatBody,
    CompletionBody,
    Document,
    RankBody,
    RerankBody,
    ScoreBody,
    WithLabels,
)

PromptList = list[str] | list[tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How a server runs.

    Attributes:
        port: 0 takes a free one.
        served_model_name: what clients call the model; by default the checkpoint's name.
        max_candidates: candidates, documents, items or prompts of one question.
        max_body_mb: bound of a question's bytes, in MB.
        batches: how files and batches are kept; without it there are none.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    max_candidates: int = 10_000
    max_body_mb: int = 32
    batches: BatchConfig | None = None


class Engine:
    """Answers questions with one ranker, which it uses alone while it runs."""

    def __init__(self, ranker: Ranker, config: ServerConfig) -> None:
        self.ranker = ranker
        self.config = config
        self.model_name = config.served_model_name or _short_name(ranker.model.name)
        self.adapter_names = tuple(ranker.model.adapters.files)
        if self.model_name in self.adapter_names:
            raise ModelError(
                f"adapter: {self.model_name!r} is what the model is served as; choose another name"
            )
        self._reader = PromptReader(ranker.model, ranker.renderer.encoder)
        self._batcher = Batcher(ranker)

    def running(self) -> AbstractAsyncContextManager[None]:
        """Answer questions inside this context."""
        return self._batcher.running()

    def find_adapter(self, model: str | None) -> str | None:
        """Read what a question calls the model: the one served, or one of its adapters.

        Returns:
            The adapter's name; ``None`` for the model served, also where the question names none.

        Raises:
            ServingError: there is no such model.
        """
        if model in (None, self.model_name):
            return None
        if model in self.adapter_names:
            return model
        served = ", ".join(repr(name) for name in (self.model_name, *self.adapter_names))
        raise ServingError(
            404, f"model: there is no {model!r}, this server has {served}", code="model_not_found"
        )

    async def rank(self, body: RankBody) -> RankAnswer:
        """Answer in our own form."""
        adapter = self._check_question(body.model, len(body.candidates), "candidates")
        if None not in (adapter, body.adapter) and adapter != body.adapter:
            raise RequestError(
                f"adapter: should be left out or {adapter!r}, as model says, is {body.adapter!r}"
            )
        result = await self._score_request(
            body if adapter is None else replace(body, adapter=adapter)
        )
        return rank_answer(result, model=self._name_of(result.adapter), top_n=body.top_n)

    async def rerank(self, body: RerankBody) -> RerankAnswer:
        """Answer in the form of Cohere and Jina."""
        adapter = self._check_question(body.model, len(body.documents), "documents")
        task = find_task(body.task, self.ranker.tasks)
        request = ScoreRequest(
            task=body.task,
            profile={"query": body.query},
            candidates=tuple(_candidate(document) for document in body.documents),
            adapter=adapter,
        )
        try:
            result = await self._score_request(request)
        except RequestError as error:
            raise type(error)(_in_rerank_words(str(error))) from error
        order = sorted(range(len(body.documents)), key=lambda i: result.candidates[i].rank)
        return RerankAnswer(
            model=self._name_of(result.adapter),
            results=[
                RerankedDocument(
                    index=index,
                    relevance_score=_relevance(task, result.candidates[index].value),
                    document=(
                        DocumentPart(**body.documents[index].model_dump())
                        if body.return_documents
                        else None
                    ),
                )
                for index in order[: body.top_n]
            ],
            usage=RerankUsage(
                prompt_tokens=result.usage.prompt_tokens, total_tokens=result.usage.prompt_tokens
            ),
            warnings=list(result.warnings),
        )

    async def score(self, body: ScoreBody) -> ScoreAnswer:
        """Answer in SGLang's form."""
        adapter = self._choose(self._check_question(body.model, len(body.items), "items"))
        prompts = _concatenate(body.query, body.items, item_first=body.item_first)
        whole = not body.apply_softmax
        tokens, usage = await self._read(prompts, "items", body, adapter=adapter, whole=whole)
        return ScoreAnswer(
            scores=[[math.exp(logprob) for _, logprob in token.labels] for token in tokens],
            model=self._name_of(adapter),
            usage=usage,
        )

    async def complete(self, body: CompletionBody) -> CompletionAnswer:
        """Answer in the form of OpenAI's completions."""
        adapter = self._choose(self._check_question(body.model, len(body.prompt), "prompt"))
        num_top = max(1, body.logprobs or 0)
        tokens, usage = await self._read(
            body.prompt, "prompt", body, adapter=adapter, num_top=num_top
        )
        choices = await self._batcher.run_text(self._write_choices, tokens, body)
        return CompletionAnswer(
            model=self._name_of(adapter),
            choices=choices,
            usage=_with_answers(usage, len(choices)),
        )

    async def chat(self, body: ChatBody) -> ChatAnswer:
        """Answer in the form of OpenAI's chat completions."""
        adapter = self._choose(self._check_question(body.model, 1, "messages"))
        turns = [(_ROLES.get(turn.role, turn.role), turn.content) for turn in body.messages]
        encode = self.ranker.renderer.encoder.encode_chat
        prompt = await self._batcher.run_text(encode, turns)
        num_top = body.top_logprobs or 0
        (token,), usage = await self._read(
            [prompt], "messages", body, adapter=adapter, num_top=max(1, num_top)
        )
        wanted = body.logprobs or body.has_labels
        choice = ChatChoice(
            message=AssistantMessage(content=self._reader.token_text(token.top[0][0])),
            logprobs=write_chat(token, num_top, self._reader) if wanted else None,
        )
        return ChatAnswer(
            model=self._name_of(adapter), choices=[choice], usage=_with_answers(usage, 1)
        )

    def _name_of(self, adapter: str | None) -> str:
        return self.model_name if adapter is None else adapter

    def _choose(self, adapter: str | None) -> str | None:
        """Choose for a question that has no task."""
        return self.ranker.choose_adapter(adapter)

    def _check_question(self, model: str | None, num_candidates: int, field: str) -> str | None:
        adapter = self.find_adapter(model)
        if num_candidates > self.config.max_candidates:
            raise TooLargeError(
                f"{field}: should hold at most {self.config.max_candidates}, holds {num_candidates}"
            )
        return adapter

    async def _score_request(self, request: ScoreRequest) -> ScoreResult:
        prepared = await self._batcher.run_text(self.ranker.prepare, request)
        (raw,) = await self._batcher.forward([prepared.rendered.tokens], label_mass=True)
        return await self._batcher.run_text(self.ranker.finish, prepared, raw)

    def _write_choices(
        self, tokens: Sequence[NextToken], body: CompletionBody
    ) -> list[CompletionChoice]:
        wanted = body.logprobs is not None or body.has_labels
        num_top = body.logprobs or 0
        return [
            CompletionChoice(
                index=index,
                text=self._reader.token_text(token.top[0][0]),
                logprobs=write_completion(token, num_top, self._reader) if wanted else None,
            )
            for index, token in enumerate(tokens)
        ]

    async def _read(
        self,
        prompts: PromptList,
        field: str,
        question: WithLabels,
        *,
        adapter: str | None,
        num_top: int = 0,
        whole: bool = True,
    ) -> tuple[list[NextToken], Usage]:
        """Read the next token of every prompt, in their order."""
        label_ids, packed = await self._batcher.run_text(
            self._pack, prompts, field, question, adapter
        )
        raws = await self._batcher.forward(packed.requests, label_mass=whole, num_top=num_top)
        tokens = await self._batcher.run_text(_unpack, packed, raws, label_ids, whole)
        computed_tokens = sum(raw.computed_tokens for raw in raws)
        usage = Usage(
            prompt_tokens=packed.num_tokens,
            total_tokens=packed.num_tokens,
            prompt_tokens_details=CachedTokens(cached_tokens=packed.num_tokens - computed_tokens),
        )
        return tokens, usage

    def _pack(
        self, prompts: PromptList, field: str, question: WithLabels, adapter: str | None
    ) -> tuple[list[int], PackedPrompts]:
        label_ids = list(question.label_token_ids or [])
        if question.labels is not None:
            label_ids = self._reader.label_ids(question.labels)
        elif label_ids:
            self._reader.check_ids(label_ids, "label_token_ids")
        encoded = self._reader.encode_all(prompts)
        self._reader.check(encoded, field)
        # The head reads at least one label.
        return label_ids, pack_prompts(encoded, label_ids or [0], adapter=adapter)


_ROLES = {"developer": "system"}  # OpenAI's newer word, which templates do not know


def _unpack(
    packed: PackedPrompts, raws: Sequence[RawScores], label_ids: Sequence[int], whole: bool
) -> list[NextToken]:
    tokens: dict[int, NextToken] = {}
    for raw, places in zip(raws, packed.places, strict=True):
        tokens.update(zip(places, next_tokens(raw, label_ids, whole=whole), strict=True))
    return [tokens[place] for place in range(len(tokens))]


def _concatenate(
    query: str | tuple[int, ...], items: PromptList, *, item_first: bool
) -> PromptList:
    # The schema has seen that both are of one kind.
    pairs = [(item, query) if item_first else (query, item) for item in items]
    return [first + second for first, second in pairs]  # type: ignore[operator,return-value]


def _with_answers(usage: Usage, num_answers: int) -> Usage:
    return usage.model_copy(
        update={
            "completion_tokens": num_answers,
            "total_tokens": usage.prompt_tokens + num_answers,
        }
    )


def _candidate(document: Document) -> Item:
    return Item(fields=document.model_dump(exclude_none=True))


def _in_rerank_words(message: str) -> str:
    renamed = message.replace("candidates[", "documents[").replace(".fields.text:", ".text:")
    return renamed.removeprefix("profile.") if renamed.startswith("profile.query:") else renamed


def _relevance(task: Task, value: float) -> float:
    """Bring a ranking value into 0..1."""
    if task.ranking.kind == "log_odds":
        return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))
    grades = [label.grade or 0.0 for label in task.labels]
    lowest, highest = min(grades), max(grades)
    scaled = (value - lowest) / (highest - lowest) if highest > lowest else 0.0
    # Rounding may leave the interval by an ulp.
    return min(1.0, max(0.0, scaled))


def _short_name(name: str) -> str:
    return Path(name).name if Path(name).is_dir() else name
