"""``rankonce bench``: kernels and whole passes beside their limits, and the report of them."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankonce.cli.bench_distillation import pruning, rungs
from rankonce.cli.bench_serving import ThreadsOption, serve, soak, usable_cores
from rankonce.cli.bench_training import adapters, scaling, training, training_options
from rankonce.cli.options import (
    DeviceOption,
    Engine,
    EngineModelOption,
    EnginePythonOption,
    Precision,
    end_in_order,
    quiet_transformers,
    read_engine,
)

if TYPE_CHECKING:
    from rankonce.serving.backends.opening import EngineOptions

app = typer.Typer(
    name="bench",
    help="Measure kernels and whole passes beside their limits and their peers.",
    no_args_is_help=True,
)
app.command()(serve)
app.command()(soak)
app.command()(rungs)
app.command()(pruning)
app.command()(adapters)
app.command()(training)
app.command("training-options")(training_options)
app.command()(scaling)

SmallOption = Annotated[bool, typer.Option("--small", help="Toy shapes, for a look on a CPU.")]
MinutesOption = Annotated[
    float,
    typer.Option(min=0.01, help="End after this time; what no longer fits is recorded as such."),
]
OutputOption = Annotated[
    Path, typer.Option(file_okay=False, help="Folder in which the chip's folder is made.")
]
OnlyOption = Annotated[str | None, typer.Option(help="Arms whose name holds this text.")]


def _run(
    suite: str, small: bool, device: str | None, minutes: float, output: Path, only: str | None
) -> None:
    from rankonce.benchmarks.command import BenchmarkOptions, run_benchmarks

    options = BenchmarkOptions(
        suites=(suite,), small=small, device=device, minutes=minutes, output=output, only=only
    )
    raise typer.Exit(run_benchmarks(options))


@app.command()
def kernels(
    small: SmallOption = False,
    device: DeviceOption = None,
    minutes: MinutesOption = 9.0,
    output: OutputOption = Path("results"),
    only: OnlyOption = None,
) -> None:
    """Time every kernel beside its reference and other implementations."""
    _run("kernels", small, device, minutes, output, only)


@app.command("pass")
def whole_pass(
    small: SmallOption = False,
    device: DeviceOption = None,
    minutes: MinutesOption = 9.0,
    output: OutputOption = Path("results"),
    only: OnlyOption = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|NAME=URL",
            help="Compare engines instead: native, vllm or sglang, started or at a URL; given "
            "several times, in this order.",
        ),
    ] = None,
    engine_python: EnginePythonOption = None,
    engine_model: EngineModelOption = None,
    model: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Checkpoint of the engines.",
            show_default="random weights of --size",
        ),
    ] = None,
    size: Annotated[str, typer.Option(help="Of the engines' random weights, 0.4m to 150m.")] = "3m",
    requests: Annotated[
        int, typer.Option(min=1, help="Of the engines: timed alone, and again together.")
    ] = 5,
    threads: ThreadsOption = None,
) -> None:
    """Time whole passes of models with random weights beside their rooflines, or other engines.

    rankonce bench pass --engine native --engine vllm --engine-python .engines/vllm/bin/python
    """
    if engine is None:
        _run("pass", small, device, minutes, output, only)
        return
    from rankonce.benchmarks.engines import EngineBenchmark, describe_engines, measure_engines
    from rankonce.benchmarks.serve_arms import VLLM_ENVIRONMENT
    from rankonce.ranker import EMBEDDED_MODEL

    quiet_transformers()
    end_in_order()
    threads = threads or usable_cores()
    # An engine that is started takes them over.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    for name, value in VLLM_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options = EngineBenchmark(
        engines=[_read_compared(text, engine_python, engine_model) for text in engine],
        model=model or EMBEDDED_MODEL,
        size=None if model else size,
        num_requests=requests,
        threads=threads,
        output=output / "engines.json",
    )
    typer.echo(describe_engines(measure_engines(options)))


def _read_compared(text: str, python: Path | None, model: str | None) -> "EngineOptions | None":
    """Read NAME or NAME=URL."""
    name, _, url = text.partition("=")
    if name not in [*Engine]:
        raise typer.BadParameter(
            f"should be one of {', '.join(Engine)}, is {name!r}", param_hint="--engine"
        )
    chosen = Engine(name)
    if chosen is Engine.NATIVE and url:
        raise typer.BadParameter("native runs here and has no URL", param_hint="--engine")
    is_started = chosen is not Engine.NATIVE and not url
    return read_engine(
        chosen,
        url=url or None,
        python=python if is_started else None,
        model=model if chosen is not Engine.NATIVE else None,
        args=None,
        api_key=None,
        precision=Precision.FP32 if is_started else None,
        unused={},
    )


@app.command()
def precision(
    model: Annotated[
        str | None,
        typer.Option(metavar="FOLDER|ID", help="Checkpoint.", show_default="the embedded ranker"),
    ] = None,
    requests: Annotated[
        Path | None, typer.Option(help="JSON lines of requests, with labels beside if known.")
    ] = None,
    tokens: Annotated[Path | None, typer.Option(help="JSON lines of tokenised requests.")] = None,
    ml_small: Annotated[
        Path | None, typer.Option(help="Folder of MovieLens latest-small: its valid part.")
    ] = None,
    members: Annotated[int, typer.Option(help="Members of ml-small at most.")] = 300,
    arm: Annotated[
        list[str] | None,
        typer.Option(help="May be given several times.", show_default="all", metavar="NAME"),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERNS",
            help="Also FP8 but for these linear layers, such as *.o_proj,*.down_proj; may be given "
            "several times.",
        ),
    ] = None,
    device: DeviceOption = None,
    save_tokens: Annotated[
        Path | None, typer.Option(help="File for the tokenised requests.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON.", show_default="results/precision-<model>.json")
    ] = None,
    record: Annotated[Path | None, typer.Option(help="Score nothing, read this record.")] = None,
    page: Annotated[
        Path | None, typer.Option(help="Markdown page with <!-- begin: precision -->.")
    ] = None,
) -> None:
    """Compare FP8 and the head's precisions with bf16 by how they rank the same requests."""
    from rankonce.benchmarks.precision import PrecisionOptions, run_precision
    from rankonce.benchmarks.precision_arms import ARMS

    options = PrecisionOptions(
        model=model,
        device=device,
        arms=tuple(arm or ARMS),
        keep=tuple(keep or ()),
        requests=requests,
        tokens=tokens,
        ml_small=ml_small,
        num_members=members,
        save_tokens=save_tokens,
        output=output,
        record=record,
        page=page,
    )
    raise typer.Exit(run_precision(options))


