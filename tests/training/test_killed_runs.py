"""A run of several stages that is stopped at any write goes on with the same bits."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from rankonce.records import TrainingExample
from rankonce.training.runs import run_stages
from tests.training.test_loop import CONFIG, finetune_stage, write_examples

STAGE = finetune_stage(replace(CONFIG, epochs=1, steps_per_checkpoint=2))
STAGES = [replace(STAGE, name="first"), replace(STAGE, name="second")]
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
NUM_STOPS = 12


class Stopped(BaseException):
    """Stands for the end of the process: nothing catches it."""


@contextmanager
def watch(call: Callable[[], None]) -> Iterator[None]:
    """Call before everything that changes a file or a folder."""
    active = [True]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        # What stops a thread that writes charts would not stop the run.
        if not active or current_thread() is not main_thread():
            return
        mode = arguments[1] if event == "open" else None
        if event in CHANGES or (isinstance(mode, str) and set(mode) & set("wax")):
            call()

    sys.addaudithook(hook)
    try:
        yield
    finally:
        active.clear()  # a hook cannot be taken away


def run(folder: Path, out: str) -> dict[str, Any]:
    """Run both stages and read all that does not tell of times."""

    def evaluate(model: Path, valid: Sequence[TrainingExample]) -> Mapping[str, Any]:
        return {"requests": len(valid)}

    run_stages(
        STAGES,
        folder / "examples.jsonl",
        folder / out,
        name="test",
        size="0.07m",
        seed=0,
        evaluate=evaluate,
    )
    found: dict[str, Any] = {}
    for path in sorted((folder / out).rglob("*")):
        name = str(path.relative_to(folder / out))
        if path.suffix in (".safetensors", ".json") and path.name != "run.json":
            found[name] = path.read_bytes()
        elif path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [(line["step"], line["loss"]) for line in lines]
    return found


def test_a_run_stopped_at_any_write_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    write_examples(tmp_path / "examples.jsonl", count=8)
    writes: list[int] = []
    with watch(lambda: writes.append(0)):
        whole = run(tmp_path, "whole")
    assert len(writes) > 5 * NUM_STOPS
    assert {"stages/1-first/model.safetensors", "model.safetensors"} <= set(whole)

    for number in range(NUM_STOPS):
        out, stop_at = f"stopped-{number}", (number * len(writes)) // NUM_STOPS
        done: list[int] = []

        def stop(at: int = stop_at, done: list[int] = done) -> None:
            done.append(0)
            if len(done) > at:
                raise Stopped

        # torch wraps what ends its own writes.
        with watch(stop), pytest.raises((Stopped, CheckpointException), match=r"Stopped|^$"):
            run(tmp_path, out)
        resumed = run(tmp_path, out)
        assert resumed.keys() == whole.keys()
        assert [name for name in whole if resumed[name] != whole[name]] == [], stop_at
