"""Checkpoints in Hugging Face form, with what a run needs to go on with the same bits.

OUT/                     the finished model: config, safetensors, tokenizer
OUT/run.json             recipe, configuration, fingerprints of the data, commit, versions
OUT/metrics.jsonl        one line a step
OUT/checkpoints/STEP/    a model as above, and state/ with optimiser and random numbers
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from rankonce.environment import describe_environment
from rankonce.errors import TrainingError

_NUM_KEPT = 2


def save_checkpoint(
    out: Path, step: int, *, accelerator: Any, network: Any, tokenizer: Any
) -> None:
    """Write a checkpoint aside and move it into place, so that a torn one is never found."""
    folder = out / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{step}"
    shutil.rmtree(unfinished, ignore_errors=True)
    save_model(unfinished, network, tokenizer)
    accelerator.save_state(str(unfinished / "state"), safe_serialization=True)
    final = folder / str(step)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(unfinished, final)
    for old in _steps(folder)[:-_NUM_KEPT]:
        shutil.rmtree(folder / str(old))


def save_model(folder: Path, network: Any, tokenizer: Any) -> None:
    """Write a model that ``from_pretrained`` loads."""
    folder.mkdir(parents=True, exist_ok=True)
    network.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def latest_checkpoint(out: Path) -> tuple[int, Path] | None:
    """Find the newest checkpoint of a run: its step and folder."""
    steps = _steps(out / "checkpoints")
    return (steps[-1], out / "checkpoints" / str(steps[-1])) if steps else None


def write_run_record(out: Path, record: dict[str, Any]) -> None:
    """Write what the run was made of, or check that a resumed run is the same one.

    ``environments`` lists where each part of the run was computed.

    Raises:
        TrainingError: the folder holds a run that was made of something else.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "run.json"
    record = json.loads(json.dumps(record))
    environments = []
    if path.exists():
        try:
            before = json.loads(path.read_text())
            environments = before.pop("environments")
            before.pop("finished", None)
        except (json.JSONDecodeError, KeyError) as error:
            raise TrainingError(f"out: {path} is not the record of a run: {error}") from error
        for name in sorted(before.keys() | record.keys()):
            if before.get(name) != record.get(name):
                raise TrainingError(
                    f"out: {out} holds a run with another {name}; choose a new folder or the "
                    f"{name} of before: {before.get(name)}"
                )
    if (environment := describe_environment()) not in environments:
        environments.append(environment)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps({**record, "environments": environments}, indent=2) + "\n")
    os.replace(unfinished, path)


def finish_run(out: Path, *, steps: int, seconds: float) -> None:
    """Note in the run record that the run is done, and what it took."""
    path = out / "run.json"
    record = json.loads(path.read_text())
    record["finished"] = {"steps": steps, "minutes": round(seconds / 60, 2)}
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(unfinished, path)


def is_finished(out: Path) -> bool:
    """Whether a run's folder holds a finished model."""
    path = out / "run.json"
    return path.exists() and "finished" in json.loads(path.read_text())


def cut_metrics(out: Path, last_step: int) -> None:
    """Drop the metrics of steps that a resumed run does again."""
    path = out / "metrics.jsonl"
    if path.exists():
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= last_step:
                    kept.append(line)
            except json.JSONDecodeError:
                break  # the run was killed in the middle of this line
        path.write_text("".join(f"{line}\n" for line in kept))


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