@app.command()
def report(
    files: Annotated[
        list[Path],
        typer.Argument(exists=True, dir_okay=False, help="Files of results, oldest first."),
    ],
    page: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Markdown page whose marked parts (<!-- begin: kernels h200 -->) are rewritten.",
        ),
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder of the pictures.")
    ] = None,
) -> None:
    """Make tables and plots from files of results and print which bars are met."""
    from rankonce.benchmarks.report import write_report

    typer.echo(write_report(files, page=page, plots=plots))


@app.command("hot-path")
def hot_path(
    output: Annotated[Path, typer.Option(dir_okay=False, help="The record to write.")] = Path(
        "results/hot-path.json"
    ),
    requests: Annotated[int, typer.Option(min=2, help="Requests of each arm.")] = 24,
) -> None:
    """Time what a server does beside the model: tokenisation, JSON in and out."""
    import json

    from rich.console import Console

    from rankonce.benchmarks.hot_path import HotPathOptions, measure_hot_path
    from rankonce.benchmarks.records import write_record

    quiet_transformers()
    with Console(stderr=True).status("measuring") as status:
        record = measure_hot_path(
            HotPathOptions(num_requests=requests),
            on_arm=lambda name: status.update(f"measuring: {name}"),
        )
    write_record(output, record)
    typer.echo(
        json.dumps({k: record[k] for k in ("tokenising", "reading_ms", "writing_ms")}, indent=1)
    )


@app.command()
def quantization(
    size: Annotated[
        list[str] | None,
        typer.Option(help="0.07m to 150m; give several.", show_default="1m to 60m"),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Both arms are timed once a round.")] = 5,
    output: Annotated[Path, typer.Option(dir_okay=False, help="JSON.")] = Path(
        "results/quantization.json"
    ),
) -> None:
    """Time passes in int8 on this CPU beside fp32."""
    from rankonce.benchmarks.quantization import (
        QuantizationBenchmark,
        describe_quantization,
        measure_quantization,
    )

    options = QuantizationBenchmark(rounds=rounds, output=output)
    options = replace(options, sizes=tuple(size)) if size else options
    with _progress("passes of") as on_pass:
        record = measure_quantization(options, on_pass=on_pass)
    typer.echo(describe_quantization(record))


@app.command("head-precision")
def head_precision(
    file: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="Requests, as text or tokenised.")
    ],
    size: Annotated[
        list[str] | None,
        typer.Option(help="Random weights beside the embedded ranker's.", show_default="10m"),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Prefixes, the first ones.")] = 20,
    candidates: Annotated[int, typer.Option(min=2, help="Of each, from the whole file.")] = 300,
    output: Annotated[Path, typer.Option(dir_okay=False, help="JSON.")] = Path(
        "results/head-precision.json"
    ),
    plot: Annotated[Path | None, typer.Option(dir_okay=False, help="Picture.")] = None,
) -> None:
    """Compare 16-bit heads with the FP32 one over hundreds of candidates."""
    from rankonce.benchmarks.head_precision import (
        HeadPrecisionOptions,
        describe_heads,
        measure_heads,
        plot_heads,
    )
    from rankonce.benchmarks.records import write_record

    quiet_transformers()
    options = HeadPrecisionOptions(requests=file, num_requests=requests, num_candidates=candidates)
    options = replace(options, sizes=tuple(size)) if size else options
    with _progress("passes of") as on_pass:
        record = measure_heads(options, on_pass=on_pass)
    write_record(output, record, allow_nan=False)
    if plot is not None:
        plot_heads(plot, record)
    typer.echo(describe_heads(record))


@contextmanager
def _progress(verb: str) -> Iterator[Callable[[str, int, int], None]]:
    """Give a function that shows how much of what is done, one line for each name."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as progress:
        lines: dict[str, Any] = {}

        def show(name: str, done: int, of: int) -> None:
            if name not in lines:
                lines[name] = progress.add_task(f"{verb} {name}", total=of)
            progress.update(lines[name], completed=done)

        yield show
