"""Checkpoints whose weights are quantised: their layers, and how they are loaded back.

FP8 and int8 for CPUs are the row-wise forms of compressed-tensors (``float-quantized`` and
``int-quantized``): a weight in 8 bits with ``weight_scale``, one FP32 number for each output
channel; activations get a scale for each token as they come. Their layers run on our own products,
without that library. int8 and NF4 of bitsandbytes load through transformers.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankonce.errors import MissingDependencyError, ModelError
from rankonce.kernels.fp8_linear import Fp8Linear, fits_fp8
from rankonce.kernels.int8_linear import Int8Linear
from rankonce.model.precision import Precision, import_bitsandbytes

logger = logging.getLogger(__name__)

SCHEMES = ("fp8", "int8", "nf4", "cpu-int8")
# The record of ``rankonce quantize`` beside the weights.
RECORD_FILE = "quantization.json"
_METHOD = "rankonce-rows"


@dataclass(frozen=True, kw_only=True)
class RowScheme:
    """A row-wise form of compressed-tensors.

    Attributes:
        kind: of its numbers: ``float`` or ``int``.
        dtype: of its weights.
        layer: what computes with them.
    """

    kind: str
    dtype: torch.dtype
    layer: type[Fp8Linear] | type[Int8Linear]

    @property
    def format(self) -> str:
        """The name that compressed-tensors gives it."""
        return f"{self.kind}-quantized"


ROW_SCHEMES: dict[str, RowScheme] = {
    "fp8": RowScheme(kind="float", dtype=torch.float8_e4m3fn, layer=Fp8Linear),
    "cpu-int8": RowScheme(kind="int", dtype=torch.int8, layer=Int8Linear),
}


def compressed_config(scheme: str, ignored: list[str]) -> dict[str, Any]:
    """Return the ``quantization_config`` of a row-wise checkpoint as other engines read it.

    Args:
        scheme: a name of ``ROW_SCHEMES``.
        ignored: names of linear layers that are not quantised, the head among them.
    """
    row_scheme = ROW_SCHEMES[scheme]
    common = {
        "num_bits": 8,
        "type": row_scheme.kind,
        "symmetric": True,
        "group_size": None,
        "block_structure": None,
        "actorder": None,
    }
    weights = {**common, "strategy": "channel", "dynamic": False, "observer": "minmax"}
    activations = {**common, "strategy": "token", "dynamic": True, "observer": None}
    return {
        "quant_method": "compressed-tensors",
        "format": row_scheme.format,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignored,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": activations,
                "output_activations": None,
                "format": row_scheme.format,
            }
        },
    }


def find_scheme(config: Any) -> str | None:
    """Say how the weights of a checkpoint are quantised.

    Args:
        config: of transformers.

    Returns:
        A name of ``SCHEMES``; ``other`` for what only transformers knows; ``None`` for floats.

    Raises:
        ModelError: a form of compressed-tensors that is not row-wise.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    settings: Mapping[str, Any] = found if isinstance(found, dict) else found.to_dict()
    method = settings.get("quant_method")
    if method == "bitsandbytes" or settings.get("load_in_8bit") or settings.get("load_in_4bit"):
        return "int8" if settings.get("load_in_8bit") else "nf4"
    if method != "compressed-tensors":
        return "other"
    for scheme in ROW_SCHEMES:
        if _is_row_wise(settings, scheme):
            return scheme
    raise ModelError(
        f"quantization_config: compressed-tensors of format {settings.get('format')!r} should be "
        "FP8 or int8 with a scale for each output channel and dynamic scales for each token"
    )


