"""How much the parts of a network matter, measured on calibration examples.

``activation`` (Minitron, arXiv 2407.14679): of every neuron, head and channel of the normalised
hidden state the mean size over the tokens of an example, then the L2 norm over examples. A head's
size is the L2 norm of what it puts out; a group's is the sum over its heads, a channel's the sum
over all norms that read it. A layer matters as much as it turns the hidden state: one minus the
cosine between what enters and what leaves, at the score rows (block influence, ShortGPT,
arXiv 2403.03853).

``taylor`` (Molchanov et al., arXiv 1611.06440): the change of an example's label loss when the part
is set to zero, to first order, |sum over tokens of activation x gradient|, and the mean over
examples. A layer matters as much as the loss grows when it is left out, which is measured and not
estimated.

``random`` draws, as a control.

All tokens of an example count, those of the prefix once, as the packed pass computes them; in the
last layer the score rows alone, see ``calibration_passes``.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rankonce.distillation.calibration_passes import (
    CalibrationPass,
    Site,
    attention_sites,
    calibration_passes,
    hidden_sites,
    mlp_sites,
    watch,
)
from rankonce.distillation.shapes import DecoderShape
from rankonce.errors import DataError
from rankonce.model.packing import forward_pass
from rankonce.training.data import TokenizedExample
from rankonce.training.objectives import LabelObjective

Kind = Literal["activation", "taylor", "random"]


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Scores, the higher the more a part matters; fp64 on the CPU.

    Attributes:
        neurons: for each layer, of its MLP neurons.
        groups: for each layer, of its key/value heads with their query heads.
        hidden_D: of the channels of the hidden state.
        layers: of the layers; all alike where they were not asked for.
    """

    neurons: tuple[Tensor, ...]
    groups: tuple[Tensor, ...]
    hidden_D: Tensor
    layers: Tensor


def measure_importance(
    network: Any,
    examples: Sequence[TokenizedExample],
    kind: Kind,
    *,
    seed: int = 0,
    needs_layers: bool = True,
) -> Importance:
    """Score the parts of a network.

    Args:
        network: with segment attention and its own layers.
        examples: for ``taylor`` with a known label each; without use for ``random``.
        needs_layers: also score layers.

    Raises:
        DataError: there is no example, or no label and gradients are wanted.
    """
    measure = IMPORTANCES[kind]
    if kind != "random" and not examples:
        raise DataError("examples: should hold at least one to calibrate with")
    return measure(network, examples, seed, needs_layers)


def _draw(
    network: Any, examples: Sequence[TokenizedExample], seed: int, needs_layers: bool
) -> Importance:
    shape = DecoderShape.of(network.config)
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int) -> Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64)

    count = range(shape.num_hidden_layers)
    return Importance(
        neurons=tuple(draw(shape.intermediate_size) for _ in count),
        groups=tuple(draw(shape.num_key_value_heads) for _ in count),
        hidden_D=draw(shape.hidden_size),
        layers=draw(shape.num_hidden_layers),
    )


def _measure_activations(
    network: Any, examples: Sequence[TokenizedExample], seed: int, needs_layers: bool
) -> Importance:
    parts = _Parts(network)
    turns = torch.zeros(len(parts.shape_layers), dtype=torch.float64)
    num_rows = 0
    with torch.inference_mode():
        for one in calibration_passes(examples, network.device, description="activations"):

            def see(number: int, x_TN: Tensor, one: CalibrationPass = one) -> None:
                parts.add(number, x_TN[0].abs(), one, _square_of_mean)

            def see_layer(
                number: int,
                before_TD: Tensor,
                after_TD: Tensor,
                rows_C: Tensor = one.score_rows_C,
            ) -> None:
                cosine_C = nn.functional.cosine_similarity(
                    before_TD[0, rows_C], after_TD[0, rows_C], dim=-1
                )
                turns[number] += float((1 - cosine_C).double().sum())

            with watch(parts.sites, see), _watch_layers(network, see_layer):
                forward_pass(network, one.batch.batch)
            num_rows += len(one.score_rows_C)
    return parts.result(torch.sqrt, turns / max(1, num_rows))


def _measure_gradients(
    network: Any, examples: Sequence[TokenizedExample], seed: int, needs_layers: bool
) -> Importance:
    labelled = [example for example in examples if example.num_targets]
    if not labelled:
        raise DataError("labels: should be known of one candidate at least to take gradients")
    parts = _Parts(network)
    objective = LabelObjective()
    wanted = [parameter.requires_grad for parameter in network.parameters()]
    network.requires_grad_(False)
    embeddings = network.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda _, __, out: out.requires_grad_())
    try:
        for one in calibration_passes(labelled, network.device, description="gradients"):
            seen: dict[int, Tensor] = {}

            def see(number: int, x_TN: Tensor, seen: dict[int, Tensor] = seen) -> None:
                x_TN.retain_grad()
                seen[number] = x_TN

            with torch.enable_grad(), watch(parts.sites, see):
                objective.loss(network, one.batch).backward()
            for number, x_TN in seen.items():
                assert x_TN.grad is not None
                effect_TN = (x_TN.detach() * x_TN.grad)[0]
                parts.add(number, effect_TN, one, _size_of_sum)
    finally:
        handle.remove()
        for parameter, needs in zip(network.parameters(), wanted, strict=True):
            parameter.requires_grad_(needs)
    losses = torch.zeros(len(parts.shape_layers), dtype=torch.float64)
    if needs_layers:
        losses = _losses_without(network, labelled)
    return parts.result(lambda total: total / len(labelled), losses)


