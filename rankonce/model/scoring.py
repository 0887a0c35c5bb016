"""Tokenised requests through the model, pass by pass.

A request is opened, takes part in one pass or several, each with some of its candidates, and is
done when all have their scores. Whoever plans the passes decides who takes part: ``Scorer.forward``
for a list of requests, the server's batcher for those that wait.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rankonce.layout import PassPart, TokenizedRequest, plan_passes
from rankonce.model.execution import PassRunner
from rankonce.model.loading import LoadedModel
from rankonce.model.prefix_cache import KeysValues, PrefixCache


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


@dataclass(kw_only=True, eq=False)
class OpenRequest:
    """A request on its way through passes.

    Attributes:
        whole: also normalise over the whole vocabulary.
        num_top: also give this many most probable tokens.
        known: keys and values of the prefix's first tokens, from the cache or an earlier pass.
        num_done: candidates that have their scores.
        pieces: scores of every pass so far, on the model's device.
    """

    tokens: TokenizedRequest
    whole: bool
    num_top: int
    known: KeysValues | None = None
    num_done: int = 0
    pieces: list[RawScores] = field(default_factory=list)

    @property
    def known_tokens(self) -> int:
        """Tokens of the prefix that need not be computed."""
        return len(self.known[0][0]) if self.known else 0

    @property
    def is_done(self) -> bool:
        """Whether every candidate has its scores."""
        return self.num_done == len(self.tokens.segment_ids)

    def join(self) -> RawScores:
        """Join the scores of all passes on the host, which waits for the device."""

        def rows(name: str) -> Tensor | None:
            tensors = [getattr(piece, name) for piece in self.pieces]
            return None if tensors[0] is None else torch.cat(tensors).cpu()

        return RawScores(
            labels_CL=torch.cat([piece.labels_CL for piece in self.pieces]).cpu(),
            mass_C=rows("mass_C"),
            top_logprobs_CN=rows("top_logprobs_CN"),
            top_ids_CN=rows("top_ids_CN"),
            computed_tokens=sum(piece.computed_tokens for piece in self.pieces),
            cached_tokens=sum(piece.cached_tokens for piece in self.pieces),
        )


class PassScorer(ABC):
    """Whoever computes the passes: a network of this process, or another engine.

    Attributes:
        cache: what is kept of prefixes here.
        num_passes: that may run at one time, each on a thread of its own.
    """

    num_passes = 1

    def __init__(self, *, cache_bytes: int) -> None:
        self.cache = PrefixCache(cache_bytes)

    @abstractmethod
    def run_pass(self, turns: Sequence[tuple[OpenRequest, int]]) -> None:
        """Run one pass.

        Args:
            turns: requests of one adapter, each with the candidate before which its part ends.
        """

    @abstractmethod
    def check(self) -> None:
        """Make sure that passes can be computed.

        Raises:
            EngineError: whoever computes them does not answer.
        """

    @abstractmethod
    def forget_recordings(self) -> None:
        """Forget what was recorded of passes, since the layers change."""

    def open_request(
        self, tokens: TokenizedRequest, *, whole: bool = False, num_top: int = 0
    ) -> OpenRequest:
        """Begin a request with what the cache knows of its prefix.

        Args:
            whole, num_top: as in ``OpenRequest``; tokens out of the whole vocabulary need both.
        """
        known = None
        if self.cache.max_bytes and tokens.prefix_ids:
            known = self.cache.get(tokens.prefix_ids, tokens.adapter, tokens.cache_salt)
        return OpenRequest(tokens=tokens, whole=whole or num_top > 0, num_top=num_top, known=known)

    def count_known(self, tokens: TokenizedRequest) -> int:
        """Count the prefix tokens that ``open_request`` would find."""
        if not self.cache.max_bytes:
            return 0
        return self.cache.count_known(tokens.prefix_ids, tokens.adapter, tokens.cache_salt)

    def forward(
        self,
        requests: Sequence[TokenizedRequest],
        *,
        max_tokens_per_pass: int,
        whole: bool = False,
        num_top: int = 0,
    ) -> list[RawScores]:
        """Run requests through the model, those of one adapter after those of another."""
        opened: dict[int, OpenRequest] = {}
        for adapter in dict.fromkeys(request.adapter for request in requests):
            places = [i for i, request in enumerate(requests) if request.adapter == adapter]
            alike = [
                self.open_request(requests[place], whole=whole, num_top=num_top) for place in places
            ]
            passes = plan_passes(
                [one.tokens for one in alike],
                [one.known_tokens for one in alike],
                max_tokens_per_pass=max_tokens_per_pass,
            )
            for parts in passes:
                self.run_pass([(alike[part.request], part.last) for part in parts])
            opened.update(zip(places, alike, strict=True))
        return [opened[place].join() for place in range(len(requests))]


class Scorer(PassScorer):
    """Runs passes of one model with one prefix cache, for one thread at a time.

    Args:
        cache_bytes: bound of the prefix cache; 0 keeps nothing across requests.
        max_graph_tokens: passes of up to this many tokens are replayed as CUDA graphs, where the
            model allows it.
    """

    def __init__(self, model: LoadedModel, *, cache_bytes: int, max_graph_tokens: int) -> None:
        super().__init__(cache_bytes=cache_bytes)
        self.model = model
        self.runner = PassRunner(
            model.network,
            model.table_keys,
            max_graph_tokens=max_graph_tokens if model.is_capturable else 0,
        )

    def check(self) -> None:
        """Do nothing: what runs in this process answers."""

    def forget_recordings(self) -> None:
        """Forget the graphs that were recorded of passes."""
        self.runner.forget_recordings()

    @torch.inference_mode()
    def run_pass(self, turns: Sequence[tuple[OpenRequest, int]]) -> None:
        """Run one pass through the network."""
        requests = [request.tokens for request, _ in turns]
        adapter = requests[0].adapter
        self.model.adapters.use(adapter)
        parts = [
            PassPart(
                request=index,
                first=request.num_done,
                last=last,
                cached=request.known_tokens == len(request.tokens.prefix_ids),
                known=request.known_tokens,
            )
            for index, (request, last) in enumerate(turns)
        ]
        goes_on = any(last < len(request.tokens.segment_ids) for request, last in turns)
        hidden_CD, kept = self.runner.run(
            parts,
            requests,
            {i: request.known for i, (request, _) in enumerate(turns) if request.known},
            keep_prefixes=self.cache.max_bytes > 0 or goes_on,
        )
        rows = hidden_CD.split([part.last - part.first for part in parts])
        scores = [
            self._read_head(rows_CD, request)
            for rows_CD, (request, _) in zip(rows, turns, strict=True)
        ]
        # From here on nothing fails: a pass changes all of its requests or none.
        for part, piece, (request, last) in zip(parts, scores, turns, strict=True):
            piece.computed_tokens, piece.cached_tokens = count_tokens(part, request.tokens)
            request.pieces.append(piece)
            request.num_done = last
        for index, entry in kept.items():
            self._keep(turns[index][0], entry)
        for request, _ in turns:
            if request.is_done:
                request.known = None

    def _keep(self, request: OpenRequest, entry: KeysValues) -> None:
        """Put what a pass computed of a prefix into the cache, and keep it for a later pass."""
        tokens, known = request.tokens, request.known_tokens
        if self.cache.max_bytes:
            self.cache.put(tokens.prefix_ids, entry, tokens.adapter, tokens.cache_salt, known=known)
        if not request.is_done:
            request.known = (
                [
                    (torch.cat(keys), torch.cat(values))
                    for keys, values in (
                        zip(*pair, strict=True) for pair in zip(request.known, entry, strict=True)
                    )
                ]
                if request.known
                else entry
            )

    def _read_head(self, rows_CD: Tensor, request: OpenRequest) -> RawScores:
        head, label_ids = self.model.head, request.tokens.label_ids
        if not request.whole:
            return RawScores(labels_CL=head.label_logprobs(rows_CD, label_ids))
        scores = head.vocabulary_logprobs(rows_CD, label_ids, num_top=request.num_top)
        mass_C = scores.labels_CL.logsumexp(dim=1)
        return RawScores(
            labels_CL=scores.labels_CL - mass_C[:, None],
            mass_C=mass_C,
            top_logprobs_CN=scores.top_logprobs_CN,
            top_ids_CN=scores.top_ids_CN,
        )


def count_tokens(part: PassPart, tokens: TokenizedRequest) -> tuple[int, int]:
    """Count the tokens of a part that go through the model, and those that the cache spared.

    What an earlier pass of the same request left is no hit.
    """
    known = part.known_of(len(tokens.prefix_ids))
    segments = sum(map(len, tokens.segment_ids[part.first : part.last]))
    return segments + len(tokens.prefix_ids) - known, known if part.first == 0 else 0
