"""Options that the training commands share, and what becomes of them."""

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankonce.cli.options import is_first_process
from rankonce.errors import TrainingError

if TYPE_CHECKING:
    from rankonce.training.adapters import AdapterConfig
    from rankonce.training.loop import TrainConfig

_OUT: Any = typer.Option(
    "--out", file_okay=False, help="Folder of the model; a run found there goes on."
)
RunFolderOption = Annotated[Path, _OUT]
MaybeRunFolderOption = Annotated[Path | None, _OUT]
StartModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="FOLDER|ID",
        help="Checkpoint to start from.",
        show_default="from scratch",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Of everything.")]
LearningRateOption = Annotated[float, typer.Option("--learning-rate", min=0.0, help="The peak.")]
PassTokensOption = Annotated[
    int, typer.Option("--max-tokens-per-pass", min=1, help="Bounds the memory of a pass.")
]

SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Change a setting of training, e.g. precision=bf16; may be repeated.",
    ),
]
BalanceOption = Annotated[
    float, typer.Option(min=1.0, help="Above 1, small tasks come more often.")
]
StylesOption = Annotated[
    bool, typer.Option("--styles", help="Draw one of its task's wordings for every example.")
]

LoraRankOption = Annotated[
    int | None,
    typer.Option(
        "--lora-rank",
        min=1,
        help="Train an adapter of this rank over --model, which stays as it is.",
        show_default="train the whole model",
    ),
]
LoraAlphaOption = Annotated[
    int | None,
    typer.Option("--lora-alpha", min=1, help="Scales the adapter.", show_default="twice the rank"),
]
LoraDropoutOption = Annotated[
    float | None,
    typer.Option(
        "--lora-dropout", min=0.0, max=0.99, help="Of an adapter's inputs.", show_default="0"
    ),
]
LoraTargetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--lora-target",
        metavar="NAME",
        help="Linear layers that get the adapter, such as q_proj; may be given several times.",
        show_default="all of the decoder",
    ),
]
QloraOption = Annotated[
    bool,
    typer.Option("--qlora", help="Hold the model in 4 bits (NF4) while the adapter learns."),
]
AdapterNameOption = Annotated[
    str | None,
    typer.Option("--adapter-name", help="Domain of the adapter.", show_default="default"),
]


def size_option(*, default: str) -> Any:
    """Make the option of a size from scratch; the default is the text of --help alone."""
    return typer.Option(
        "--size",
        metavar="NAME|FOLDER",
        help="Size from scratch: 0.07m to 150m, or a checkpoint whose shape and tokenizer to take.",
        show_default=default,
    )


def check_start(model: str | None, size: str | None) -> None:
    """Refuse a size beside a checkpoint, which has its own."""
    if model is not None and size is not None:
        raise typer.BadParameter("is for training from scratch", param_hint="--size")


def read_loss(text: str) -> tuple[str, float]:
    """Read ``NAME`` or ``NAME=WEIGHT``."""
    name, _, weight = text.partition("=")
    try:
        return name, float(weight or 1.0)
    except ValueError as error:
        raise TrainingError(f"loss: should be NAME or NAME=WEIGHT, is {text!r}") from error


def read_adapter_config(
    *,
    lora_rank: LoraRankOption = None,
    lora_alpha: LoraAlphaOption = None,
    lora_dropout: LoraDropoutOption = None,
    lora_target: LoraTargetOption = None,
    qlora: QloraOption = False,
    adapter_name: AdapterNameOption = None,
) -> "AdapterConfig | None":
    """Read how an adapter is trained; ``None`` without a rank, which the others need."""
    if lora_rank is None:
        others = (lora_alpha, lora_dropout, lora_target, adapter_name)
        if qlora or any(option is not None for option in others):
            raise typer.BadParameter(
                "should be given where an adapter is meant", param_hint="--lora-rank"
            )
        return None
    from rankonce.training.adapters import AdapterConfig

    return AdapterConfig(
        name=adapter_name or "default",
        rank=lora_rank,
        alpha=lora_alpha,
        dropout=lora_dropout or 0.0,
        targets=tuple(lora_target) if lora_target else None,
        quantize="nf4" if qlora else "none",
    )


def change_config(
    config: "TrainConfig", settings: Sequence[str] | None, **options: Any
) -> "TrainConfig":
    """Change what the command's own options say, and what ``--set`` names beside them."""
    from dataclasses import replace

    from rankonce.training.recipes import read_settings

    named = read_settings(settings or ())
    if both := sorted(named.keys() & options):
        raise TrainingError(f"set: {', '.join(both)}: the command has an option for it")
    return replace(config, **options, **named)


def takes_adapter(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of ``read_adapter_config`` in place of its ``adapter``.

    typer reads signatures, so the command gets one that has them.
    """
    options = inspect.signature(read_adapter_config).parameters
    own = inspect.signature(command).parameters
    shown = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in (*own.values(), *options.values())
        if parameter.name != "adapter"
    ]

    @wraps(command)
    def run(**given: Any) -> None:
        adapter = read_adapter_config(**{name: given.pop(name) for name in options})
        command(**given, adapter=adapter)

    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return run


def tell_model(out: Path) -> None:
    """Say where the model is, once, however many processes trained it."""
    if is_first_process():
        typer.echo(f"model: {out}", err=True)
