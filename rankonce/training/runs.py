"""Runs of stages: the start, one stage after the other, and the finished ranker.

OUT/                     the finished model, its tokenizer, run.json and README.md, the model card
OUT/stages/1-pretrain/   a run of the loop: see ``checkpoint``; evaluation.json if it was measured
OUT/stages/2-finetune/   …
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from rankonce.errors import TrainingError
from rankonce.model.adapters import fingerprint_base
from rankonce.model.loading import load_model
from rankonce.model.sizes import build_like, build_model
from rankonce.prompts.encoding import TextEncoder
from rankonce.prompts.rendering import Renderer
from rankonce.prompts.tasks import Task, library_tasks
from rankonce.records import TrainingExample
from rankonce.training.adapters import AdapterConfig, load_network
from rankonce.training.checkpoint import (
    finish_run,
    is_finished,
    save_model,
    trained_tasks,
    write_json,
    write_run_record,
)
from rankonce.training.loop import train
from rankonce.training.model_card import write_model_card
from rankonce.training.parallel import Processes
from rankonce.training.stages import Stage, StageSource
from rankonce.training.tokenizer import train_tokenizer

logger = logging.getLogger(__name__)

# Measures a model's folder on labelled requests: metrics by task.
Evaluate = Callable[[Path, Sequence[TrainingExample]], Mapping[str, Any]]


def run_stages(
    stages: Sequence[Stage],
    data: Path,
    out: Path,
    *,
    name: str,
    size: str,
    seed: int,
    model: str | None = None,
    tasks: Iterable[Task] = (),
    evaluate: Evaluate | None = None,
    adapter: AdapterConfig | None = None,
) -> None:
    """Run stages one after the other, from a checkpoint or from random weights.

    A run that was killed goes on where it stood; stages that are finished are not run again.

    Args:
        name: of what is run, for the record.
        size: what is built where no checkpoint is given: a name of ``SIZES``, or a checkpoint's
            folder for random weights in its shape, with its tokenizer.
        model: a checkpoint to start from; without one a tokenizer is trained on the texts of all
            stages and a model of the size is built.
        evaluate: measures the model after each stage, on its valid requests or the last stage's.
        adapter: train this over the checkpoint, which stays as it is; it goes from stage to stage.

    Raises:
        RankOnceError: the data, the checkpoint or the output folder cannot be used.
    """
    if adapter is not None:
        _check_adapter(adapter, stages, model)
    known = {**library_tasks(), **{task.name: task for task in tasks}}
    stages, sources, left_out = _load(stages, data, known)
    used = {task.name: task for source in sources for task in source.tasks}
    record = {
        "run": name,
        "config": {stage.name: asdict(stage.config) for stage in stages},
        "left_out": left_out,
        "tasks": {
            key: hashlib.sha256(task.model_dump_json().encode()).hexdigest()
            for key, task in sorted(used.items())
        },
        "size": size if model is None else None,
        "seed": seed,
        "model": model,
        "data": {key: value for source in sources for key, value in source.fingerprint.items()},
        "objective": {
            stage.name: dict(source.objective)
            for stage, source in zip(stages, sources, strict=True)
            if source.objective
        },
    }
    if model is not None:
        record["earlier_tasks"] = list(trained_tasks(Path(model)) or ())
    if adapter is not None and model is not None:
        record |= {"adapter": asdict(adapter), "base": fingerprint_base(model)}
    _check_valid(sources, evaluate)
    processes = Processes()
    write_run_record(out, record, writes=processes.is_first)
    if processes.is_first:
        for part, table in (pair for source in sources for pair in source.split.items()):
            (out / "split").mkdir(exist_ok=True)
            table.write_parquet(out / "split" / f"{part}.parquet")
        if model is None:
            _write_start(out / "start", sources, list(known.values()), size, seed)
    processes.wait()
    tokenizer, limit = _load_start(out / "start", model, adapter)
    renderer = Renderer(TextEncoder(tokenizer), max_prompt_tokens=limit)
    before: str | Path = out / "start" if model is None else model
    for number, (stage, source) in enumerate(zip(stages, sources, strict=True), start=1):
        folder = out / "stages" / f"{number}-{stage.name}"
        if not is_finished(folder):
            torch.manual_seed(seed)
            train(
                load_network(before, adapter, base=model),
                tokenizer,
                source.open(renderer),
                folder,
                config=stage.config,
                name=stage.name,
                record={"data": source.fingerprint},
            )
        measured = folder / "evaluation.json"
        # What the last stage is for says of every stage before it how far it has come.
        valid = source.valid or sources[-1].valid
        if processes.is_first and evaluate is not None and valid and not measured.exists():
            write_json(measured, evaluate(folder, valid))
        before = folder
    if processes.is_first:
        network = load_network(before, adapter, base=model)
        _finish(out, network, tokenizer, _folders(out, stages), tasks=sorted(used))
    processes.wait()


def _finish(
    out: Path, network: Any, tokenizer: Any, folders: Sequence[Path], *, tasks: Sequence[str]
) -> None:
    """Write the model of the last stage, what all took, and the model card."""
    save_model(out, network, tokenizer)
    finished = [json.loads((p / "run.json").read_text())["finished"] for p in folders]
    finish_run(
        out,
        steps=sum(one["steps"] for one in finished),
        seconds=60 * sum(one["minutes"] for one in finished),
    )
    write_model_card(out, folders, tasks=tasks)


def _folders(out: Path, stages: Sequence[Stage]) -> list[Path]:
    return [out / "stages" / f"{number}-{s.name}" for number, s in enumerate(stages, start=1)]


def _load(
    stages: Sequence[Stage], data: Path, tasks: Mapping[str, Task]
) -> tuple[list[Stage], list[StageSource], list[str]]:
    """Load the stages' data; give those that have any, and the names of the others."""
    found: list[tuple[Stage, StageSource]] = []
    left_out = []
    for stage in stages:
        source = stage.load(data, stage.config, tasks)
        if source is None:
            left_out.append(stage.name)
            logger.warning("stage %s is left out: its data are not beside %s", stage.name, data)
        else:
            found.append((stage, source))
    if not found:
        raise TrainingError(f"stages: should hold one that has data at {data}")
    return [stage for stage, _ in found], [source for _, source in found], left_out


