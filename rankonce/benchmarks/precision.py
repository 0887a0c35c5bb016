"""One model in several precisions on the same requests: does its ranking survive?

    python -m rankonce.benchmarks.precision --ml-small ml-small/
    python -m rankonce.benchmarks.precision --tokens tokens.jsonl --device cuda

An arm is a way to compute the body and the head. FP8 runs over bf16 activations as on a GPU; on a
CPU the same quantised numbers are multiplied in fp32. ``fp8-over-fp32`` is what ``load_model``
gives for FP8 on a CPU. The heads in bf16 and FP8 are there to show what rounded logits do; no
ranker of ours runs them. A candidate's score is the log-odds of its request's first label.

Tokenised requests run where only PyTorch and transformers are installed. ``--save-tokens`` writes
them: JSON lines of ``prefix_ids``, ``segment_ids`` and ``label_ids``, and ``labels`` (1 for the
first label, 0 for another, null) where they are known.
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from rankonce.errors import DataError, ModelError, NumericsError, RankOnceError
from rankonce.evaluation.metrics import auc, ndcg_at_k
from rankonce.kernels.fp8_linear import fp8_linear, quantize_rows
from rankonce.layout import PassPart, TokenizedRequest, plan_passes
from rankonce.model.acceleration import accelerate_model
from rankonce.model.head import Head, head_of
from rankonce.model.loading import LoadedModel, load_model
from rankonce.model.packing import forward_pass, pack_pass
from rankonce.model.prefix_cache import KeysValues

Floats = NDArray[np.float64]

EMBEDDED_MODEL = Path(__file__).parents[1] / "embedded"
# What an arm must reach against bf16.
BARS = {"top_agreement": 0.99, "kendall_tau": 0.99, "distinct_score_ratio": 0.99}
REFERENCES = ("bf16", "fp32")
# Members whose held-out rows are fewer have next to nothing to rank.
_MIN_CANDIDATES = 10
_FP8_MULTIPLE = 16
# Pairs of candidates are compared in blocks of this many rows.
_PAIR_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class Arm:
    """How body and head are computed.

    Attributes:
        activations: ``fp32`` or ``bf16``: the dtype of all that is not quantised.
        fp8: quantise the linear layers but those that ``keep`` names.
        head: ``fp32`` (ours), or ``bf16`` or ``fp8``: logits rounded to bf16 before log-softmax,
            in the latter from a quantised hidden state and weight.
    """

    activations: str
    fp8: bool = False
    keep: tuple[str, ...] = ()
    head: str = "fp32"


ARMS = {
    "fp32": Arm(activations="fp32"),
    "bf16": Arm(activations="bf16"),
    "bf16+bf16-head": Arm(activations="bf16", head="bf16"),
    "fp8": Arm(activations="bf16", fp8=True),
    "fp8+fp8-head": Arm(activations="bf16", fp8=True, head="fp8"),
    "fp8-over-fp32": Arm(activations="fp32", fp8=True),
}


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions:
    """What is compared on what. Exactly one of requests, tokens and ml_small is given.

    Attributes:
        model: a checkpoint; the embedded ranker if ``None``.
        arms: names of ``ARMS``; bf16 and fp32 are always run.
        keep: for each an FP8 arm over bf16: patterns of linear layers that stay, with commas.
        requests: JSON lines as ``rankonce score`` takes them, ``labels`` beside if known.
        tokens: JSON lines of tokenised requests.
        ml_small: folder of MovieLens latest-small; the valid part of the recipe's split is scored.
        num_members, num_candidates: of ml-small at most; members are drawn by ``seed``.
        output: JSON; ``results/precision-<model>.json`` if ``None``.
        commit: where the checkout cannot say it.
    """

    model: str | None = None
    device: str | None = None
    arms: tuple[str, ...] = tuple(ARMS)
    keep: tuple[str, ...] = ()
    requests: Path | None = None
    tokens: Path | None = None
    ml_small: Path | None = None
    num_members: int = 300
    num_candidates: int = 50
    seed: int = 0
    save_tokens: Path | None = None
    output: Path | None = None
    max_tokens_per_pass: int = 16_384
    commit: str | None = None


@dataclass(frozen=True, kw_only=True)
class LabelledRequest:
    """A tokenised request and, where known, whether each candidate's label is the first one."""

    tokens: TokenizedRequest
    labels: tuple[int | None, ...]

    @property
    def num_texts(self) -> int:
        """Candidates with different tokens."""
        return len(set(self.tokens.segment_ids))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One arm against another, over requests with two different candidates at least.

    Attributes:
        top_agreement: NDCG@1 agreement: the share of requests in which the candidate that the arm
            puts first has the best score of the reference. Of candidates that tie for the arm's
            first place each counts its part; those that tie in the reference are equally right.
        top_agreement_error: its standard error over requests.
        ndcg_at_1: mean over requests of the reference's P(first label) of the arm's first
            candidate over the best one: what a disagreement costs.
        kendall_tau: mean over requests of tau-b; 0 where only the arm has all scores equal.
        max_delta, mean_delta: |difference of log P| in nats, over candidates and labels.
        calibration_delta: mean |difference of P(first label)| over candidates.
    """

    top_agreement: float
    top_agreement_error: float
    ndcg_at_1: float
    kendall_tau: float
    max_delta: float
    mean_delta: float
    calibration_delta: float


def run_precision(options: PrecisionOptions) -> int:
    """Measure every arm, write the record and print the tables.

    Returns:
        An exit status: 0, whatever bars were missed.

    Raises:
        RankOnceError: an option, a request or the checkpoint cannot be used.
    """
    from rankonce.benchmarks.command import describe

    arms = choose_arms(options.arms, options.keep)
    if options.max_tokens_per_pass < 1:
        raise DataError(f"max_tokens_per_pass: should be 1 or more, is {options.max_tokens_per_pass}")
    name = options.model or str(EMBEDDED_MODEL)

    def load(activations: str) -> LoadedModel:
        return load_model(name, device=options.device, precision=activations)

    model = load("fp32")
    requests, source = read_input(options, model)
    if options.save_tokens is not None:
        write_tokens(options.save_tokens, requests)
    scores, largest_logit = score_arms(
        load, arms, [one.tokens for one in requests], max_tokens_per_pass=options.max_tokens_per_pass
    )
    record = {
        "model": {**_describe_model(model, options.model), "largest_label_logit": largest_logit},
        "requests": {**source, **_describe_requests(requests)},
        "command": _command(options),
        "bars": BARS,
        "arms": [
            {"name": arm, **asdict(arms[arm]), **measure_arm(arm, scores, requests)} for arm in arms
        ],
        "environment": describe(str(model.device), commit=options.commit),
    }
    output = options.output or Path("results") / f"precision-{Path(name).name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_without_nan(record), indent=1, allow_nan=False)
    output.write_text(f"{text}\n", encoding="utf-8")
    print(render(record["arms"]))
    print(output)
    return 0


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


# ------------------------------------------------------------------ what comes in


def read_input(
    options: PrecisionOptions, model: LoadedModel
) -> tuple[list[LabelledRequest], dict[str, Any]]:
    """Read the requests and say where they come from.

    Raises:
        RankOnceError: none or several sources are given, or what they hold cannot be scored.
    """
    given = [x for x in (options.requests, options.tokens, options.ml_small) if x is not None]
    if len(given) != 1:
        raise DataError("requests, tokens, ml_small: exactly one should be given")
    source: dict[str, Any] = {"source": given[0].name}
    if options.tokens is not None:
        requests = read_tokens(options.tokens)
    elif options.requests is not None:
        requests = read_requests(options.requests, model)
    else:
        requests, fingerprint = _read_ml_small(given[0], options, model)
        source |= {"split": "valid", "seed": options.seed, "fingerprint": fingerprint}
    for number, one in enumerate(requests, start=1):
        try:
            model.check_ids(one.tokens)
        except ModelError as error:
            raise ModelError(f"request {number}: {error}") from error
    if all(one.num_texts < 2 for one in requests):
        raise DataError(f"{given[0]}: should hold a request with two different candidates")
    return requests, source


def read_tokens(path: Path) -> list[LabelledRequest]:
    """Read tokenised requests.

    Raises:
        DataError: names the line and the field.
    """
    return list(_each_line(path, _read_tokens_line))


def write_tokens(path: Path, requests: Iterable[LabelledRequest]) -> None:
    """Write tokenised requests as ``read_tokens`` takes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{_tokens_line(one)}\n" for one in requests)


