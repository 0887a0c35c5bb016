"""Gradient checkpointing: layers keep their input and are computed again in the backward pass."""

from collections.abc import Callable
from copy import copy
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rankonce.errors import TrainingError
from rankonce.model.attention import SegmentPass


def recompute_layers(network: Any) -> None:
    """Let every decoder layer keep nothing but its input while gradients are taken (Chen 2016).

    Called after ``accelerate_model``, whose layers are wrapped as well as those of transformers.

    Raises:
        TrainingError: the model has no decoder layers of the usual form.
    """
    layers = getattr(network.base_model, "layers", None)
    if layers is None:
        name = type(network).__name__
        raise TrainingError(f"gradient_checkpointing: {name} has no layers of the usual form")
    for layer in layers:
        layer.forward = RecomputedLayer(layer.forward)


class RecomputedLayer:
    """A layer's forward that is run again when its gradients are needed.

    A pass collects what layers hand on, so each run of the layer gets a copy of the pass as it
    stood before the layer: running it again changes nothing for the layers after it.

    Args:
        forward: takes hidden states and, by its name, the segment pass.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(
        self, hidden_states: Tensor, *args: Any, segment_pass: SegmentPass, **options: Any
    ) -> Any:
        """Run the layer; arguments and results are those of its forward."""
        before = copy(segment_pass)
        before.residual_TD = None
        left: list[SegmentPass] = []

        def run(hidden: Tensor, residual_TD: Tensor | None) -> tuple[Any, Tensor | None]:
            own = copy(before)
            own.residual_TD = residual_TD
            out = self.forward(hidden, *args, segment_pass=own, **options)
            if not left:
                left.append(own)
            return out, own.residual_TD

        out, segment_pass.residual_TD = checkpoint(
            run, hidden_states, segment_pass.residual_TD, use_reentrant=False
        )
        segment_pass.trimmed, segment_pass.num_layers = left[0].trimmed, left[0].num_layers
        return out
