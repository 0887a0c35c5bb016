"""Log-probabilities of score rows in plain PyTorch, for every device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Vocabulary rows a slice: 500 score rows make 16 MB of logits.
_SLICE = 8192


@dataclass(frozen=True, kw_only=True)
class VocabularyLogprobs:
    """Log-probabilities over the whole vocabulary.

    Attributes:
        labels_CL: log P of each label's tokens together.
        top_logprobs_CN, top_ids_CN: the N most probable tokens, best first.
    """

    labels_CL: Tensor
    top_logprobs_CN: Tensor
    top_ids_CN: Tensor


def label_logprobs_reference(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    label_ids: Sequence[Sequence[int]],
    *,
    bias_V: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """Normalise over the labels, touching their rows only; differentiable."""
    logits_CL = _label_logits(hidden_CD, weight_VD, label_ids, bias_V, softcap)
    return logits_CL.log_softmax(dim=-1)


@torch.no_grad()
def vocabulary_logprobs_streamed(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    label_ids: Sequence[Sequence[int]],
    *,
    num_top: int,
    bias_V: Tensor | None,
    softcap: float | None,
) -> VocabularyLogprobs:
    """Normalise over the vocabulary, slice by slice."""
    num_rows, num_tokens = hidden_CD.shape[0], weight_VD.shape[0]
    dtype = torch.promote_types(hidden_CD.dtype, torch.float32)
    device = hidden_CD.device
    lse_C = torch.full((num_rows,), -torch.inf, dtype=dtype, device=device)
    top_CN = torch.empty((num_rows, 0), dtype=dtype, device=device)
    ids_CN = torch.empty((num_rows, 0), dtype=torch.long, device=device)
    for start in range(0, num_tokens, _SLICE):
        end = min(start + _SLICE, num_tokens)
        logits = _logits(
            hidden_CD, weight_VD[start:end], None if bias_V is None else bias_V[start:end], softcap
        )
        # log_softmax gives the log-sum-exp some ten times faster than logsumexp does on a CPU.
        slice_lse = logits[:, 0] - logits.log_softmax(dim=-1)[:, 0]
        lse_C = torch.logaddexp(lse_C, slice_lse)
        if num_top:
            slice_ids = torch.arange(start, end, device=device).expand(num_rows, -1)
            merged = torch.cat((top_CN, logits), dim=1)
            merged_ids = torch.cat((ids_CN, slice_ids), dim=1)
            top_CN, places = merged.topk(min(num_top, merged.shape[1]), dim=1)
            ids_CN = merged_ids.gather(1, places)
    labels_CL = _label_logits(hidden_CD, weight_VD, label_ids, bias_V, softcap)
    return VocabularyLogprobs(
        labels_CL=labels_CL - lse_C[:, None],
        top_logprobs_CN=top_CN - lse_C[:, None],
        top_ids_CN=ids_CN,
    )


def _label_logits(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    label_ids: Sequence[Sequence[int]],
    bias_V: Tensor | None,
    softcap: float | None,
) -> Tensor:
    ids = torch.tensor([i for forms in label_ids for i in forms], device=hidden_CD.device)
    bias = None if bias_V is None else bias_V[ids]
    logits = _logits(hidden_CD, weight_VD[ids], bias, softcap)
    if len(ids) == len(label_ids):
        return logits
    forms = logits.split([len(forms) for forms in label_ids], dim=1)
    return torch.stack([form.logsumexp(dim=1) for form in forms], dim=1)


def _logits(
    hidden_CD: Tensor, weight_ND: Tensor, bias_N: Tensor | None, softcap: float | None
) -> Tensor:
    # Both operands are widened before the product: rounding its result makes ranks collapse.
    dtype = torch.promote_types(hidden_CD.dtype, torch.float32)
    logits = hidden_CD.to(dtype) @ weight_ND.to(dtype).T
    if bias_N is not None:
        logits = logits + bias_N.to(dtype)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
