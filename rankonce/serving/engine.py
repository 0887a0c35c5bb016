"""From question to answer: prepare on the text thread, forward in the batcher, write the answer."""

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from rankonce.errors import ModelError, RequestError
from rankonce.prompts.tasks import find_task
from rankonce.ranker import PreparedRequest, Ranker
from rankonce.records import ScoreRequest, ScoreResult
from rankonce.serving.answers import (
    AssistantMessage,
    ChatAnswer,
    ChatChoice,
    CompletionAnswer,
    GenerativeScore,
    GenerativeScoringAnswer,
    PrefixAnswer,
    RankAnswer,
    RankUsage,
    ScoreAnswer,
    Usage,
    history_part,
    rank_answer,
)
from rankonce.serving.batcher import Batcher, BatcherConfig, Terms
from rankonce.serving.batches.config import BatchConfig
from rankonce.serving.failures import TooLargeError, UnknownModelError
from rankonce.serving.logprobs import write_chat, write_choices
from rankonce.serving.next_tokens import NextTokenReader
from rankonce.serving.observations import CacheObserved, Observations, QueueObserved, Stage
from rankonce.serving.packing import EncodedPrompts
from rankonce.serving.passes import Passes
from rankonce.serving.prefixes import PreparedPrefixes
from rankonce.serving.prompts import PromptReader
from rankonce.serving.rerank_shapes import AnyRerankAnswer, RerankBody
from rankonce.serving.reranking import in_rerank_words, read_documents, write_rerank
from rankonce.serving.results import ResultCache
from rankonce.serving.schemas import (
    ChatBody,
    CompletionBody,
    GenerativeScoringBody,
    PrefixBody,
    RankBody,
    ScoreBody,
)


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How a server runs.

    Attributes:
        port: 0 takes a free one.
        served_model_name: what clients call the model; by default the checkpoint's name.
        max_candidates: candidates, documents, items or prompts of one question.
        max_body_mb: bound of a question's bytes, in MB.
        allow_adapter_loading: load and unload adapters on a client's word, from any folder that
            the server can read.
        batching: how questions wait.
        result_cache_pairs: bound on the scores that are kept for pairs of a prefix and a
            candidate; 0 keeps none.
        prefix_ttl_s: seconds for which a prepared prefix can be used, unless it asks for less.
        max_prefixes: prepared prefixes that are remembered; the oldest go first.
        pinned_tasks: tasks whose instruction is read before the first question comes.
        batches: how files and batches are kept; without it there are none.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    max_candidates: int = 10_000
    max_body_mb: int = 32
    allow_adapter_loading: bool = False
    batching: BatcherConfig = field(default_factory=BatcherConfig)
    result_cache_pairs: int = 0
    prefix_ttl_s: int = 300
    max_prefixes: int = 10_000
    pinned_tasks: tuple[str, ...] = ()
    batches: BatchConfig | None = None


