"""Steps over the devices at hand: each once, after what it needs, a process of its own.

The processes are forked from one that has imported what most commands need: the imports of a
command take seconds, and an experiment has hundreds of steps.

OUT/steps/DIGEST/    out, what the step wrote; scores.parquet and stdout of a measure; log, what it
                     said on stderr; step.json once it has finished
"""

import fcntl
import importlib
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.reduction import DupFd
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from rankonce.distillation.experiments.plan import Step
from rankonce.environment import describe_environment
from rankonce.errors import ExperimentError

RANKONCE = "rankonce.cli:main"
_PRELOADED = [
    "rankonce.cli",
    "rankonce.ranker",
    "rankonce.distillation.ladder",
    "rankonce.evaluation.report",
    "transformers.models.qwen3.modeling_qwen3",
]
# A start also looks after the other processes, and their codes can be read only once.
_CODES = threading.Lock()
# Of what a failed step said, so much is repeated.
_LAST_LINES = 3


@dataclass(frozen=True, kw_only=True)
class Device:
    """Where one step at a time runs.

    Attributes:
        environment: variables of its processes.
    """

    name: str
    environment: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a step ended.

    Attributes:
        failure: why, in a line; ``None`` if it finished.
        seconds: of the attempt that finished.
        was_known: it had finished in an earlier run of the experiment.
        commit: of the program that ran it.
        answer: the JSON that a measure printed.
    """

    step: Step
    folder: Path
    failure: str | None = None
    seconds: float = 0.0
    was_known: bool = False
    commit: str = ""
    answer: Any = None


def find_devices(slots: int | None = None) -> list[Device]:
    """Give a device for every GPU, or the processor in equal parts.

    Args:
        slots: parts of the processor; without it the GPUs, and without these one part.
    """
    import torch

    if slots is None and (count := torch.cuda.device_count()):
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = given.split(",") if given else [str(number) for number in range(count)]
        return [
            Device(name=f"cuda:{name}", environment={"CUDA_VISIBLE_DEVICES": name})
            for name in names[:count]
        ]
    slots = slots or 1
    threads = str(max(1, torch.get_num_threads() // slots))
    return [
        Device(
            name=f"cpu {number}",
            environment={"OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ""},
        )
        for number in range(slots)
    ]


def run_steps(
    steps: Mapping[str, Step],
    out: Path,
    devices: Sequence[Device],
    *,
    ended: Callable[[Outcome], None],
    program: str = RANKONCE,
) -> None:
    """Run steps; what has finished before is not run again, and a failure stops only its users.

    Args:
        steps: by digest; of those that could run the first one runs.
        ended: is told of every step as it ends, from this thread.
        program: what the commands are given to, ``module:function``.

    Raises:
        ExperimentError: another process runs one of the steps.
    """
    multiprocessing.set_forkserver_preload(_PRELOADED)
    free: SimpleQueue[Device] = SimpleQueue()
    for device in devices:
        free.put(device)

    def attempt(step: Step) -> Outcome:
        device = free.get()
        try:
            return _run(step, out, device, program)
        finally:
            free.put(device)

    outcomes: dict[str, Outcome] = {}
    waiting = dict(steps)
    running: dict[Future[Outcome], str] = {}
    with ThreadPoolExecutor(len(devices)) as pool:
        while waiting or running:
            for digest, step in list(waiting.items()):
                known = [outcomes[need] for need in step.needs if need in outcomes]
                failed = next((one for one in known if one.failure is not None), None)
                if failed is not None:
                    del waiting[digest]
                    reason = failed.failure
                    if not str(reason).startswith("needs "):
                        reason = f"needs {failed.step.name}, which failed: {reason}"
                    outcomes[digest] = Outcome(
                        step=step, folder=_folder(out, digest), failure=reason
                    )
                    ended(outcomes[digest])
                elif len(known) == len(step.needs) and len(running) < len(devices):
                    if running and (
                        step.alone or any(steps[one].alone for one in running.values())
                    ):
                        continue
                    del waiting[digest]
                    running[pool.submit(attempt, step)] = digest
            done, _ = wait(running, return_when=FIRST_COMPLETED) if running else ((), ())
            for future in done:
                digest = running.pop(future)
                outcomes[digest] = future.result()
                ended(outcomes[digest])


def _folder(out: Path, digest: str) -> Path:
    return out / "steps" / digest


def _run(step: Step, out: Path, device: Device, program: str) -> Outcome:
    folder = _folder(out, step.digest)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder) as lock:
        record = folder / "step.json"
        if record.exists():
            known = json.loads(record.read_text())
            return Outcome(
                step=step,
                folder=folder,
                seconds=known["seconds"],
                was_known=True,
                commit=known["environment"]["commit"],
                answer=_read_answer(folder) if step.kind == "measure" else None,
            )
        _clear(folder)
        names = {need: str(_folder(out, need) / "out") for need in step.needs}
        names |= {"out": str(folder / "out"), "scores": str(folder / "scores.parquet")}
        command = [_fill(word, names) for word in step.command]
        start = time.monotonic()
        code = _run_process(program, command, dict(device.environment), folder, lock)
        seconds = round(time.monotonic() - start, 3)
        if code:
            return Outcome(step=step, folder=folder, failure=_describe(code, folder))
        answer = None
        if step.kind == "measure":
            try:
                answer = _read_answer(folder)
            except ValueError as error:
                return Outcome(step=step, folder=folder, failure=f"printed no JSON: {error}")
        environment = describe_environment()
        finished = {
            "name": step.name,
            "command": ["rankonce", *command],
            "device": device.name,
            "seconds": seconds,
            "environment": environment,
        }
        part = record.with_suffix(".part")
        part.write_text(json.dumps(finished, indent=2) + "\n")
        part.replace(record)
        commit = str(environment["commit"])
        return Outcome(step=step, folder=folder, seconds=seconds, commit=commit, answer=answer)


def _run_process(
    program: str, command: list[str], environment: dict[str, str], folder: Path, lock: int
) -> int | None:
    context = multiprocessing.get_context("forkserver")
    with _CODES:
        process = context.Process(
            target=_run_command, args=(program, command, environment, folder, DupFd(lock))
        )
        process.start()
    connection.wait([process.sentinel])
    with _CODES:
        process.join()
    return process.exitcode


def _run_command(
    program: str, command: list[str], environment: dict[str, str], folder: Path, lock: Any
) -> None:
    """Run a step's command; in the process that was forked for it."""
    # If the experiment is killed and the step lives on, nobody else may take its folder.
    lock.detach()
    os.environ.update(environment)
    with (folder / "stdout").open("wb") as stdout, (folder / "log").open("ab") as log:
        log.write(f"$ rankonce {' '.join(command)}\n".encode())
        log.flush()
        os.dup2(stdout.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if (threads := environment.get("OMP_NUM_THREADS")) is not None:
        # The variable was read when torch was imported.
        import torch

        torch.set_num_threads(int(threads))
    module, _, function = program.partition(":")
    getattr(importlib.import_module(module), function)(command)


@contextmanager
def _alone(folder: Path) -> Iterator[int]:
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ExperimentError(
                f"{folder}: another process runs this step; wait for it or stop it"
            ) from error
        yield lock.fileno()


def _clear(folder: Path) -> None:
    """Remove what an attempt left that no command goes on from."""
    out = folder / "out"
    # Training runs and ladders resume; whatever else was cut off begins again.
    if out.is_dir() and not any((out / name).exists() for name in ("run.json", "rungs")):
        shutil.rmtree(out)
    (folder / "scores.parquet").unlink(missing_ok=True)


def _fill(word: str, names: Mapping[str, str]) -> str:
    for name, value in names.items():
        word = word.replace(f"{{{name}}}", value)
    return word


def _read_answer(folder: Path) -> Any:
    return json.loads((folder / "stdout").read_text(encoding="utf-8"))


def _describe(code: int, folder: Path) -> str:
    text = (folder / "log").read_text(encoding="utf-8", errors="replace")
    last = " ".join(line.strip() for line in text.splitlines()[-_LAST_LINES:])
    how = f"was killed by signal {-code}" if code < 0 else f"exited with {code}"
    return f"{how}: {last} (see {folder / 'log'})"
