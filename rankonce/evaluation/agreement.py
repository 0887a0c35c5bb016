"""Figures of how well one way to compute scores keeps the order of another.

A candidate's score is the log-odds of its request's first label.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankonce.evaluation.labelled_requests import LabelledRequest
from rankonce.evaluation.metrics import auc, expected_calibration_error, ndcg_at_k

Floats = NDArray[np.float64]

REFERENCES = ("bf16", "fp32")
# What an arm must reach against bf16.
BARS = {"top_agreement": 0.99, "kendall_tau": 0.99, "distinct_score_ratio": 0.99}
# Pairs of candidates are compared in blocks of this many rows.
_PAIR_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One arm against another, over requests with two different candidates at least.

    Attributes:
        top_agreement: NDCG@1 agreement: the share of requests in which the candidate that the arm
            puts first has the best score of the reference. Of candidates that tie for the arm's
            first place each counts its part; those that tie in the reference are equally right.
        top_agreement_error: its standard error over requests.
        ndcg_at_1: mean over requests of the reference's P(first label) of the arm's first
            candidate over the best one: what a disagreement costs.
        kendall_tau: mean over requests of tau-b; 0 where only the arm has all scores equal.
        max_delta, mean_delta: |difference of log P| in nats, over candidates and labels.
        calibration_delta: mean |difference of P(first label)| over candidates.
    """

    top_agreement: float
    top_agreement_error: float
    ndcg_at_1: float
    kendall_tau: float
    max_delta: float
    mean_delta: float
    calibration_delta: float


def measure_arm(
    name: str,
    scores: Mapping[str, Sequence[Floats]],
    requests: Sequence[LabelledRequest],
    *,
    references: Sequence[str] = REFERENCES,
) -> dict[str, Any]:
    """Return the figures of one arm, its comparisons, and which bars it meets against bf16.

    Candidates with the same tokens count as one: at two places they may differ in the last bit.

    Args:
        scores: log P(label), C x L a request, by arm.
        references: the arms that it is compared with.
    """
    firsts = [_first_places(one.tokens.segment_ids) for one in requests]
    texts = {
        arm: [logprobs_CL[places] for logprobs_CL, places in zip(parts, firsts, strict=True)]
        for arm, parts in scores.items()
        if arm in (name, *references)
    }
    values = [log_odds(logprobs_CL) for logprobs_CL in texts[name]]
    distinct = sum(len(np.unique(value)) for value in values)
    measured: dict[str, Any] = {
        "distinct_score_ratio": distinct / sum(map(len, values)),
        "num_distinct_scores": len(np.unique(np.concatenate(values))),
        **_label_metrics(scores[name], requests),
        "against": {},
    }
    ranked = [index for index, value in enumerate(values) if len(value) > 1]
    for other in references:
        if other != name:
            theirs, mine = ([texts[arm][index] for index in ranked] for arm in (other, name))
            measured["against"][other] = asdict(compare(theirs, mine))
    if "bf16" in measured["against"]:
        reached = {**measured["against"]["bf16"], **measured}
        measured["bars_met"] = {bar: reached[bar] >= target for bar, target in BARS.items()}
    return measured


def _first_places(segment_ids: Sequence[tuple[int, ...]]) -> list[int]:
    places: dict[tuple[int, ...], int] = {}
    for place, ids in enumerate(segment_ids):
        places.setdefault(ids, place)
    return list(places.values())


def compare(reference: Sequence[Floats], other: Sequence[Floats]) -> Comparison:
    """Compare the log-probabilities, C x L a request, of an arm with those of a reference."""
    pairs = list(zip(reference, other, strict=True))
    values = [(log_odds(a), log_odds(b)) for a, b in pairs]
    agreements = np.array([top_agreement(a, b) for a, b in values])
    gains = [
        float(np.mean(np.exp(a[:, 0])[b == b.max()]) / np.exp(a[:, 0].max()))
        for (a, _), (_, b) in zip(pairs, values, strict=True)
    ]
    deltas = np.concatenate([np.abs(a - b).ravel() for a, b in pairs])
    shifts = np.concatenate([np.abs(np.exp(a[:, 0]) - np.exp(b[:, 0])) for a, b in pairs])
    taus = np.array([kendall_tau(a, b) for a, b in values])
    return Comparison(
        top_agreement=float(agreements.mean()),
        top_agreement_error=float(agreements.std() / math.sqrt(len(agreements))),
        ndcg_at_1=float(np.mean(gains)),
        kendall_tau=float(np.nanmean(taus)) if not np.isnan(taus).all() else math.nan,
        max_delta=float(deltas.max()),
        mean_delta=float(deltas.mean()),
        calibration_delta=float(shifts.mean()),
    )


def log_odds(logprobs_CL: Floats) -> Floats:
    """Return what candidates are ordered by: log P(first label) less that of all others."""
    others: Floats = np.logaddexp.reduce(logprobs_CL[:, 1:], axis=1)
    odds: Floats = logprobs_CL[:, 0] - others
    return odds


def top_agreement(reference: Floats, other: Floats) -> float:
    """Return the part of ``other``'s first candidates that ``reference`` scores best."""
    return float(np.mean(reference[other == other.max()] == reference.max()))


def kendall_tau(reference: Floats, other: Floats) -> float:
    """Return Kendall's tau-b (1945).

    Returns:
        In -1..1; 0 where only ``other`` has all scores equal, nan where ``reference`` has.
    """
    agreeing, pairs, other_pairs = 0.0, 0, 0
    # Over ordered pairs: every pair counts twice above and below.
    for start in range(0, len(reference), _PAIR_ROWS):
        rows = slice(start, start + _PAIR_ROWS)
        order = np.sign(reference[rows, None] - reference)
        other_order = np.sign(other[rows, None] - other)
        agreeing += float((order * other_order).sum())
        pairs += int(np.count_nonzero(order))
        other_pairs += int(np.count_nonzero(other_order))
    if not pairs:
        return math.nan
    return agreeing / math.sqrt(pairs * other_pairs) if other_pairs else 0.0


def _label_metrics(
    logprobs: Sequence[Floats], requests: Sequence[LabelledRequest]
) -> dict[str, float]:
    rows = [
        (label, value, probability, member)
        for member, (logprobs_CL, one) in enumerate(zip(logprobs, requests, strict=True))
        for label, value, probability in zip(
            one.labels,
            log_odds(logprobs_CL).tolist(),
            np.exp(logprobs_CL[:, 0]).tolist(),
            strict=True,
        )
        if label is not None
    ]
    if not rows:
        return {}
    labels, scores, probabilities, members = (
        np.array(column) for column in zip(*rows, strict=True)
    )
    return {
        "auc": auc(labels, scores),
        "calibration_error": expected_calibration_error(labels, np.clip(probabilities, 0.0, 1.0)),
        "label_ndcg_at_1": ndcg_at_k(labels.astype(np.float64), scores, members, k=1),
    }
