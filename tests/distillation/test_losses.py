"""Losses of students against their definitions, row by row in FP64."""

import math
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from rankonce.distillation.losses import LOSSES, SOFTENED, TaughtRows
from rankonce.distillation.objective import DistillConfig
from rankonce.errors import TrainingError

_SLATES = [0, 0, 0, 1, 2, 2, 2, 2, 3, 3]
_WEIGHTS = [1.0, 0.5, 1.0, 1.0, 0.0, 1.0, 0.25, 1.0, 0.0, 1.0]


def build_rows(*, graded: bool, temperature: float = 1.0) -> TaughtRows:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    num_labels = 4 if graded else 2
    return TaughtRows(
        log_probs_RL=random(10, num_labels).log_softmax(1),
        teacher_RL=(3 * random(10, num_labels)).log_softmax(1),
        weights_R=torch.tensor(_WEIGHTS, dtype=torch.float64),
        slates_R=torch.tensor(_SLATES),
        grades_L=torch.tensor([3, 2, 0.5, 0] if graded else [1, 0], dtype=torch.float64),
        ranking="expected_grade" if graded else "log_odds",
        temperature=temperature,
        skew=0.2,
        hidden_RMD=random(10, 3, 5),
        teacher_hidden_RMD=random(10, 3, 5),
    )


def soften(row: Any, temperature: float) -> list[float]:
    powers = [math.exp(x / temperature) for x in row]
    return [power / sum(powers) for power in powers]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def mix(p: list[float], q: list[float], share: float) -> list[float]:
    return [share * a + (1 - share) * b for a, b in zip(p, q, strict=True)]


def value(row: Any, rows: TaughtRows) -> float:
    if rows.ranking == "log_odds":
        return float(row[0] - row[1])
    return sum(math.exp(x) * float(g) for x, g in zip(row, rows.grades_L, strict=True))


def row_loss(name: str, rows: TaughtRows, i: int) -> float:
    student, teacher = rows.log_probs_RL[i].tolist(), rows.teacher_RL[i].tolist()
    t = rows.temperature
    q, p = soften(student, t), soften(teacher, t)
    if name == "log-odds-mse":
        pairs = list(combinations(range(len(p)), 2))
        return sum(
            ((student[a] - student[b]) - (teacher[a] - teacher[b])) ** 2 for a, b in pairs
        ) / len(pairs)
    if name == "hidden-states":
        assert rows.hidden_RMD is not None
        assert rows.teacher_hidden_RMD is not None
        own, theirs = rows.hidden_RMD[i].tolist(), rows.teacher_hidden_RMD[i].tolist()
        return sum(
            sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / sum(b * b for b in y)
            for x, y in zip(own, theirs, strict=True)
        ) / len(own)
    return (
        t
        * t
        * {
            "forward-kl": kl(p, q),
            "reverse-kl": kl(q, p),
            "jensen-shannon": (kl(p, mix(p, q, 0.5)) + kl(q, mix(p, q, 0.5))) / 2,
            "skewed-kl": kl(p, mix(p, q, rows.skew)),
        }[name]
    )


def expected_loss(name: str, rows: TaughtRows) -> float:
    if name != "pairwise-margin":
        return sum(w * row_loss(name, rows, i) for i, w in enumerate(_WEIGHTS))
    total = 0.0
    for slate in range(4):
        members = [i for i, s in enumerate(_SLATES) if s == slate]
        pairs = [(i, j) for i, j in combinations(members, 2) if _WEIGHTS[i] * _WEIGHTS[j]]
        weight = sum(_WEIGHTS[i] * _WEIGHTS[j] for i, j in pairs)
        gaps = sum(
            _WEIGHTS[i]
            * _WEIGHTS[j]
            * (
                (value(rows.log_probs_RL[i], rows) - value(rows.log_probs_RL[j], rows))
                - (value(rows.teacher_RL[i], rows) - value(rows.teacher_RL[j], rows))
            )
            ** 2
            for i, j in pairs
        )
        total += sum(_WEIGHTS[i] for i in members) * gaps / weight if pairs else 0.0
    return total


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_its_definition_with_a_right_gradient(
    name: str, graded: bool, temperature: float
) -> None:
    rows = build_rows(graded=graded, temperature=temperature)
    assert LOSSES[name](rows).item() == pytest.approx(expected_loss(name, rows), rel=1e-9)
    learnt = "hidden_RMD" if name == "hidden-states" else "log_probs_RL"

    def of(learnt_tensor: Tensor) -> Tensor:
        return LOSSES[name](replace(rows, **{learnt: learnt_tensor}))

    assert torch.autograd.gradcheck(of, getattr(rows, learnt).clone().requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(name: str) -> None:
    rows = build_rows(graded=True, temperature=2.0)
    logits_RL = rows.teacher_RL.clone().requires_grad_()
    own = logits_RL.log_softmax(1)
    hidden = rows.teacher_hidden_RMD
    loss = LOSSES[name](replace(rows, log_probs_RL=own, hidden_RMD=hidden))
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    (loss + 0 * own.sum()).backward()
    assert logits_RL.grad is not None
    assert float(logits_RL.grad.abs().max()) < 1e-12


def test_a_temperature_changes_divergences_alone() -> None:
    cold, warm = (build_rows(graded=False, temperature=t) for t in (1.0, 3.0))
    changed = [n for n in LOSSES if LOSSES[n](cold).item() != LOSSES[n](warm).item()]
    assert tuple(changed) == SOFTENED


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"losses": {}}, "at least one of forward-kl"),
        ({"losses": {"hinge": 1.0}}, "hold 'hinge'"),
        ({"losses": {"forward-kl": 0.0}}, "should weigh more than 0"),
        ({"target": "softer"}, "target: should be one of hard, soft"),
        ({"temperature": 0.0}, "temperature: should be above 0"),
        ({"temperature": 2.0, "losses": {"log-odds-mse": 1.0}}, "should be 1, since none"),
        ({"teacher_share": 1.5}, "teacher_share: should be in 0..1"),
        ({"skew": 0.0}, "skew: should be between 0 and 1"),
        ({"target": "hard", "losses": {"hidden-states": 1.0}}, "target hard has none"),
        ({"target": "hard", "losses": {"reverse-kl": 1.0}}, "target hard has none"),
        ({"teacher_share": 0.9}, "teacher_share: is of the target mixture"),
        ({"skew": 0.5}, "skew: is of the loss skewed-kl"),
    ],
)
def test_what_cannot_be_learnt_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        DistillConfig(**options)
