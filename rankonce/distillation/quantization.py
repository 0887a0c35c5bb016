"""Quantise a checkpoint, and accept it by how it ranks beside the one it comes from."""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rankonce.environment import describe_environment
from rankonce.errors import DataError, ModelError, NumericsError
from rankonce.evaluation.agreement import Floats, measure_arm
from rankonce.evaluation.labelled_requests import (
    LabelledRequest,
    check_requests,
    describe_requests,
    read_requests,
)
from rankonce.evaluation.metrics import without_nan
from rankonce.model.loading import LoadedModel, load_model
from rankonce.model.precision import PRECISIONS, loading_options
from rankonce.model.quantized import (
    RECORD_FILE,
    ROW_SCHEMES,
    SCHEMES,
    compressed_config,
    find_scheme,
    quantize_layers,
    stored_tensors,
)
from rankonce.model.scoring import Scorer
from rankonce.training.checkpoint import save_model, trained_tasks

# What the quantised model must reach. The last two are compared where labels are known.
LEAST = {"top_agreement": 0.98, "kendall_tau": 0.98, "distinct_score_ratio": 0.99}
MOST = {"calibration_error_rise": 0.01, "auc_loss": 0.002}
_MAX_TOKENS_PER_PASS = 8192


@dataclass(frozen=True, kw_only=True)
class QuantizationOptions:
    """What is quantised, how, and what it must reach.

    Attributes:
        model: a float checkpoint: folder or id.
        out: a new or empty folder.
        scheme: a name of ``SCHEMES``.
        data: JSON lines of requests, ``labels`` beside where known; without it nothing is accepted.
        accept: bars by name that differ from ``LEAST`` and ``MOST``.
        device: where both models score; the GPU if there is one.
    """

    model: str
    out: Path
    scheme: str
    data: Path | None = None
    accept: Mapping[str, float] = field(default_factory=dict)
    device: str | None = None

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ModelError(f"to: should be one of {', '.join(SCHEMES)}, is {self.scheme!r}")
        for name, bar in self.accept.items():
            if name not in LEAST | MOST:
                raise DataError(f"accept: should name {', '.join(LEAST | MOST)}, not {name!r}")
            if not math.isfinite(bar):
                raise DataError(f"accept: {name} should be a finite number, is {bar}")
        if self.accept and self.data is None:
            raise DataError("data: should be given, since accept is measured on its requests")

    @property
    def bars(self) -> dict[str, float]:
        """The bars that hold."""
        return {**LEAST, **MOST, **self.accept}


def quantize_model(
    options: QuantizationOptions, on_step: Callable[[str, int, int], None] = lambda *_: None
) -> dict[str, Any]:
    """Write the quantised checkpoint and its record, ``quantization.json``.

    Args:
        on_step: called with what is done, how much of it, and of how much.

    Returns:
        The record; its ``verdict`` is ``accepted``, ``refused`` or ``unchecked``.

    Raises:
        RankOnceError: the checkpoint, the requests, the folder or a library cannot be used.
    """
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ModelError(f"out: {options.out} exists and is not empty; choose a new folder")
    model = load_model(options.model, device=options.device, precision=None)
    if (stored := find_scheme(model.network.config)) is not None:
        raise ModelError(
            f"model: {options.model} is quantised already ({stored}); should be the float "
            "checkpoint"
        )
    requests: list[LabelledRequest] = []
    if options.data is not None:
        requests = read_requests(options.data, model)
        check_requests(requests, model)
    before = _score(model, requests, lambda done, of: on_step("unquantised", done, of))
    # Under its name only when it has its verdict.
    written = options.out.with_name(f".{options.out.name}.unfinished")
    shutil.rmtree(written, ignore_errors=True)
    try:
        left = _write(replace(options, out=written), model)
        del model
        # What is measured is what was written, as it loads again.
        quantized = load_model(written, device=options.device)
        after = _score(quantized, requests, lambda done, of: on_step("quantised", done, of))
        record: dict[str, Any] = {
            "scheme": options.scheme,
            "model": Path(options.model).name,
            "tasks": trained_tasks(Path(options.model)),
            "left": left,
            "bytes": {"before": _weight_bytes(options.model), "after": _weight_bytes(written)},
            "verdict": "unchecked",
            "failures": [],
            "environment": describe_environment(),
        }
        if options.data is not None:
            scores = {"unquantised": before, "quantised": after}
            record |= _accept(scores, requests, options)
            record["requests"] = {"source": options.data.name, **describe_requests(requests)}
        record = without_nan(record)
        (written / RECORD_FILE).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
        if options.out.exists():
            options.out.rmdir()
        os.replace(written, options.out)
    finally:
        shutil.rmtree(written, ignore_errors=True)
    return record


