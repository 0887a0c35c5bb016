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

from torch import Tensor

from rankonce.calibration import Calibration, calibrate_log_probs, read_calibrations
from rankonce.errors import ModelError, NumericsError, RankOnceError, RequestError
from rankonce.layout import TokenizedRequest
from rankonce.model.adapters import is_adapter, read_adapter
from rankonce.model.known import KnownModel
from rankonce.model.loading import LoadedModel, add_adapter, load_model
from rankonce.model.scoring import PassScorer, RawScores, Scorer
from rankonce.prompts.encoding import TextEncoder
from rankonce.prompts.rendering import RenderedRequest, Renderer
from rankonce.prompts.tasks import Task, find_task, library_tasks
from rankonce.prompts.token_cache import TokenCache
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
        token_cache_mb: bound of the token ids of candidates and events that are kept, in MB.
        label_mass: also read the whole vocabulary and report the labels' share of it.
        chat: use the tokenizer's chat template; ``None`` uses it where there is one.
        adapter: scores the requests that name none, whatever their task; ``None`` leaves it to the
            adapter that learnt the task.
        calibrate: apply the calibrations that lie beside the model and its adapters.
    """

    max_tokens_per_pass: int = 16_384
    max_graph_tokens: int = 4096
    prefix_cache_mb: int = 256
    token_cache_mb: int = 64
    label_mass: bool = False
    chat: bool | None = None
    adapter: str | None = None
    calibrate: bool = True


@dataclass(frozen=True, kw_only=True)
class PreparedRequest:
    """A request that is ready for the model."""

    request: ScoreRequest
    task: Task
    rendered: RenderedRequest


class Ranker:
    """Scores the candidates of requests with one model and any number of tasks.

    Args:
        model: a loaded model, or what is known of one whose weights another engine holds.
        tasks: the caller's own tasks, beside those of the library and before them.
        config: how it runs.
        scorer: computes the passes; by default the model itself.

    Raises:
        ModelError: the weights are not here, and there is no scorer.
    """

    def __init__(
        self,
        model: KnownModel,
        *,
        tasks: Iterable[Task] = (),
        config: RankerConfig | None = None,
        scorer: PassScorer | None = None,
    ) -> None:
        self.model = model
        self.config = config or RankerConfig()
        # By adapter and task; the backbone's under None.
        self.calibrations: dict[str | None, Mapping[str, Calibration]] = {}
        if self.config.calibrate:
            folders = {None: model.name} | {
                name: files.folder for name, files in model.adapters.files.items()
            }
            self.calibrations = {name: read_calibrations(one) for name, one in folders.items()}
        self.tasks: dict[str, Task] = {**library_tasks(), **{task.name: task for task in tasks}}
        encoder = TextEncoder(
            model.tokenizer,
            chat=self.config.chat,
            cache=TokenCache(self.config.token_cache_mb * 1_000_000),
        )
        self.renderer = Renderer(encoder, max_prompt_tokens=model.max_prompt_tokens)
        self.scorer = scorer or Scorer(
            self.loaded,
            cache_bytes=self.config.prefix_cache_mb * 1_000_000,
            max_graph_tokens=self.config.max_graph_tokens,
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

    @property
    def loaded(self) -> LoadedModel:
        """The model with its weights.

        Raises:
            ModelError: another engine holds them.
        """
        if not isinstance(self.model, LoadedModel):
            raise ModelError(f"model: the weights of {self.model.name} are in another engine")
        return self.model

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

    def prepare(
        self,
        request: ScoreRequest,
        *,
        cache_salt: str | None = None,
        needs_candidates: bool = True,
        is_checked: bool = False,
    ) -> PreparedRequest:
        """Render a request and find its labels' tokens.

        Args:
            cache_salt: requests of different salts share nothing that is kept.
            needs_candidates: refuse a request without candidates, of which only the prefix can be
                computed.
            is_checked: every field has been checked already, as ``read_request`` does it.

        Raises:
            RankOnceError: names the field of the request that cannot be used.
        """
        if not is_checked:
            request = read_request(request, needs_candidates=needs_candidates)
        task = find_task(request.task, self.tasks)
        adapter = self.choose_adapter(request.adapter, task=task.name)
        rendered = self.renderer.render(task, request, cache_salt=cache_salt)
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

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Load one more adapter; nothing else may use the ranker meanwhile.

        Raises:
            ModelError: there is one of this name, or it does not fit; all is as before.
        """
        if name in self.model.adapters.files:
            raise ModelError(f"adapter: {name!r} is loaded already")
        calibrations = read_calibrations(folder) if self.config.calibrate else {}
        add_adapter(self.loaded, folder, name=name)
        self.calibrations[name] = calibrations
        self.scorer.forget_recordings()

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter with all that was computed with it; nothing else may run meanwhile."""
        self.model.adapters.remove(self.loaded.network, name)
        self.calibrations.pop(name, None)
        self.scorer.cache.drop(name)
        self.scorer.forget_recordings()

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
        return self.scorer.forward(
            requests,
            max_tokens_per_pass=self.config.max_tokens_per_pass,
            whole=self.config.label_mass if label_mass is None else label_mass,
            num_top=num_top,
        )

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
        calibration = self.find_calibration(request, tokens.adapter)
        calibrated = None
        if calibration is not None:
            calibrated = _calibrate(raw.labels_CL, task, calibration)
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
                    log_probs=log_probs[index] if calibrated is None else calibrated[index][0],
                    value=values[index] if calibrated is None else calibrated[index][1],
                    rank=ranks[index],
                    label_mass=None if masses is None else masses[index],
                    raw_value=None if calibrated is None else values[index],
                    raw_log_probs=None if calibrated is None else log_probs[index],
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
            warnings=(
                *_warnings(prepared, len(by_text) - num_distinct, masses),
                *self._calibration_warnings(request, tokens.adapter),
            ),
            adapter=tokens.adapter,
            calibration=None if calibration is None else calibration.method,
        )

    def find_calibration(self, request: ScoreRequest, adapter: str | None) -> Calibration | None:
        """Find what calibrates the scores of a request, if anything does.

        A request with an instruction of its own is not like those that the task's was fitted on.
        """
        if request.instruction is not None:
            return None
        return self.calibrations.get(adapter, {}).get(request.task)

    def _calibration_warnings(self, request: ScoreRequest, adapter: str | None) -> list[str]:
        if request.instruction is None or request.task not in self.calibrations.get(adapter, {}):
            return []
        return ["instruction: is not the task's, for which alone the scores would be calibrated"]

    def _finish_all(self, prepared: Sequence[PreparedRequest]) -> Iterator[ScoreResult]:
        raws = self.forward([one.rendered.tokens for one in prepared])
        yield from (self.finish(one, raw) for one, raw in zip(prepared, raws, strict=True))


def _calibrate(
    labels_CL: Tensor, task: Task, calibration: Calibration
) -> list[tuple[dict[str, float], float]]:
    """Return calibrated log-probabilities by label, and the ranking value, of each candidate."""
    log_probs_CL, values_C = calibrate_log_probs(labels_CL.double().numpy(), task, calibration)
    return [
        (dict(zip(task.label_names, row, strict=True)), value)
        for row, value in zip(log_probs_CL.tolist(), values_C.tolist(), strict=True)
    ]


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
