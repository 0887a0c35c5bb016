"""Gradients of the log-probabilities: they recompute logits instead of keeping them.

With g the gradient of label l's log-probability, the logit of token v gets
``P(v | l) * g`` from every label that v is a form of, less ``P(v) * sum(g)``.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankonce.kernels.label_logprobs.forms import LabelForms
from rankonce.kernels.label_logprobs.products import product

# Rows and weights, the labels, bias_V and softcap; results have no gradients.
LabelsForward: TypeAlias = Callable[
    [Tensor, Tensor, LabelForms, Tensor | None, float | None], Tensor
]
VocabularyForward: TypeAlias = Callable[
    [Tensor, Tensor, LabelForms, Tensor | None, float | None], tuple[Tensor, Tensor]
]
Gradients: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]

# Logits of a slice: 64 MB in FP32.
_MAX_LOGITS = 2**24
_MAX_SLICE, _MIN_SLICE = 8192, 256


def slices(num_rows: int, num_tokens: int) -> Iterator[slice]:
    """Cut a vocabulary so that the logits of one slice stay small for any number of rows."""
    size = max(_MIN_SLICE, min(_MAX_SLICE, _MAX_LOGITS // max(1, num_rows)))
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


def logits_of(
    hidden_CD: Tensor, weight_ND: Tensor, bias_N: Tensor | None, softcap: float | None
) -> Tensor:
    """Return the logits of rows in FP32, or FP64 where an operand is FP64."""
    logits_CN = product(hidden_CD, weight_ND.T)
    if bias_N is not None:
        logits_CN = logits_CN + bias_N.to(logits_CN.dtype)
    return logits_CN if softcap is None else softcap * torch.tanh(logits_CN / softcap)


def sum_forms(logits_CN: Tensor, forms: LabelForms) -> Tensor:
    """Add up the probabilities of each label's forms, as logits_CL."""
    if len(forms.ids) == forms.num_labels:
        return logits_CN
    sizes = [forms.labels.count(label) for label in range(forms.num_labels)]
    parts = logits_CN.split(sizes, dim=1)
    return torch.stack([part.logsumexp(dim=1) for part in parts], dim=1)


class OverLabels(torch.autograd.Function):
    """Log-probabilities among the labels, by any forward function."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_CD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        forms: LabelForms,
        softcap: float | None,
        forward: LabelsForward,
    ) -> Tensor:
        """Return label_logprobs_CL."""
        ctx.save_for_backward(hidden_CD, weight_VD, bias_V)
        ctx.forms, ctx.softcap = forms, softcap
        return forward(hidden_CD, weight_VD, forms, bias_V, softcap)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_CL: Tensor) -> Gradients:
        """Return gradients that are zero outside the labels' rows of the head."""
        hidden_CD, weight_VD, bias_V = ctx.saved_tensors
        forms, softcap = ctx.forms, ctx.softcap
        weight_ND, logits_CN = _logits_of_forms(hidden_CD, weight_VD, bias_V, forms, softcap)
        grad_CN = _grad_of_forms(grad_CL, logits_CN, forms)
        grad_CN -= logits_CN.softmax(dim=1) * grad_CL.sum(dim=1, keepdim=True)
        grad_CN = _through_softcap(grad_CN, logits_CN, softcap)

        grad_hidden = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_hidden = product(grad_CN, weight_ND).to(hidden_CD.dtype)
        if ctx.needs_input_grad[1]:
            rows_ND = product(grad_CN.T, hidden_CD)
            grad_weight = _scatter(rows_ND, forms, weight_VD)
        if bias_V is not None and ctx.needs_input_grad[2]:
            grad_bias = _scatter(grad_CN.sum(dim=0), forms, bias_V)
        return grad_hidden, grad_weight, grad_bias, None, None, None


class OverVocabulary(torch.autograd.Function):
    """Log-probabilities in the whole vocabulary, by any forward function."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_CD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        forms: LabelForms,
        softcap: float | None,
        forward: VocabularyForward,
    ) -> tuple[Tensor, Tensor]:
        """Return label_logprobs_CL and the log-sum-exp lse_C, which has no gradient."""
        labels_CL, lse_C = forward(hidden_CD, weight_VD, forms, bias_V, softcap)
        ctx.save_for_backward(hidden_CD, weight_VD, bias_V, lse_C)
        ctx.mark_non_differentiable(lse_C)
        ctx.forms, ctx.softcap = forms, softcap
        return labels_CL, lse_C

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_CL: Tensor, _: Tensor) -> Gradients:
        """Recompute the logits slice by slice and add up what each slice gives."""
        hidden_CD, weight_VD, bias_V, lse_C = ctx.saved_tensors
        forms, softcap = ctx.forms, ctx.softcap
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden_CD, dtype=lse_C.dtype) if needs_hidden else None
        grad_weight = torch.empty_like(weight_VD) if needs_weight else None
        grad_bias = torch.empty_like(bias_V) if bias_V is not None and needs_bias else None
        _, logits_CN = _logits_of_forms(hidden_CD, weight_VD, bias_V, forms, softcap)
        forms_CN = _grad_of_forms(grad_CL, logits_CN, forms)
        mass_C1 = grad_CL.sum(dim=1, keepdim=True)
        for part in slices(len(hidden_CD), len(weight_VD)):
            weight_ND = weight_VD[part]
            bias_N = None if bias_V is None else bias_V[part]
            logits_CN = logits_of(hidden_CD, weight_ND, bias_N, softcap)
            if logits_CN.shape[1] == len(weight_VD):
                # The forward's own products round otherwise. With the sum of the very logits that
                # are exponentiated here, most of a likely token's error cancels; over several
                # slices that would take their products twice.
                lse_C = logits_CN.logsumexp(dim=1)
            grad_CN = (logits_CN - lse_C[:, None]).exp_().mul_(-mass_C1)
            for form, token_id in enumerate(forms.ids):
                if part.start <= token_id < part.stop:
                    grad_CN[:, token_id - part.start] += forms_CN[:, form]
            grad_CN = _through_softcap(grad_CN, logits_CN, softcap)
            if grad_hidden is not None:
                grad_hidden += product(grad_CN, weight_ND)
            if grad_weight is not None:
                grad_weight[part] = product(grad_CN.T, hidden_CD)
            if grad_bias is not None:
                grad_bias[part] = grad_CN.sum(dim=0)
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(hidden_CD.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _logits_of_forms(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    forms: LabelForms,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    weight_ND = weight_VD[forms.ids_N]
    bias_N = None if bias_V is None else bias_V[forms.ids_N]
    return weight_ND, logits_of(hidden_CD, weight_ND, bias_N, softcap)


def _grad_of_forms(grad_CL: Tensor, logits_CN: Tensor, forms: LabelForms) -> Tensor:
    labels_CL = sum_forms(logits_CN, forms)
    among_CN = (logits_CN - labels_CL[:, forms.labels_N]).exp()
    return among_CN * grad_CL[:, forms.labels_N]


def _through_softcap(grad_CN: Tensor, logits_CN: Tensor, softcap: float | None) -> Tensor:
    return grad_CN if softcap is None else grad_CN * (1 - (logits_CN / softcap) ** 2)


def _scatter(rows: Tensor, forms: LabelForms, like: Tensor) -> Tensor:
    # Ids that come twice are added up in a fixed order, which index_add does not promise.
    return torch.zeros_like(like).index_put_((forms.ids_N,), rows.to(like.dtype), accumulate=True)
