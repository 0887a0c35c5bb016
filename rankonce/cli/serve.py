"""``rankonce serve``: scores over HTTP."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from rankonce.cli.options import (
    AdapterOption,
    ChatOption,
    DeviceOption,
    KeepOption,
    MaxTokensPerPassOption,
    PrecisionOption,
    PrefixCacheOption,
    TaskFileOption,
    TrustRemoteCodeOption,
    load_ranker,
    read_adapters,
)
from rankonce.errors import MissingDependencyError


def serve(
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65_535, help="0 takes a free one.")
    ] = 8000,
    served_model_name: Annotated[
        str | None,
        typer.Option(
            "--served-model-name",
            help="What clients call the model.",
            show_default="the checkpoint's name",
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="FOLDER|ID or NAME=FOLDER|ID",
            help="Folder in Hugging Face form, or id of a repository on the hub; several with "
            "names, of which requests choose one by the field model.",
            show_default="the embedded movie ranker",
        ),
    ] = None,
    task_file: TaskFileOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    keep: KeepOption = None,
    max_tokens_per_pass: MaxTokensPerPassOption = None,
    prefix_cache_mb: PrefixCacheOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    chat: ChatOption = None,
    adapter: AdapterOption = None,
    allow_adapter_loading: Annotated[
        bool,
        typer.Option(
            "--allow-adapter-loading",
            help="Let clients load adapters from any folder here, and unload them.",
        ),
    ] = False,
) -> None:
    """Serve scores over HTTP, to clients of OpenAI, SGLang, vLLM, Cohere, Jina and others too.

    rankonce serve --port 8000
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(error.name or "fastapi", extra="serve") from error
    models = _read_models(model, served_model_name=served_model_name)
    adapters = read_adapters(adapter)
    if len(models) > 1 and adapters:
        raise typer.BadParameter(
            "goes with one model; load adapters over several at run time", param_hint="--adapter"
        )
    from rankonce.serving.app import open_listener, run_server
    from rankonce.serving.engine import ServerConfig

    # A server's log says how the model runs; uvicorn's has the same level.
    logging.getLogger("rankonce").setLevel(logging.INFO)
    config = ServerConfig(
        host=host,
        port=port,
        served_model_name=served_model_name,
        allow_adapter_loading=allow_adapter_loading,
    )
    # A taken port should be known before the weights are read.
    listener = open_listener(config)
    rankers = {
        name: load_ranker(
            source,
            task_files=task_file,
            device=device,
            precision=precision,
            keep=keep,
            max_tokens_per_pass=max_tokens_per_pass,
            prefix_cache_mb=prefix_cache_mb,
            trust_remote_code=trust_remote_code,
            chat=chat,
            adapters=adapters,
        )
        for name, source in models.items()
    }
    # From here on a client that comes waits until it is answered.
    listener.listen()
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listener.getsockname()[1]}"
    shown_names = ", ".join(ranker.model.name for ranker in rankers.values())
    typer.echo(f"serving {shown_names} on {address}, the interface is at {address}/docs", err=True)
    # A single model without a name of its own is called by its checkpoint's.
    run_server(rankers.get("", rankers), config, listener)


def _read_models(
    texts: Sequence[str] | None, *, served_model_name: str | None
) -> dict[str, str | None]:
    """Read where each model is, by its name; the only one may have none."""
    if not texts:
        return {"": None}
    models: dict[str, str | None] = {}
    for text in texts:
        name, _, source = text.partition("=")
        if not source or Path(text).exists():  # a folder may have a = in its name
            name, source = "", text
        if len(texts) > 1 and not name:
            raise typer.BadParameter(
                f"should be NAME=FOLDER where there are several, is {text!r}", param_hint="--model"
            )
        if name in models:
            raise typer.BadParameter(f"{name!r} is given twice", param_hint="--model")
        models[name] = source
    if served_model_name is not None and "" not in models:
        raise typer.BadParameter(
            "goes with one --model that has no name of its own", param_hint="--served-model-name"
        )
    return models
