"""The whole trip of a request: prepare → forward → finish.

prepare   task and request become text and token ids                 rankonce.prompts
forward   requests are packed into passes, prefixes come from or go
          to the cache, the head reads the score rows                rankonce.model
finish    log-probabilities become ranking values and ranks, in the
          request's own order
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rankonce.errors import NumericsError, RankOnceError, RequestError
from rankonce.layout import PassPart, TokenizedRequest, plan_passes
from rankonce.model.adapters import is_adapter, read_adapter
from rankonce.model.execution import PassRunner
from rankonce.model.loading import LoadedModel, load_model
from rankonce.model.prefix_cache import KeysValues, PrefixCache
from rankonce.prompts.encoding import TextEncoder
from rankonce.prompts.rendering import RenderedRequest, Renderer
from rankonce.prompts.tasks import Task, find_task, library_tasks
from rankonce.records import CandidateScore, ScoreRequest, ScoreResult, TokenUsage, read_request

EMBEDDED_MODEL = Path(__file__).parent / "embedded"
# Below this share of the whole vocabulary the model would rather have said something else.
_LOW_LABEL_MASS = 0.05


@dataclass(frozen=True, kw_only=True)
class RankerConfig:
    """How a ranker runs.

    Attributes:
        max_tokens_per_pass: computed tokens of one forward pass; bounds its memory.
        max_graph_tokens: passes of up to this many tokens are replayed as CUDA graphs, where the
            model allows it; 0 replays none.
        prefix_cache_mb: bound of the prefix cache in MB; 0 keeps nothing.
        label_mass: also read the whole vocabulary and report the labels' share of it.
        chat: use the tokenizer's chat template; ``None`` uses it where there is one.
        adapter: scores the requests that name none, whatever their task; ``None`` leaves it to the
            adapter that learnt the task.
    """

    max_tokens_per_pass: int = 16_384
    max_graph_tokens: int = 4096
    prefix_cache_mb: int = 256
    label_mass: bool = False
    chat: bool | None = None
    adapter: str | None = None


@dataclass(frozen=True, kw_only=True)
class PreparedRequest:
    """A request that is ready for the model."""

    request: ScoreRequest
    task: Task
    rendered: RenderedRequest


@dataclass(kw_only=True)
class RawScores:
    """What the model says of one request's C candidates.

    Attributes:
        labels_CL: log P(label) among the labels, FP32.
        mass_C: log of the labels' probability in the whole vocabulary, where asked for.
        top_logprobs_CN, top_ids_CN: most probable tokens, where asked for.
        computed_tokens: tokens of this request that went through the model.
        cached_tokens: prefix tokens that came from the cache.
    """

    labels_CL: Tensor
    mass_C: Tensor | None = None
    top_logprobs_CN: Tensor | None = None
    top_ids_CN: Tensor | None = None
    computed_tokens: int = 0
    cached_tokens: int = 0


class Ranker:
    """Scores the candidates of requests with one model and any number of tasks.

    Args:
        model: a loaded model.
        tasks: the caller's own tasks, beside those of the library and before them.
        config: how it runs.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        tasks: Iterable[Task] = (),
        config: RankerConfig | None = None,
    ) -> None:
        self.model = model
        self.config = config or RankerConfig()
        self.tasks: dict[str, Task] = {**library_tasks(), **{task.name: task for task in tasks}}
        encoder = TextEncoder(model.tokenizer, chat=self.config.chat)
        self.renderer = Renderer(encoder, max_prompt_tokens=model.max_prompt_tokens)
        self.cache = PrefixCache(self.config.prefix_cache_mb * 1_000_000)
        self.runner = PassRunner(
            model.network,
            model.table_keys,
            max_graph_tokens=self.config.max_graph_tokens if model.is_capturable else 0,
        )

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = EMBEDDED_MODEL,
        *,
        device: str | None = None,
        precision: str | None = None,
        keep: Sequence[str] = (),
        trust_remote_code: bool = False,
        tasks: Iterable[Task] = (),
        config: RankerConfig | None = None,
        adapters: Mapping[str, str | Path] | None = None,
    ) -> "Ranker":
        """Load a checkpoint, the embedded movie ranker by default; see ``load_model``.

        The folder of an adapter loads its backbone as well, and scores with both.
        """
        if is_adapter(name):
            files = read_adapter(name, name="default")
            adapters = {files.name: name, **(adapters or {})}
            config = replace(config or RankerConfig(), adapter=files.name)
            name = files.find_base()
        model = load_model(
            name,
            device=device,
            precision=precision,
            keep=keep,
            trust_remote_code=trust_remote_code,
            adapters=adapters,
        )
        return cls(model, tasks=tasks, config=config)

    def score(self, request: ScoreRequest) -> ScoreResult:
        """Score the candidates of one request in as few passes as fit.

        Raises:
            RankOnceError: names the field of the request that cannot be used.
        """
        prepared = self.prepare(request)
        (raw,) = self.forward([prepared.rendered.tokens])
        return self.finish(prepared, raw)

    def score_many(
        self, requests: Iterable[ScoreRequest], *, progress: bool = True
    ) -> Iterator[ScoreResult]:
        """Score requests in their order, as many in a pass as fit, with a progress bar on stderr.

        Results come as soon as their pass is done, so any number of requests can be streamed.

        Raises:
            RankOnceError: a request cannot be used; the answers to those before it come first.
        """
        from rich.console import Console
        from rich.progress import track

        console = Console(stderr=True)
        total = len(requests) if isinstance(requests, Sequence) else None
        stream = track(
            requests,
            description="scoring",
            total=total,
            console=console,
            disable=not (progress and console.is_terminal),
        )
        waiting: list[PreparedRequest] = []
        tokens = 0
        for request in stream:
            try:
                waiting.append(self.prepare(request))
            except RankOnceError:
                # What came before the request at fault is answered all the same.
                yield from self._finish_all(waiting)
                raise
            usage = waiting[-1].rendered.tokens
            tokens += len(usage.prefix_ids) + sum(map(len, usage.segment_ids))
            if tokens >= self.config.max_tokens_per_pass:
                yield from self._finish_all(waiting)
                waiting, tokens = [], 0
        yield from self._finish_all(waiting)

    def prepare(self, request: ScoreRequest) -> PreparedRequest:
        """Render a request and find its labels' tokens.

        Raises:
            RankOnceError: names the field of the request that cannot be used.
        """
        request = read_request(request)
        task = find_task(request.task, self.tasks)
        adapter = self.choose_adapter(request.adapter, task=task.name)
        rendered = self.renderer.render(task, request)
        rendered = replace(rendered, tokens=replace(rendered.tokens, adapter=adapter))
        self.model.check_ids(rendered.tokens)
        return PreparedRequest(request=request, task=task, rendered=rendered)

    def choose_adapter(self, name: str | None, *, task: str | None = None) -> str | None:
        """Find the adapter that scores a request.

        Args:
            name: as the request gives it: empty for the backbone alone, ``None`` leaves the choice
                to the configuration or to the task.
            task: the request's.

        Returns:
            Its name; ``None`` is the backbone alone.

        Raises:
            RequestError: there is no such adapter, or several learnt the task.
        """
        name = self.config.adapter if name is None else name
        known = self.model.adapters.files
        if name:
            if name not in known:
                there = f"one of {', '.join(known)}" if known else "left out, since none is loaded"
                raise RequestError(f"adapter: should be {there}, is {name!r}")
            return name
        learnt = self.model.adapters.of_task(task) if name is None and task is not None else []
        if len(learnt) > 1:
            raise RequestError(f"adapter: should be given: {', '.join(learnt)} learnt {task}")
        return learnt[0] if learnt else None

    @torch.inference_mode()
    def forward(
        self,
        requests: Sequence[TokenizedRequest],
        *,
        label_mass: bool | None = None,
        num_top: int = 0,
    ) -> list[RawScores]:
        """Run tokenised requests through the model, those of one adapter after those of another.

        Args:
            label_mass: also normalise over the whole vocabulary; the ranker's setting by default.
            num_top: also give this many most probable tokens of every candidate.
        """
        whole = num_top > 0 or (self.config.label_mass if label_mass is None else label_mass)
        raws: dict[int, RawScores] = {}
        for adapter in dict.fromkeys(request.adapter for request in requests):
            places = [i for i, request in enumerate(requests) if request.adapter == adapter]
            self.model.adapters.use(adapter)
            scores = self._forward_alike([requests[place] for place in places], whole, num_top)
            raws.update(zip(places, scores, strict=True))
        return [raws[place] for place in range(len(requests))]

    def _forward_alike(
        self, requests: Sequence[TokenizedRequest], whole: bool, num_top: int
    ) -> list[RawScores]:
        """Run requests through the model with the adapter that is in use."""
        prefixes: dict[int, KeysValues] = {}
        for index, request in enumerate(requests):
            if not self.config.prefix_cache_mb:
                break
            entry = self.cache.get(request.prefix_ids, request.adapter)
            if entry is not None:
                prefixes[index] = entry
        passes = plan_passes(
            requests,
            [index in prefixes for index in range(len(requests))],
            max_tokens_per_pass=self.config.max_tokens_per_pass,
        )
        pieces: list[list[RawScores]] = [[] for _ in requests]
        from_cache = set(prefixes)
        for number, parts in enumerate(passes):
            going_on = {part.request for later in passes[number + 1 :] for part in later}
            hidden_CD, kept = self.runner.run(
                parts,
                requests,
                prefixes,
                keep_prefixes=self.config.prefix_cache_mb > 0 or bool(going_on),
            )
            for index, entry in kept.items():
                self.cache.put(requests[index].prefix_ids, entry, requests[index].adapter)
                if index in going_on:
                    prefixes[index] = entry
            row = 0
            for part in parts:
                rows_CD = hidden_CD[row : row + part.last - part.first]
                row += part.last - part.first
                scores = self._read_head(rows_CD, requests[part.request], whole, num_top)
                _count_tokens(scores, part, requests[part.request], from_cache)
                pieces[part.request].append(scores)
            for index in set(prefixes) - going_on:
                del prefixes[index]
        return [_join(scores) for scores in pieces]

    def finish(self, prepared: PreparedRequest, raw: RawScores) -> ScoreResult:
        """Turn the model's numbers into the answer, in the request's own order.

        Raises:
            NumericsError: a score is NaN or infinite; names the candidate.
        """
        task, request, tokens = prepared.task, prepared.request, prepared.rendered.tokens
        rows = raw.labels_CL.tolist()
        for index, row in enumerate(rows):
            if not all(math.isfinite(value) for value in row):
                raise NumericsError(
                    f"candidates[{index}]: the model gave {row} as log-probabilities; its weights "
                    "or its precision are at fault"
                )
        log_probs = [dict(zip(task.label_names, row, strict=True)) for row in rows]
        values = [task.ranking_value(row) for row in log_probs]
        order = sorted(range(len(values)), key=lambda index: -values[index])
        ranks = {index: place + 1 for place, index in enumerate(order)}
        masses = None if raw.mass_C is None else raw.mass_C.exp().tolist()
        # A text that stands twice may differ from itself in the last bit: its first value counts.
        by_text: dict[tuple[int, ...], float] = {}
        for segment, value in zip(tokens.segment_ids, values, strict=True):
            by_text.setdefault(segment, value)
        num_distinct = len(set(by_text.values()))
        return ScoreResult(
            id=request.id,
            task=task.name,
            candidates=tuple(
                CandidateScore(
                    id=candidate.id,
                    log_probs=log_probs[index],
                    value=values[index],
                    rank=ranks[index],
                    label_mass=None if masses is None else masses[index],
                )
                for index, candidate in enumerate(request.candidates)
            ),
            history=prepared.rendered.history,
            usage=TokenUsage(
                prompt_tokens=len(tokens.prefix_ids) + sum(map(len, tokens.segment_ids)),
                computed_tokens=raw.computed_tokens,
                cached_tokens=raw.cached_tokens,
                separate_tokens=tokens.separate_tokens,
            ),
            distinct_score_ratio=num_distinct / len(by_text),
            warnings=_warnings(prepared, len(by_text) - num_distinct, masses),
            adapter=tokens.adapter,
        )

    def _finish_all(self, prepared: Sequence[PreparedRequest]) -> Iterator[ScoreResult]:
        raws = self.forward([one.rendered.tokens for one in prepared])
        yield from (self.finish(one, raw) for one, raw in zip(prepared, raws, strict=True))

    def _read_head(
        self, rows_CD: Tensor, request: TokenizedRequest, whole: bool, num_top: int
    ) -> RawScores:
        head = self.model.head
        if not whole:
            return RawScores(labels_CL=head.label_logprobs(rows_CD, request.label_ids))
        scores = head.vocabulary_logprobs(rows_CD, request.label_ids, num_top=num_top)
        mass_C = scores.labels_CL.logsumexp(dim=1)
        return RawScores(
            labels_CL=scores.labels_CL - mass_C[:, None],
            mass_C=mass_C,
            top_logprobs_CN=scores.top_logprobs_CN,
            top_ids_CN=scores.top_ids_CN,
        )


