"""What a run shows and records: a progress bar, JSON lines, TensorBoard."""

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from rankonce.errors import MissingDependencyError


class Write(Protocol):
    """Takes the metrics of a step."""

    def __call__(self, *, step: int, progress: float, **metrics: float) -> None:
        """Write them."""


def open_report(
    out: Path, *, name: str, last_step: int, is_silent: bool
) -> AbstractContextManager[Write]:
    """Open the report of a run.

    Args:
        name: of the stage, for people.
        last_step: steps after it are reported anew.
        is_silent: for processes beside the first, whose metrics are the same.

    Raises:
        MissingDependencyError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependencyError("tensorboard", extra="train") from error
    if is_silent:
        return nullcontext(_write_nothing)
    writer = SummaryWriter(str(out / "tensorboard"), purge_step=last_step + 1)
    return Reporter(out, writer, name=name)


def _write_nothing(*, step: int, progress: float, **metrics: float) -> None:
    return


class Reporter:
    """Progress bar on stderr, metrics as JSON lines and for TensorBoard.

    Args:
        out: the run's folder.
        writer: TensorBoard's.
        name: of the stage, for people.
    """

    def __init__(self, out: Path, writer: Any, *, name: str) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._console = console
        self._name = name
        self._writer = writer
        self._file = (out / "metrics.jsonl").open("a")
        self._task = self._progress.add_task(name, total=1.0, numbers="")

    def __enter__(self) -> Write:
        self._progress.start()
        return self.write

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._writer.close()
        self._file.close()

    def write(self, *, step: int, progress: float, **metrics: float) -> None:
        """Write the metrics of a step.

        Args:
            progress: part of the run that is done.
        """
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        numbers = ""
        if "loss" in metrics:
            numbers = f"loss {metrics['loss']:.4f}, {metrics['tokens_per_s']:,.0f} tokens/s"
            numbers += f", {metrics['flop_per_s'] / 1e12:.3g} TFLOP/s"
            if "flop_utilisation" in metrics:
                numbers += f" ({metrics['flop_utilisation']:.0%})"
        self._progress.update(self._task, completed=progress, numbers=numbers)
        if "valid_loss" in metrics:
            self._console.print(f"{self._name}, step {step}: valid {metrics['valid_loss']:.4f}")