def _accept(
    scores: Mapping[str, Sequence[Floats]],
    requests: Sequence[LabelledRequest],
    options: QuantizationOptions,
) -> dict[str, Any]:
    """Measure both models and compare what was reached with the bars.

    A bar that the requests cannot measure, for want of labels, is refused if it was asked for.
    """
    arms = {
        name: measure_arm(name, scores, requests, references=("unquantised",)) for name in scores
    }
    before, after = arms["unquantised"], arms["quantised"]
    reached = {**after["against"]["unquantised"], **after}
    if "auc" in after:
        reached["auc_loss"] = before["auc"] - after["auc"]
        reached["calibration_error_rise"] = after["calibration_error"] - before["calibration_error"]
    failures, unmeasured = [], []
    for name, bar in options.bars.items():
        value = reached.get(name, math.nan)
        if math.isnan(value):
            unmeasured.append(name)
            if name in options.accept:
                failures.append(f"{name} cannot be measured on these requests")
            continue
        if (value < bar) if name in LEAST else (value > bar):
            sign = "≥" if name in LEAST else "≤"
            failures.append(f"{name} should be {sign} {bar}, is {value:.4f}")
    return {
        "bars": options.bars,
        "unmeasured": unmeasured,
        "arms": arms,
        "reached": {name: reached[name] for name in options.bars if name in reached},
        "verdict": "refused" if failures else "accepted",
        "failures": failures,
    }


def _write(options: QuantizationOptions, model: LoadedModel) -> list[str]:
    """Write weights, configuration and tokenizer; return the linear layers that were left.

    The model is used up.
    """
    if options.scheme not in ROW_SCHEMES:
        return _write_bitsandbytes(options, model.tokenizer)
    # In the checkpoint's own dtype: what stays float keeps its bits. A CPU holds it in FP32, which
    # lost none of them.
    if model.device.type != "cpu":
        model = load_model(options.model, device="cpu")
    model.acceleration.undo()
    network = model.network.to(PRECISIONS[_own_precision(options.model)].dtype)
    left = quantize_layers(network, options.scheme)
    save_model(options.out, network, model.tokenizer, weights=stored_tensors(network))
    path = options.out / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] = compressed_config(options.scheme, left)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    return left


def _write_bitsandbytes(options: QuantizationOptions, tokenizer: Any) -> list[str]:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = PRECISIONS[_own_precision(options.model)].dtype
    precision = replace(PRECISIONS[options.scheme], dtype=dtype)
    network = AutoModelForCausalLM.from_pretrained(
        options.model, **loading_options(precision, device)
    )
    save_model(options.out, network, tokenizer)
    return [name for name, module in network.named_modules() if type(module) is torch.nn.Linear]


def _own_precision(source: str) -> str:
    dtype = AutoConfig.from_pretrained(source).dtype
    return next((name for name, one in PRECISIONS.items() if one.dtype == dtype), "fp32")


def _score(
    model: LoadedModel, requests: Sequence[LabelledRequest], on_request: Callable[[int, int], None]
) -> list[Floats]:
    """Return log P(label), C x L, of every request."""
    scorer = Scorer(model, cache_bytes=0, max_graph_tokens=0)
    scores = []
    for number, one in enumerate(requests, start=1):
        raw = scorer.forward([one.tokens], max_tokens_per_pass=_MAX_TOKENS_PER_PASS)[0]
        if not raw.labels_CL.isfinite().all():
            raise NumericsError(
                f"request {number}: {model.name} gave log-probabilities that are not finite"
            )
        scores.append(raw.labels_CL.double().numpy())
        on_request(number, len(requests))
    return scores


def _weight_bytes(source: str | Path) -> int | None:
    """Bytes of the safetensors of a folder; ``None`` for a checkpoint of the hub."""
    files = list(Path(source).glob("*.safetensors"))
    return sum(file.stat().st_size for file in files) if files else None
