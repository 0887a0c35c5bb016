"""The fast path: decoder layers run on our kernels, in fp32, bf16, fp16 or FP8.

``accelerate_model`` gives every decoder layer of a known architecture another forward: fused
norms, one product for queries, keys and values and one for gate and up, rotary embedding and
q/k norm in one kernel, and in the last layer queries, output projection and MLP of the score rows
only. The module tree and the parameters stay where they are, so the model can be saved, and
``Acceleration.undo`` takes everything back.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from rankonce.errors import ModelError
from rankonce.kernels.fp8_linear import Fp8Linear, QuantizedRows, fits_fp8
from rankonce.kernels.fused_norm import Activation, gated_activation, norm_rope, rms_norm
from rankonce.kernels.int8_linear import Int8Linear
from rankonce.kernels.segment_attention import segment_attention
from rankonce.model.attention import SegmentPass

logger = logging.getLogger(__name__)

# Decoder layers that are norms, attention with rotate-half positions, and an MLP, by model type:
# what is added to the weights of their norms, and whether every layer has the configured window.
_ARCHITECTURES = {
    "llama": (0.0, False),
    "mistral": (0.0, True),
    "mixtral": (0.0, True),
    "qwen2": (0.0, False),
    "qwen3": (0.0, False),
    "gemma2": (1.0, False),
    "gemma3_text": (1.0, False),
}
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}

Rows = Tensor | QuantizedRows


@dataclass(kw_only=True)
class Acceleration:
    """What ``accelerate_model`` did to a model.

    Attributes:
        report: one line for each thing that was improved or left as it was.
        is_complete: every layer runs on our kernels and plain products, adapters' among them,
            without a step whose work depends on numbers (experts, dynamic rotary embeddings) or on
            weights in another library's form.
        is_fp8: linear layers are quantised.
    """

    report: list[str] = field(default_factory=list)
    is_complete: bool = False
    is_fp8: bool = False
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def undo(self) -> None:
        """Give the layers their own forward back; the weights were never changed."""
        while self._undo:
            self._undo.pop()()

    def become(self, other: "Acceleration") -> None:
        """Speak of what was done to the model since."""
        self.report, self.is_complete = other.report, other.is_complete
        self.is_fp8, self._undo = other.is_fp8, other._undo


def accelerate_model(
    network: Any, precision: str | None = None, *, keep: Sequence[str] = (), trainable: bool = False
) -> Acceleration:
    """Run the decoder layers of a transformers model on our kernels.

    Args:
        network: a causal language model whose attention is segment attention.
        precision: ``fp8`` quantises the linear layers; otherwise the weights' own dtype is used.
        keep: names or patterns (``*.down_proj``, ``model.layers.0.*``) of linear layers that are
            not to be quantised. Embeddings, norms and the head never are.
        trainable: leave every weight its own memory, as optimizers and checkpoints want it,
            instead of joining those that share an input.

    Returns:
        What was done, and the way back.

    Raises:
        ModelError: a pattern of ``keep`` names no layer, or FP8 is asked of an architecture that
            is not known here.
    """
    kind = network.config.get_text_config().model_type
    name = type(network).__name__
    acceleration = Acceleration(is_fp8=precision == "fp8")
    if kind not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        if precision == "fp8":
            raise ModelError(f"precision: fp8 is known for {known}; {name} is {kind}")
        acceleration.report.append(f"{name}: left as it is; known are {known}")
        return acceleration
    decoder = network.base_model
    names = {module: path for path, module in network.named_modules()}
    linears = [names[module] for module in decoder.layers.modules() if _is_plain(module)]
    for pattern in keep:
        if not any(fnmatch(path, pattern) for path in linears):
            raise ModelError(f"keep: {pattern!r} names no linear layer; they are {linears[:7]} …")
    kept = {path for path in linears if any(fnmatch(path, pattern) for pattern in keep)}
    offset, has_one_window = _ARCHITECTURES[kind]
    layers = []
    for layer in decoder.layers:
        one_window = getattr(layer.self_attn.config, "sliding_window", None)
        fast = FastLayer(
            layer,
            offset=offset,
            window=one_window
            if has_one_window
            else getattr(layer.self_attn, "sliding_window", None),
            is_last=layer is decoder.layers[-1],
            fp8=precision == "fp8",
            kept={module for module, path in names.items() if path in kept},
            joins=not trainable,
        )
        layers.append(fast)
        layer.forward = fast
        acceleration._undo.append(partial(delattr, layer, "forward"))
    acceleration.report += _report(layers, kept, precision)
    rope_type = getattr(getattr(decoder, "rotary_emb", None), "rope_type", "default")
    acceleration.is_complete = rope_type in ("default", "linear", "llama3", "yarn") and all(
        layer.fuses_mlp and all(_is_products(one) for p in layer.projections for one in p.linears)
        for layer in layers
    )
    for line in acceleration.report:
        _log_line(name, line)
    return acceleration


class FastLayer:
    """One decoder layer on our kernels; called in place of the layer's own forward.

    The MLP's output leaves without its residual, which the next layer's first norm adds.

    Args:
        layer: a transformers decoder layer.
        offset: added to the weights of its norms.
        window: of its attention.
        is_last: compute queries, output projection and MLP for the score rows only.
        fp8: quantise the linear layers.
        kept: linear layers that are not quantised.
        joins: join the weights of linear layers over the same input.
    """

    def __init__(
        self,
        layer: Any,
        *,
        offset: float,
        window: int | None,
        is_last: bool,
        fp8: bool,
        kept: set[nn.Module],
        joins: bool,
    ) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.layer, self.attention, self.mlp = layer, attention, mlp
        self.offset, self.window, self.is_last = offset, window, is_last
        self.is_sandwich = hasattr(layer, "pre_feedforward_layernorm")
        self.second_norm = (
            layer.pre_feedforward_layernorm if self.is_sandwich else layer.post_attention_layernorm
        )
        self.head_size = attention.head_dim
        activation = getattr(attention.config, "hidden_activation", None)
        self.activation = _ACTIVATIONS.get(activation or attention.config.hidden_act)
        self.fuses_mlp = self.activation is not None and hasattr(mlp, "gate_proj")

        def project(*linears: Any) -> Projection:
            quantizes = fp8 and not kept.intersection(linears)
            return Projection(linears, fp8=quantizes, joins=joins)

        # The last layer needs its keys and values for every token, its queries only for some.
        query_key_value = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.query = project(query_key_value[0]) if is_last else None
        self.query_key_value = project(*query_key_value[1 if is_last else 0 :])
        self.output = project(attention.o_proj)
        self.gate_up = project(mlp.gate_proj, mlp.up_proj) if self.fuses_mlp else None
        self.down = project(mlp.down_proj) if self.fuses_mlp else None

    @property
    def projections(self) -> list["Projection"]:
        """Return the products of the layer."""
        every = (self.query, self.query_key_value, self.output, self.gate_up, self.down)
        return [one for one in every if one is not None]

    def __call__(
        self,
        hidden_states: Tensor,
        *_: Any,
        position_embeddings: tuple[Tensor, Tensor],
        segment_pass: SegmentPass,
        **__: Any,
    ) -> Tensor:
        """Run the layer over ``1 x T x D``; the last one returns the score rows, ``1 x C x D``."""
        attends_fp8 = self.query_key_value.fp8 and (self.query is None or self.query.fp8)
        normed, residual_TD = self._norm(
            self.layer.input_layernorm,
            hidden_states[0],
            attends_fp8,
            residual_TD=segment_pass.residual_TD,
        )
        segment_pass.residual_TD = None
        attended_TE = self._attend(normed, position_embeddings, segment_pass)
        if self.is_last:
            residual_TD = residual_TD.index_select(0, segment_pass.score_rows_C)
            segment_pass.trimmed = True
        out_TD: Tensor = self.output(attended_TE)
        if self.is_sandwich:
            out_TD = self._norm(self.layer.post_attention_layernorm, out_TD)[0]
        feeds_fp8 = self.gate_up is not None and self.gate_up.fp8
        normed, residual_TD = self._norm(
            self.second_norm, out_TD, feeds_fp8, residual_TD=residual_TD
        )
        out_TD = self._feed_forward(normed)
        if self.is_sandwich:
            out_TD = self._norm(self.layer.post_feedforward_layernorm, out_TD)[0]
        if self.is_last:
            return (residual_TD + out_TD)[None]
        segment_pass.residual_TD = residual_TD
        return out_TD[None]

    def _norm(
        self,
        norm: Any,
        x_TD: Tensor,
        quantize: bool = False,
        *,
        residual_TD: Tensor | None = None,
    ) -> tuple[Any, Tensor]:
        if residual_TD is not None:
            # Products under an autocast come in bf16; hidden states keep their own dtype.
            x_TD = x_TD.to(residual_TD.dtype)
        return rms_norm(
            x_TD,
            norm.weight,
            eps=_eps(norm),
            offset=self.offset,
            residual_TD=residual_TD,
            quantize=quantize,
        )

    def _attend(
        self,
        normed_TD: Rows,
        position_embeddings: tuple[Tensor, Tensor],
        segment_pass: SegmentPass,
    ) -> Tensor:
        attention, spans = self.attention, segment_pass.spans
        if attention.training and attention.attention_dropout:
            raise ModelError(
                f"{type(attention).__name__}: attention_dropout should be 0 in packed passes, "
                f"is {attention.attention_dropout}"
            )
        cos_TK, sin_TK = (table[0] for table in position_embeddings)
        parts = [
            part.unflatten(1, (-1, self.head_size)) for part in self.query_key_value(normed_TD)
        ]
        if self.query is None:
            q_THK, k_TGK, v_TGK = parts
            q_THK, k_TGK = self._rotate(q_THK, k_TGK, cos_TK, sin_TK)
        else:
            rows_C, spans = segment_pass.score_rows_C, segment_pass.score_spans
            k_TGK, v_TGK = parts
            q_THK = self.query(_select(normed_TD, rows_C)).unflatten(1, (-1, self.head_size))
            q_THK, _ = self._rotate(
                q_THK, q_THK[:, :0], cos_TK.index_select(0, rows_C), sin_TK.index_select(0, rows_C)
            )
            _, k_TGK = self._rotate(k_TGK[:, :0], k_TGK, cos_TK, sin_TK)
        if self.window is not None:
            segment_pass.sliding_windows.add(self.window)
        k_SGK, v_SGK = segment_pass.take_up(k_TGK, v_TGK)
        return segment_attention(
            q_THK,
            k_SGK,
            v_SGK,
            spans,
            scale=attention.scaling,
            softcap=getattr(attention, "attn_logit_softcapping", None),
            window=self.window,
        ).flatten(1)

    def _rotate(
        self, q_THK: Tensor, k_TGK: Tensor, cos_TK: Tensor, sin_TK: Tensor
    ) -> tuple[Tensor, Tensor]:
        q_norm = getattr(self.attention, "q_norm", None)
        k_norm = getattr(self.attention, "k_norm", None)
        return norm_rope(
            q_THK,
            k_TGK,
            cos_TK,
            sin_TK,
            q_weight_K=None if q_norm is None else q_norm.weight,
            k_weight_K=None if k_norm is None else k_norm.weight,
            eps=1e-6 if q_norm is None else _eps(q_norm),
            offset=self.offset,
        )

    def _feed_forward(self, normed_TD: Rows) -> Tensor:
        if self.gate_up is None or self.down is None or self.activation is None:
            out: Tensor = self.mlp(normed_TD[None])[0]  # type: ignore[index]
            return out
        gate_TI, up_TI = self.gate_up(normed_TD)
        hidden = gated_activation(
            gate_TI, up_TI, activation=self.activation, quantize=self.down.fp8
        )
        out_TD: Tensor = self.down(hidden)
        return out_TD


class Projection:
    """Linear layers over the same input as one product.

    A float weight that FP8 quantises stays beside its quantised copy. Otherwise, and for layers
    that are quantised already, the joined weight takes the layers' place in memory and they become
    views of it, so that nothing is held twice; with gradients, and for layers of other libraries
    (adapters, bitsandbytes), each layer is called by itself.
    """

    def __init__(self, linears: Sequence[Any], *, fp8: bool, joins: bool) -> None:
        self.linears = linears
        self.sizes = [linear.out_features for linear in linears]
        plain = all(_is_plain(linear) for linear in linears)
        is_fp8 = all(isinstance(linear, Fp8Linear) for linear in linears)
        self.is_stored = is_fp8 or all(isinstance(linear, Int8Linear) for linear in linears)
        self.fp8 = fp8 and plain and all(fits_fp8(linear) for linear in linears)
        self.product: Any = None
        if self.fp8:
            self.product = Fp8Linear.from_linear(_joined(linears))
        elif self.is_stored:
            self.fp8 = is_fp8
            self.product = _joined_rows(linears)
        elif plain and joins and len(linears) > 1:
            self.product = _joined(linears)
            _become_views(linears, self.product)

    def __call__(self, rows: Rows) -> Any:
        """Return one matrix, or a tuple of them where there are several layers."""
        trains = torch.is_grad_enabled() and not (self.fp8 or self.is_stored)
        if self.product is None or trains:
            parts = tuple(linear(rows) for linear in self.linears)
        else:
            parts = self.product(rows).split(self.sizes, dim=1)
        return parts if len(self.linears) > 1 else parts[0]


def _joined(linears: Sequence[nn.Linear]) -> nn.Linear:
    """Join the weights of plain layers that have the same input."""
    first = linears[0]
    if len(linears) == 1:
        return first
    product = nn.Linear(first.in_features, 1, bias=False, device="meta")
    weight_ND = torch.cat([linear.weight.detach() for linear in linears])
    product.weight = nn.Parameter(weight_ND, requires_grad=False)
    product.out_features = len(weight_ND)
    if first.bias is not None:
        bias_N = torch.cat([linear.bias.detach() for linear in linears])
        product.bias = nn.Parameter(bias_N, requires_grad=False)
    return product


def _joined_rows(linears: Sequence[Any]) -> Any:
    """Join quantised layers that have the same input; they become views of the one product."""
    first = linears[0]
    if len(linears) == 1:
        return first
    # FP8 has no concatenation of its own on every device.
    bits_ND = torch.cat([linear.values_ND.view(torch.int8) for linear in linears])
    values_ND = bits_ND.view(first.values_ND.dtype)
    scale_N = torch.cat([linear.scale_N for linear in linears])
    has_bias = first.bias_N is not None
    bias_N = torch.cat([linear.bias_N for linear in linears]) if has_bias else None
    start = 0
    for linear in linears:
        rows = slice(start, start + linear.out_features)
        linear.values_ND, linear.scale_N = values_ND[rows], scale_N[rows]
        linear.bias_N = bias_N[rows] if bias_N is not None else None
        start = rows.stop
    if isinstance(first, Fp8Linear):
        return Fp8Linear.from_rows(values_ND, scale_N, bias_N=bias_N, dtype=first.dtype)
    return Int8Linear(values_ND, scale_N, bias_N)


def _become_views(linears: Sequence[nn.Linear], product: nn.Linear) -> None:
    start = 0
    for linear in linears:
        end = start + linear.out_features
        linear.weight.data = product.weight.data[start:end]
        if linear.bias is not None:
            linear.bias.data = product.bias.data[start:end]
        start = end


def _is_plain(module: Any) -> bool:
    return type(module) is nn.Linear


def _is_products(module: Any) -> bool:
    """Whether a layer is a product of ours: plain, alone or under adapters, or in FP8."""
    return isinstance(module, Fp8Linear) or _is_plain(getattr(module, "base_layer", module))


def _select(rows: Rows, places_C: Tensor) -> Rows:
    if isinstance(rows, QuantizedRows):
        return QuantizedRows(
            values_TD=rows.values_TD.view(torch.uint8)
            .index_select(0, places_C)
            .view(rows.values_TD.dtype),
            scale_T=rows.scale_T.index_select(0, places_C),
        )
    return rows.index_select(0, places_C)


def _eps(norm: Any) -> float:
    """Return what a norm adds to the mean square; transformers has two names for it."""
    eps: float = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return eps


def _report(layers: list[FastLayer], kept: set[str], precision: str | None) -> list[str]:
    """Say what was improved and what was left."""
    lines = [
        f"{len(layers)} layers on fused norms, rotary embedding and segment attention; the last "
        "one computes queries and MLP for the score rows only"
    ]
    if not all(layer.fuses_mlp for layer in layers):
        lines.append("MLP: left as it is; known is gate, up and down with SiLU or tanh-GELU")
    products = [product for layer in layers for product in layer.projections]
    if precision == "fp8":
        quantized = sum(product.fp8 for product in products)
        names = ", ".join(sorted(kept)) or "none"
        lines.append(f"{quantized} of {len(products)} products in FP8, kept by name: {names}")
        if any(not product.fp8 for product in products) and not kept:
            lines.append("products whose sizes are no multiples of 16 stay as they are")
    stored = sum(product.is_stored for product in products)
    if stored:
        lines.append(f"{stored} of {len(products)} products in the 8 bits of the checkpoint")
    others = (product for product in products if not product.is_stored)
    if not all(_is_plain(linear) for product in others for linear in product.linears):
        lines.append("layers that are not plain linears (adapters, 8 and 4 bits) run one by one")
    return lines


@cache
def _log_line(name: str, line: str) -> None:
    logger.info("%s: %s", name, line)