def _is_row_wise(settings: Mapping[str, Any], scheme: str) -> bool:
    expected = compressed_config(scheme, [])["config_groups"]["group_0"]
    groups = list((settings.get("config_groups") or {}).values())
    names = ("num_bits", "type", "strategy", "symmetric", "dynamic")
    return (
        len(groups) == 1
        and settings.get("format") == ROW_SCHEMES[scheme].format
        and settings.get("kv_cache_scheme") is None
        and groups[0].get("targets") == ["Linear"]
        and not groups[0].get("output_activations")
        and all(
            (groups[0].get(part) or {}).get(name) == expected[part][name]
            for part in ("weights", "input_activations")
            for name in names
        )
    )


def stored_options(config: Any, scheme: str, precision: Precision, device: str) -> dict[str, Any]:
    """Return the keyword arguments of ``from_pretrained`` for a quantised checkpoint.

    Changes ``config`` where its settings would break packed passes.

    Raises:
        MissingDependencyError: bitsandbytes and accelerate, for what they quantised.
    """
    dtype = precision.dtype_on(device)
    settings = config.quantization_config
    if scheme in ROW_SCHEMES:
        _register_loader()
        ignored = list(settings.get("ignore") or [])
        config.quantization_config = {"quant_method": _METHOD, "scheme": scheme, "ignore": ignored}
        return {"dtype": dtype}
    for library in ("bitsandbytes", "accelerate"):
        if find_spec(library) is None:
            raise MissingDependencyError(library, extra="quantize")
    import_bitsandbytes()
    # As in ``loading_options``: outlier columns are found over all rows of a pass.
    changed = {"llm_int8_threshold": 0.0, "bnb_4bit_compute_dtype": str(dtype).split(".")[-1]}
    config.quantization_config = {**settings, **changed}
    return {"dtype": dtype, "device_map": {"": device}}


def check_stored(scheme: str, name: str | None, precision: Precision, source: str) -> None:
    """Refuse to quantise what is quantised already.

    Raises:
        ModelError: another precision of weights is asked for.
    """
    if (precision.fp8 or precision.bits) and name != scheme:
        raise ModelError(
            f"precision: {source} is quantised already ({scheme}); leave the precision out, or "
            f"give that of the other layers (fp32, bf16, fp16), not {name}"
        )


def warn_refused(source: str) -> None:
    """Log a warning where a checkpoint failed the acceptance of ``rankonce quantize``."""
    import json

    try:
        record = json.loads((Path(source) / RECORD_FILE).read_text())
        refused = record["verdict"] == "refused"
    except (OSError, ValueError, KeyError, TypeError):
        return
    if refused:
        logger.warning(
            "%s was refused by the ranking acceptance when it was quantised: %s",
            source,
            "; ".join(map(str, record.get("failures") or ())),
        )


def quantizable_layers(network: Any, scheme: str) -> tuple[dict[str, nn.Linear], list[str]]:
    """Return the decoder's linear layers that a row-wise scheme takes, and names of the others.

    Embeddings and the head are never taken; FP8 takes sizes in multiples of 16.
    """
    names = {module: path for path, module in network.named_modules()}
    taken, left = {}, []
    for module, path in names.items():
        if type(module) is not nn.Linear:
            continue
        in_decoder = path.startswith(f"{names[network.base_model.layers]}.")
        if in_decoder and (scheme != "fp8" or fits_fp8(module)):
            taken[path] = module
        else:
            left.append(path)
    return taken, left


def quantize_layers(network: Any, scheme: str) -> list[str]:
    """Put quantised layers in the place of the decoder's linear layers.

    Args:
        network: with its own forward (``Acceleration.undo``).
        scheme: a name of ``ROW_SCHEMES``.

    Returns:
        Names of the linear layers that were left.

    Raises:
        ModelError: no layer can be taken, or experts share a tensor, which would stay as it is.
    """
    for path, weight in network.named_parameters():
        if weight.ndim > 2:
            raise ModelError(
                f"{type(network).__name__}: {path} holds experts in one tensor, which {scheme} "
                "does not take; should be a decoder of linear layers"
            )
    taken, left = quantizable_layers(network, scheme)
    if not taken:
        raise ModelError(
            f"{type(network).__name__}: has no linear layer in its decoder that {scheme} takes"
        )
    for path, linear in taken.items():
        network.set_submodule(path, ROW_SCHEMES[scheme].layer.from_linear(linear))
    return left


