"""``rankonce bench serve`` and ``soak``: servers under load and faults."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from rankonce.cli.options import end_in_order, quiet_transformers

T = TypeVar("T")

ThreadsOption = Annotated[
    int | None,
    typer.Option(min=1, help="That a server computes with.", show_default="a core each"),
]
ServerArgumentsOption = Annotated[
    str, typer.Option(help="More arguments of rankonce serve, as a shell would read them.")
]
ModelFolderOption = Annotated[Path, typer.Option(exists=True, file_okay=False, help="Checkpoint.")]
SizeOption = Annotated[
    str | None,
    typer.Option(
        help="Random weights of this size (0.07m to 150m) and the embedded ranker's tokenizer, "
        "instead of a checkpoint."
    ),
]
RecordOption = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="Measure nothing, print this record."),
]
# The same folder as ``ranker.EMBEDDED_MODEL``, whose module imports torch.
EMBEDDED = Path(__file__).parents[1] / "embedded"


def usable_cores() -> int:
    import os

    return len(os.sched_getaffinity(0))


def _choose(name: str, known: Mapping[str, T], option: str) -> T:
    if name not in known:
        raise typer.BadParameter(
            f"should be one of {', '.join(known)}, is {name!r}", param_hint=option
        )
    return known[name]


def serve(
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="A server of ours that runs already, with the checkpoint of --model.",
            show_default="starts one",
        ),
    ] = None,
    model: ModelFolderOption = EMBEDDED,
    size: SizeOption = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            help="member, member_short or bench_score; may be given several times.",
            show_default="all",
        ),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            help="rankonce rank, rankonce score, vllm or transformers; may be given several times.",
            show_default="all that are there",
        ),
    ] = None,
    vllm_python: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Python of an environment in which vLLM is installed."
        ),
    ] = None,
    p99: Annotated[float, typer.Option(min=1, help="Bound of p99, ms.")] = 1000.0,
    step_seconds: Annotated[float, typer.Option(min=1, help="How long a rate is held.")] = 20.0,
    min_requests: Annotated[int, typer.Option(min=1, help="Of a step, however long.")] = 30,
    threads: ThreadsOption = None,
    server_arguments: ServerArgumentsOption = "",
    vllm_arguments: Annotated[str, typer.Option(help="The same for the vLLM server.")] = "",
    seed: Annotated[int, typer.Option(min=0, help="Of texts and arrivals.")] = 0,
    output: Annotated[Path, typer.Option(dir_okay=False, help="JSON.")] = Path(
        "results/serve.json"
    ),
    plot: Annotated[Path | None, typer.Option(dir_okay=False, help="Picture, .png.")] = None,
    page: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Markdown page with <!-- begin: serve -->."),
    ] = None,
    record: RecordOption = None,
) -> None:
    """Find how many candidates a second servers score while p99 stays within a bound.

    Requests arrive as a Poisson process whether or not earlier ones are answered; the rate is
    doubled until p99 passes the bound, then bisected. Our server stands beside the same checkpoint
    behind vLLM and behind plain transformers.
    """
    import json
    import shlex

    from rankonce.benchmarks.pages import update_page
    from rankonce.benchmarks.serve_report import describe_serving, plot_serving

    if record is not None:
        found = json.loads(record.read_text())
    else:
        from rankonce.benchmarks.serve import ServeBenchmark, measure_serving
        from rankonce.benchmarks.serve_arms import ARMS, Setup
        from rankonce.benchmarks.serve_models import shared_checkpoint
        from rankonce.benchmarks.serve_workloads import LOAD_WORKLOADS

        quiet_transformers()
        end_in_order()
        workloads = tuple(
            _choose(name, LOAD_WORKLOADS, "--workload") for name in workload or LOAD_WORKLOADS
        )
        arms = tuple(_choose(name, ARMS, "--arm").name for name in arm or ARMS)
        arguments = {
            "rankonce": shlex.split(server_arguments),
            "vllm": shlex.split(vllm_arguments),
        }
        with shared_checkpoint(model, size=size, seed=seed) as folder:
            setup = Setup(
                model=folder,
                threads=threads or usable_cores(),
                vllm_python=vllm_python,
                arguments=arguments,
                url=url,
            )
            found = measure_serving(
                ServeBenchmark(
                    setup=setup,
                    workloads=workloads,
                    arms=arms,
                    bound_ms=p99,
                    step_seconds=step_seconds,
                    min_requests=min_requests,
                    seed=seed,
                    output=output,
                )
            )
    if plot is not None:
        plot_serving(plot, found)
    text = describe_serving(found)
    if page is not None:
        update_page(page, {"serve": text}.get, example="serve")
    typer.echo(text)


def soak(
    minutes: Annotated[float, typer.Option(min=0.05, help="Of traffic.")] = 30.0,
    rate: Annotated[
        float | None,
        typer.Option(min=0.1, help="Requests a second.", show_default="80 % of the capacity"),
    ] = None,
    load: Annotated[float, typer.Option(min=0.01, help="Share of the capacity.")] = 0.8,
    p99: Annotated[float, typer.Option(min=1, help="Bound of p99 for the capacity, ms.")] = 1000.0,
    kills: Annotated[int, typer.Option(min=0, help="Of the server process.")] = 3,
    members: Annotated[int, typer.Option(min=3, help="Whose questions are asked.")] = 600,
    batch_lines: Annotated[
        int, typer.Option(min=0, help="Of each batch file beside the traffic; 0 sends none.")
    ] = 0,
    model: ModelFolderOption = EMBEDDED,
    size: SizeOption = None,
    threads: ThreadsOption = None,
    server_arguments: ServerArgumentsOption = "",
    seed: Annotated[int, typer.Option(min=0, help="Of texts and traffic.")] = 0,
    output: Annotated[Path, typer.Option(dir_okay=False, help="JSON.")] = Path("results/soak.json"),
    page: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Markdown page with <!-- begin: soak -->."),
    ] = None,
    record: RecordOption = None,
) -> None:
    """Ask a server for a long time, also wrongly, kill it, and check every answer.

    Exits with 1 if a score was wrong, a batch line lost or a valid question refused but for load.
    """
    import json
    import shlex

    from rankonce.benchmarks.pages import update_page
    from rankonce.benchmarks.soak_report import describe_soak

    if record is not None:
        found = json.loads(record.read_text())
    else:
        from rankonce.benchmarks.serve_arms import Setup
        from rankonce.benchmarks.serve_models import shared_checkpoint
        from rankonce.benchmarks.soak import SoakBenchmark, run_soak

        quiet_transformers()
        end_in_order()
        with shared_checkpoint(model, size=size, seed=seed) as folder:
            setup = Setup(
                model=folder,
                threads=threads or usable_cores(),
                arguments={"rankonce": shlex.split(server_arguments)},
            )
            found = run_soak(
                SoakBenchmark(
                    setup=setup,
                    minutes=minutes,
                    rate=rate,
                    load=load,
                    bound_ms=p99,
                    kills=kills,
                    members=members,
                    batch_lines=batch_lines,
                    seed=seed,
                    output=output,
                )
            )
    text = describe_soak(found)
    if page is not None:
        update_page(page, {"soak": text}.get, example="soak")
    typer.echo(text)
    raise typer.Exit(0 if found["is_clean"] else 1)