def _check_valid(sources: Sequence[StageSource], evaluate: Evaluate | None) -> None:
    """Refuse held-out requests that say nothing, before the training that they are to measure."""
    for source in sources:
        labels = [label for example in source.valid for label in example.labels]
        if evaluate is not None and labels and all(label is None for label in labels):
            raise TrainingError("valid: labels: should be known of one candidate at least")


def _check_adapter(adapter: AdapterConfig, stages: Sequence[Stage], model: str | None) -> None:
    if model is None:
        raise TrainingError("model: should be given, since an adapter learns over a checkpoint")
    averages = any(stage.config.averaging for stage in stages)
    if averages and adapter.quantize != "none":
        raise TrainingError(
            f"averaging: should be 0 over a backbone in {adapter.quantize}, whose weights are "
            "codes and have no mean"
        )


def _write_start(
    folder: Path, sources: Sequence[StageSource], tasks: Sequence[Task], size: str, seed: int
) -> None:
    """Write a tokenizer and random weights, once.

    Args:
        tasks: whose labels become one token each, also where a later run learns them.
    """
    if folder.exists():
        return
    # Under its name only when it is whole.
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    if Path(size).is_dir():
        network, tokenizer = build_like(Path(size), seed=seed), AutoTokenizer.from_pretrained(size)
    else:
        bytewise = Renderer(TextEncoder(train_tokenizer([" "], tasks)), max_prompt_tokens=2**31)
        texts = (text for source in sources for text in source.texts(bytewise))
        network, tokenizer = build_model(size, seed=seed), train_tokenizer(texts, tasks)
    save_model(unfinished, network, tokenizer)
    unfinished.rename(folder)


def _load_start(folder: Path, model: str | None, adapter: AdapterConfig | None) -> tuple[Any, int]:
    """Load the tokenizer and the longest prompt, and check a checkpoint that is given."""
    if model is not None:
        start = load_model(model, precision=adapter.precision if adapter else "fp32")
        return start.tokenizer, start.max_prompt_tokens
    limit = AutoConfig.from_pretrained(folder).max_position_embeddings
    return AutoTokenizer.from_pretrained(folder), limit