def _count_tokens(
    scores: RawScores, part: PassPart, request: TokenizedRequest, from_cache: set[int]
) -> None:
    segments = request.segment_ids[part.first : part.last]
    scores.computed_tokens = sum(map(len, segments))
    if part.first == 0:
        if part.request in from_cache:
            scores.cached_tokens = len(request.prefix_ids)
        else:
            scores.computed_tokens += len(request.prefix_ids)


def _join(pieces: Sequence[RawScores]) -> RawScores:
    """Join the parts of a request on the host: the first wait for the device, after all passes."""

    def rows(name: str) -> Tensor | None:
        tensors = [getattr(piece, name) for piece in pieces]
        return None if tensors[0] is None else torch.cat(tensors).cpu()

    return RawScores(
        labels_CL=torch.cat([piece.labels_CL for piece in pieces]).cpu(),
        mass_C=rows("mass_C"),
        top_logprobs_CN=rows("top_logprobs_CN"),
        top_ids_CN=rows("top_ids_CN"),
        computed_tokens=sum(piece.computed_tokens for piece in pieces),
        cached_tokens=sum(piece.cached_tokens for piece in pieces),
    )


def _warnings(
    prepared: PreparedRequest, num_ties: int, masses: Sequence[float] | None
) -> tuple[str, ...]:
    warnings = []
    history = prepared.rendered.history
    if history.dropped:
        warnings.append(
            f"history: {len(history.dropped)} of {history.num_events} events were dropped by "
            f"policy {history.policy}"
        )
    if num_ties:
        warnings.append(f"scores: {num_ties} different candidates share a score with another one")
    if masses is not None and min(masses) < _LOW_LABEL_MASS:
        warnings.append(
            f"labels: their probability in the whole vocabulary is as low as {min(masses):.2g}; "
            "the model would rather answer something else"
        )
    return tuple(warnings)
