"""The work of passes: multiplications and additions, each counted as one FLOP.

Only what the mask lets through is counted. W, the weights that a token meets in the decoder layers,
costs 2 W a token; a token that sees another costs 4 H K a layer; a logit costs 2 D.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from rankonce.kernels.segment_attention import SegmentSpans
from rankonce.model.acceleration import FastLayer
from rankonce.model.attention import SegmentPass


def product_flop(num_weights: float, num_rows: float) -> float:
    """Count the product of rows with weights."""
    return 2.0 * num_weights * num_rows


def attention_flop(num_heads: int, head_size: int, num_pairs: float) -> float:
    """Count one layer's attention forward: queries times keys, and weights times values."""
    return 4.0 * num_heads * head_size * num_pairs


def count_pairs(spans: SegmentSpans, window: int | None = None) -> int:
    """Count the pairs of a query and a key that it sees."""
    ranges = spans.seen_ranges(window).astype(np.int64)
    return int((ranges[:, 1] - ranges[:, 0] + ranges[:, 3] - ranges[:, 2]).sum())


@dataclass(frozen=True, kw_only=True)
class LayerWork:
    """What one decoder layer does.

    Attributes:
        token_weights: weights that every token meets.
        row_weights: weights that only score rows meet: the last accelerated layer's queries,
            output projection and MLP.
        num_heads, head_size: of the queries.
        window: of the attention.
        sees_rows_only: only score rows attend.
    """

    token_weights: float
    row_weights: float
    num_heads: int
    head_size: int
    window: int | None
    sees_rows_only: bool


@dataclass(frozen=True, kw_only=True)
class DecoderWork:
    """What the layers of a decoder do, and the size of its head.

    Attributes:
        hidden_size, vocabulary: D and V.
    """

    layers: tuple[LayerWork, ...]
    hidden_size: int
    vocabulary: int

    @classmethod
    def of(cls, network: Any) -> "DecoderWork":
        """Read the work off a transformers model as it will run, accelerated or not.

        Of experts those count that a token meets. Layers of an unknown form count as nothing.
        """
        config = network.config.get_text_config()
        layers = getattr(network.base_model, "layers", ())
        return cls(
            layers=tuple(_layer_work(layer, config) for layer in layers),
            hidden_size=config.hidden_size,
            vocabulary=config.vocab_size,
        )

    def flop(self, segment_pass: SegmentPass, *, num_logits: int) -> float:
        """Count a forward pass.

        Args:
            num_logits: that the head computes.
        """
        spans, score_spans = segment_pass.spans, segment_pass.score_spans
        num_tokens, num_rows = spans.num_queries, len(segment_pass.score_rows_C)
        pairs: dict[tuple[bool, int | None], int] = {}
        total = product_flop(self.hidden_size, num_logits)
        for layer in self.layers:
            key = (layer.sees_rows_only, layer.window)
            if key not in pairs:
                pairs[key] = count_pairs(score_spans if key[0] else spans, layer.window)
            total += product_flop(layer.token_weights, num_tokens)
            total += product_flop(layer.row_weights, num_rows)
            total += attention_flop(layer.num_heads, layer.head_size, pairs[key])
        return total


def _layer_work(layer: Any, config: Any) -> LayerWork:
    experts = getattr(config, "num_local_experts", None)
    share = config.num_experts_per_tok / experts if experts else 1.0
    weights: dict[str, float] = {}
    for name, parameter in layer.named_parameters():
        if parameter.ndim > 1:
            weights[name] = parameter.numel() * (share if ".experts." in name else 1.0)
    forward = getattr(layer, "forward", None)
    fast = forward if isinstance(forward, FastLayer) else None
    trims = fast is not None and fast.is_last
    every_token = sum(
        count
        for name, count in weights.items()
        if not trims or any(part in name for part in ("k_proj", "v_proj"))
    )
    attention = layer.self_attn
    return LayerWork(
        token_weights=every_token,
        row_weights=sum(weights.values()) - every_token,
        num_heads=config.num_attention_heads,
        head_size=attention.head_dim,
        window=fast.window if fast is not None else getattr(attention, "sliding_window", None),
        sees_rows_only=trims,
    )
