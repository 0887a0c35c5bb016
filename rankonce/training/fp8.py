"""Training with products in FP8: forward in FP8, gradients in the weights' own precision.

It is there to be tried. At the sizes that FP8 was measured on by others it hardly pays: nanochat's
log has 1.17 times the tokens a second, 5 % at equal quality, and a loss at 12 layers.
"""

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankonce.errors import TrainingError
from rankonce.kernels.fp8_linear import fits_fp8, fp8_linear, has_fp8, quantize_rows

logger = logging.getLogger(__name__)


def check_fp8(device: torch.device) -> None:
    """Refuse a device without FP8 products, and warn of what is to be expected on others.

    Raises:
        TrainingError: names the device.
    """
    if device.type != "cuda" or not has_fp8(device):
        raise TrainingError(
            f"fp8: needs a GPU with FP8 products (compute capability 8.9 or more), runs on {device}"
        )
    logger.warning("fp8: small models train slower and a little worse than in bf16")


def train_in_fp8(network: Any) -> int:
    """Multiply in FP8 in the linear layers of the decoder; head and embeddings stay as they are.

    Returns:
        How many layers; those whose sizes are no multiples of 16 stay as they are, too.
    """
    fitting = [
        module
        for module in network.base_model.layers.modules()
        if type(module) is nn.Linear and fits_fp8(module)
    ]
    for linear in fitting:
        linear.forward = partial(_multiply, linear)  # type: ignore[method-assign]
    return len(fitting)


def _multiply(linear: nn.Linear, x: Tensor) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    rows_TD = x.reshape(-1, x.shape[-1])
    out_TN: Tensor = _Fp8Product.apply(rows_TD, linear.weight)  # type: ignore[no-untyped-call]
    if linear.bias is not None:
        out_TN = out_TN + linear.bias.to(out_TN.dtype)
    return out_TN.reshape(*x.shape[:-1], linear.out_features)


class _Fp8Product(torch.autograd.Function):
    """Rows times a weight, both quantised with a scale a row; rounding counts as the identity."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ND: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ND)
        return fp8_linear(quantize_rows(x_TD), quantize_rows(weight_ND), out_dtype=x_TD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad_TN,) = grads
        x_TD, weight_ND = ctx.saved_tensors
        grad_weight_ND = grad_TN.T @ x_TD
        return grad_TN @ weight_ND.to(grad_TN.dtype), grad_weight_ND.to(weight_ND.dtype)
