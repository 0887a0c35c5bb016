"""One model in several precisions on the same requests: does its ranking survive?

    python -m rankonce.benchmarks.precision --ml-small ml-small/
    python -m rankonce.benchmarks.precision --tokens tokens.jsonl --device cuda
    python -m rankonce.benchmarks.precision --record RECORD --page docs/kernels.md

Tokenised requests run where only PyTorch and transformers are installed. ``--save-tokens`` writes
them: JSON lines of ``prefix_ids``, ``segment_ids`` and ``label_ids``, and ``labels`` (1 for the
first label, 0 for another, null) where they are known.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from rankonce.benchmarks.command import describe
from rankonce.benchmarks.pages import update_page
from rankonce.benchmarks.precision_arms import ARMS, check_patterns, choose_arms, score_arms
from rankonce.benchmarks.precision_requests import read_ml_small
from rankonce.benchmarks.precision_table import render
from rankonce.benchmarks.records import write_record
from rankonce.errors import DataError, RankOnceError
from rankonce.evaluation.agreement import BARS, measure_arm
from rankonce.evaluation.labelled_requests import (
    LabelledRequest,
    check_requests,
    describe_requests,
    read_requests,
    read_tokens,
    write_tokens,
)
from rankonce.evaluation.metrics import without_nan
from rankonce.model.loading import LoadedModel, load_model

EMBEDDED_MODEL = Path(__file__).parents[1] / "embedded"


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions:
    """What is compared on what. Exactly one of requests, tokens, ml_small and record is given.

    Attributes:
        model: a checkpoint; the embedded ranker if ``None``.
        arms: names of ``ARMS``; bf16 and fp32 are always run.
        keep: for each an FP8 arm over bf16: patterns of linear layers that stay, with commas.
        requests: JSON lines as ``rankonce score`` takes them, ``labels`` beside if known.
        tokens: JSON lines of tokenised requests.
        ml_small: folder of MovieLens latest-small; the valid part of the recipe's split is scored.
        num_members: of ml-small at most.
        output: JSON; ``results/precision-<model>.json`` if ``None``.
        commit: where the checkout cannot say it.
        record: what an earlier run wrote; nothing is scored.
        page: Markdown with ``<!-- begin: precision -->``.
    """

    model: str | None = None
    device: str | None = None
    arms: tuple[str, ...] = tuple(ARMS)
    keep: tuple[str, ...] = ()
    requests: Path | None = None
    tokens: Path | None = None
    ml_small: Path | None = None
    num_members: int = 300
    save_tokens: Path | None = None
    output: Path | None = None
    commit: str | None = None
    record: Path | None = None
    page: Path | None = None


def run_precision(options: PrecisionOptions) -> int:
    """Measure every arm and write the record, or read one; print its table, and fill a page.

    Returns:
        An exit status: 0, whatever bars were missed.

    Raises:
        RankOnceError: an option, a request, the checkpoint or the page cannot be used.
    """
    sources = (options.requests, options.tokens, options.ml_small, options.record)
    if sum(source is not None for source in sources) != 1:
        raise DataError("requests, tokens, ml_small, record: exactly one should be given")
    if options.record is not None:
        record = _read_record(options.record)
    else:
        name = Path(options.model or EMBEDDED_MODEL).name
        output = options.output or Path("results") / f"precision-{name}.json"
        output.parent.mkdir(parents=True, exist_ok=True)
        record = _measure(options)
        write_record(output, record, allow_nan=False)
    table = render(record)
    print(table)
    if options.page is not None:
        update_page(options.page, {"precision": table}.get, example="precision")
    return 0


def _measure(options: PrecisionOptions) -> dict[str, Any]:
    arms = choose_arms(options.arms, options.keep)

    def load(activations: str) -> LoadedModel:
        name = options.model or EMBEDDED_MODEL
        return load_model(name, device=options.device, precision=activations)

    model = load("fp32")
    check_patterns(arms, model)
    requests, source = _read_input(options, model)
    if options.save_tokens is not None:
        write_tokens(options.save_tokens, requests)
    scores, largest_logit = score_arms(load, arms, [one.tokens for one in requests])
    record = {
        "model": {**_describe_model(model, options.model), "largest_label_logit": largest_logit},
        "requests": {**source, **describe_requests(requests)},
        "command": _command(options),
        "bars": BARS,
        "arms": [
            {"name": arm, **asdict(arms[arm]), **measure_arm(arm, scores, requests)} for arm in arms
        ],
        "environment": describe(str(model.device), commit=options.commit),
    }
    return {name: without_nan(part) for name, part in record.items()}


def _read_input(
    options: PrecisionOptions, model: LoadedModel
) -> tuple[list[LabelledRequest], dict[str, Any]]:
    """Read the requests and say where they come from."""
    source: dict[str, Any] = {}
    if options.tokens is not None:
        path, requests = options.tokens, read_tokens(options.tokens)
    elif options.requests is not None:
        path, requests = options.requests, read_requests(options.requests, model)
    else:
        assert options.ml_small is not None
        path = options.ml_small
        requests, fingerprint = read_ml_small(path, model, num_members=options.num_members)
        source = {"split": "valid", "fingerprint": fingerprint}
    check_requests(requests, model)
    return requests, {"source": path.name, **source}


def _read_record(path: Path) -> dict[str, Any]:
    names = {"model", "requests", "command", "bars", "arms", "environment"}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not isinstance(record, dict) or set(record) != names:
        raise DataError(f"{path}: should be the record of a comparison of precisions")
    return record


def _describe_model(model: LoadedModel, name: str | None) -> dict[str, Any]:
    config = model.network.config.get_text_config()
    digest, num_parameters = sha256(), 0
    for weight in model.network.parameters():
        digest.update(weight.detach().cpu().numpy().tobytes())
        num_parameters += weight.numel()
    return {
        "name": "embedded" if name is None else Path(name).name,
        "type": config.model_type,
        "num_parameters": num_parameters,
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "weights_sha256": digest.hexdigest(),
    }


def _command(options: PrecisionOptions) -> str:
    """Write the options as a command, folders and files of input by their names alone."""
    words = ["rankonce bench precision"]
    default = PrecisionOptions()
    for name, (option, _) in _OPTIONS.items():
        value = getattr(options, name)
        if value == getattr(default, name) or name in ("commit", "save_tokens", "output", "page"):
            continue
        if isinstance(value, Path) or name == "model":
            value = Path(value).name
        for one in value if isinstance(value, tuple) else (value,):
            text = str(one)
            words.append(f"{option} '{text}'" if set(text) & set("*? ") else f"{option} {text}")
    return " ".join(words)


_OPTIONS = {
    "model": ("--model", "checkpoint; the embedded ranker by default"),
    "requests": ("--requests", "JSON lines of requests, labels beside"),
    "tokens": ("--tokens", "JSON lines of tokenised requests"),
    "ml_small": ("--ml-small", "folder of MovieLens latest-small: its valid part"),
    "num_members": ("--members", "members of ml-small at most (%(default)s)"),
    "arms": ("--arm", f"of {', '.join(ARMS)}; all by default; may be repeated"),
    "keep": ("--keep", "also FP8 but for layers of these patterns (a,b); may be repeated"),
    "device": ("--device", "cpu, cuda, ...; the GPU if there is one"),
    "save_tokens": ("--save-tokens", "file for the tokenised requests"),
    "output": ("--output", "JSON file; results/precision-<model>.json by default"),
    "commit": ("--commit", "name of the commit, where git cannot say it"),
    "record": ("--record", "score nothing, read this record"),
    "page": ("--page", "Markdown with <!-- begin: precision -->"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from a command line; exit 2 for bad usage, 1 for failure."""
    parser = argparse.ArgumentParser(
        prog="python -m rankonce.benchmarks.precision",
        description="Compare precisions of one model by how it ranks.",
    )
    default = PrecisionOptions()
    for name, (option, text) in _OPTIONS.items():
        value = getattr(default, name)
        settings: dict[str, Any] = {"dest": name, "help": text, "default": value}
        if isinstance(value, tuple):
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