def row_layers(network: nn.Module) -> Iterator[tuple[str, Fp8Linear | Int8Linear]]:
    """Return the row-wise quantised layers with their names."""
    for path, module in network.named_modules():
        if isinstance(module, Fp8Linear | Int8Linear):
            yield path, module


def stored_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's tensors under the names of compressed-tensors."""
    tensors = dict(network.state_dict())
    for path, layer in row_layers(network):
        for name in ("values_ND", "scale_N", "bias_N"):
            tensors.pop(f"{path}.{name}", None)
        tensors[f"{path}.weight"] = layer.values_ND.contiguous()
        tensors[f"{path}.weight_scale"] = layer.scale_N[:, None].contiguous()
        if layer.bias_N is not None:
            tensors[f"{path}.bias"] = layer.bias_N
    return tensors


class _Stored(nn.Module):
    """The tensors of a layer as the checkpoint holds them, until it becomes one that computes."""

    def __init__(self, linear: nn.Linear, scheme: str) -> None:
        super().__init__()
        size = (linear.out_features, linear.in_features)

        def parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
            empty = torch.empty(shape, dtype=dtype, device=linear.weight.device)
            return nn.Parameter(empty, requires_grad=False)

        self.weight = parameter(size, ROW_SCHEMES[scheme].dtype)
        self.weight_scale = parameter((size[0], 1), torch.float32)
        self.bias = None if linear.bias is None else parameter(size[:1], linear.weight.dtype)

    def settle(self, dtype: torch.dtype) -> Fp8Linear | Int8Linear:
        """Return the layer that computes; it shares the tensors."""
        values_ND, scale_N = self.weight.data, self.weight_scale.data[:, 0].contiguous()
        bias_N = None if self.bias is None else self.bias.data
        if values_ND.dtype == torch.int8:
            return Int8Linear(values_ND, scale_N, bias_N)
        return Fp8Linear.from_rows(values_ND, scale_N, bias_N=bias_N, dtype=dtype)


def settle_layers(network: Any, dtype: torch.dtype) -> None:
    """Make layers that compute of those that were loaded.

    Args:
        dtype: of the outputs that FP8 layers give for quantised rows.
    """
    for path, module in list(network.named_modules()):
        if isinstance(module, _Stored):
            network.set_submodule(path, module.settle(dtype))


def settle_dtype(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast what bitsandbytes left; transformers keeps the dtype of the files, whatever is asked."""
    stored = network.get_input_embeddings().weight.dtype  # type: ignore[operator]
    for parameter in network.parameters():
        if parameter.dtype == stored:
            parameter.data = parameter.data.to(dtype)


def _register_loader() -> None:
    """Tell transformers how to read row-wise weights; once a process."""
    from transformers.quantizers.auto import (
        AUTO_QUANTIZER_MAPPING,
        register_quantization_config,
        register_quantizer,
    )
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if _METHOD in AUTO_QUANTIZER_MAPPING:
        return

    @register_quantization_config(_METHOD)
    class RowConfig(QuantizationConfigMixin):
        quant_method: Any

        def __init__(self, scheme: str, ignore: list[str], **_: Any) -> None:
            self.quant_method, self.scheme, self.ignore = _METHOD, scheme, ignore

    @register_quantizer(_METHOD)
    class RowLoader(HfQuantizer):
        is_trainable = False

        def is_serializable(self) -> bool:
            return False

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
            settings: Any = self.quantization_config
            taken, _left = quantizable_layers(model, settings.scheme)
            for path, linear in taken.items():
                if path not in settings.ignore:
                    model.set_submodule(path, _Stored(linear, settings.scheme))
            return model
