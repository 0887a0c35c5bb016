"""Score rows become log-probabilities in FP32; logits over the vocabulary are never stored.

``label_logprobs`` touches the head's label rows only. ``vocabulary_logprobs`` normalises over the
whole vocabulary and also gives the most probable tokens, as OpenAI's clients expect. Both are
differentiable on every path: Triton on a GPU, the reference elsewhere. The path taken is logged
once.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from rankonce.errors import ShapeError
from rankonce.kernels.label_logprobs.forms import MAX_FORMS, place_forms
from rankonce.kernels.label_logprobs.gradients import OverLabels, OverVocabulary
from rankonce.kernels.label_logprobs.reference import (
    label_logprobs_reference,
    top_tokens,
    vocabulary_logprobs_reference,
)

__all__ = ["VocabularyLogprobs", "label_logprobs", "vocabulary_logprobs"]

logger = logging.getLogger(__name__)

_TRITON_DTYPES = {torch.bfloat16, torch.float16, torch.float32}


@dataclass(frozen=True, kw_only=True)
class VocabularyLogprobs:
    """Log-probabilities over the whole vocabulary.

    Attributes:
        labels_CL: log P of each label's tokens together.
        top_logprobs_CN, top_ids_CN: the N most probable tokens, best first, without gradients.
    """

    labels_CL: Tensor
    top_logprobs_CN: Tensor
    top_ids_CN: Tensor


def label_logprobs(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    label_ids: Sequence[Sequence[int]],
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Log P(label) among the labels, computed in FP32 (FP64 where an operand is FP64).

    Differentiable once in ``hidden_CD``, ``weight_VD`` and ``bias_V``; the gradients of the last
    two are dense tensors, zero outside the labels' rows.

    Args:
        hidden_CD: final hidden states of the score rows, any floating dtype.
        weight_VD: the head's weights, any floating dtype.
        label_ids: for each of L labels the token ids whose probability it gathers.
        bias_V: the head's bias.
        softcap: bounds the logits as Gemma 2 does.

    Returns:
        label_logprobs_CL; every row's exponentials sum to 1.

    Raises:
        ShapeError: names what was expected and what came.
    """
    _check(hidden_CD, weight_VD, label_ids, bias_V)
    forms = place_forms(label_ids, hidden_CD.device)
    forward = label_logprobs_reference
    if _takes_triton(hidden_CD, weight_VD, bias_V, len(forms.ids)):
        from rankonce.kernels.label_logprobs.triton import label_logprobs_triton as forward
    logprobs_CL: Tensor = OverLabels.apply(  # type: ignore[no-untyped-call]
        hidden_CD, weight_VD, bias_V, forms, softcap, forward
    )
    return logprobs_CL


def vocabulary_logprobs(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    label_ids: Sequence[Sequence[int]],
    *,
    num_top: int = 0,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
) -> VocabularyLogprobs:
    """Log P(label) in the whole vocabulary and the ``num_top`` most probable tokens, in FP32.

    Arguments, errors and dtypes as in ``label_logprobs``. The vocabulary is read in slices with a
    running log-sum-exp (Milakov & Gimelshein 2018) and read again for the most probable tokens.
    ``labels_CL`` is differentiable once; the backward pass recomputes the logits in slices.
    """
    _check(hidden_CD, weight_VD, label_ids, bias_V)
    forms = place_forms(label_ids, hidden_CD.device)
    forward = vocabulary_logprobs_reference
    if _takes_triton(hidden_CD, weight_VD, bias_V, len(forms.ids)):
        from rankonce.kernels.label_logprobs.triton import vocabulary_logprobs_triton as forward
    labels_CL, lse_C = OverVocabulary.apply(  # type: ignore[no-untyped-call]
        hidden_CD, weight_VD, bias_V, forms, softcap, forward
    )
    top_logprobs_CN, top_ids_CN = top_tokens(
        hidden_CD, weight_VD, lse_C, num_top=num_top, bias_V=bias_V, softcap=softcap
    )
    return VocabularyLogprobs(
        labels_CL=labels_CL, top_logprobs_CN=top_logprobs_CN, top_ids_CN=top_ids_CN
    )


def _check(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    label_ids: Sequence[Sequence[int]],
    bias_V: Tensor | None,
) -> None:
    if hidden_CD.ndim != 2 or weight_VD.ndim != 2 or hidden_CD.shape[1] != weight_VD.shape[1]:
        raise ShapeError(
            f"hidden, weight: should be CD and VD, are {hidden_CD.shape} and {weight_VD.shape}"
        )
    if bias_V is not None and bias_V.shape != weight_VD.shape[:1]:
        raise ShapeError(f"bias: should be V = {weight_VD.shape[0]} numbers, is {bias_V.shape}")
    ids = [token_id for forms in label_ids for token_id in forms]
    if not label_ids or not all(label_ids) or any(not 0 <= i < weight_VD.shape[0] for i in ids):
        raise ShapeError(
            f"label_ids: should hold ids below {weight_VD.shape[0]}, at least one a label, "
            f"hold {label_ids}"
        )


def _takes_triton(
    hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, num_forms: int
) -> bool:
    operands = [hidden_CD, weight_VD, *([] if bias_V is None else [bias_V])]
    fits = (
        hidden_CD.is_cuda
        and all(operand.dtype in _TRITON_DTYPES for operand in operands)
        and num_forms <= MAX_FORMS
        and find_spec("triton") is not None
    )
    _log_path("triton" if fits else "reference")
    return fits


@cache
def _log_path(path: str) -> None:
    logger.info("label_logprobs runs on its %s path", path)
