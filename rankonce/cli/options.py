"""Options that several commands share, and the loading of a ranker from them."""

import logging
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankonce.cli.request_files import STDIN

if TYPE_CHECKING:
    from rankonce.ranker import Ranker
    from rankonce.serving.backends.opening import EngineOptions


class Precision(StrEnum):
    """The names of ``rankonce.model.precision.PRECISIONS``, which imports torch."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    FP8 = "fp8"
    INT8 = "int8"
    NF4 = "nf4"


class Engine(StrEnum):
    """Whoever computes the passes."""

    NATIVE = "native"
    VLLM = "vllm"
    SGLANG = "sglang"


def _check_requests(path: Path) -> Path:
    # typer's own check takes "-" for the name of a file.
    if path != STDIN and (path.is_dir() or not path.exists()):
        raise typer.BadParameter(f"there is no file {str(path)!r}")
    return path


RequestsArgument = Annotated[
    Path,
    typer.Argument(
        callback=_check_requests,
        help="JSON lines, or Parquet by its suffix; - reads JSON lines from stdin.",
    ),
]
# Options without a value leave the choice to ``RankerConfig`` and ``load_model``: the texts of
# show_default say what that is.
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="FOLDER|ID",
        help="Folder in Hugging Face form, or id of a repository on the hub.",
        show_default="the embedded movie ranker",
    ),
]
TaskFileOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--task-file",
        exists=True,
        dir_okay=False,
        help="Task file (YAML) beside the library's tasks; may be given several times.",
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, cuda:1, ...", show_default="the GPU if there is one"),
]
PrecisionOption = Annotated[
    Precision | None,
    typer.Option(
        "--precision",
        help="Of the weights; int8 and nf4 need bitsandbytes.",
        show_default="bf16 on a GPU, fp32 on a CPU",
    ),
]
KeepOption = Annotated[
    list[str] | None,
    typer.Option(
        "--keep",
        metavar="PATTERN",
        help="Linear layers that FP8 leaves as they are, such as *.down_proj; may be given several "
        "times.",
    ),
]
MaxTokensPerPassOption = Annotated[
    int | None,
    typer.Option(
        "--max-tokens-per-pass",
        min=1,
        help="Computed tokens of one forward pass; bounds its memory.",
        show_default="16384",
    ),
]
PrefixCacheOption = Annotated[
    int | None,
    typer.Option(
        "--prefix-cache-mb",
        min=0,
        help="Bound of the prefix cache in MB; 0 keeps nothing.",
        show_default="256",
    ),
]
LabelMassOption = Annotated[
    bool,
    typer.Option("--label-mass", help="Also report the labels' share of the whole vocabulary."),
]
TrustRemoteCodeOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")
]
ChatOption = Annotated[
    bool | None,
    typer.Option(
        "--chat/--plain",
        help="Use the tokenizer's chat template, or plain text.",
        show_default="chat where there is a template",
    ),
]
AdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="NAME=DIR",
        help="Adapter over the model, by the name that requests choose it by; may be given several "
        "times.",
    ),
]


EngineOption = Annotated[
    Engine,
    typer.Option("--engine", help="Computes the passes: RankOnce itself, or another engine."),
]
EngineUrlOption = Annotated[
    str | None,
    typer.Option(
        "--engine-url",
        metavar="URL",
        help="Server of the engine, which runs already.",
        show_default="one is started",
    ),
]
EnginePythonOption = Annotated[
    Path | None,
    typer.Option(
        "--engine-python",
        metavar="PATH",
        help="Python of the environment in which the engine is installed.",
        show_default="this one",
    ),
]
EngineModelOption = Annotated[
    str | None,
    typer.Option(
        "--engine-model",
        metavar="NAME",
        help="What the engine calls the model.",
        show_default="as --model has it",
    ),
]
EngineArgsOption = Annotated[
    str | None,
    typer.Option(
        "--engine-args",
        metavar="TEXT",
        help="More arguments of the engine that is started, such as '--max-model-len 8192'.",
    ),
]
EngineKeyOption = Annotated[
    str | None,
    typer.Option(
        "--engine-api-key",
        envvar="RANKONCE_ENGINE_API_KEY",
        help="Key that the engine's server wants.",
    ),
]


def read_engine(
    engine: Engine,
    *,
    url: str | None,
    python: Path | None,
    model: str | None,
    args: str | None,
    api_key: str | None,
    precision: Precision | None,
    unused: Mapping[str, object],
) -> "EngineOptions | None":
    """Read the options of an engine; ``None`` is RankOnce itself.

    Args:
        unused: options that the native engine alone has, by name; none may be given for another.
    """
    given = {
        "--engine-url": url,
        "--engine-python": python,
        "--engine-model": model,
        "--engine-args": args,
    }
    if engine is Engine.NATIVE:
        for name, value in given.items():
            if value is not None:
                raise typer.BadParameter("goes with another --engine than native", param_hint=name)
        return None
    for option, unwanted in unused.items():
        if unwanted:
            raise typer.BadParameter(f"does not go with --engine {engine.value}", param_hint=option)
    if url is not None:
        if not url.startswith(("http://", "https://")):
            raise typer.BadParameter(
                f"should begin with http:// or https://, is {url!r}", param_hint="--engine-url"
            )
        for option in ("--engine-python", "--engine-args"):
            if given[option] is not None:
                raise typer.BadParameter(
                    "starts an engine, and --engine-url joins one that runs", param_hint=option
                )
        if precision is not None:
            raise typer.BadParameter(
                "is settled by the engine that runs at --engine-url", param_hint="--precision"
            )
    from rankonce.serving.backends.opening import EngineOptions

    return EngineOptions(
        engine=engine.value,
        url=url,
        python=python,
        served_name=model,
        api_key=api_key,
        precision=None if precision is None else precision.value,
        arguments=shlex.split(args or ""),
    )


def read_adapters(texts: Sequence[str] | None) -> dict[str, Path] | None:
    """Read ``NAME=DIR`` of every adapter, ``None`` if there are none."""
    folders: dict[str, Path] = {}
    for text in texts or ():
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise typer.BadParameter(f"should be NAME=DIR, is {text!r}", param_hint="--adapter")
        if name in folders:
            raise typer.BadParameter(f"{name!r} is given twice", param_hint="--adapter")
        folders[name] = Path(folder)
    return folders or None


def load_ranker(
    model: str | None = None,
    *,
    task_files: Sequence[Path] | None = None,
    device: str | None = None,
    precision: Precision | None = None,
    keep: Sequence[str] | None = None,
    max_tokens_per_pass: int | None = None,
    prefix_cache_mb: int | None = None,
    label_mass: bool = False,
    trust_remote_code: bool = False,
    chat: bool | None = None,
    adapters: Mapping[str, Path] | None = None,
    adapter: str | None = None,
    calibrate: bool = True,
) -> "Ranker":
    """Load the ranker that the options describe.

    Args:
        adapter: scores the requests that name none.
        calibrate: apply the calibrations beside the model and its adapters.

    Raises:
        RankOnceError: the checkpoint or a task file cannot be used.
    """
    from rankonce.prompts.tasks import load_task

    # Task files first: a fault in one should not wait for the weights.
    own_tasks = [load_task(path) for path in task_files or ()]

    from rankonce.ranker import EMBEDDED_MODEL, Ranker, RankerConfig

    quiet_transformers()
    given = _given(max_tokens_per_pass=max_tokens_per_pass, prefix_cache_mb=prefix_cache_mb)
    return Ranker.from_pretrained(
        model or EMBEDDED_MODEL,
        device=device,
        precision=precision,
        keep=tuple(keep or ()),
        trust_remote_code=trust_remote_code,
        tasks=own_tasks,
        config=RankerConfig(
            label_mass=label_mass, chat=chat, adapter=adapter, calibrate=calibrate, **given
        ),
        adapters=adapters,
    )


@contextmanager
def open_ranker(
    engine: "EngineOptions | None",
    model: str | None = None,
    *,
    task_files: Sequence[Path] | None = None,
    max_tokens_per_pass: int | None = None,
    label_mass: bool = False,
    trust_remote_code: bool = False,
    chat: bool | None = None,
    **native: Any,
) -> Iterator["Ranker"]:
    """Have a ranker inside this context, of this process or over another engine.

    Args:
        native: what ``load_ranker`` takes besides, and another engine does not.
    """
    if engine is None:
        yield load_ranker(
            model,
            task_files=task_files,
            max_tokens_per_pass=max_tokens_per_pass,
            label_mass=label_mass,
            trust_remote_code=trust_remote_code,
            chat=chat,
            **native,
        )
        return
    from rankonce.prompts.tasks import load_task

    own_tasks = [load_task(path) for path in task_files or ()]

    from rankonce.ranker import EMBEDDED_MODEL, RankerConfig
    from rankonce.serving.backends import opening

    quiet_transformers()
    given = _given(max_tokens_per_pass=max_tokens_per_pass)
    with opening.open_ranker(
        engine,
        model or EMBEDDED_MODEL,
        tasks=own_tasks,
        config=RankerConfig(label_mass=label_mass, chat=chat, **given),
        trust_remote_code=trust_remote_code,
    ) as ranker:
        yield ranker


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def end_in_order() -> None:
    """Let SIGTERM unwind as Ctrl-C does, so that servers that were started end as well."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def is_first_process() -> bool:
    """Whether this process speaks for all that ``torchrun`` or ``accelerate launch`` started."""
    return os.environ.get("RANK", "0") == "0"


def quiet_transformers() -> None:
    """Keep transformers' and accelerate's advice off stderr, unless logging is wanted."""
    if logging.getLogger().isEnabledFor(logging.INFO):
        return
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