IMPORTANCES: Mapping[str, Callable[[Any, Sequence[TokenizedExample], int, bool], Importance]] = {
    "activation": _measure_activations,
    "taylor": _measure_gradients,
    "random": _draw,
}


@torch.inference_mode()
def _losses_without(network: Any, examples: Sequence[TokenizedExample]) -> Tensor:
    """Measure by how much the label loss of a row grows when one layer is left out."""
    objective = LabelObjective()
    layers = list(network.base_model.layers)
    totals = torch.zeros(1 + len(layers), dtype=torch.float64)
    for one in calibration_passes(examples, network.device, description="layers left out"):
        for place, layer in enumerate((None, *layers)):
            with nullcontext() if layer is None else _left_out(layer):
                batch = one.batch
                totals[place] += float(objective.loss(network, batch))
                # A pass keeps count of the layers that it has been through.
                batch.batch.segment_pass.num_layers = 0
    return (totals[1:] - totals[0]) / sum(example.num_targets for example in examples)


class _left_out:  # noqa: N801 - a context
    """Hands on what enters a layer."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __enter__(self) -> None:
        self._handle = self._layer.register_forward_hook(
            lambda _, args, kwargs, out: _entering(args, kwargs), with_kwargs=True
        )

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


class _watch_layers:  # noqa: N801 - a context
    """Hands over what enters and what leaves every layer."""

    def __init__(self, network: Any, see: Callable[[int, Tensor, Tensor], None]) -> None:
        self._layers, self._see = network.base_model.layers, see

    def __enter__(self) -> None:
        self._handles = [
            layer.register_forward_hook(
                lambda _, args, kwargs, out, number=number: self._see(
                    number, _entering(args, kwargs), out
                ),
                with_kwargs=True,
            )
            for number, layer in enumerate(self._layers)
        ]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def _entering(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    entering: Tensor = args[0] if args else kwargs["hidden_states"]
    return entering


# Turn what was summed over the tokens of E examples, and how many there are, into sums over both.
_Reduce = Callable[[Tensor, Tensor], Tensor]


def _square_of_mean(total_EN: Tensor, count_E: Tensor) -> Tensor:
    return (total_EN / count_E[:, None]).square().sum(0)


def _size_of_sum(total_EN: Tensor, count_E: Tensor) -> Tensor:
    return total_EN.abs().sum(0)


class _Parts:
    """Adds up the scores of all parts over passes, site by site."""

    def __init__(self, network: Any) -> None:
        self.shape = DecoderShape.of(network.config)
        self.shape_layers = range(self.shape.num_hidden_layers)
        count = self.shape.num_hidden_layers
        neurons, heads, hidden = (
            find(network) for find in (mlp_sites, attention_sites, hidden_sites)
        )
        self.sites: list[Site] = [*neurons, *heads, *hidden]
        self._neurons, self._heads = range(count), range(count, 2 * count)
        self._totals: dict[int, Tensor] = {}

    def add(self, number: int, x_TN: Tensor, one: CalibrationPass, reduce: _Reduce) -> None:
        """Add what one pass shows at one site."""
        x_TN, examples_T = one.counted(x_TN, score_rows=self.sites[number].score_rows)
        if number in self._heads:
            # A head counts by the size of what it puts out; effects of its numbers add up.
            x_THK = x_TN.unflatten(1, (self.shape.num_attention_heads, self.shape.head_dim))
            x_TN = x_THK.norm(dim=2) if reduce is _square_of_mean else x_THK.sum(2)
            if reduce is _size_of_sum:
                x_TN = x_TN.unflatten(1, (self.shape.num_key_value_heads, -1)).sum(2)
        total_EN = x_TN.new_zeros((one.num_examples, x_TN.shape[1]), dtype=torch.float64)
        total_EN.index_add_(0, examples_T, x_TN.double())
        count_E = torch.bincount(examples_T, minlength=one.num_examples).clamp(min=1)
        found = reduce(total_EN, count_E).cpu()
        self._totals[number] = self._totals.get(number, torch.zeros_like(found)) + found

    def result(self, finish: Callable[[Tensor], Tensor], layers: Tensor) -> Importance:
        """Turn totals into scores."""
        scores = {number: finish(total) for number, total in self._totals.items()}
        groups = self.shape.num_key_value_heads
        hidden = [scores[number] for number in range(self._heads.stop, len(self.sites))]
        return Importance(
            neurons=tuple(scores[number] for number in self._neurons),
            groups=tuple(scores[number].view(groups, -1).sum(1) for number in self._heads),
            hidden_D=torch.stack(hidden).sum(0),
            layers=layers,
        )
