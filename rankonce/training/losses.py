"""What training lowers: losses over labels, one function each in one table, and over tokens.

A loss of the table sees the score rows of whole slates (the candidates of one request) and returns
a sum that is on the scale of one number a row, so that it can be divided by the rows of a step
however they fall into passes, and losses can be added.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus
from torch.utils.checkpoint import checkpoint

from rankonce.errors import TrainingError
from rankonce.model.head import Head

# Logits of this many numbers are in memory at once: 64 MiB.
_LOGITS_AT_ONCE = 1 << 24


@dataclass(frozen=True, kw_only=True)
class LabelRows:
    """R score rows of requests whose tasks have the same labels and ranking.

    Attributes:
        log_probs_RL: log P(label) among the labels, FP32.
        targets_RL: the probability of every label that is to be learnt.
        slates_R: which request a row belongs to; rows of a slate stand together.
        grades_L: the labels' grades, or 1 for the one whose log-odds rank.
        ranking: how the ranking value comes from the probabilities.
    """

    log_probs_RL: Tensor
    targets_RL: Tensor
    slates_R: Tensor
    grades_L: Tensor
    ranking: Literal["log_odds", "expected_grade"]

    @property
    def values_R(self) -> Tensor:  # noqa: N802
        """The ranking values."""
        return ranking_values(self.log_probs_RL, self.grades_L, self.ranking)

    @property
    def worth_R(self) -> Tensor:  # noqa: N802
        """What the rows are worth by their targets."""
        return self.targets_RL @ self.grades_L


def ranking_values(log_probs_RL: Tensor, grades_L: Tensor, ranking: str) -> Tensor:
    """Return the values that R rows are ranked by: log-odds, or expected grades."""
    if ranking == "expected_grade":
        return log_probs_RL.exp() @ grades_L
    is_ranked_L = grades_L > 0
    return log_probs_RL[:, is_ranked_L].logsumexp(1) - log_probs_RL[:, ~is_ranked_L].logsumexp(1)


def softmax_loss(rows: LabelRows) -> Tensor:
    """Cross-entropy of the labels with their targets, hard or soft."""
    return -(rows.targets_RL * rows.log_probs_RL).sum()


def pairwise_loss(rows: LabelRows) -> Tensor:
    """Logistic loss of the ranking values' differences within a slate (RankNet: Burges 2005).

    A pair weighs as much as its worths differ; a slate's weights are scaled to its number of rows.
    Slates whose rows are all worth the same teach nothing.
    """
    values_R, worth_R = rows.values_R, rows.worth_R
    weight_RR = (worth_R[:, None] - worth_R[None, :]).clamp(min=0)
    weight_RR = weight_RR * (rows.slates_R[:, None] == rows.slates_R[None, :])
    total_N = _sum_by_slate(weight_RR.sum(1), rows.slates_R)
    size_N = _sum_by_slate(torch.ones_like(worth_R), rows.slates_R)
    scale_N = torch.where(total_N > 0, size_N / total_N.clamp(min=1e-12), 0.0)
    loss_RR = softplus(values_R[None, :] - values_R[:, None])
    return (scale_N[rows.slates_R][:, None] * weight_RR * loss_RR).sum()


def listwise_loss(rows: LabelRows) -> Tensor:
    """Softmax of a slate's ranking values against its shares of worth (ListNet: Cao 2007).

    A slate counts as its number of rows; one in which nothing is worth anything teaches nothing.
    """
    values_R, worth_R, slates_R = rows.values_R, rows.worth_R, rows.slates_R
    num_slates = int(slates_R.max()) + 1 if len(slates_R) else 0
    largest_N = values_R.new_full((num_slates,), -torch.inf)
    largest_N = largest_N.scatter_reduce(0, slates_R, values_R.detach(), "amax")
    shifted_R = values_R - largest_N[slates_R]
    log_share_R = shifted_R - _sum_by_slate(shifted_R.exp(), slates_R).log()[slates_R]
    total_N = _sum_by_slate(worth_R, slates_R)
    size_N = _sum_by_slate(torch.ones_like(worth_R), slates_R)
    scale_N = torch.where(total_N > 0, size_N / total_N.clamp(min=1e-12), 0.0)
    return -(scale_N[slates_R] * worth_R * log_share_R).sum()


LOSSES: Mapping[str, Callable[[LabelRows], Tensor]] = {
    "softmax": softmax_loss,
    "pairwise": pairwise_loss,
    "listwise": listwise_loss,
}


def check_losses(losses: Mapping[str, float]) -> None:
    """Refuse losses that are not in the table.

    Raises:
        TrainingError: names the loss.
    """
    if not losses:
        raise TrainingError(f"losses: should hold at least one of {', '.join(LOSSES)}")
    for name, weight in losses.items():
        if name not in LOSSES:
            raise TrainingError(f"losses: should be of {', '.join(LOSSES)}, hold {name!r}")
        if not weight > 0:
            raise TrainingError(f"losses.{name}: should weigh more than 0, weighs {weight}")


def token_loss(head: Head, hidden_RD: Tensor, target_ids_R: Tensor) -> Tensor:
    """Cross-entropy of the next token over the whole vocabulary, summed over R rows, in FP32.

    Logits are computed in slices of rows and again in the backward pass, so that R x V is never
    stored.
    """
    rows = max(1, _LOGITS_AT_ONCE // len(head.weight_VD))
    total = hidden_RD.new_zeros((), dtype=torch.float32)
    for hidden_PD, ids_P in zip(hidden_RD.split(rows), target_ids_R.split(rows), strict=True):
        total = total + checkpoint(_slice_loss, head, hidden_PD, ids_P, use_reentrant=False)
    return total


def _slice_loss(head: Head, hidden_PD: Tensor, target_ids_P: Tensor) -> Tensor:
    logits_PV = hidden_PD.float() @ head.weight_VD.float().T
    if head.bias_V is not None:
        logits_PV = logits_PV + head.bias_V.float()
    if head.softcap is not None:
        logits_PV = head.softcap * torch.tanh(logits_PV / head.softcap)
    return cross_entropy(logits_PV, target_ids_P.long(), reduction="sum")


def _sum_by_slate(values_R: Tensor, slates_R: Tensor) -> Tensor:
    num_slates = int(slates_R.max()) + 1 if len(slates_R) else 0
    return values_R.new_zeros(num_slates).index_add(0, slates_R, values_R)
