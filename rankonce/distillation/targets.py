"""What is learnt from labels and what from the teacher: one function each in one table.

A target cuts a row into lessons. Labels are learnt by cross-entropy; what is learnt of the teacher
goes through the losses that were chosen. Where one of both is not known, the other is all there is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class KnownRows:
    """What is known of R score rows.

    Attributes:
        labels_RL: probability of every label, 0 in rows without a label.
        is_labelled_R: which rows have one.
        teacher_RL: the teacher's log-probabilities, uniform in rows that it was not asked of.
        is_taught_R: which rows it was asked of.
        own_RL: the served read-out's own log-probabilities, without gradient.
        grades_L: worth of every label.
        teacher_share: the teacher's part of a mixture, in 0..1.
    """

    labels_RL: Tensor
    is_labelled_R: Tensor
    teacher_RL: Tensor
    is_taught_R: Tensor
    own_RL: Tensor
    grades_L: Tensor
    teacher_share: float


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What one read-out learns of R rows.

    Attributes:
        readout: the one that is served, or the one that is dropped after training.
        labels_R: weight of the cross-entropy with the label.
        teacher_R: weight of the losses against ``teacher_RL``.
        teacher_RL: log-probabilities that are to be met.
    """

    readout: Literal["served", "auxiliary"]
    labels_R: Tensor
    teacher_R: Tensor
    teacher_RL: Tensor


def hard(rows: KnownRows) -> Sequence[Lesson]:
    """Learn the labels alone: what a student is measured against."""
    labels_R = _weights(rows, rows.is_labelled_R)
    return [_served(rows, labels_R, torch.zeros_like(labels_R))]


def soft(rows: KnownRows) -> Sequence[Lesson]:
    """Learn what the teacher says, and labels only where it was not asked."""
    teacher_R = _weights(rows, rows.is_taught_R)
    return [_served(rows, 1 - teacher_R, teacher_R)]


def mixture(rows: KnownRows) -> Sequence[Lesson]:
    """Learn both at once, ``teacher_share`` of the teacher; one alone where the other is missing.

    With forward KL at temperature 1 its gradient is that of a mixed label (Hinton et al. 2015).
    """
    both_R = rows.is_labelled_R & rows.is_taught_R
    alone_R = _weights(rows, rows.is_taught_R)
    teacher_R = torch.where(both_R, rows.teacher_share, alone_R)
    return [_served(rows, 1 - teacher_R, teacher_R)]


def two_logits(rows: KnownRows) -> Sequence[Lesson]:
    """Learn labels in the served read-out and the teacher in another one (Khani et al. 2024).

    What the teacher gets wrong in level then reaches the shared layers, not the served scores.
    """
    labels_R, teacher_R = (_weights(rows, x) for x in (rows.is_labelled_R, rows.is_taught_R))
    none_R = torch.zeros_like(labels_R)
    return [
        _served(rows, labels_R, none_R),
        Lesson(
            readout="auxiliary", labels_R=none_R, teacher_R=teacher_R, teacher_RL=rows.teacher_RL
        ),
    ]


def larger(rows: KnownRows) -> Sequence[Lesson]:
    """Learn whichever is worth more, the teacher or the label: max(teacher, label).

    Of two labels this is the larger probability of the one that ranks; of grades, the distribution
    with the larger expected grade.
    """
    is_higher_R = rows.teacher_RL.exp() @ rows.grades_L > rows.labels_RL @ rows.grades_L
    takes_R = rows.is_taught_R & (is_higher_R | ~rows.is_labelled_R)
    teacher_R = _weights(rows, takes_R)
    return [_served(rows, 1 - teacher_R, teacher_R)]


def self_auxiliary(rows: KnownRows) -> Sequence[Lesson]:
    """Learn labels in the served read-out, and in another one their softened form.

    There rows that are worth something stay hard, and those worth nothing take the model's own
    soft label, without gradient (after Zhang et al. 2024). A read-out that is taught by itself
    would learn nothing of these rows: hence the second one.
    """
    labels_R = _weights(rows, rows.is_labelled_R)
    is_positive_R = (rows.labels_RL @ rows.grades_L > rows.grades_L.min()) & rows.is_labelled_R
    hard_R = _weights(rows, is_positive_R)
    return [
        _served(rows, labels_R, torch.zeros_like(labels_R)),
        Lesson(
            readout="auxiliary",
            labels_R=hard_R,
            teacher_R=labels_R - hard_R,
            teacher_RL=rows.own_RL,
        ),
    ]


@dataclass(frozen=True, kw_only=True)
class TargetRule:
    """A target and what it takes.

    Attributes:
        lessons: cuts rows into lessons.
        takes_teacher: a teacher has to be asked.
        needs_labels: every request has to have a label.
        has_auxiliary: a read-out is learnt that is not served.
    """

    lessons: Callable[[KnownRows], Sequence[Lesson]]
    takes_teacher: bool = True
    needs_labels: bool = False
    has_auxiliary: bool = False


TARGETS: Mapping[str, TargetRule] = {
    "hard": TargetRule(lessons=hard, takes_teacher=False, needs_labels=True),
    "soft": TargetRule(lessons=soft),
    "mixture": TargetRule(lessons=mixture),
    "two-logits": TargetRule(lessons=two_logits, has_auxiliary=True),
    "max": TargetRule(lessons=larger, needs_labels=True),
    "self-auxiliary": TargetRule(
        lessons=self_auxiliary, takes_teacher=False, needs_labels=True, has_auxiliary=True
    ),
}


def _weights(rows: KnownRows, is_in_R: Tensor) -> Tensor:
    return is_in_R.to(rows.own_RL.dtype)


def _served(rows: KnownRows, labels_R: Tensor, teacher_R: Tensor) -> Lesson:
    return Lesson(
        readout="served", labels_R=labels_R, teacher_R=teacher_R, teacher_RL=rows.teacher_RL
    )
