"""Log-probabilities of score rows in plain PyTorch, for every device."""

import torch
from torch import Tensor

from rankonce.kernels.label_logprobs.forms import LabelForms
from rankonce.kernels.label_logprobs.gradients import logits_of, slices, sum_forms
from rankonce.kernels.label_logprobs.products import wide_dtype


def label_logprobs_reference(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    forms: LabelForms,
    bias_V: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """Normalise over the labels, touching their rows only; differentiable."""
    return _label_logits(hidden_CD, weight_VD, forms, bias_V, softcap).log_softmax(dim=-1)


@torch.no_grad()
def vocabulary_logprobs_reference(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    forms: LabelForms,
    bias_V: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Normalise over the vocabulary, slice by slice, without gradients.

    Returns:
        label_logprobs_CL and the log-sum-exp lse_C of all logits.
    """
    num_rows = len(hidden_CD)
    dtype = wide_dtype(hidden_CD, weight_VD)
    largest_C = torch.full((num_rows,), -torch.inf, dtype=dtype, device=hidden_CD.device)
    total_C = torch.zeros_like(largest_C)
    for part in slices(num_rows, len(weight_VD)):
        bias_N = None if bias_V is None else bias_V[part]
        logits_CN = logits_of(hidden_CD, weight_VD[part], bias_N, softcap)
        new_largest_C = torch.maximum(largest_C, logits_CN.amax(dim=1))
        # A bias may rule out every token so far: the maximum of nothing must not become NaN.
        base_C = new_largest_C.nan_to_num(neginf=0.0)
        total_C = total_C * (largest_C - base_C).exp()
        total_C += (logits_CN - base_C[:, None]).exp_().sum(dim=1)
        largest_C = new_largest_C
    # Maxima first: a sum near 18 would lose the last bits of the logarithm.
    logits_CL = _label_logits(hidden_CD, weight_VD, forms, bias_V, softcap)
    log_total_C = total_C.log()
    return logits_CL - largest_C[:, None] - log_total_C[:, None], largest_C + log_total_C


@torch.no_grad()
def top_tokens(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    lse_C: Tensor,
    *,
    num_top: int,
    bias_V: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Find the most probable tokens, slice by slice, without gradients.

    Returns:
        top_logprobs_CN and top_ids_CN, best first; N is ``num_top``, or V if that is less.
    """
    num_rows = len(hidden_CD)
    top_CN = lse_C.new_empty((num_rows, 0))
    ids_CN = torch.empty((num_rows, 0), dtype=torch.long, device=lse_C.device)
    for part in slices(num_rows, len(weight_VD)) if num_top else ():
        bias_N = None if bias_V is None else bias_V[part]
        logits_CN = logits_of(hidden_CD, weight_VD[part], bias_N, softcap)
        best_CN, places_CN = logits_CN.topk(min(num_top, logits_CN.shape[1]), dim=1)
        merged, merged_ids = (
            torch.cat(pair, dim=1) for pair in ((top_CN, best_CN), (ids_CN, places_CN + part.start))
        )
        top_CN, order_CN = merged.topk(min(num_top, merged.shape[1]), dim=1)
        ids_CN = merged_ids.gather(1, order_CN)
    return top_CN - lse_C[:, None], ids_CN


def _label_logits(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    forms: LabelForms,
    bias_V: Tensor | None,
    softcap: float | None,
) -> Tensor:
    bias_N = None if bias_V is None else bias_V[forms.ids_N]
    logits_CN = logits_of(hidden_CD, weight_VD[forms.ids_N], bias_N, softcap)
    return sum_forms(logits_CN, forms)
