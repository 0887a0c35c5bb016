"""What a student may lower to become like its teacher: one function each in one table.

A loss sees what student and teacher say of R score rows of whole slates and returns a sum on the
scale of one number a row, as those of ``training.losses``. Divergences take a temperature t:
both distributions are raised to the power 1/t and normalised again, and the loss is multiplied by
t², which keeps gradients as large as they were (Hinton et al. 2015).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rankonce.errors import TrainingError
from rankonce.training.losses import ranking_values


@dataclass(frozen=True, kw_only=True)
class TaughtRows:
    """R score rows of requests whose tasks have the same L labels and ranking.

    Attributes:
        log_probs_RL, teacher_RL: log P(label) among the labels, the student's and the teacher's.
        weights_R: how much a row counts; from 0.
        slates_R: which request a row belongs to.
        grades_L: the labels' grades, or 1 for the one whose log-odds rank.
        ranking: how the ranking value comes from the probabilities.
        temperature: of the divergences.
        skew: the teacher's part of the mixture that ``skewed_kl`` compares with, between 0 and 1.
        hidden_RMD, teacher_hidden_RMD: hidden states after M layers, where a loss asks for them.
    """

    log_probs_RL: Tensor
    teacher_RL: Tensor
    weights_R: Tensor
    slates_R: Tensor
    grades_L: Tensor
    ranking: Literal["log_odds", "expected_grade"]
    temperature: float = 1.0
    skew: float = 0.1
    hidden_RMD: Tensor | None = None
    teacher_hidden_RMD: Tensor | None = None

    @property
    def softened(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities of student and teacher at the temperature."""
        t = self.temperature
        return (self.log_probs_RL / t).log_softmax(1), (self.teacher_RL / t).log_softmax(1)

    def sum_softened(self, divergences_R: Tensor) -> Tensor:
        """Add up divergences at the temperature."""
        return self.temperature**2 * (self.weights_R * divergences_R).sum()


def forward_kl(rows: TaughtRows) -> Tensor:
    """KL(teacher ‖ student): be likely wherever the teacher is (Hinton et al. 2015)."""
    student_RL, teacher_RL = rows.softened
    return rows.sum_softened(_kl(teacher_RL, student_RL))


def reverse_kl(rows: TaughtRows) -> Tensor:
    """KL(student ‖ teacher): be unlikely wherever the teacher is (Gu et al. 2023, MiniLLM)."""
    student_RL, teacher_RL = rows.softened
    return rows.sum_softened(_kl(student_RL, teacher_RL))


def jensen_shannon(rows: TaughtRows) -> Tensor:
    """Mean KL of both to their mean (Lin 1991); at most log 2 a row at temperature 1."""
    student_RL, teacher_RL = rows.softened
    mean_RL = _mix(teacher_RL, student_RL, 0.5)
    return rows.sum_softened((_kl(teacher_RL, mean_RL) + _kl(student_RL, mean_RL)) / 2)


def skewed_kl(rows: TaughtRows) -> Tensor:
    """KL(teacher ‖ skew x teacher + (1 - skew) x student) (Ko et al. 2024, DistiLLM)."""
    student_RL, teacher_RL = rows.softened
    return rows.sum_softened(_kl(teacher_RL, _mix(teacher_RL, student_RL, rows.skew)))


def log_odds_mse(rows: TaughtRows) -> Tensor:
    """Squared difference of log-odds, as a mean over the pairs of labels.

    A temperature would cancel: log-odds are divided by it and the loss multiplied by its square.
    """
    difference_RL = rows.log_probs_RL - rows.teacher_RL
    num_labels = difference_RL.shape[1]
    # The sum over pairs of (d_a - d_b)² is L times the sum of squares around the mean.
    around_RL = difference_RL - difference_RL.mean(1, keepdim=True)
    return (rows.weights_R * 2 / (num_labels - 1) * around_RL.square().sum(1)).sum()


def pairwise_margin(rows: TaughtRows) -> Tensor:
    """Squared difference of the margins between a slate's candidates (Hofstätter et al. 2020).

    A margin is the difference of two ranking values. A slate is the mean over its pairs, times its
    rows; a pair weighs as the product of its rows. A slate of one row teaches nothing.
    """
    values_R = ranking_values(rows.log_probs_RL, rows.grades_L, rows.ranking)
    wanted_R = ranking_values(rows.teacher_RL, rows.grades_L, rows.ranking)
    weights_R, difference_R = rows.weights_R, values_R - wanted_R
    total_N = _sum_by_slate(weights_R, rows.slates_R)
    mean_N = _sum_by_slate(weights_R * difference_R, rows.slates_R) / total_N.clamp(min=1e-12)
    around_R = difference_R - mean_N[rows.slates_R]
    # Pairs by the same sum as above, with weights.
    pairs_N = total_N * _sum_by_slate(weights_R * around_R.square(), rows.slates_R)
    weight_N = (total_N.square() - _sum_by_slate(weights_R.square(), rows.slates_R)) / 2
    is_pair_N = weight_N > 1e-9
    means_N = torch.where(is_pair_N, pairs_N / torch.where(is_pair_N, weight_N, 1.0), 0.0)
    return (total_N * means_N).sum()


def hidden_states(rows: TaughtRows) -> Tensor:
    """Squared distance of hidden states at the score rows, as a part of the teacher's square.

    The mean over the matched layers (Sanh et al. 2019 and Muralidharan et al. 2024 match states
    of a student that has fewer layers).

    Raises:
        TrainingError: nobody recorded hidden states.
    """
    if rows.hidden_RMD is None or rows.teacher_hidden_RMD is None:
        raise TrainingError("losses: hidden-states needs the hidden states of both models")
    distance_RM = (rows.hidden_RMD - rows.teacher_hidden_RMD).square().mean(2)
    size_RM = rows.teacher_hidden_RMD.square().mean(2).clamp(min=1e-12)
    return (rows.weights_R * (distance_RM / size_RM).mean(1)).sum()


Loss = Callable[[TaughtRows], Tensor]
LOSSES: Mapping[str, Loss] = {
    "forward-kl": forward_kl,
    "reverse-kl": reverse_kl,
    "jensen-shannon": jensen_shannon,
    "skewed-kl": skewed_kl,
    "log-odds-mse": log_odds_mse,
    "pairwise-margin": pairwise_margin,
    "hidden-states": hidden_states,
}
# Those that a temperature changes.
SOFTENED = ("forward-kl", "reverse-kl", "jensen-shannon", "skewed-kl")


def _kl(from_RL: Tensor, to_RL: Tensor) -> Tensor:
    return (from_RL.exp() * (from_RL - to_RL)).sum(1)


def _mix(first_RL: Tensor, second_RL: Tensor, share: float) -> Tensor:
    """Return the log of a mixture with this share of the first."""
    return torch.logaddexp(first_RL + math.log(share), second_RL + math.log(1 - share))


def _sum_by_slate(values_R: Tensor, slates_R: Tensor) -> Tensor:
    num_slates = int(slates_R.max()) + 1 if len(slates_R) else 0
    return values_R.new_zeros(num_slates).index_add(0, slates_R, values_R)
