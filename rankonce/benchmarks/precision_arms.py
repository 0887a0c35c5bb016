"""Arms: ways to compute one model's body and head, and the scores that each gives.

FP8 runs over bf16 activations as on a GPU; on a CPU the same quantised numbers are multiplied in
fp32. ``fp8-over-fp32`` is what ``load_model`` gives for FP8 on a CPU. The heads in bf16 and FP8 are
there to show what rounded logits do; no ranker of ours runs them. The arm at 18 adds 18 to the
labels' logits, where those of large models lie and a step of bf16 is 0.125; unrounded, that changes
no probability.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from rankonce.errors import DataError, ModelError, NumericsError
from rankonce.evaluation.agreement import REFERENCES, Floats
from rankonce.kernels.fp8_linear import fp8_linear, quantize_rows
from rankonce.layout import PassPart, TokenizedRequest, plan_passes
from rankonce.model.acceleration import accelerate_model
from rankonce.model.head import Head, head_of
from rankonce.model.loading import LoadedModel
from rankonce.model.packing import forward_pass, pack_pass
from rankonce.model.prefix_cache import KeysValues

_FP8_MULTIPLE = 16
_ROUNDED = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """How body and head are computed.

    Attributes:
        activations: ``fp32`` or ``bf16``: the dtype of all that is not quantised.
        fp8: quantise the linear layers but those that ``keep`` names.
        head: ``fp32`` (ours), or ``bf16``, ``fp16`` or ``fp8``: logits rounded to 16 bits before
            log-softmax, in the last to bf16 from a quantised hidden state and weight.
        shift: added to the labels' logits before they are rounded.
    """

    activations: str
    fp8: bool = False
    keep: tuple[str, ...] = ()
    head: str = "fp32"
    shift: float = 0.0


ARMS = {
    "fp32": Arm(activations="fp32"),
    "bf16": Arm(activations="bf16"),
    "bf16+bf16-head": Arm(activations="bf16", head="bf16"),
    "fp8": Arm(activations="bf16", fp8=True),
    "fp8+fp8-head": Arm(activations="bf16", fp8=True, head="fp8"),
    "fp8+fp8-head-at-18": Arm(activations="bf16", fp8=True, head="fp8", shift=18.0),
    "fp8-over-fp32": Arm(activations="fp32", fp8=True),
}


def choose_arms(names: Sequence[str], keep: Sequence[str] = ()) -> dict[str, Arm]:
    """Return arms by their names, the references first, and one for each of ``keep``.

    Raises:
        DataError: there is no arm of this name, or ``keep`` has an empty pattern.
    """
    for name in names:
        if name not in ARMS:
            raise DataError(f"arm: should be one of {', '.join(ARMS)}, is {name!r}")
    arms = {name: ARMS[name] for name in ARMS if name in (*names, *REFERENCES)}
    for patterns in keep:
        kept = tuple(pattern.strip() for pattern in patterns.split(","))
        if not all(kept):
            raise DataError(f"keep: should be patterns with commas between, is {patterns!r}")
        arms[f"fp8 keeping {', '.join(kept)}"] = replace(ARMS["fp8"], keep=kept)
    return arms


def check_patterns(arms: Mapping[str, Arm], model: LoadedModel) -> None:
    """Refuse patterns before an arm's turn comes, which may be after many minutes.

    Raises:
        ModelError: names the pattern that no layer has.
    """
    names = [name for name, _ in model.network.named_modules()]
    for pattern in {pattern for arm in arms.values() for pattern in arm.keep}:
        if not any(fnmatch(name, pattern) for name in names):
            raise ModelError(f"keep: {pattern!r} names no layer of the model")


def score_arms(
    load: Callable[[str], LoadedModel],
    arms: Mapping[str, Arm],
    requests: Sequence[TokenizedRequest],
    *,
    max_tokens_per_pass: int = 16_384,
) -> tuple[dict[str, list[Floats]], float]:
    """Score requests in every arm; arms that differ by their head share a body.

    Args:
        load: gives the model with its weights in ``fp32`` or ``bf16``.

    Returns:
        Log P(label), C x L a request, by arm, and the largest |logit| of a label.

    Raises:
        NumericsError: names the arm and the request whose score is not finite.
    """
    bodies: dict[Arm, dict[str, Arm]] = {}
    for name, arm in sorted(arms.items(), key=lambda entry: entry[1].activations):
        bodies.setdefault(replace(arm, head="fp32", shift=0.0), {})[name] = arm
    passes = plan_passes(requests, [False] * len(requests), max_tokens_per_pass=max_tokens_per_pass)
    scores: dict[str, list[Floats]] = {}
    largest_logit = 0.0
    loaded: tuple[str, LoadedModel] | None = None
    with tqdm(total=len(bodies) * len(passes), unit="pass", disable=None) as bar:
        for body, heads in bodies.items():
            bar.set_description(next(iter(heads)))
            if loaded is None or loaded[0] != body.activations:
                loaded = (body.activations, load(body.activations))
            model = loaded[1]
            model.acceleration.undo()
            acceleration = accelerate_model(
                model.network, "fp8" if body.fp8 else None, keep=body.keep
            )
            pieces: dict[str, list[list[Tensor]]] = {name: [[] for _ in requests] for name in heads}
            for part, hidden_CD in forward_requests(model, requests, passes, bar.update):
                label_ids = requests[part.request].label_ids
                head = head_of(model.network)
                largest_logit = max(largest_logit, _largest(head, hidden_CD, label_ids))
                for name, arm in heads.items():
                    logprobs_CL = head_logprobs(
                        head, arm.head, hidden_CD, label_ids, shift=arm.shift
                    )
                    pieces[name][part.request].append(logprobs_CL.double().cpu())
            acceleration.undo()
            for name, by_request in pieces.items():
                scores[name] = [torch.cat(parts).numpy() for parts in by_request]
                _check_finite(name, scores[name])
    return scores, largest_logit


@torch.inference_mode()
def head_logprobs(
    head: Head,
    kind: str,
    hidden_CD: Tensor,
    label_ids: Sequence[Sequence[int]],
    *,
    shift: float = 0.0,
) -> Tensor:
    """Return log P(label) among the labels, C x L, by a head of an arm's kind."""
    if kind == "fp32":
        return head.label_logprobs(hidden_CD, label_ids)
    ids = [token_id for forms in label_ids for token_id in forms]
    logits_CN = _label_logits(head, kind, hidden_CD, ids, shift)
    if head.softcap is not None:
        logits_CN = head.softcap * torch.tanh(logits_CN / head.softcap)
    by_label = logits_CN.float().split([len(forms) for forms in label_ids], dim=1)
    return torch.stack([part.logsumexp(dim=1) for part in by_label], dim=1).log_softmax(dim=1)