def read_requests(path: Path, model: LoadedModel) -> list[LabelledRequest]:
    """Read requests, and their labels where they have any, and render them for a model.

    Raises:
        DataError: names the line and the field.
    """
    prepare = _preparation(model)

    def read(data: Any) -> LabelledRequest:
        labels = data.pop("labels", None) if isinstance(data, dict) else None
        return prepare(data, labels)

    return list(_each_line(path, read))


def _read_ml_small(
    folder: Path, options: PrecisionOptions, model: LoadedModel
) -> tuple[list[LabelledRequest], dict[str, str]]:
    """Make one request a member of the held-out rows, all seen from the first one's moment."""
    import polars as pl

    from rankonce.datasets.movielens import movie_examples, movie_rows
    from rankonce.training.recipes import ml_small

    if options.num_members < 1 or options.num_candidates < _MIN_CANDIDATES:
        raise DataError(
            f"members, candidates: should be at least 1 and {_MIN_CANDIDATES}, are "
            f"{options.num_members} and {options.num_candidates}"
        )
    recipe = ml_small()
    data = recipe.load(folder, recipe.config)
    valid = data.split["valid"]
    counts = valid.group_by("user_id").len().filter(pl.col("len") >= _MIN_CANDIDATES)
    members = np.sort(counts["user_id"].to_numpy())
    generator = np.random.default_rng(options.seed)
    drawn = generator.permutation(members)[: options.num_members].tolist()
    place = pl.int_range(pl.len()).over("user_id")
    rows = valid.filter(pl.col("user_id").is_in(drawn) & (place < options.num_candidates))
    movies = movie_rows(rows, data.split["items"], train=data.split["train"])
    examples = movie_examples(movies, candidates_per_example=options.num_candidates)
    prepare = _preparation(model)
    return [prepare(one.request, one.labels) for one in examples], data.fingerprint


