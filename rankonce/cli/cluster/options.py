"""The options of ``--ray``, and what does not go with them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import typer

RayOption = Annotated[bool, typer.Option("--ray", help="Run on a Ray cluster.")]
RayAddressOption = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        metavar="HOST:PORT",
        help="Running cluster; auto is the one that this machine belongs to.",
        show_default="a cluster of this machine alone, which ends with the command",
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        help="Copies of the model that --ray scores with.",
        show_default="one a GPU, or one a CPU where there is no GPU",
    ),
]
ShardRowsOption = Annotated[
    int | None,
    typer.Option(
        "--shard-rows",
        min=1,
        help="Lines or rows of one shard of --ray: what a worker that dies loses.",
        show_default="1000",
    ),
]
ReplicasOption = Annotated[
    int | None,
    typer.Option(
        "--replicas", min=1, help="Copies of the server that --ray starts.", show_default="1"
    ),
]
MaxReplicasOption = Annotated[
    int | None,
    typer.Option(
        "--max-replicas",
        min=1,
        help="Start up to so many replicas under load, and stop them after it.",
        show_default="as many as --replicas",
    ),
]
TargetQuestionsOption = Annotated[
    float | None,
    typer.Option(
        "--target-questions",
        min=0.1,
        help="Questions under way in a replica, on average, above which --max-replicas adds one.",
        show_default="8",
    ),
]

# What one process does for itself, and several cannot do together.
_NOT_SERVED = {
    "--data-dir": "files and batches live in one process; rankonce score --ray is for many",
    "--allow-adapter-loading": "one replica would load it, the others not",
    "--header-timeout": "Ray's proxies take the questions",
    "--write-timeout": "Ray's proxies send the answers",
    "--drain-delay": "Ray's proxies know which replicas are about to stop",
}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How far a server scales.

    Attributes:
        address: of the cluster; ``None`` starts one of this machine alone.
        replicas: how many there are, at least.
        max_replicas: how many there may be under load; ``None`` adds none.
        target_questions: questions under way in a replica above which one more is started.
    """

    address: str | None
    replicas: int
    max_replicas: int | None
    target_questions: float


def check_ray_usage(ray: bool, options: Mapping[str, object], *, engine: str) -> None:
    """Refuse options of ``--ray`` without it, an address that is none, and other engines.

    Args:
        options: values by name; ``None`` where an option is not given.
        engine: what ``--engine`` says.
    """
    if ray and engine != "native":
        raise typer.BadParameter(
            f"workers of --ray hold the model themselves; scale {engine} by its own means and give "
            "its URL without --ray",
            param_hint="--engine",
        )
    for name, value in options.items():
        if value is not None and not ray:
            raise typer.BadParameter("goes with --ray", param_hint=name)
    address = options["--ray-address"]
    if address not in (None, "auto") and not re.fullmatch(r"[^/]+:\d+", str(address)):
        raise typer.BadParameter(
            "should be HOST:PORT of the cluster's head, or auto; through ray:// work is handed in "
            f"with ray job submit; is {address}",
            param_hint="--ray-address",
        )


def read_scale(
    context: typer.Context,
    ray: bool,
    address: str | None,
    replicas: int | None,
    max_replicas: int | None,
    target_questions: float | None,
    *,
    engine: str,
) -> Scale | None:
    """Read how far ``rankonce serve`` scales, ``None`` without ``--ray``."""
    check_ray_usage(
        ray,
        {
            "--ray-address": address,
            "--replicas": replicas,
            "--max-replicas": max_replicas,
            "--target-questions": target_questions,
        },
        engine=engine,
    )
    if not ray:
        return None
    for name, reason in _NOT_SERVED.items():
        source = context.get_parameter_source(name.removeprefix("--").replace("-", "_"))
        if source is not None and source.name != "DEFAULT":
            raise typer.BadParameter(f"does not go with --ray: {reason}", param_hint=name)
    if max_replicas is not None and max_replicas < (replicas or 1):
        raise typer.BadParameter(
            f"should be at least --replicas, {replicas}", param_hint="--max-replicas"
        )
    if target_questions is not None and max_replicas is None:
        raise typer.BadParameter("goes with --max-replicas", param_hint="--target-questions")
    return Scale(
        address=address,
        replicas=replicas or 1,
        max_replicas=max_replicas,
        target_questions=target_questions or 8.0,
    )