def _label_logits(
    head: Head, kind: str, hidden_CD: Tensor, ids: Sequence[int], shift: float = 0.0
) -> Tensor:
    """Return the labels' logits, C x N: rounded as the kind says, or not for ``fp32``."""
    weight_ND = head.weight_VD[list(ids)]
    bias_N = weight_ND.new_full((len(ids),), shift)
    if head.bias_V is not None:
        bias_N = bias_N + head.bias_V[list(ids)]
    if kind == "fp8":
        # Every row has a scale of its own: the labels' rows alone give what the whole head would.
        padding = -len(ids) % _FP8_MULTIPLE
        logits_CN = fp8_linear(
            quantize_rows(hidden_CD.contiguous()),
            quantize_rows(functional.pad(weight_ND, (0, 0, 0, padding))),
            bias_N=functional.pad(bias_N, (0, padding)),
            out_dtype=torch.bfloat16,
        )
        return logits_CN[:, : len(ids)]
    dtype = _ROUNDED.get(kind, torch.float32)
    hidden_CD, weight_ND = hidden_CD.to(dtype), weight_ND.to(dtype)
    # The sum is kept in FP32 until it is rounded, as 16-bit products keep it.
    return (hidden_CD.float() @ weight_ND.float().T + bias_N.float()).to(dtype)


def _largest(head: Head, hidden_CD: Tensor, label_ids: Sequence[Sequence[int]]) -> float:
    ids = [i for forms in label_ids for i in forms]
    with torch.inference_mode():
        return float(_label_logits(head, "fp32", hidden_CD, ids).abs().max())


@torch.inference_mode()
def forward_requests(
    model: LoadedModel,
    requests: Sequence[TokenizedRequest],
    passes: Sequence[Sequence[PassPart]],
    done: Callable[[], Any],
) -> Iterator[tuple[PassPart, Tensor]]:
    """Run the passes; a request that is cut keeps its prefix until its last part is done."""
    prefixes: dict[int, KeysValues] = {}
    for number, parts in enumerate(passes):
        following = passes[number + 1] if number + 1 < len(passes) else ()
        going_on = {part.request for part in following if part.cached}
        batch = pack_pass(
            parts,
            requests,
            prefixes,
            keep_prefixes=bool(going_on),
            device=model.device,
            table_keys=model.table_keys,
        )
        hidden_CD = forward_pass(model.network, batch)
        prefixes |= zip(batch.kept_requests, batch.segment_pass.kept, strict=True)
        prefixes = {index: kept for index, kept in prefixes.items() if index in going_on}
        sizes = [part.last - part.first for part in parts]
        yield from zip(parts, hidden_CD.split(sizes), strict=True)
        done()


def _check_finite(name: str, scores: Sequence[Floats]) -> None:
    for number, logprobs_CL in enumerate(scores, start=1):
        if not np.isfinite(logprobs_CL).all():
            raise NumericsError(
                f"arm {name}, request {number}: the model gave log-probabilities that are not "
                "finite; its weights or its precision are at fault"
            )