def _preparation(model: LoadedModel) -> Callable[[Any, Any], LabelledRequest]:
    # Only what renders needs the ranker, whose libraries a borrowed machine lacks.
    from rankonce.ranker import Ranker

    ranker = Ranker(model)

    def prepare(request: Any, labels: Any) -> LabelledRequest:
        prepared = ranker.prepare(request)
        task, tokens = prepared.task, prepared.rendered.tokens
        if task.ranking.label != task.label_names[0]:
            raise DataError(f"task: {task.name} does not rank by its first label")
        known = [None] * len(tokens.segment_ids) if labels is None else labels
        if not isinstance(known, list | tuple) or len(known) != len(tokens.segment_ids):
            raise DataError("labels: should be a list with one label a candidate")
        if not all(label is None or label in task.label_names for label in known):
            raise DataError(f"labels: should be of {', '.join(task.label_names)} or null")
        first = task.label_names[0]
        return LabelledRequest(
            tokens=tokens,
            labels=tuple(None if label is None else int(label == first) for label in known),
        )

    return prepare


def _each_line(
    path: Path, read: Callable[[Any], LabelledRequest]
) -> Iterator[LabelledRequest]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield read(json.loads(line))
            except (json.JSONDecodeError, RecursionError, RankOnceError) as error:
                raise DataError(f"{path}: line {number}: {error}") from error
    if not any(line.strip() for line in lines):
        raise DataError(f"{path}: should hold at least one request")


