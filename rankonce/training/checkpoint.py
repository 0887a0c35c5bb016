"""Checkpoints in Hugging Face form, with what a run needs to go on with the same bits.

OUT/                     the finished model: config, safetensors, tokenizer
OUT/run.json             recipe, configuration, fingerprints of the data, commit, versions
OUT/metrics.jsonl        one line a step
OUT/checkpoints/STEP/    a model as above, and state/ with what the run goes on from: weights and
                         optimisers, in parts where processes hold parts, and random numbers

Several processes share one file system: each writes its part of a state, the first everything else.
"""

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rankonce.environment import describe_environment
from rankonce.errors import DataError, TrainingError
from rankonce.training.optimization import WeightAverage
from rankonce.training.parallel import ParallelLearner

logger = logging.getLogger(__name__)

_NUM_KEPT = 2
# What says beside a model how it was made.
_RECORDS = ("run.json", "pruning.json", "quantization.json")


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What goes on from checkpoint to checkpoint beside the model that is kept.

    Attributes:
        learner: whose weights are trained, on every process.
        optimizers: over its parameters.
        average: of the weights, if one is kept.
        position: has a ``state_dict`` of plain numbers.
    """

    learner: ParallelLearner
    optimizers: Sequence[torch.optim.Optimizer]
    average: WeightAverage | None
    position: Any

    def save(self, folder: Path) -> None:
        """Write it, each process its part."""
        from torch.distributed.checkpoint.state_dict_saver import save

        processes = self.learner.processes
        with _silent_alone():
            save(self._tensors(), checkpoint_id=folder)
        own = {
            "position": self.position.state_dict(),
            "updates": self.average.num_updates if self.average else 0,
            "random": _random_state(processes.device),
            "processes": processes.count,
        }
        torch.save(own, folder / f"process-{processes.rank}.pt")

    def load(self, folder: Path) -> None:
        """Take up what was saved, also by another number of processes.

        With as many as before everything has the same bits; otherwise dropout draws anew.
        """
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict
        from torch.distributed.checkpoint.state_dict_loader import load

        processes, learner = self.learner.processes, self.learner.learner
        tensors = self._tensors()
        with _silent_alone():
            load(tensors, checkpoint_id=folder)
        for number, optimizer in enumerate(self.optimizers):
            set_optimizer_state_dict(learner, optimizer, tensors[f"optimizer {number}"])
        first = torch.load(folder / "process-0.pt", weights_only=True)
        self.position.load_state_dict(first["position"])
        if self.average is not None:
            self.average.num_updates = first["updates"]
        if first["processes"] == processes.count:
            own = torch.load(folder / f"process-{processes.rank}.pt", weights_only=True)
            _set_random_state(own["random"], processes.device)
        else:
            logger.warning(
                "goes on with %d processes after %d: other random numbers, other rounding",
                *(processes.count, first["processes"]),
            )

    def _tensors(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        learner = self.learner.learner
        # Loading writes into these. A backbone under an adapter does not change and is not kept.
        trained = {n: p.detach() for n, p in learner.named_parameters() if p.requires_grad}
        tensors: dict[str, Any] = {"model": trained}
        for number, optimizer in enumerate(self.optimizers):
            tensors[f"optimizer {number}"] = get_optimizer_state_dict(learner, optimizer)
        if self.average is not None:
            tensors["average"] = dict(enumerate(self.average.averages))
        return tensors


def save_checkpoint(out: Path, step: int, *, state: RunState, tokenizer: Any) -> None:
    """Write a checkpoint aside and move it into place, so that a torn one is never found."""
    processes = state.learner.processes
    folder = out / "checkpoints"
    unfinished = folder / f".{step}"
    if processes.is_first:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    processes.wait()
    save_kept(unfinished, state, tokenizer)
    state.save(unfinished / "state")
    processes.wait()
    if processes.is_first:
        final = folder / str(step)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(unfinished, final)
        for old in _steps(folder)[:-_NUM_KEPT]:
            shutil.rmtree(folder / str(old))


def save_kept(folder: Path, state: RunState, tokenizer: Any) -> None:
    """Write the model that a run keeps, the average where there is one, by the first process."""
    with state.average.applied() if state.average else nullcontext():
        weights = state.learner.gather_weights()
        if state.learner.processes.is_first:
            save_model(folder, state.learner.network, tokenizer, weights=weights)


def save_model(
    folder: Path, network: Any, tokenizer: Any, *, weights: dict[str, torch.Tensor] | None = None
) -> None:
    """Write a model that ``from_pretrained`` loads.

    Args:
        weights: the network's own by default.
    """
    folder.mkdir(parents=True, exist_ok=True)
    network.save_pretrained(folder, state_dict=weights, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def latest_checkpoint(out: Path) -> tuple[int, Path] | None:
    """Find the newest checkpoint of a run: its step and folder."""
    steps = _steps(out / "checkpoints")
    return (steps[-1], out / "checkpoints" / str(steps[-1])) if steps else None


def write_run_record(out: Path, record: dict[str, Any], *, writes: bool = True) -> None:
    """Write what the run was made of, or check that a resumed run is the same one.

    ``environments`` lists where each part of the run was computed.

    Args:
        writes: false only checks, for processes beside the first.

    Raises:
        TrainingError: the folder holds a run that was made of something else.
    """
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
    if not writes:
        return
    out.mkdir(parents=True, exist_ok=True)
    if (environment := describe_environment()) not in environments:
        environments.append(environment)
    write_json(path, {**record, "environments": environments})


def finish_run(out: Path, *, steps: int, seconds: float) -> None:
    """Note in the run record that the run is done, and what it took."""
    path = out / "run.json"
    record = json.loads(path.read_text())
    record["finished"] = {"steps": steps, "minutes": round(seconds / 60, 2)}
    write_json(path, record)


def write_json(path: Path, content: object) -> None:
    """Write a file whole or not at all, whenever the process is killed."""
    _write_whole(path, json.dumps(content, indent=2) + "\n")


def trained_tasks(folder: Path) -> tuple[str, ...] | None:
    """Read from a model's record which tasks it was trained on, its start's among them.

    The record is that of a run, or what ``prune`` or ``quantize`` wrote beside the model.

    Returns:
        Their names; ``None`` where there is no record, or none that names tasks.

    Raises:
        DataError: the record is not JSON.
    """
    path = next((folder / name for name in _RECORDS if (folder / name).is_file()), None)
    if path is None:
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: should be the record of a model: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("tasks"), dict | list):
        return None
    # The record holds each task's name with the fingerprint of its wording.
    names = (*record["tasks"], *record.get("earlier_tasks", ()))
    return tuple(dict.fromkeys(map(str, names)))


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
        _write_whole(path, "".join(f"{line}\n" for line in kept))


def _write_whole(path: Path, text: str) -> None:
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def _silent_alone() -> Iterator[None]:
    """Keep the remark away that one process saves alone, which is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
