"""Options of the benchmarks and the run that they describe."""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from rankonce.benchmarks import bars
from rankonce.benchmarks.kernels import kernel_cases
from rankonce.benchmarks.report import evaluate_bars
from rankonce.benchmarks.results import Results, chip_slug, choose_path, save
from rankonce.benchmarks.runner import DeviceLostError, Run
from rankonce.benchmarks.scoring import pass_cases
from rankonce.benchmarks.supervision import DEVICE_LOST, announce, supervise
from rankonce.benchmarks.timing import Deadline, measure_ceilings
from rankonce.environment import describe_environment
from rankonce.errors import DataError, RankOnceError

SUITES = ("kernels", "pass")
DEFAULT_FOLDER = Path("results")
DEFAULT_MINUTES = 9.0


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """How a run goes.

    Attributes:
        suites: some of ``SUITES``.
        small: toy shapes, for tests and for a look on a processor.
        device: the GPU where there is one, if ``None``.
        minutes: arms that no longer fit are recorded as not measured.
        output: folder of the results; the chip's folder is made in it.
        only: arms whose row's name holds this text; all if ``None``.
        commit: where the checkout cannot say it.
        supervised: run in a child process that is replaced when it dies or hangs; on a GPU if
            ``None``.
        until, resume, announce: for the child: the end as a time of day, the file to go on with,
            and the file into which it writes the path of its results.
    """

    suites: tuple[str, ...] = SUITES
    small: bool = False
    device: str | None = None
    minutes: float = DEFAULT_MINUTES
    output: Path = DEFAULT_FOLDER
    only: str | None = None
    commit: str | None = None
    supervised: bool | None = None
    until: float | None = None
    resume: Path | None = None
    announce: Path | None = None


def run_benchmarks(options: BenchmarkOptions) -> int:
    """Measure, write the results, print their path and the bars.

    Returns:
        An exit status: 0, or ``DEVICE_LOST`` from a child that must be replaced.

    Raises:
        DataError: an option makes no sense.
    """
    if options.minutes <= 0:
        raise DataError(f"minutes: should be more than 0, is {options.minutes:g}")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    supervised = device.startswith("cuda") if options.supervised is None else options.supervised
    until = options.until or time.time() + options.minutes * 60
    if supervised:
        child = _child_arguments(replace(options, device=device, until=until))
        path = supervise(child, until=until)
    else:
        _check_device(device)
        path = choose_path_for(options, device)
        try:
            _measure(options, path, device, until)
        except DeviceLostError as error:
            print(f"error: {error}", file=sys.stderr)
            return DEVICE_LOST
    if options.until is None:
        print(path)
        print(bars.render(evaluate_bars([path])))
    return 0


def choose_path_for(options: BenchmarkOptions, device: str) -> Path:
    """Return the file to go on with, or name a new one and write its environment."""
    if options.resume is not None:
        path = options.resume
    else:
        environment = describe(device, commit=options.commit)
        path = choose_path(options.output, environment["chip"], environment["commit"])
        save(path, Results(environment=environment))
    if options.announce is not None:
        announce(path, options.announce)
    return path


def _measure(options: BenchmarkOptions, path: Path, device: str, until: float) -> None:
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    if device.startswith("cuda"):
        # fp32 references in fp32: TF32 would blur what they are there to tell.
        torch.set_float32_matmul_precision("highest")
    deadline = Deadline(until - time.time())
    run = Run(path, deadline=deadline, device=device)
    if run.results.ceilings is None:
        run.set_ceilings(measure_ceilings(device, dtype, small=options.small))
    cases = []
    if "kernels" in options.suites:
        cases += kernel_cases(device=device, dtype=dtype, small=options.small)
    if "pass" in options.suites:
        cases += pass_cases(lambda: run.ceilings, device=device, dtype=dtype, small=options.small)
    if options.only is not None:
        wanted = options.only.lower()
        cases = [
            replace(
                case,
                arms=tuple(arm for arm in case.arms if wanted in case.row(arm, device).key.lower()),
            )
            for case in cases
        ]
    run.run(cases)


def describe(device: str, *, commit: str | None = None) -> dict[str, Any]:
    """Name chip, commit, libraries and driver."""
    environment: dict[str, Any] = describe_environment()
    if commit is not None:
        environment["commit"] = commit
    name = str(environment["processor"])
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        name = properties.name
        environment["gpu"] = name
        environment["gpu_memory_gb"] = round(properties.total_memory / 1e9, 1)
        environment["cuda"] = str(torch.version.cuda)
    try:
        environment["triton"] = version("triton")
    except PackageNotFoundError:
        environment["triton"] = "not installed"
    environment["chip"] = chip_slug(name)
    environment["began"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return environment


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"device: {device!r} cannot be used: {text}") from error


def _child_arguments(options: BenchmarkOptions) -> list[str]:
    arguments = [sys.executable, "-m", "rankonce.benchmarks", *options.suites, "--unsupervised"]
    arguments += ["--device", str(options.device), "--until", repr(options.until)]
    arguments += ["--output", str(options.output)]
    if options.small:
        arguments.append("--small")
    for name in ("only", "commit"):
        value = getattr(options, name)
        if value is not None:
            arguments.append(f"--{name}={value}")
    return arguments


def _parser(suites: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rankonce.benchmarks", description="Measure kernels and whole passes."
    )
    if len(suites) > 1:
        parser.add_argument("suites", nargs="*", metavar="suite", help=f"of {', '.join(suites)}")
    parser.add_argument("--small", action="store_true", help="toy shapes")
    parser.add_argument("--device", help="cpu, cuda, ...; the GPU if there is one")
    parser.add_argument(
        "--minutes", type=float, default=DEFAULT_MINUTES, help="end after this time (%(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=DEFAULT_FOLDER, help="folder of results (%(default)s)"
    )
    parser.add_argument("--only", help="arms whose name holds this text")
    parser.add_argument("--commit", help="name of the commit, where git cannot say it")
    parser.add_argument(
        "--unsupervised",
        dest="supervised",
        action="store_false",
        default=None,
        help="stay in this process, even if an arm takes the GPU down",
    )
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--resume", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--announce", type=Path, help=argparse.SUPPRESS)
    return parser


def main(suites: Sequence[str] = SUITES, arguments: Sequence[str] | None = None) -> int:
    """Run from a command line; exit 2 for bad usage, 1 for failure."""
    parser = _parser(suites)
    parsed = vars(parser.parse_args(arguments))
    chosen = tuple(parsed.pop("suites", None) or suites)
    unknown = [suite for suite in chosen if suite not in suites]
    if unknown:
        parser.error(f"suite: should be one of {', '.join(suites)}, is {unknown[0]!r}")
    if parsed["minutes"] <= 0:
        parser.error(f"--minutes: should be more than 0, is {parsed['minutes']:g}")
    try:
        return run_benchmarks(BenchmarkOptions(suites=chosen, **parsed))
    except (RankOnceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
