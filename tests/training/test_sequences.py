"""Packed texts see only themselves: their losses and gradients are those of texts alone."""

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from rankonce.errors import DataError
from rankonce.model.acceleration import accelerate_model
from rankonce.model.loading import use_segment_attention
from rankonce.training.objectives import TokenObjective
from rankonce.training.sequences import TokenSequence
from tests.conftest import ARCHITECTURES, build_network


def build_sequences() -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(3)
    sequences = []
    for length in (63, 2, 17, 100):
        ids = torch.randint(2, 640, (length,), generator=generator).tolist()
        learnt = (torch.rand(length, generator=generator) < 0.6).tolist()
        learnt[0], learnt[-1] = False, True
        sequences.append(TokenSequence(token_ids=tuple(ids), learnt=tuple(learnt)))
    return sequences


def separate_loss(network: Any, sequences: list[TokenSequence]) -> torch.Tensor:
    total = torch.zeros(())
    for one in sequences:
        logits = network(torch.tensor([one.token_ids])).logits[0]
        places = torch.tensor(one.learnt).nonzero()[:, 0]
        targets = torch.tensor(one.token_ids)[places]
        total = total + cross_entropy(logits[places - 1], targets, reduction="sum")
    return total


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_texts_never_see_each_other(architecture: str) -> None:
    sequences = build_sequences()
    packed, plain = build_network(architecture), build_network(architecture)
    use_segment_attention(packed)
    accelerate_model(packed, trainable=True)
    objective = TokenObjective()
    loss = objective.loss(packed, objective.pack(sequences))
    expected = separate_loss(plain, sequences)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward(), expected.backward()
    scale = max(float(p.grad.abs().max()) for p in plain.parameters() if p.grad is not None)
    for (name, actual), wanted in zip(packed.named_parameters(), plain.parameters(), strict=True):
        if wanted.grad is not None:
            assert float((actual.grad - wanted.grad).abs().max()) <= 1e-5 * scale, name


def test_only_learnt_tokens_count() -> None:
    sequences = build_sequences()
    assert sum(one.num_targets for one in sequences) == sum(sum(one.learnt) for one in sequences)
    batch = TokenObjective().pack(sequences)
    wanted = [
        i for one in sequences for i, flag in zip(one.token_ids, one.learnt, strict=True) if flag
    ]
    assert batch.target_ids_R.tolist() == wanted


@pytest.mark.parametrize(
    ("ids", "learnt"), [((5,), (False,)), ((5, 6), (True, True)), ((5, 6), (False,))]
)
def test_a_sequence_that_cannot_be_learnt_is_refused(
    ids: tuple[int, ...], learnt: tuple[bool, ...]
) -> None:
    with pytest.raises(DataError, match="sequence: should hold two tokens or more"):
        TokenSequence(token_ids=ids, learnt=learnt)
