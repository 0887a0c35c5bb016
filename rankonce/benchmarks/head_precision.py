"""What rounding the head's logits to 16 bits does to an order of hundreds of candidates.

A body in FP32 gives the hidden states once; heads that differ by their rounding alone score them.
``levels`` add the same number to the logits of all labels, which changes no probability: large
models' labels lie at 15 to 30, where neighbouring numbers of bf16 are 0.06 to 0.125 apart.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rankonce.benchmarks.precision_arms import forward_requests, head_logprobs
from rankonce.environment import describe_environment
from rankonce.errors import DataError, MissingDependencyError
from rankonce.evaluation.agreement import Floats, measure_arm
from rankonce.evaluation.labelled_requests import (
    LabelledRequest,
    check_requests,
    describe_requests,
    read_requests,
)
from rankonce.evaluation.metrics import without_nan
from rankonce.layout import TokenizedRequest, plan_passes
from rankonce.model.loading import LoadedModel, load_model, prepare_model
from rankonce.model.sizes import build_model

_HEADS = ("bf16", "fp16")
_REFERENCE = "fp32"
_MAX_TOKENS_PER_PASS = 4096


@dataclass(frozen=True, kw_only=True)
class HeadPrecisionOptions:
    """What is compared.

    Attributes:
        requests: JSON lines as ``rankonce score`` takes them, or tokenised; their labels are not
            used.
        model: a checkpoint.
        sizes: names of ``SIZES``, with random weights.
        num_requests: prefixes, of the first of ``requests``.
        num_candidates: different candidates of each, drawn from all of ``requests``.
        levels: what is added to the labels' logits.
    """

    requests: Path
    model: Path = Path(__file__).parents[1] / "embedded"
    sizes: tuple[str, ...] = ("10m",)
    num_requests: int = 20
    num_candidates: int = 300
    levels: tuple[float, ...] = (0.0, 2.0, 4.0, 8.0, 16.0, 32.0)


def measure_heads(
    options: HeadPrecisionOptions, *, on_pass: Callable[[str, int, int], None] = lambda *_: None
) -> dict[str, Any]:
    """Score the requests by every head and compare with the FP32 head.

    Args:
        on_pass: called after every pass with the model, the passes that are done and their number.

    Raises:
        RankOnceError: the data, a size or a number cannot be used.
    """
    model = load_model(options.model, device="cpu", precision="fp32")
    requests = make_requests(options, model)
    measured = {"embedded": _measure(model, requests, options.levels, on_pass, "embedded")}
    for size in options.sizes:
        network = build_model(size, seed=0, vocabulary_size=len(model.head.weight_VD)).eval()
        random = prepare_model(network, model.tokenizer, name=f"{size} random")
        measured[random.name] = _measure(random, requests, options.levels, on_pass, random.name)
    return {
        "command": f"rankonce bench head-precision {options.requests.name} "
        + "".join(f"--size {size} " for size in options.sizes)
        + f"--requests {options.num_requests} --candidates {options.num_candidates}",
        "requests": {
            "source": options.requests.name,
            **describe_requests(requests),
        },
        "models": without_nan(measured),
        "environment": describe_environment(),
    }


def make_requests(options: HeadPrecisionOptions, model: LoadedModel) -> list[LabelledRequest]:
    """Give the first requests candidates from all of them.

    Raises:
        DataError: there are fewer requests or candidates than asked for.
    """
    given = read_requests(options.requests, model)
    check_requests(given, model)
    texts = sorted({segment for one in given for segment in one.tokens.segment_ids})
    for name, asked, most in (
        ("requests", options.num_requests, len(given)),
        ("candidates", options.num_candidates, len(texts)),
    ):
        if not 1 <= asked <= most:
            raise DataError(f"{name}: should be 1 to {most}, is {asked}")
    generator = np.random.default_rng(0)
    requests = []
    for one in given[: options.num_requests]:
        drawn = generator.choice(len(texts), options.num_candidates, replace=False)
        tokens = TokenizedRequest(
            prefix_ids=one.tokens.prefix_ids,
            segment_ids=tuple(texts[place] for place in drawn.tolist()),
            label_ids=one.tokens.label_ids,
        )
        requests.append(LabelledRequest(tokens=tokens, labels=(None,) * len(drawn)))
    return requests


def _measure(
    model: LoadedModel,
    requests: Sequence[LabelledRequest],
    levels: Sequence[float],
    on_pass: Callable[[str, int, int], None],
    name: str,
) -> dict[str, Any]:
    tokens = [one.tokens for one in requests]
    passes = plan_passes(tokens, [False] * len(tokens), max_tokens_per_pass=_MAX_TOKENS_PER_PASS)
    heads: dict[str, tuple[str, float]] = {_REFERENCE: (_REFERENCE, 0.0)}
    heads |= {f"{kind} at {level:g}": (kind, level) for kind in _HEADS for level in levels}
    pieces: dict[str, list[list[Floats]]] = {arm: [[] for _ in requests] for arm in heads}
    num_done, largest_logit = 0, 0.0

    def done() -> None:
        nonlocal num_done
        num_done += 1
        on_pass(name, num_done, len(passes))

    for part, hidden_CD in forward_requests(model, tokens, passes, done):
        label_ids = tokens[part.request].label_ids
        weight_ND = model.head.weight_VD[[i for forms in label_ids for i in forms]].float()
        with torch.inference_mode():
            largest_logit = max(largest_logit, float((hidden_CD @ weight_ND.T).abs().max()))
        for arm, (kind, level) in heads.items():
            logprobs_CL = head_logprobs(model.head, kind, hidden_CD, label_ids, shift=level)
            pieces[arm][part.request].append(logprobs_CL.double().numpy())
    scores = {arm: [np.concatenate(parts) for parts in found] for arm, found in pieces.items()}
    arms = []
    for arm, (kind, level) in heads.items():
        figures = measure_arm(arm, scores, requests, references=(_REFERENCE,))
        compared = figures["against"].get(_REFERENCE, {})
        names = ("top_agreement", "top_agreement_error", "kendall_tau", "max_delta")
        arms.append(
            {
                "head": kind,
                "level": level,
                "distinct_score_ratio": figures["distinct_score_ratio"],
                **{name: compared[name] for name in names if name in compared},
            }
        )
    return {
        "num_parameters": sum(weight.numel() for weight in model.network.parameters()),
        "largest_label_logit": largest_logit,
        "heads": arms,
    }


def describe_heads(record: Mapping[str, Any]) -> str:
    """Return the record as a table in Markdown; a level is added to the labels' logits."""
    lines = [
        "| model | head | level | distinct | top agreement | tau-b |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for model, one in record["models"].items():
        for head in one["heads"]:
            compared = (
                f"{head['top_agreement']:.3f} ± {head['top_agreement_error']:.3f} "
                f"| {head['kendall_tau']:.4f}"
                if head["head"] != _REFERENCE
                else "– | –"
            )
            lines.append(
                f"| {model} | {head['head']} | {head['level']:g} "
                f"| {head['distinct_score_ratio']:.4f} | {compared} |"
            )
    return "\n".join(lines)


def plot_heads(path: Path, record: Mapping[str, Any]) -> None:
    """Draw distinct scores and agreement with the FP32 head by the labels' level.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("matplotlib", extra="bench") from error
    figure = Figure(figsize=(11, 4), layout="constrained")
    titles = {
        "distinct_score_ratio": "different scores over candidates",
        "top_agreement": "same first candidate as the FP32 head",
        "kendall_tau": "Kendall's tau-b with the FP32 head",
    }
    for axes, (name, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for model, style in zip(record["models"], ("-", "--", ":", "-."), strict=False):
            for kind, colour in zip(_HEADS, ("tab:red", "tab:blue"), strict=True):
                heads = [one for one in record["models"][model]["heads"] if one["head"] == kind]
                axes.plot(
                    [one["level"] for one in heads],
                    [one[name] for one in heads],
                    color=colour,
                    linestyle=style,
                    marker="o",
                    markersize=3,
                    label=f"{kind} head, {model}",
                )
        axes.set(title=title, xlabel="added to the labels' logits", ylim=(-0.03, 1.03))
    figure.axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
