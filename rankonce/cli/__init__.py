"""The command line: one file a subcommand, each parses, calls one function and prints.

Data goes to stdout, progress and logs to stderr. Exit 0: done; 1: failed, with ``error: ...`` on
stderr; 2: bad usage. Subcommands import what is heavy when they run, so that help is quick.
"""

import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from rankonce import __version__
from rankonce.cli import bench
from rankonce.cli.calibrate import calibrate
from rankonce.cli.crossvalidate import crossvalidate
from rankonce.cli.datasets import datasets
from rankonce.cli.demo import demo
from rankonce.cli.distill import distill
from rankonce.cli.evaluate import evaluate
from rankonce.cli.experiment import experiment
from rankonce.cli.explain_prompt import explain_prompt
from rankonce.cli.finetune import finetune
from rankonce.cli.instruct import instruct
from rankonce.cli.ladder import ladder
from rankonce.cli.merge import merge
from rankonce.cli.pretrain import pretrain
from rankonce.cli.prune import prune
from rankonce.cli.quantize import quantize
from rankonce.cli.score import score
from rankonce.cli.serve import serve
from rankonce.cli.simulate import simulate
from rankonce.cli.suite import suite
from rankonce.cli.tasks import tasks
from rankonce.cli.train import train
from rankonce.errors import RankOnceError

app = typer.Typer(
    name="rankonce",
    help="Rank many candidates for a member in one forward pass of a language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    demo,
    score,
    explain_prompt,
    tasks,
    datasets,
    simulate,
    serve,
    train,
    pretrain,
    instruct,
    finetune,
    distill,
    ladder,
    merge,
    prune,
    quantize,
    evaluate,
    calibrate,
    suite,
    crossvalidate,
    experiment,
):
    app.command()(command)
app.add_typer(bench.app)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rankonce {__version__}")
        raise typer.Exit


@app.callback()
def configure(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log on stderr.")] = False,
) -> None:
    """Set up logging before the subcommand runs."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Args:
        arguments: those of the process by default.
    """
    try:
        app(arguments, prog_name="rankonce")
    except (RankOnceError, OSError) as error:
        # OSError: a file or a port, whose name its message carries.
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
