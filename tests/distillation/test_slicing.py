"""A cut network computes what the whole one does with the rest set to zero."""

import copy
from typing import Any

import pytest
import torch

from rankonce.distillation.shapes import DecoderShape, ParameterAxes
from rankonce.distillation.slicing import Selection, rows_of_groups, slice_network
from rankonce.errors import ModelError
from tests.conftest import ARCHITECTURES, build_network

PRUNABLE = tuple(name for name in ARCHITECTURES if name != "mixtral")
# Odd sizes; three query heads a group.
SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 75,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 10,
    "vocab_size": 131,
    "initializer_range": 0.1,
}
IDS = torch.tensor([[3, 128, 7, 55, 90, 14, 2, 77, 101, 5, 33]])
HIDDEN = (0, 1, 2, 5, 6, 8, 9, 12, 13, 14, 20, 21, 25, 26, 30, 31, 33, 35, 40, 41, 43, 44, 46, 47)
GROUPS = ((0, 2), (1, 3), (0, 1), (2, 3))
NEURONS = tuple(tuple(range(start, 75, 4))[:17] for start in range(4))


def build(architecture: str, **overrides: Any) -> Any:
    network = build_network(architecture, **{**SHAPE, **overrides})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # Norms and biases as a trained model has them: not all alike.
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return network


def select(network: Any, *parts: str) -> Selection:
    """Cut the parts that are named, keep the others whole."""
    whole = Selection.everything(DecoderShape.of(network.config))
    layers = (0, 2) if "layers" in parts else whole.layers
    return Selection(
        layers=layers,
        groups=tuple(
            torch.tensor(GROUPS[one]) if "groups" in parts else whole.groups[one] for one in layers
        ),
        neurons=tuple(
            torch.tensor(NEURONS[one]) if "neurons" in parts else whole.neurons[one]
            for one in layers
        ),
        hidden=torch.tensor(HIDDEN) if "hidden" in parts else whole.hidden,
        tokens=whole.tokens,
    )


@torch.no_grad()
def mask(network: Any, selection: Selection) -> Any:
    """Set to zero what is not selected, in a network that keeps its sizes."""
    masked = copy.deepcopy(network)
    shape = DecoderShape.of(network.config)

    def others(kept: torch.Tensor, size: int) -> list[int]:
        return sorted(set(range(size)) - set(kept.tolist()))

    def silence(linear: Any, rows: Any) -> None:
        linear.weight[rows] = 0
        if linear.bias is not None:
            linear.bias[rows] = 0

    gone = others(selection.hidden, shape.hidden_size)
    masked.model.embed_tokens.weight[:, gone] = 0
    if masked.lm_head.weight is not masked.model.embed_tokens.weight:
        masked.lm_head.weight[:, gone] = 0
    for number, layer in enumerate(masked.model.layers):
        outputs = (layer.self_attn.o_proj, layer.mlp.down_proj)
        if number not in selection.layers:
            for linear in outputs:
                silence(linear, slice(None))
            continue
        place = selection.layers.index(number)
        groups = torch.tensor(others(selection.groups[place], shape.num_key_value_heads)).long()
        inputs = (
            rows_of_groups(groups, shape.heads_per_group * shape.head_dim),
            others(selection.neurons[place], shape.intermediate_size),
        )
        for linear, columns in zip(outputs, inputs, strict=True):
            linear.weight[:, columns] = 0
            silence(linear, gone)
    return masked


@torch.no_grad()
def log_probs(network: Any) -> torch.Tensor:
    return network(IDS).logits.double().log_softmax(-1)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "parts",
    [
        ("neurons",),
        ("groups",),
        ("layers",),
        ("hidden",),
        ("layers", "groups", "neurons", "hidden"),
    ],
    ids="+".join,
)
@pytest.mark.parametrize("architecture", PRUNABLE)
def test_a_cut_network_is_the_whole_one_masked(
    architecture: str, parts: tuple[str, ...], tied: bool
) -> None:
    network = build(architecture, tie_word_embeddings=tied)
    selection = select(network, *parts)
    cut, masked = slice_network(network, selection), mask(network, selection)
    shape = selection.shape(DecoderShape.of(network.config))
    assert DecoderShape.of(cut.config) == shape
    assert (cut.lm_head.weight is cut.model.embed_tokens.weight) == tied
    found, expected = log_probs(cut), log_probs(masked)
    difference = (found - expected).abs()
    # What fp32 rounds away in logits of this size, over the whole vocabulary.
    assert difference.mean() <= 1e-6
    assert difference.max() <= 5e-6
    # The mask matters: the whole network says something else.
    assert (log_probs(network) - expected).abs().max() > 0.01


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parameters_are_counted_as_they_are(architecture: str) -> None:
    network = build_network(architecture, **SHAPE, attention_bias=True)
    if architecture == "mixtral":
        with pytest.raises(ModelError, match="mixtral has experts"):
            ParameterAxes.of(network.config)
        return
    axes, shape = ParameterAxes.of(network.config), DecoderShape.of(network.config)
    assert axes.count(shape) == sum(one.numel() for one in network.parameters())
    selection = select(network, "layers", "groups", "neurons", "hidden")
    cut = slice_network(network, selection)
    assert axes.count(selection.shape(shape)) == sum(one.numel() for one in cut.parameters())


def test_kinds_of_layers_and_what_is_not_cut_stay() -> None:
    network = build("gemma3_text", sliding_window=7)
    network.config.layer_types = ["sliding_attention", "full_attention"] * 2
    cut = slice_network(network, select(network, "layers"))
    assert cut.config.layer_types == ["sliding_attention", "sliding_attention"]
    for old, new in zip((0, 2), cut.model.layers, strict=True):
        before = network.model.layers[old].state_dict()
        for name, weight in new.state_dict().items():
            assert torch.equal(weight, before[name])


def test_pruned_in_two_steps_is_pruned_in_one() -> None:
    network = build("gemma2")
    once = slice_network(network, select(network, "groups", "neurons", "hidden"))
    half = slice_network(network, select(network, "hidden"))
    twice = slice_network(half, select(half, "groups", "neurons"))
    for name, weight in once.state_dict().items():
        assert torch.allclose(weight, twice.state_dict()[name], rtol=1e-6, atol=1e-7), name


def test_parameters_of_another_kind_are_refused() -> None:
    network = build("llama")
    network.model.layers[1].mlp.register_parameter("gain", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(ModelError, match=r"how to prune the parameter model\.layers\.1\.mlp\.gain"):
        slice_network(network, select(network, "neurons"))
