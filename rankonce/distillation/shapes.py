"""Sizes of a decoder: which architectures can be cut, what a size costs, and sizes for a share.

Every parameter of the supported architectures has axes out of six: ``tokens``, ``hidden``,
``queries``, ``keys``, ``neurons`` and ``head``, which is never cut. One table of them counts the
parameters of any size here and cuts the weights in ``slicing``.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rankonce.errors import ModelError

_LINEAR = {
    "q_proj": ("queries", "hidden"),
    "k_proj": ("keys", "hidden"),
    "v_proj": ("keys", "hidden"),
    "o_proj": ("hidden", "queries"),
    "gate_proj": ("neurons", "hidden"),
    "up_proj": ("neurons", "hidden"),
    "down_proj": ("hidden", "neurons"),
    "embed_tokens": ("tokens", "hidden"),
    "lm_head": ("tokens", "hidden"),
}
_NORMS = {
    "norm": "hidden",
    "input_layernorm": "hidden",
    "post_attention_layernorm": "hidden",
    "pre_feedforward_layernorm": "hidden",
    "post_feedforward_layernorm": "hidden",
    "q_norm": "head",
    "k_norm": "head",
}
# How unwilling ``plan_shape`` is to cut a size: it lowers the sum of these times the squared
# logarithm of what is left. The MLP goes first, as it does in Minitron (arXiv 2407.14679).
_RELUCTANCE = {"intermediate_size": 1.0, "num_key_value_heads": 8.0, "hidden_size": 16.0}
# No size is cut by a share to less than this part of what it was.
_LEAST = 1 / 8


@dataclass(frozen=True, kw_only=True)
class Family:
    """What an architecture does that matters when its width is cut.

    Attributes:
        norm_adds_one: its norms multiply by one more than their weight.
        scales_embeddings: it multiplies embeddings by the square root of the hidden size.
        norms_queries: queries and keys are normalised, which undoes any scale of theirs.
        needs_multiple: its configuration wants a hidden size that the heads divide.
    """

    norm_adds_one: bool = False
    scales_embeddings: bool = False
    norms_queries: bool = False
    needs_multiple: bool = False


FAMILIES: dict[str, Family] = {
    "llama": Family(needs_multiple=True),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(norms_queries=True),
    "gemma2": Family(norm_adds_one=True, scales_embeddings=True, needs_multiple=True),
    "gemma3_text": Family(
        norm_adds_one=True, scales_embeddings=True, norms_queries=True, needs_multiple=True
    ),
}


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """The sizes that pruning changes; the others are those of the configuration.

    Attributes:
        heads_per_group: query heads that share a key/value head; they go together.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_key_value_heads: int
    intermediate_size: int
    heads_per_group: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> "DecoderShape":
        """Read the shape off a transformers configuration.

        Raises:
            ModelError: heads do not fall into groups.
        """
        heads = config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        if heads % groups:
            raise ModelError(
                f"num_attention_heads: {heads} heads should be a multiple of {groups} "
                "key/value heads"
            )
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_key_value_heads=groups,
            intermediate_size=config.intermediate_size,
            heads_per_group=heads // groups,
            head_dim=head_dim,
        )

    @property
    def num_attention_heads(self) -> int:
        """Query heads."""
        return self.num_key_value_heads * self.heads_per_group

    def sizes(self) -> dict[str, int]:
        """Name the sizes as a configuration does."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
        }

    def _axis(self, name: str) -> int:
        return {
            "tokens": self.vocab_size,
            "hidden": self.hidden_size,
            "queries": self.num_attention_heads * self.head_dim,
            "keys": self.num_key_value_heads * self.head_dim,
            "neurons": self.intermediate_size,
            "head": self.head_dim,
        }[name]

    def count(self, axes: tuple[str, ...]) -> int:
        """Count the numbers of a parameter with these axes."""
        return math.prod(map(self._axis, axes))


@dataclass(frozen=True, kw_only=True)
class ParameterAxes:
    """The axes of every parameter: of one layer, and outside of the layers; tied ones once."""

    layer: tuple[tuple[str, ...], ...]
    outside: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, config: Any) -> "ParameterAxes":
        """Read them off a model of this configuration that has no memory.

        Raises:
            ModelError: the architecture cannot be pruned.
        """
        import torch
        from transformers import AutoModelForCausalLM

        find_family(config)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        names = [name for name, _ in network.named_parameters()]
        return cls(
            layer=tuple(axes_of(name) for name in names if ".layers.0." in name),
            outside=tuple(axes_of(name) for name in names if ".layers." not in name),
        )

    def count(self, shape: DecoderShape) -> int:
        """Count the parameters of a model of a shape."""
        layer = sum(map(shape.count, self.layer))
        return shape.num_hidden_layers * layer + sum(map(shape.count, self.outside))


def find_family(config: Any) -> Family:
    """Find what is known of an architecture.

    Raises:
        ModelError: it cannot be pruned; names those that can.
    """
    kind = config.model_type
    if kind in FAMILIES:
        return FAMILIES[kind]
    why = (
        " has experts, whose neurons are not one width,"
        if hasattr(config, "num_local_experts")
        else ""
    )
    raise ModelError(f"model: {kind}{why} cannot be pruned; should be one of {', '.join(FAMILIES)}")


def axes_of(name: str) -> tuple[str, ...]:
    """Return the axes of a parameter by its name.

    Raises:
        ModelError: the name is not one of a decoder's that can be pruned.
    """
    *_, module, kind = name.split(".")
    if module in _LINEAR:
        return _LINEAR[module] if kind == "weight" else _LINEAR[module][:1]
    if module in _NORMS and kind == "weight":
        return (_NORMS[module],)
    raise ModelError(f"model: does not know how to prune the parameter {name}")


def check_shape(config: Any, shape: DecoderShape) -> None:
    """Refuse a shape that is no cut of a configuration's or that transformers would refuse.

    Raises:
        ModelError: names the size and what it can be.
    """
    before = DecoderShape.of(config)
    for name in (*_RELUCTANCE, "num_hidden_layers"):
        size, most = getattr(shape, name), getattr(before, name)
        if not 1 <= size <= most:
            raise ModelError(f"{name}: should be from 1 to {most}, is {size}")
    heads = shape.num_attention_heads
    if find_family(config).needs_multiple and shape.hidden_size % heads:
        raise ModelError(
            f"hidden_size: should be a multiple of the {heads} heads in a {config.model_type} "
            f"model, is {shape.hidden_size}"
        )


def plan_shape(
    config: Any,
    *,
    max_parameters: int,
    fixed: Mapping[str, int],
    least: DecoderShape | None = None,
    most: DecoderShape | None = None,
) -> DecoderShape:
    """Choose the sizes that are not given so that a model has at most so many parameters.

    Among all hidden sizes and numbers of key/value heads, each with the widest MLP that fits, the
    least cut one is taken, see ``_RELUCTANCE``. Sizes are multiples of a power of two that grows
    with them. Depth is never cut unless it is given.

    Args:
        config: of the model before.
        fixed: sizes by their names in the configuration; ``vocab_size`` may be among them.
        least, most: bounds of the sizes.

    Raises:
        ModelError: no shape is that small.
    """
    before = DecoderShape.of(config)
    most = most or before
    axes = ParameterAxes.of(config)
    base = replace(most, **fixed)
    best: tuple[float, DecoderShape] | None = None
    smallest = axes.count(base)
    for hidden in _sizes("hidden_size", fixed, before, least, most):
        for groups in _sizes("num_key_value_heads", fixed, before, least, most):
            narrow = replace(base, hidden_size=hidden, num_key_value_heads=groups)
            if find_family(config).needs_multiple and hidden % narrow.num_attention_heads:
                continue
            for neurons in _sizes("intermediate_size", fixed, before, least, most):
                shape = replace(narrow, intermediate_size=neurons)
                count = axes.count(shape)
                smallest = min(smallest, count)
                if count <= max_parameters:
                    cost = sum(
                        weight * math.log(getattr(shape, name) / getattr(before, name)) ** 2
                        for name, weight in _RELUCTANCE.items()
                    )
                    if best is None or cost < best[0]:
                        best = (cost, shape)
                    # Narrower MLPs of this hidden size and these heads are cut more.
                    break
    if best is None:
        share = smallest / axes.count(before)
        raise ModelError(
            f"keep: should be {math.ceil(share * 1000) / 1000} or more with these sizes, which "
            f"leave {smallest:,} parameters at least"
        )
    return best[1]


def _sizes(
    name: str,
    fixed: Mapping[str, int],
    before: DecoderShape,
    least: DecoderShape | None,
    most: DecoderShape,
) -> Iterator[int]:
    """Give the values that a size may take, the largest first."""
    if name in fixed:
        yield fixed[name]
        return
    full, high = getattr(before, name), getattr(most, name)
    low = max(1, math.ceil(full * _LEAST)) if least is None else getattr(least, name)
    # Below 64 times 32 the steps get finer with the size, so that a share is met.
    step = min(64, 1 << max(0, (full // 32).bit_length() - 1))
    yield high
    yield from (size for size in range(high // step * step, low, -step) if size < high)
    if low < high:
        yield low


def between(config: Any, end: DecoderShape, *, step: int, steps: int) -> dict[str, int]:
    """Return the depth after one of several steps from a configuration's depth to an end's."""
    first, last = config.num_hidden_layers, end.num_hidden_layers
    return {"num_hidden_layers": round(first * (last / first) ** (step / steps))}
