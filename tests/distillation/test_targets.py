"""Targets: which part of a row is learnt from its label, and which from the teacher."""

import pytest
import torch
from torch import Tensor

from rankonce.distillation.losses import LOSSES, TaughtRows
from rankonce.distillation.targets import TARGETS, KnownRows, Lesson


def build_rows(*, share: float = 0.25) -> KnownRows:
    """Make five rows: liked, disliked, liked but not taught, taught alone, disliked."""
    teacher = torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.5, 0.5], [0.8, 0.2], [0.4, 0.6]])
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    return KnownRows(
        labels_RL=labels,
        is_labelled_R=labels.sum(1) > 0,
        teacher_RL=teacher.log(),
        is_taught_R=torch.tensor([True, True, False, True, True]),
        own_RL=torch.tensor([[0.6, 0.4]] * 5).log(),
        grades_L=torch.tensor([1.0, 0.0]),
        teacher_share=share,
    )


def weights(lesson: Lesson) -> list[tuple[float, float]]:
    return list(zip(lesson.labels_R.tolist(), lesson.teacher_R.tolist(), strict=True))


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("hard", [(1, 0), (1, 0), (1, 0), (0, 0), (1, 0)]),
        ("soft", [(0, 1), (0, 1), (1, 0), (0, 1), (0, 1)]),
        ("mixture", [(0.75, 0.25), (0.75, 0.25), (1, 0), (0, 1), (0.75, 0.25)]),
        # The teacher is less than a like and more than a dislike.
        ("max", [(1, 0), (0, 1), (1, 0), (0, 1), (0, 1)]),
    ],
)
def test_one_readout_learns_from(target: str, expected: list[tuple[float, float]]) -> None:
    (lesson,) = TARGETS[target].lessons(build_rows())
    assert lesson.readout == "served"
    assert weights(lesson) == expected


def test_two_logits_keep_label_and_teacher_apart() -> None:
    served, auxiliary = TARGETS["two-logits"].lessons(build_rows())
    assert (served.readout, auxiliary.readout) == ("served", "auxiliary")
    assert weights(served) == [(1, 0), (1, 0), (1, 0), (0, 0), (1, 0)]
    assert weights(auxiliary) == [(0, 1), (0, 1), (0, 0), (0, 1), (0, 1)]


def test_self_auxiliary_softens_negatives_by_the_models_own_label() -> None:
    rows = build_rows()
    served, auxiliary = TARGETS["self-auxiliary"].lessons(rows)
    assert weights(served) == [(1, 0), (1, 0), (1, 0), (0, 0), (1, 0)]
    assert weights(auxiliary) == [(1, 0), (0, 1), (1, 0), (0, 0), (0, 1)]
    assert torch.equal(auxiliary.teacher_RL, rows.own_RL)


def test_a_mixture_has_the_gradient_of_a_mixed_label() -> None:
    rows = build_rows(share=0.4)
    logits = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))

    def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
        return torch.autograd.grad(loss, leaf)[0]

    leaf = logits.clone().requires_grad_()
    log_probs_RL = leaf.log_softmax(1)
    (lesson,) = TARGETS["mixture"].lessons(rows)
    taught = TaughtRows(
        log_probs_RL=log_probs_RL,
        teacher_RL=lesson.teacher_RL,
        weights_R=lesson.teacher_R,
        slates_R=torch.zeros(5, dtype=torch.long),
        grades_L=rows.grades_L,
        ranking="log_odds",
    )
    by_lessons = LOSSES["forward-kl"](taught)
    by_lessons = by_lessons - lesson.labels_R @ (rows.labels_RL * log_probs_RL).sum(1)
    mixed_RL = 0.6 * rows.labels_RL + 0.4 * rows.teacher_RL.exp()
    mixed_RL[2], mixed_RL[3] = rows.labels_RL[2], rows.teacher_RL[3].exp()
    other = logits.clone().requires_grad_()
    by_label = -(mixed_RL * other.log_softmax(1)).sum()
    torch.testing.assert_close(gradient(by_lessons, leaf), gradient(by_label, other))