class Engine:
    """Answers questions with one ranker, which it uses alone while it runs."""

    def __init__(self, ranker: Ranker, config: ServerConfig) -> None:
        self.ranker = ranker
        self.config = config
        self.model_name = config.served_model_name or _short_name(ranker.model.name)
        if self.model_name in self.adapter_names:
            raise ModelError(
                f"adapter: {self.model_name!r} is what the model is served as; choose another name"
            )
        self._prompts = PromptReader(ranker.model, ranker.renderer.encoder)
        self.observations = Observations()
        self._batcher = Batcher(ranker, config.batching, self.observations)
        self._prefixes = PreparedPrefixes(config.max_prefixes)
        self._results = ResultCache(max_pairs=config.result_cache_pairs)
        self._passes = Passes(self._batcher, self._results)
        self._next_tokens = NextTokenReader(self._prompts, self._batcher, self._passes)
        for task in ranker.tasks.values():
            ranker.scorer.cache.pin(ranker.renderer.instruction_ids(task))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Answer questions inside this context."""
        async with self._batcher.running():
            for name in self.config.pinned_tasks:
                await self.read_instruction(name)
            yield

    @property
    def queue(self) -> QueueObserved:
        """What is under way now."""
        return self._batcher.queue

    @property
    def caches(self) -> dict[str, CacheObserved]:
        """What each cache did so far and holds now."""
        cache, texts = self.ranker.scorer.cache, self.ranker.renderer.encoder.cache
        return {
            "prefix": CacheObserved(
                **asdict(cache.counts), max_bytes=cache.max_bytes, num_entries=len(cache)
            ),
            "tokens": CacheObserved(**asdict(texts.counts), max_bytes=texts.max_bytes),
            "results": self._results.observed,
        }

    async def read_instruction(self, task: str) -> None:
        """Compute what every prefix of a task begins with, for the cache to have it."""
        ids = self.ranker.renderer.instruction_ids(find_task(task, self.ranker.tasks))
        adapter = self.ranker.choose_adapter(None, task=task)
        await self._passes.read_prefix(ids, Terms(), adapter=adapter)

    async def forget_adapter(self, adapter: str | None) -> None:
        """Drop everything that was computed with an adapter, whose weights change or go."""
        self._results.drop(adapter)
        await self._batcher.run_between_passes(self.ranker.scorer.cache.drop, adapter)

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Adapters that questions can name."""
        adapters = self.ranker.model.adapters
        return tuple(name for name in adapters.files if name not in adapters.leaving)

    async def load_adapter(self, name: str, folder: str) -> None:
        """Load one more adapter between two passes.

        Raises:
            ModelError: it does not fit.
        """
        await self._batcher.run_between_passes(self.ranker.load_adapter, name, folder)

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter that no question uses, between two passes."""
        self._prefixes.drop(name)
        await self.forget_adapter(name)
        await self._batcher.run_between_passes(self.ranker.unload_adapter, name)

    def find_adapter(self, model: str | None) -> str | None:
        """Read what a question calls the model: the one served, or one of its adapters.

        Returns:
            The adapter's name; ``None`` for the model served, also where the question names none.

        Raises:
            UnknownModelError: there is no such model.
        """
        if model is None or model == self.model_name:
            return None
        if model in self.adapter_names:
            return model
        raise UnknownModelError("model", model, (self.model_name, *self.adapter_names))

    async def rank(self, body: RankBody, *, cache_salt: str | None = None) -> RankAnswer:
        """Answer in our own form.

        Args:
            cache_salt: as everywhere here: questions of different salts share nothing that is kept.
        """
        self._check_question(body.model, len(body.candidates), "candidates")
        if body.prefix is not None:
            leaving = self.ranker.model.adapters.leaving
            body = self._prefixes.complete(
                body, body.prefix, cache_salt=cache_salt, leaving=leaving
            )
        elif not body.task:
            raise RequestError(
                "task: is required and missing (or prefix, the id of a prepared one)"
            )
        with self._passes.admit(body, cache_salt) as terms:
            result = await self._score_request(self._with_adapter(body, body.model), terms)
        return rank_answer(result, model=self._name_of(result.adapter), top_n=body.top_n)

    async def prepare_prefix(
        self, body: PrefixBody, *, cache_salt: str | None = None
    ) -> PrefixAnswer:
        """Read what comes before the candidates, and give a handle for ``rank``."""
        request = self._with_adapter(body, body.model)
        with self._passes.admit(body, cache_salt) as terms:
            prepare = partial(self.ranker.prepare, cache_salt=cache_salt, needs_candidates=False)
            prepared = await self._batcher.run_text(prepare, request)
            tokens = prepared.rendered.tokens
            raw = await self._passes.read_prefix(tokens.prefix_ids, terms, adapter=tokens.adapter)
        num_tokens = len(tokens.prefix_ids)
        handle = self._prefixes.add(
            replace(prepared.request, adapter=tokens.adapter or ""),
            cache_salt=cache_salt,
            ttl_s=min(body.ttl_s or self.config.prefix_ttl_s, self.config.prefix_ttl_s),
            num_tokens=num_tokens,
        )
        return PrefixAnswer(
            id=handle.id,
            model=self._name_of(tokens.adapter),
            adapter=tokens.adapter,
            task=prepared.task.name,
            expires_at=int(handle.expires_at),
            history=history_part(prepared.rendered.history),
            usage=RankUsage(
                prompt_tokens=num_tokens,
                total_tokens=num_tokens,
                computed_tokens=num_tokens - raw.cached_tokens,
                cached_tokens=raw.cached_tokens,
                separate_tokens=num_tokens,
            ),
        )

    async def rerank(self, body: RerankBody, *, cache_salt: str | None = None) -> AnyRerankAnswer:
        """Answer in the form of Cohere and Jina, or of whose words the question has."""
        adapter = self._check_question(body.model, len(body.documents), body.documents_field)
        task = find_task(body.task, self.ranker.tasks)
        with self._passes.admit(body, cache_salt) as terms:
            documents = await self._batcher.run_text(read_documents, body, self._prompts)
            request = ScoreRequest(
                task=body.task,
                profile={"query": body.query},
                candidates=documents.candidates,
                adapter=adapter,
                instruction=body.instruction,
            )
            try:
                result = await self._score_request(request, terms)
            except RequestError as error:
                raise type(error)(in_rerank_words(str(error), body)) from error
        return write_rerank(body, documents, result, task, model=self._name_of(result.adapter))

    async def score(self, body: ScoreBody, *, cache_salt: str | None = None) -> ScoreAnswer:
        """Answer in SGLang's form."""
        adapter = self._choose(self._check_question(body.model, len(body.items), "items"))
        encode = partial(
            self._prompts.encode_concatenated,
            body.query,
            body.items,
            "items",
            item_first=body.item_first,
        )
        whole = not body.apply_softmax
        with self._passes.admit(body, cache_salt) as terms:
            tokens, usage = await self._next_tokens.read(
                encode, "items", body, terms, adapter=adapter, whole=whole
            )
        return ScoreAnswer(
            scores=[[math.exp(logprob) for _, logprob in token.labels] for token in tokens],
            model=self._name_of(adapter),
            usage=usage,
        )

    async def score_generatively(
        self, body: GenerativeScoringBody, *, cache_salt: str | None = None
    ) -> GenerativeScoringAnswer:
        """Answer in the form of vLLM's generative scoring."""
        adapter = self._choose(self._check_question(body.model, len(body.items), "items"))
        encode = partial(
            self._prompts.encode_joined,
            body.query,
            body.items,
            item_first=body.item_first,
            add_special_tokens=body.add_special_tokens,
        )
        whole = not body.apply_softmax
        with self._passes.admit(body, cache_salt) as terms:
            tokens, usage = await self._next_tokens.read(
                encode, "items", body, terms, adapter=adapter, whole=whole
            )
        answer = GenerativeScoringAnswer(
            model=self._name_of(adapter),
            data=[
                GenerativeScore(index=index, score=math.exp(token.labels[0][1]))
                for index, token in enumerate(tokens)
            ],
            usage=_with_answers(usage, len(tokens)),
        )
        if body.request_id is not None:
            answer.id = f"generative-scoring-{body.request_id}"
        return answer

    async def complete(
        self, body: CompletionBody, *, cache_salt: str | None = None
    ) -> CompletionAnswer:
        """Answer in the form of OpenAI's completions."""
        adapter = self._choose(self._check_question(body.model, len(body.prompt), "prompt"))
        encode = partial(self._prompts.encode_all, body.prompt, "prompt")
        num_top = max(1, body.logprobs or 0)
        with self._passes.admit(body, cache_salt) as terms:
            tokens, usage = await self._next_tokens.read(
                encode, "prompt", body, terms, adapter=adapter, num_top=num_top
            )
            choices = await self._batcher.run_text(
                write_choices, tokens, body, self._prompts, stage=Stage.ANSWER
            )
        return CompletionAnswer(
            model=self._name_of(adapter),
            choices=choices,
            usage=_with_answers(usage, len(choices)),
        )

    async def chat(self, body: ChatBody, *, cache_salt: str | None = None) -> ChatAnswer:
        """Answer in the form of OpenAI's chat completions."""
        adapter = self._choose(self._check_question(body.model, 1, "messages"))
        turns = [(_ROLES.get(turn.role, turn.role), turn.content) for turn in body.messages]
        encode_chat = self.ranker.renderer.encoder.encode_chat
        num_top = body.top_logprobs or 0
        with self._passes.admit(body, cache_salt) as terms:
            (token,), usage = await self._next_tokens.read(
                lambda: EncodedPrompts(head=(), tails=[encode_chat(turns)]),
                "messages",
                body,
                terms,
                adapter=adapter,
                num_top=max(1, num_top),
            )
        wanted = body.logprobs or body.has_labels
        choice = ChatChoice(
            message=AssistantMessage(content=self._prompts.token_text(token.top[0][0])),
            logprobs=write_chat(token, num_top, self._prompts) if wanted else None,
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

    def _with_adapter(self, request: ScoreRequest, model: str | None) -> ScoreRequest:
        """Give a request the adapter that is served as ``model``, if it is one."""
        adapter = self.find_adapter(model)
        if None not in (adapter, request.adapter) and adapter != request.adapter:
            raise RequestError(
                f"adapter: should be left out or {adapter!r}, as model says, is {request.adapter!r}"
            )
        return request if adapter is None else replace(request, adapter=adapter)

    async def _score_request(self, request: ScoreRequest, terms: Terms) -> ScoreResult:
        # A body was checked when it came; that takes as long again as all else before rendering.
        is_checked = isinstance(request, RankBody)
        prepare = partial(self.ranker.prepare, cache_salt=terms.cache_salt, is_checked=is_checked)
        prepared: PreparedRequest = await self._batcher.run_text(prepare, request)
        (raw,) = await self._passes.forward([prepared.rendered.tokens], terms, label_mass=True)
        return await self._batcher.run_text(self.ranker.finish, prepared, raw, stage=Stage.ANSWER)


_ROLES = {"developer": "system"}  # OpenAI's newer word, which templates do not know


def _with_answers(usage: Usage, num_answers: int) -> Usage:
    return usage.model_copy(
        update={
            "completion_tokens": num_answers,
            "total_tokens": usage.prompt_tokens + num_answers,
        }
    )


def _short_name(name: str) -> str:
    return Path(name).name if Path(name).is_dir() else name
