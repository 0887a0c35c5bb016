"""Score rows become log-probabilities in FP32; logits over the vocabulary are never stored.

``label_logprobs`` touches the head's label rows only. ``vocabulary_logprobs`` normalises over the
whole vocabulary and also gives the most probable tokens, as OpenAI's clients expect.
"""

from collections.abc import Sequence

from torch import Tensor

from rankonce.errors import ShapeError
from rankonce.kernels.label_logprobs.reference import (
    VocabularyLogprobs,
    label_logprobs_reference,
    vocabulary_logprobs_streamed,
)

__all__ = ["VocabularyLogprobs", "label_logprobs", "vocabulary_logprobs"]


def label_logprobs(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    label_ids: Sequence[Sequence[int]],
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Log P(label) among the labels, computed in FP32 (FP64 for FP64 states).

    Args:
        hidden_CD: final hidden states of the score rows, any floating dtype.
        weight_VD: the head's weights.
        label_ids: for each of L labels the token ids whose probability it gathers.
        bias_V: the head's bias.
        softcap: bounds the logits as Gemma 2 does.

    Returns:
        label_logprobs_CL; every row's exponentials sum to 1.

    Raises:
        ShapeError: names what was expected and what came.
    """
    _check(hidden_CD, weight_VD, label_ids)
    return label_logprobs_reference(hidden_CD, weight_VD, label_ids, bias_V=bias_V, softcap=softcap)


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

    Arguments as in ``label_logprobs``. The vocabulary is read in slices with a running
    log-sum-exp (Milakov & Gimelshein 2018). No gradients.

    Raises:
        ShapeError: names what was expected and what came.
    """
    _check(hidden_CD, weight_VD, label_ids)
    return vocabulary_logprobs_streamed(
        hidden_CD, weight_VD, label_ids, num_top=num_top, bias_V=bias_V, softcap=softcap
    )


def _check(hidden_CD: Tensor, weight_VD: Tensor, label_ids: Sequence[Sequence[int]]) -> None:
    if hidden_CD.ndim != 2 or weight_VD.ndim != 2 or hidden_CD.shape[1] != weight_VD.shape[1]:
        raise ShapeError(
            f"hidden, weight: should be CD and VD, are {hidden_CD.shape} and {weight_VD.shape}"
        )
    ids = [token_id for forms in label_ids for token_id in forms]
    if not all(label_ids) or any(not 0 <= i < weight_VD.shape[0] for i in ids):
        raise ShapeError(
            f"label_ids: should hold ids below {weight_VD.shape[0]}, at least one a label, "
            f"hold {label_ids}"
        )
