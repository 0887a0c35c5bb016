"""Cut a decoder: the weights that stay, in a network of the smaller size.

A cut network computes what the whole one does with the rest set to zero. For neurons, heads and
layers that is so because nothing else adds to what they add to. For channels of the hidden state
the norms take a mean over all channels, in which those set to zero count: over the D' channels that
stay the mean is r = D / D' times larger, so norms multiply by the square root of r, and epsilon
grows by r. Where queries and keys are normalised with the same epsilon, their projections grow
by the square root of r, which their norm takes back. Embeddings that the model multiplies by
the square root of the hidden size grow by the square root of r; a head that shares them then has it
already, and the last norm stays as it is.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rankonce.distillation.shapes import DecoderShape, axes_of, find_family


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What stays, as ascending indices into the network before.

    Attributes:
        layers: which layers.
        groups, neurons: key/value heads and MLP neurons of each kept layer, as many in each.
        hidden: channels of the hidden state.
        tokens: rows of the vocabulary.
    """

    layers: tuple[int, ...]
    groups: tuple[Tensor, ...]
    neurons: tuple[Tensor, ...]
    hidden: Tensor
    tokens: Tensor

    @classmethod
    def everything(cls, shape: DecoderShape) -> "Selection":
        """Select all that a network of a shape has."""
        layers = tuple(range(shape.num_hidden_layers))
        return cls(
            layers=layers,
            groups=tuple(torch.arange(shape.num_key_value_heads) for _ in layers),
            neurons=tuple(torch.arange(shape.intermediate_size) for _ in layers),
            hidden=torch.arange(shape.hidden_size),
            tokens=torch.arange(shape.vocab_size),
        )

    def shape(self, before: DecoderShape) -> DecoderShape:
        """Return the sizes of the selected part."""
        return replace(
            before,
            vocab_size=len(self.tokens),
            hidden_size=len(self.hidden),
            num_hidden_layers=len(self.layers),
            num_key_value_heads=len(self.groups[0]),
            intermediate_size=len(self.neurons[0]),
        )


@torch.no_grad()
def slice_network(network: Any, selection: Selection) -> Any:
    """Build the network of what is selected, on the same device and in the same dtype.

    Args:
        network: a transformers model of ``FAMILIES``; it is left as it is.

    Returns:
        A model with eager attention in evaluation mode, whose configuration names its sizes.
    """
    from transformers import AutoModelForCausalLM

    before = DecoderShape.of(network.config)
    config = _slice_config(network.config, selection, before)
    dtype = next(network.parameters()).dtype
    with torch.random.fork_rng(devices=[]):
        smaller = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
    weights = network.state_dict()
    places = {number: place for place, number in enumerate(selection.layers)}
    cut: dict[str, Tensor] = {}
    for name, weight in weights.items():
        number = _layer_of(name)
        if number is not None and number not in places:
            continue
        place = None if number is None else places[number]
        for axis, axis_name in enumerate(axes_of(name)):
            index = _index_of(axis_name, selection, before, place)
            if index is not None:
                weight = weight.index_select(axis, index.to(weight.device))
        own = name if number is None else name.replace(f".{number}.", f".{place}.", 1)
        cut[own] = _rescale(name, weight, network.config, len(selection.hidden))
    smaller.load_state_dict(cut)
    smaller.generation_config = copy.deepcopy(network.generation_config)
    return smaller.to(network.device).eval()


def _index_of(
    axis: str, selection: Selection, shape: DecoderShape, place: int | None
) -> Tensor | None:
    if axis == "tokens":
        return selection.tokens
    if axis == "hidden":
        return selection.hidden
    if axis == "head":
        return None
    assert place is not None
    if axis == "neurons":
        return selection.neurons[place]
    groups = selection.groups[place]
    rows = shape.head_dim * (shape.heads_per_group if axis == "queries" else 1)
    return rows_of_groups(groups, rows)


def rows_of_groups(groups: Tensor, rows: int) -> Tensor:
    """Return the rows of groups that have ``rows`` of them each, one group after another."""
    return (groups[:, None] * rows + torch.arange(rows)[None, :]).flatten()


def _rescale(name: str, weight: Tensor, config: Any, hidden: int) -> Tensor:
    """Make up for the channels over which norms no longer take their mean."""
    ratio = config.hidden_size / hidden
    if ratio == 1:
        return weight
    family = find_family(config)
    scale: float = ratio**0.5
    module = name.split(".")[-2]
    is_tied = bool(config.tie_word_embeddings)
    if axes_of(name) == ("hidden",) and "norm" in module:
        if module == "norm" and is_tied and family.scales_embeddings:
            return weight
        return (weight + 1) * scale - 1 if family.norm_adds_one else weight * scale
    grows = (module in ("q_proj", "k_proj") and family.norms_queries) or (
        family.scales_embeddings and (module == "embed_tokens" or (module == "lm_head" and is_tied))
    )
    return weight * scale if grows else weight


def _slice_config(config: Any, selection: Selection, before: DecoderShape) -> Any:
    smaller = copy.deepcopy(config)
    for name, size in selection.shape(before).sizes().items():
        setattr(smaller, name, size)
    smaller.rms_norm_eps = config.rms_norm_eps * config.hidden_size / len(selection.hidden)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        smaller.layer_types = [kinds[number] for number in selection.layers]
    return smaller


def _layer_of(name: str) -> int | None:
    """Return the number of the layer that a parameter belongs to."""
    _, found, rest = name.partition(".layers.")
    return int(rest.split(".")[0]) if found else None
