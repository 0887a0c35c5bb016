"""Segment attention as an attention of transformers.

transformers hands extra keyword arguments of the model's forward through to the attention function,
so a pass travels as ``segment_pass`` and no model code changes. Masks are ours as well: the
registered mask function returns none, since the spans say who sees whom.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from rankonce.errors import ModelError
from rankonce.kernels.segment_attention import SegmentSpans, segment_attention
from rankonce.model.prefix_cache import KeysValues

ATTENTION_NAME = "rankonce_segments"


class SegmentPass:
    """What the layers of one pass share.

    Layers write into it, so it is no dataclass: FSDP copies those on their way into a layer.

    Args:
        spans: who sees whom.
        score_spans: the same for the score rows alone.
        score_rows_C: the last token of every candidate.
        cached: for each layer the known keys and values, in the order of their rows.
        front_rows_F: where prefixes are known in part: the rows that stand in front of the tokens'
            own, as rows of the known ones and the tokens together.
        kept_rows: for each prefix to be kept, its token rows.

    Attributes:
        kept: filled by the layers: for each of ``kept_rows``, keys and values layer by layer.
        recorded: filled by the layers, where it is given: keys and values of all tokens.
        residual_TD: left by an accelerated layer for the next one, which adds it.
        trimmed: set by the last accelerated layer: its output holds the score rows only.
        sliding_windows: filled by the layers: the windows that they declared.
        num_layers: filled by the layers: how many of them ran segment attention.
    """

    def __init__(
        self,
        *,
        spans: SegmentSpans,
        score_spans: SegmentSpans,
        score_rows_C: Tensor,
        cached: Sequence[tuple[Tensor, Tensor]] = (),
        front_rows_F: Tensor | None = None,
        kept_rows: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.spans, self.score_spans, self.score_rows_C = spans, score_spans, score_rows_C
        self.cached, self.front_rows_F, self.kept_rows = cached, front_rows_F, kept_rows
        self.kept: list[KeysValues] = [[] for _ in kept_rows]
        self.recorded: KeysValues | None = None
        self.residual_TD: Tensor | None = None
        self.trimmed = False
        self.sliding_windows: set[int] = set()
        self.num_layers = 0

    def take_up(self, k_TGK: Tensor, v_TGK: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the prefixes of a layer that are to be kept and put the cached ones in front.

        Returns:
            k_SGK, v_SGK: what the layer's queries attend to.
        """
        for prefix, (start, end) in zip(self.kept, self.kept_rows, strict=True):
            # Copies: a view would keep the whole pass alive in the cache.
            prefix.append((k_TGK[start:end].clone(), v_TGK[start:end].clone()))
        if self.recorded is not None:
            self.recorded.append((k_TGK, v_TGK))
        layer = self.num_layers
        self.num_layers += 1
        if not self.cached:
            return k_TGK, v_TGK
        cached_k, cached_v = self.cached[layer]
        return self._put_in_front(cached_k, k_TGK), self._put_in_front(cached_v, v_TGK)

    def _put_in_front(self, cached: Tensor, own: Tensor) -> Tensor:
        joined = torch.cat((cached, own))
        if self.front_rows_F is None:
            return joined
        return torch.cat((joined.index_select(0, self.front_rows_F), own))


def attend_segments(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    segment_pass: SegmentPass | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Run one layer's attention; shapes are transformers' ``1 x heads x tokens x head size``."""
    name = type(module).__name__
    if segment_pass is None:
        raise ModelError(f"{name}: the model is set up for packed passes; call it through a ranker")
    if getattr(module, "is_causal", True) is False or s_aux is not None:
        raise ModelError(f"{name}: is not plain causal attention and cannot run packed")
    if dropout:
        raise ModelError(f"{name}: attention_dropout should be 0 in packed passes, is {dropout}")
    if sliding_window is not None:
        segment_pass.sliding_windows.add(sliding_window)
    # Under an autocast the rotary embedding leaves queries and keys wider than values.
    q_THK, k_TGK, v_TGK = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    k_SGK, v_SGK = segment_pass.take_up(k_TGK, v_TGK)
    out_THK = segment_attention(
        q_THK,
        k_SGK,
        v_SGK,
        segment_pass.spans,
        scale=q_THK.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        window=sliding_window,
    )
    return out_THK[None], None


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def register_segment_attention() -> None:
    """Make the attention known to transformers under ``ATTENTION_NAME``; may be called again."""
    AttentionInterface.register(ATTENTION_NAME, attend_segments)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)