def _read_tokens_line(data: Any) -> LabelledRequest:
    names = {"prefix_ids", "segment_ids", "label_ids"}
    if not isinstance(data, dict) or not names <= set(data) <= names | {"labels"}:
        raise DataError(f"should be an object of {', '.join(sorted(names))} and perhaps labels")
    tokens = TokenizedRequest(
        prefix_ids=_token_ids("prefix_ids", data["prefix_ids"]),
        segment_ids=_lists_of_ids("segment_ids", data["segment_ids"]),
        label_ids=_lists_of_ids("label_ids", data["label_ids"]),
    )
    if not tokens.segment_ids:
        raise DataError("segment_ids: should hold at least one candidate")
    if len(tokens.label_ids) < 2:
        raise DataError(f"label_ids: should hold two labels or more, holds {len(tokens.label_ids)}")
    labels = data.get("labels")
    known = [None] * len(tokens.segment_ids) if labels is None else labels
    if (
        not isinstance(known, list)
        or len(known) != len(tokens.segment_ids)
        or not all(label is None or (type(label) is int and label in (0, 1)) for label in known)
    ):
        raise DataError("labels: should be a list of 1, 0 or null, one a candidate")
    return LabelledRequest(tokens=tokens, labels=tuple(known))


def _lists_of_ids(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, list):
        raise DataError(f"{name}: should be a list of lists of token ids")
    lists = tuple(_token_ids(f"{name}[{index}]", ids) for index, ids in enumerate(value))
    for index, ids in enumerate(lists):
        if not ids:
            raise DataError(f"{name}[{index}]: should hold at least one token id")
    return lists


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(x) is int and x >= 0 for x in value):
        raise DataError(f"{name}: should be a list of token ids")
    return tuple(value)


def _tokens_line(one: LabelledRequest) -> str:
    return json.dumps({**asdict(one.tokens), "labels": one.labels})


# ------------------------------------------------------------------ the arms


def score_arms(
    load: Callable[[str], LoadedModel],
    arms: Mapping[str, Arm],
    requests: Sequence[TokenizedRequest],
    *,
    max_tokens_per_pass: int,
) -> tuple[dict[str, list[Floats]], float]:
    """Score requests in every arm; arms that differ by their head share a body.

    Args:
        load: gives the model with its weights in ``fp32`` or ``bf16``.

    Returns:
        Log P(label), C x L a request, by arm, and the largest |logit| of a label.

    Raises:
        NumericsError: names the arm and the request whose score is not finite.
    """
    bodies: dict[Arm, dict[str, str]] = {}
    for name, arm in sorted(arms.items(), key=lambda entry: entry[1].activations):
        bodies.setdefault(replace(arm, head="fp32"), {})[name] = arm.head
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
            for part, hidden_CD in _forward(model, requests, passes, bar.update):
                label_ids = requests[part.request].label_ids
                head = head_of(model.network)
                largest_logit = max(largest_logit, _largest(head, hidden_CD, label_ids))
                for name, kind in heads.items():
                    logprobs_CL = head_logprobs(head, kind, hidden_CD, label_ids)
                    pieces[name][part.request].append(logprobs_CL.double().cpu())
            acceleration.undo()
            for name, by_request in pieces.items():
                scores[name] = [torch.cat(parts).numpy() for parts in by_request]
                _check_finite(name, scores[name])
    return scores, largest_logit


