"""Segment attention, span by span, as the definition reads."""

import torch
from torch import Tensor

from rankonce.kernels.segment_attention.spans import SegmentSpans


def segment_attention_reference(
    q_THK: Tensor,
    k_SGK: Tensor,
    v_SGK: Tensor,
    spans: SegmentSpans,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Compute every span by itself, in fp32 (fp64 for fp64); differentiable by autograd."""
    dtype = torch.promote_types(q_THK.dtype, torch.float32)
    device = q_THK.device
    num_shared = q_THK.shape[1] // k_SGK.shape[1]
    outputs = []
    for query_start, query_end, key_start, key_end, prefix_start, prefix_end in spans.rows():
        rows = torch.cat(
            (
                torch.arange(prefix_start, prefix_end, device=device),
                torch.arange(key_start, key_end, device=device),
            )
        )
        q_HLK = q_THK[query_start:query_end].to(dtype).transpose(0, 1)
        k_HRK = k_SGK[rows].to(dtype).repeat_interleave(num_shared, dim=1).transpose(0, 1)
        v_HRK = v_SGK[rows].to(dtype).repeat_interleave(num_shared, dim=1).transpose(0, 1)
        logits_HLR = q_HLK @ k_HRK.transpose(1, 2) * scale
        if softcap is not None:
            logits_HLR = softcap * torch.tanh(logits_HLR / softcap)
        # Places in the span's prompt: the queries are its last tokens.
        places_R = torch.arange(len(rows), device=device)
        places_L = places_R[len(rows) - (query_end - query_start) :, None]
        seen_LR = places_R <= places_L
        if window is not None:
            seen_LR = seen_LR & (places_R > places_L - window)
        weights_HLR = logits_HLR.masked_fill(~seen_LR, -torch.inf).softmax(dim=-1)
        outputs.append((weights_HLR @ v_HRK).transpose(0, 1))
    # The spans cover the queries in order, so their outputs are the rows of the result.
    return torch.cat(outputs).to(q_THK.dtype)
