"""A backend as what computes the passes of a ranker."""

from collections.abc import Sequence

import torch

from rankonce.model.scoring import OpenRequest, PassScorer, RawScores
from rankonce.serving.backends.base import Backend, GroupScores, PromptGroup


class EngineScorer(PassScorer):
    """Hands passes to an engine, which keeps prefixes itself.

    Args:
        backend: must take as many passes at a time as it says.
    """

    def __init__(self, backend: Backend) -> None:
        super().__init__(cache_bytes=0)
        self.backend = backend
        self.num_passes = backend.num_passes

    def check(self) -> None:
        """Make sure that the engine answers."""
        self.backend.check()

    def forget_recordings(self) -> None:
        """Do nothing: whatever an engine records is its own."""

    def run_pass(self, turns: Sequence[tuple[OpenRequest, int]]) -> None:
        """Ask the engine about the candidates of a pass; all of them are scored, or none."""
        groups = [_group(request, last) for request, last in turns]
        answers = self.backend.score(groups)
        pieces = [
            _read(request, group, answer)
            for (request, _), group, answer in zip(turns, groups, answers, strict=True)
        ]
        for (request, last), piece in zip(turns, pieces, strict=True):
            request.pieces.append(piece)
            request.num_done = last


def _group(request: OpenRequest, last: int) -> PromptGroup:
    tokens = request.tokens
    return PromptGroup(
        prefix_ids=tokens.prefix_ids,
        segment_ids=tokens.segment_ids[request.num_done : last],
        label_ids=tuple(dict.fromkeys(token for forms in tokens.label_ids for token in forms)),
        num_top=request.num_top,
        cache_salt=tokens.cache_salt,
    )


def _read(request: OpenRequest, group: PromptGroup, answer: GroupScores) -> RawScores:
    place = {token: index for index, token in enumerate(group.label_ids)}
    forms_CI = torch.tensor(answer.label_logprobs, dtype=torch.float64)
    whole_CL = torch.stack(
        [
            forms_CI[:, [place[token] for token in forms]].logsumexp(dim=1)
            for forms in request.tokens.label_ids
        ],
        dim=1,
    )
    mass_C = whole_CL.logsumexp(dim=1)
    raw = RawScores(
        labels_CL=(whole_CL - mass_C[:, None]).float(),
        mass_C=mass_C.float() if request.whole else None,
        computed_tokens=answer.prompt_tokens - answer.cached_tokens,
        cached_tokens=answer.cached_tokens,
    )
    if request.num_top:
        ids, logprobs = zip(*(zip(*top, strict=True) for top in answer.top), strict=True)
        raw.top_ids_CN, raw.top_logprobs_CN = torch.tensor(ids), torch.tensor(logprobs)
    return raw
