"""The model card of a finished run: what it was made of and what it measured."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any


def write_model_card(out: Path, stages: Sequence[Path], *, tasks: Sequence[str]) -> None:
    """Write ``OUT/README.md`` from the records of a run and its stages.

    Args:
        stages: the folders of the stages, in their order.
        tasks: names of the tasks that were learnt.
    """
    run = json.loads((out / "run.json").read_text())
    origin = f"from {run['model']}" if run["model"] else f"from scratch, size {run['size']}"
    lines = [
        "---",
        "library_name: rankonce",
        "pipeline_tag: text-ranking",
        "---",
        "",
        f"# {run['run']}",
        "",
        "A decoder-only ranker: the prompt is the feature set, the log-probability of the answer "
        f"is the score. Made by RankOnce {origin}, seed {run['seed']}, in "
        f"{run['finished']['minutes']:g} minutes of training.",
        "",
        _describe_weights(out, run),
        f"Tasks: {', '.join(tasks) or 'none, texts only'}.",
        "",
        "```python",
        "from rankonce.ranker import Ranker",
        f'ranker = Ranker.from_pretrained("{out.name}")',
        "```",
        "",
        "## Stages",
        "",
        "| stage | steps | minutes | tokens/s | FLOP utilisation | targets a step | learning rate "
        "| data |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for folder in stages:
        record = json.loads((folder / "run.json").read_text())
        settings = record["config"]
        lines.append(
            f"| {folder.name} | {record['finished']['steps']} | {record['finished']['minutes']:g} "
            f"| {_median(folder, 'tokens_per_s', ',.0f')} "
            f"| {_median(folder, 'flop_utilisation', '.0%')} "
            f"| {settings['targets_per_step']} | {settings['learning_rate']:g} "
            f"| {', '.join(sorted(record['data']))} |"
        )
    measured = [folder for folder in stages if (folder / "evaluation.json").exists()]
    if measured:
        lines += ["", "## Measured on held-out requests", ""]
        for folder in measured:
            lines += _table(folder.name, json.loads((folder / "evaluation.json").read_text()))
    lines += [
        "",
        "## Limits",
        "",
        "The numbers hold for requests like those above: the same tasks, wordings and kinds of "
        "statistics. What a prompt leaves out the ranker does not know. Fingerprints of the data, "
        "configuration and machines are in `run.json` and `stages/*/run.json`.",
        "",
    ]
    (out / "README.md").write_text("\n".join(lines))


def _describe_weights(out: Path, run: dict[str, Any]) -> str:
    if adapter := run.get("adapter"):
        held = "" if adapter["quantize"] == "none" else f", held in {adapter['quantize']} meanwhile"
        return (
            f"An adapter, {adapter['name']}: rank {adapter['rank']} over {run['model']}{held}. "
            "`rankonce merge` makes a checkpoint of both."
        )
    config = json.loads((out / "config.json").read_text())
    return (
        f"Architecture: {config['model_type']}, {config['num_hidden_layers']} layers of "
        f"{config['hidden_size']}, vocabulary {config['vocab_size']}."
    )


def _median(folder: Path, name: str, form: str) -> str:
    """The median over a stage's steps of what ``metrics.jsonl`` says of each."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    found = [row[name] for row in rows if row.get(name) is not None]
    return format(median(found), form) if found else "–"


def _table(name: str, measured: dict[str, dict[str, Any]]) -> list[str]:
    metrics = sorted({metric for values in measured.values() for metric in values})
    rows = [
        f"After {name}:",
        "",
        f"| task | {' | '.join(metrics)} |",
        f"| --- | {' | '.join('---:' for _ in metrics)} |",
    ]
    for task, values in measured.items():
        cells = [f"{values[m]:.4f}" if m in values else "–" for m in metrics]
        rows.append(f"| {task} | {' | '.join(cells)} |")
    return [*rows, ""]
