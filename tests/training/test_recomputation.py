"""Gradient checkpointing gives the same gradients from less memory, whatever runs the layers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rankonce.model.acceleration import accelerate_model
from rankonce.model.loading import use_segment_attention
from rankonce.training.objectives import LabelObjective
from rankonce.training.optimization import add_dropout
from rankonce.training.recomputation import recompute_layers
from tests.conftest import ARCHITECTURES, build_network
from tests.training.test_gradients import build_examples


def gradients(
    architecture: str, examples: Any, *, accelerates: bool, recomputes: bool
) -> tuple[list[Tensor], int]:
    """Take the gradients of a pass and count the bytes that its graph kept."""
    network = build_network(architecture)
    use_segment_attention(network)
    if accelerates:
        accelerate_model(network, trainable=True)
    add_dropout(network, [0.1] * 3)
    if recomputes:
        recompute_layers(network)
    network.train()
    objective = LabelObjective()
    batch = objective.pack(examples)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = objective.loss(network, batch)
    # The weights are there anyway.
    for parameter in network.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    size = sum(kept.values())
    loss.backward()
    return [p.grad for p in network.parameters() if p.grad is not None], size


@pytest.mark.parametrize("accelerates", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_computed_again_give_the_same_bits(
    tokenizer: Any, architecture: str, accelerates: bool
) -> None:
    examples = build_examples(tokenizer)
    expected, size = gradients(architecture, examples, accelerates=accelerates, recomputes=False)
    actual, smaller = gradients(architecture, examples, accelerates=accelerates, recomputes=True)
    assert len(actual) == len(expected)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    # Three layers keep an input each, in place of all that is in them.
    assert smaller < 0.25 * size