@torch.inference_mode()
def head_logprobs(
    head: Head, kind: str, hidden_CD: Tensor, label_ids: Sequence[Sequence[int]]
) -> Tensor:
    """Return log P(label) among the labels, C x L, by a head of an arm's kind."""
    if kind == "fp32":
        return head.label_logprobs(hidden_CD, label_ids)
    logits_CN = _label_logits(head, kind, hidden_CD, [i for forms in label_ids for i in forms])
    if head.softcap is not None:
        logits_CN = head.softcap * torch.tanh(logits_CN / head.softcap)
    by_label = logits_CN.float().split([len(forms) for forms in label_ids], dim=1)
    return torch.stack([part.logsumexp(dim=1) for part in by_label], dim=1).log_softmax(dim=1)


def _label_logits(head: Head, kind: str, hidden_CD: Tensor, ids: Sequence[int]) -> Tensor:
    """Return the labels' logits, C x N: in bf16, or unrounded for the kind ``fp32``."""
    weight_ND = head.weight_VD[list(ids)]
    bias_N = None if head.bias_V is None else head.bias_V[list(ids)]
    if kind == "fp8":
        # Every row has a scale of its own: the labels' rows alone give what the whole head would.
        padding = -len(ids) % _FP8_MULTIPLE
        weight_ND = torch.nn.functional.pad(weight_ND, (0, 0, 0, padding))
        if bias_N is not None:
            bias_N = torch.nn.functional.pad(bias_N, (0, padding))
        logits_CN = fp8_linear(
            quantize_rows(hidden_CD.contiguous()),
            quantize_rows(weight_ND),
            bias_N=bias_N,
            out_dtype=torch.bfloat16,
        )
        return logits_CN[:, : len(ids)]
    if kind == "bf16":
        hidden_CD, weight_ND = hidden_CD.bfloat16(), weight_ND.bfloat16()
    logits_CN = hidden_CD.float() @ weight_ND.float().T
    if bias_N is not None:
        logits_CN = logits_CN + bias_N.float()
    return logits_CN.bfloat16() if kind == "bf16" else logits_CN


def _largest(head: Head, hidden_CD: Tensor, label_ids: Sequence[Sequence[int]]) -> float:
    ids = [i for forms in label_ids for i in forms]
    with torch.inference_mode():
        return float(_label_logits(head, "fp32", hidden_CD, ids).abs().max())


