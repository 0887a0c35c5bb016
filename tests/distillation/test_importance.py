"""Scores of parts against the same computed one prompt at a time by plain transformers."""

from typing import Any

import pytest
import torch

from rankonce.distillation.importance import measure_importance
from rankonce.layout import TokenizedRequest
from rankonce.model.loading import use_segment_attention
from rankonce.training.data import TokenizedExample
from tests.conftest import build_network

LABELS = ((5,), (9,))


def example(*segments: tuple[int, ...], prefix: tuple[int, ...]) -> TokenizedExample:
    tokens = TokenizedRequest(prefix_ids=prefix, segment_ids=segments, label_ids=LABELS)
    targets = tuple((1.0, 0.0) if place % 2 else (0.0, 1.0) for place in range(len(segments)))
    return TokenizedExample(tokens=tokens, targets=targets, grades=(1.0, 0.0), ranking="log_odds")


# One candidate each: a prompt of plain transformers is the whole example.
EXAMPLES = [
    example((7, 8, 11), prefix=(1, 2, 3, 4)),
    example((12,), prefix=(6, 5)),
    example((30, 31, 32, 33, 34), prefix=(20, 21, 22)),
]


def loss_of(network: Any, one: TokenizedExample) -> torch.Tensor:
    ids = torch.tensor([[*one.tokens.prefix_ids, *one.tokens.segment_ids[0]]])
    logits = network(ids, use_cache=False).logits[0, -1, [5, 9]]
    return -(torch.tensor(one.targets[0]) * logits.log_softmax(0)).sum()


def test_activations_are_means_over_tokens_and_norms_over_examples() -> None:
    network = build_network("qwen3", initializer_range=0.1)
    seen: dict[str, list[torch.Tensor]] = {"mlp": [], "o": []}
    layer = network.model.layers[1]
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0][0]))
        for name, module in (("mlp", layer.mlp.down_proj), ("o", layer.self_attn.o_proj))
    ]
    with torch.no_grad():
        for one in EXAMPLES:
            loss_of(network, one)
    for handle in handles:
        handle.remove()
    expected = torch.stack([x.abs().mean(0) for x in seen["mlp"]]).norm(dim=0)
    heads = torch.stack([x.view(-1, 4, 16).norm(dim=2).mean(0) for x in seen["o"]]).norm(dim=0)
    use_segment_attention(network)
    found = measure_importance(network, EXAMPLES, "activation")
    assert torch.allclose(found.neurons[1], expected.double(), rtol=1e-4)
    assert torch.allclose(found.groups[1], heads.view(2, 2).sum(1).double(), rtol=1e-4)


def test_gradients_tell_the_first_order_change_of_the_loss() -> None:
    network = build_network("gemma2", initializer_range=0.1)
    layer = network.model.layers[0]
    weight = layer.mlp.down_proj.weight
    expected = torch.zeros(96, dtype=torch.float64)
    for one in EXAMPLES:
        (gradient,) = torch.autograd.grad(loss_of(network, one), weight)
        # Scaling a neuron's column scales its activation.
        expected += (gradient * weight).sum(0).detach().abs().double() / len(EXAMPLES)
    use_segment_attention(network)
    found = measure_importance(network, EXAMPLES, "taylor", needs_layers=False)
    assert torch.allclose(found.neurons[0], expected, rtol=1e-3, atol=1e-7)
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_layer_matters_as_much_as_the_loss_grows_without_it() -> None:
    network = build_network("llama", initializer_range=0.1)
    with torch.no_grad():
        whole = sum(float(loss_of(network, one)) for one in EXAMPLES)
        kept = network.model.layers
        expected = []
        for place in range(3):
            network.model.layers = torch.nn.ModuleList(
                layer for number, layer in enumerate(kept) if number != place
            )
            network.config.num_hidden_layers = 2
            expected.append((sum(float(loss_of(network, one)) for one in EXAMPLES) - whole) / 3)
        network.model.layers = kept
        network.config.num_hidden_layers = 3
    use_segment_attention(network)
    found = measure_importance(network, EXAMPLES, "taylor")
    assert found.layers.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_random_scores_come_from_the_seed() -> None:
    network = build_network("llama")
    first, again, other = (measure_importance(network, [], "random", seed=s) for s in (1, 1, 2))
    assert torch.equal(first.hidden_D, again.hidden_D)
    assert not torch.equal(first.hidden_D, other.hidden_D)
