"""Losses against their definitions, written out slate by slate in FP64."""

import math

import pytest
import torch
from torch import Tensor

from rankonce.errors import TrainingError
from rankonce.model.head import Head
from rankonce.training.losses import LOSSES, LabelRows, check_losses, token_loss
from rankonce.training.objectives import LabelObjective

_SLATES = [0, 0, 0, 1, 2, 2, 2, 2, 3, 3]


def build_rows(*, graded: bool, seed: int = 0) -> LabelRows:
    generator = torch.Generator().manual_seed(seed)
    num_labels = 4 if graded else 2
    logits = torch.randn(10, num_labels, generator=generator, dtype=torch.float64)
    targets = torch.randn(10, num_labels, generator=generator, dtype=torch.float64).softmax(1)
    # The last slate is worth the same everywhere; another row is hard.
    targets[8:] = targets[8]
    targets[4] = torch.eye(num_labels, dtype=torch.float64)[0]
    grades = torch.tensor([3.0, 2.0, 0.5, 0.0] if graded else [1.0, 0.0], dtype=torch.float64)
    return LabelRows(
        log_probs_RL=logits.log_softmax(1).requires_grad_(),
        targets_RL=targets,
        slates_R=torch.tensor(_SLATES),
        grades_L=grades,
        ranking="expected_grade" if graded else "log_odds",
    )


def values_of(rows: LabelRows) -> list[float]:
    probabilities = rows.log_probs_RL.exp().tolist()
    if rows.ranking == "log_odds":
        return [math.log(p[0] / p[1]) for p in probabilities]
    return [sum(p * g for p, g in zip(row, rows.grades_L, strict=True)) for row in probabilities]


def expected_loss(name: str, rows: LabelRows) -> float:
    values = values_of(rows)
    worth = [float(sum(row * rows.grades_L)) for row in rows.targets_RL]
    if name == "softmax":
        return -(rows.targets_RL * rows.log_probs_RL).sum().item()
    total = 0.0
    for slate in range(4):
        members = [i for i, s in enumerate(_SLATES) if s == slate]
        if name == "listwise":
            norm = sum(math.exp(values[i]) for i in members)
            shares = [worth[i] / sum(worth[j] for j in members) for i in members]
            loss = sum(
                -share * math.log(math.exp(values[i]) / norm)
                for i, share in zip(members, shares, strict=True)
            )
            total += len(members) * loss
        else:
            pairs = [(i, j) for i in members for j in members if worth[i] > worth[j]]
            weight = sum(worth[i] - worth[j] for i, j in pairs)
            loss = sum(
                (worth[i] - worth[j]) * math.log1p(math.exp(values[j] - values[i]))
                for i, j in pairs
            )
            total += len(members) * loss / weight if pairs else 0.0
    return total


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_its_definition_with_a_right_gradient(name: str, graded: bool) -> None:
    rows = build_rows(graded=graded)
    loss = LOSSES[name](rows)
    assert loss.item() == pytest.approx(expected_loss(name, rows), rel=1e-9)

    def of(log_probs: Tensor) -> Tensor:
        other = build_rows(graded=graded)
        return LOSSES[name](
            LabelRows(
                log_probs_RL=log_probs,
                targets_RL=other.targets_RL,
                slates_R=other.slates_R,
                grades_L=other.grades_L,
                ranking=other.ranking,
            )
        )

    assert torch.autograd.gradcheck(of, rows.log_probs_RL.detach().requires_grad_())


@pytest.mark.parametrize("name", ["pairwise", "listwise"])
def test_a_slate_of_equal_worth_or_of_none_teaches_no_order(name: str) -> None:
    rows = build_rows(graded=False)
    nothing = LabelRows(
        log_probs_RL=rows.log_probs_RL,
        targets_RL=torch.tensor([[0.0, 1.0]], dtype=torch.float64).expand(10, 2),
        slates_R=rows.slates_R,
        grades_L=rows.grades_L,
        ranking="log_odds",
    )
    loss = LOSSES[name](nothing)
    assert loss.item() == 0.0
    loss.backward()
    assert rows.log_probs_RL.grad is not None
    assert not rows.log_probs_RL.grad.any()


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({}, "at least one of softmax"),
        ({"hinge": 1.0}, "hold 'hinge'"),
        ({"softmax": 0.0}, "softmax: should weigh more than 0"),
    ],
)
def test_unknown_losses_are_named(losses: dict[str, float], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        LabelObjective(losses=losses)
    with pytest.raises(TrainingError):
        check_losses(losses)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_token_loss_in_slices_is_the_loss_over_all_logits(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None
) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(63, 16), torch.randn(101, 16)
    bias, targets = torch.randn(101), torch.randint(101, (63,))
    results = []
    for rows_at_once in (10_000, 7):
        monkeypatch.setattr("rankonce.training.losses._LOGITS_AT_ONCE", 101 * rows_at_once)
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
        head = Head(weight_VD=leaves[1], bias_V=leaves[2], softcap=softcap)
        loss = token_loss(head, leaves[0], targets)
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    logits = hidden.double() @ weight.double().T + bias.double()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    assert results[0][0].item() == pytest.approx(expected.item(), rel=1e-5)
    for whole, cut in zip(*results, strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-5)
