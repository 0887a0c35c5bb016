"""Learning rates, optimisers and dropout of a run."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import dropout

from rankonce.errors import TrainingError

Schedule = Literal["cosine", "warmup-stable-decay"]
# The last part of a run in which a stable rate decays.
_DECAY_SHARE = 0.2
_SGD_MOMENTUM = 0.9


def rate_factor(
    progress: float, *, schedule: Schedule, warmup_share: float, final_share: float
) -> float:
    """Part of the peak learning rate: linear warm-up, then down to ``final_share``.

    ``cosine`` falls all the way; ``warmup-stable-decay`` stays at the peak until the last fifth of
    the run and falls with 1 - sqrt (Hägele et al. 2024).

    Args:
        progress: part of the run that is done after this step, in 0..1.
    """
    if progress < warmup_share:
        return progress / warmup_share
    if schedule == "cosine":
        done = (progress - warmup_share) / (1 - warmup_share)
        left = (1 + math.cos(math.pi * min(done, 1.0))) / 2
    else:
        done = max(0.0, (progress - (1 - _DECAY_SHARE)) / _DECAY_SHARE)
        left = 1 - math.sqrt(min(done, 1.0))
    return final_share + (1 - final_share) * left


def build_optimizers(
    network: torch.nn.Module, *, weight_decay: float, with_sgd: bool
) -> list[torch.optim.Optimizer]:
    """AdamW and, for the end of a run, SGD with momentum over the same parameters.

    Weights decay on matrices only. Learning rates are set step by step.
    """
    trained = [p for p in network.parameters() if p.requires_grad]
    if not trained:
        raise TrainingError("network: has no parameter that is trained")

    def groups() -> list[dict[str, Any]]:
        return [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]

    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups(), betas=(0.9, 0.95))]
    if with_sgd:
        optimizers.append(torch.optim.SGD(groups(), momentum=_SGD_MOMENTUM))
    return optimizers


class WeightAverage:
    """An exponential average of weights (Polyak averaging), sharded as they are.

    ``torch.optim.swa_utils.AveragedModel`` copies the module, which a sharded one does not allow.

    Args:
        parameters: the trained ones; their average is kept in tensors of the same form.
        kept: the part of the average that stays at every update; the first update takes the
            weights as they are.
    """

    def __init__(self, parameters: Sequence[Tensor], *, kept: float) -> None:
        self.averages = [parameter.detach().clone() for parameter in parameters]
        self.kept = kept
        self.num_updates = 0
        self._weights = [_local_part(parameter) for parameter in parameters]
        self._averages = [_local_part(average) for average in self.averages]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of a step."""
        if self.num_updates:
            torch._foreach_lerp_(self._averages, self._weights, 1 - self.kept)
        else:
            torch._foreach_copy_(self._averages, self._weights)
        self.num_updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average in the place of the weights for a while."""
        weights = [weight.clone() for weight in self._weights]
        torch._foreach_copy_(self._weights, self._averages)
        try:
            yield
        finally:
            torch._foreach_copy_(self._weights, weights)


def _local_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor that may be sharded, as a view."""
    part: Any = tensor.detach()
    local: Tensor = part.to_local() if hasattr(part, "to_local") else part
    return local


def layer_dropout(num_layers: int, *, last: float, first: float | None) -> list[float]:
    """Dropout of every layer: from ``first`` in the lowest to ``last`` in the highest, linearly."""
    low = last if first is None else first
    steps = max(1, num_layers - 1)
    # Weighted so that both ends are exact: a share below 0 by rounding is refused.
    return [(low * (steps - i) + last * i) / steps for i in range(num_layers)]


def add_dropout(network: Any, shares: Sequence[float]) -> None:
    """Drop parts of what every layer adds to the hidden states, while the model is in training.

    Args:
        shares: one a layer.

    Raises:
        TrainingError: the architecture's layers have no ``self_attn`` and ``mlp``.
    """
    if not any(shares):
        return
    layers = getattr(network.base_model, "layers", None)
    if layers is None:
        raise TrainingError(f"dropout: {type(network).__name__} has no layers of the usual form")
    for layer, share in zip(layers, shares, strict=True):
        for name, last in (("self_attn", "o_proj"), ("mlp", "down_proj")):
            if not hasattr(layer, name):
                raise TrainingError(f"dropout: {type(layer).__name__} has no {name}; leave it at 0")
            # The product that ends it, where there is one: accelerated layers call that alone.
            module = getattr(layer, name)
            getattr(module, last, module).register_forward_hook(partial(_drop, share=share))


def _drop(module: torch.nn.Module, _: Any, output: Any, *, share: float) -> Any:
    if isinstance(output, tuple):
        return (dropout(output[0], share, module.training), *output[1:])
    return dropout(output, share, module.training)