@torch.inference_mode()
def _forward(
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


# ------------------------------------------------------------------ the figures


def measure_arm(
    name: str, scores: Mapping[str, Sequence[Floats]], requests: Sequence[LabelledRequest]
) -> dict[str, Any]:
    """Return the figures of one arm, its comparisons, and which bars it meets against bf16."""
    mine = scores[name]
    values = [log_odds(logprobs_CL) for logprobs_CL in mine]
    distinct = sum(len(np.unique(value)) for value in values)
    measured: dict[str, Any] = {
        "distinct_score_ratio": distinct / sum(one.num_texts for one in requests),
        "num_distinct_scores": len(np.unique(np.concatenate(values))),
        **_label_metrics(values, requests),
        "against": {},
    }
    ranked = [index for index, one in enumerate(requests) if one.num_texts > 1]
    for other in REFERENCES:
        if other != name:
            theirs = scores[other]
            measured["against"][other] = asdict(
                compare([theirs[i] for i in ranked], [mine[i] for i in ranked])
            )
    if "bf16" in measured["against"]:
        reached = {**measured["against"]["bf16"], **measured}
        measured["bars_met"] = {bar: reached[bar] >= target for bar, target in BARS.items()}
    return measured


def compare(reference: Sequence[Floats], other: Sequence[Floats]) -> Comparison:
    """Compare the log-probabilities, C x L a request, of an arm with those of a reference."""
    pairs = list(zip(reference, other, strict=True))
    values = [(log_odds(a), log_odds(b)) for a, b in pairs]
    agreements = np.array([top_agreement(a, b) for a, b in values])
    gains = [
        float(np.mean(np.exp(a[:, 0])[b == b.max()]) / np.exp(a[:, 0].max()))
        for (a, _), (_, b) in zip(pairs, values, strict=True)
    ]
    deltas = np.concatenate([np.abs(a - b).ravel() for a, b in pairs])
    shifts = np.concatenate([np.abs(np.exp(a[:, 0]) - np.exp(b[:, 0])) for a, b in pairs])
    taus = np.array([kendall_tau(a, b) for a, b in values])
    return Comparison(
        top_agreement=float(agreements.mean()),
        top_agreement_error=float(agreements.std() / math.sqrt(len(agreements))),
        ndcg_at_1=float(np.mean(gains)),
        kendall_tau=float(np.nanmean(taus)) if not np.isnan(taus).all() else math.nan,
        max_delta=float(deltas.max()),
        mean_delta=float(deltas.mean()),
        calibration_delta=float(shifts.mean()),
    )


def log_odds(logprobs_CL: Floats) -> Floats:
    """Return what candidates are ordered by: log P(first label) less that of all others."""
    others: Floats = np.logaddexp.reduce(logprobs_CL[:, 1:], axis=1)
    odds: Floats = logprobs_CL[:, 0] - others
    return odds


def top_agreement(reference: Floats, other: Floats) -> float:
    """Return the part of ``other``'s first candidates that ``reference`` scores best."""
    return float(np.mean(reference[other == other.max()] == reference.max()))


def kendall_tau(reference: Floats, other: Floats) -> float:
    """Return Kendall's tau-b (1945).

    Returns:
        In -1..1; 0 where only ``other`` has all scores equal, nan where ``reference`` has.
    """
    agreeing, pairs, other_pairs = 0.0, 0, 0
    # Over ordered pairs: every pair counts twice above and below.
    for start in range(0, len(reference), _PAIR_ROWS):
        rows = slice(start, start + _PAIR_ROWS)
        order = np.sign(reference[rows, None] - reference)
        other_order = np.sign(other[rows, None] - other)
        agreeing += float((order * other_order).sum())
        pairs += int(np.count_nonzero(order))
        other_pairs += int(np.count_nonzero(other_order))
    if not pairs:
        return math.nan
    return agreeing / math.sqrt(pairs * other_pairs) if other_pairs else 0.0


def _label_metrics(
    values: Sequence[Floats], requests: Sequence[LabelledRequest]
) -> dict[str, float]:
    rows = [
        (label, value, member)
        for member, (scores, one) in enumerate(zip(values, requests, strict=True))
        for label, value in zip(one.labels, scores.tolist(), strict=True)
        if label is not None
    ]
    if not rows:
        return {}
    labels, scores, members = (np.array(column) for column in zip(*rows, strict=True))
    return {
        "auc": auc(labels, scores),
        "label_ndcg_at_1": ndcg_at_k(labels.astype(np.float64), scores, members, k=1),
    }


# ------------------------------------------------------------------ what goes out


def render(arms: Sequence[Mapping[str, Any]]) -> str:
    """Write the arms as plain tables, one for each reference."""
    titles = (
        "top agreement", "±", "NDCG@1", "tau-b", "max |Δ|", "mean |Δ|", "|Δ P|", "distinct",
        "AUC", "bars",
    )  # fmt: skip
    tables = []
    for reference in REFERENCES:
        rows = [(f"against {reference}", *titles)]
        for arm in arms:
            if reference in arm["against"]:
                figures = [*arm["against"][reference].values(), arm["distinct_score_ratio"]]
                cells = [_cell(figure) for figure in (*figures, arm.get("auc", math.nan))]
                rows.append((arm["name"], *cells, _verdict(arm) if reference == "bf16" else "–"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            first, *rest = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            tables.append("  ".join([first, *(cell.strip().rjust(len(cell)) for cell in rest)]))
        tables.append("")
    return "\n".join(tables)


def _cell(figure: float) -> str:
    return "–" if math.isnan(figure) else f"{figure:.4f}"


def _verdict(arm: Mapping[str, Any]) -> str:
    if "bars_met" not in arm:
        return "–"
    missed = [bar for bar, met in arm["bars_met"].items() if not met]
    return f"missed {', '.join(missed)}" if missed else "met"


def _describe_model(model: LoadedModel, name: str | None) -> dict[str, Any]:
    config = model.network.config.get_text_config()
    return {
        "name": "embedded" if name is None else Path(name).name,
        "type": config.model_type,
        "num_parameters": sum(weight.numel() for weight in model.network.parameters()),
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "weights_sha256": _hash(
            weight.detach().cpu().numpy().tobytes() for weight in model.network.parameters()
        ),
    }


def _describe_requests(requests: Sequence[LabelledRequest]) -> dict[str, Any]:
    return {
        "num_requests": len(requests),
        "num_candidates": sum(len(one.labels) for one in requests),
        "num_tokens": sum(
            len(one.tokens.prefix_ids) + sum(map(len, one.tokens.segment_ids)) for one in requests
        ),
        "tokens_sha256": _hash(_tokens_line(one).encode() for one in requests),
    }


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _command(options: PrecisionOptions) -> str:
    """Write the options as a command, folders and files of input by their names alone."""
    words = ["rankonce bench precision"]
    default = PrecisionOptions()
    for name, option in _OPTIONS.items():
        value = getattr(options, name)
        if value == getattr(default, name) or name == "commit":
            continue
        if name in ("requests", "tokens", "ml_small", "model", "save_tokens"):
            value = Path(value).name
        for one in value if isinstance(value, tuple) else (value,):
            text = str(one)
            words.append(f"{option} '{text}'" if set(text) & set("*? ") else f"{option} {text}")
    return " ".join(words)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


_OPTIONS = {
    "model": "--model",
    "requests": "--requests",
    "tokens": "--tokens",
    "ml_small": "--ml-small",
    "num_members": "--members",
    "num_candidates": "--candidates",
    "seed": "--seed",
    "arms": "--arm",
    "keep": "--keep",
    "device": "--device",
    "max_tokens_per_pass": "--max-tokens-per-pass",
    "save_tokens": "--save-tokens",
    "output": "--output",
    "commit": "--commit",
}
_HELP = {
    "model": "checkpoint; the embedded ranker by default",
    "requests": "JSON lines of requests, labels beside",
    "tokens": "JSON lines of tokenised requests",
    "ml_small": "folder of MovieLens latest-small: its valid part",
    "num_members": "members of ml-small at most (%(default)s)",
    "num_candidates": "candidates of a member at most (%(default)s)",
    "seed": "of the members' draw (%(default)s)",
    "arms": f"of {', '.join(ARMS)}; all by default; may be repeated",
    "keep": "also FP8 without these layers, patterns with commas between; may be repeated",
    "device": "cpu, cuda, ...; the GPU if there is one",
    "max_tokens_per_pass": "tokens of one forward pass (%(default)s)",
    "save_tokens": "file for the tokenised requests",
    "output": "JSON file; results/precision-<model>.json by default",
    "commit": "name of the commit, where git cannot say it",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from a command line; exit 2 for bad usage, 1 for failure."""
    parser = argparse.ArgumentParser(
        prog="python -m rankonce.benchmarks.precision",
        description="Compare precisions of one model by how it ranks.",
    )
    default = PrecisionOptions()
    for name, option in _OPTIONS.items():
        value = getattr(default, name)
        settings: dict[str, Any] = {"dest": name, "help": _HELP[name], "default": value}
        if name in ("arms", "keep"):
            settings |= {"action": "append", "default": None}
        elif isinstance(value, int):
            settings["type"] = int
        elif name not in ("model", "device", "commit"):
            settings["type"] = Path
        parser.add_argument(option, **settings)
    parsed = vars(parser.parse_args(arguments))
    for name in ("arms", "keep"):
        parsed[name] = getattr(default, name) if parsed[name] is None else tuple(parsed[name])
    try:
        return run_precision(PrecisionOptions(**parsed))
    except (RankOnceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
