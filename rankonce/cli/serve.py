"""``rankonce serve``: scores over HTTP."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from rankonce.cli.options import (
    AdapterOption,
    ChatOption,
    DeviceOption,
    KeepOption,
    MaxTokensPerPassOption,
    ModelOption,
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
    data_dir: Annotated[
        Path | None,
        typer.Option(
            "--data-dir",
            help="Folder for files and batches; without it there are none.",
            file_okay=False,
        ),
    ] = None,
    max_batch_lines: Annotated[
        int, typer.Option("--max-batch-lines", min=1, help="Lines of one batch.")
    ] = 50_000,
    max_file_mb: Annotated[
        int, typer.Option("--max-file-mb", min=1, help="Size of an uploaded file.")
    ] = 200,
    batch_lines_in_flight: Annotated[
        int,
        typer.Option(
            "--batch-lines-in-flight",
            min=1,
            help="Lines of batches that wait for the model at one time, beside live questions.",
        ),
    ] = 8,
    model: ModelOption = None,
    task_file: TaskFileOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    keep: KeepOption = None,
    max_tokens_per_pass: MaxTokensPerPassOption = None,
    prefix_cache_mb: PrefixCacheOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    chat: ChatOption = None,
    adapter: AdapterOption = None,
) -> None:
    """Serve scores over HTTP, to clients of OpenAI, SGLang, Cohere and Jina too.

    rankonce serve --port 8000
    """
    try:
        import fastapi  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(error.name or "fastapi", extra="serve") from error
    from rankonce.serving.app import open_listener, run_server
    from rankonce.serving.batches.config import BatchConfig
    from rankonce.serving.batches.folder import DataFolder
    from rankonce.serving.engine import ServerConfig

    # A server's log says how the model runs; uvicorn's has the same level.
    logging.getLogger("rankonce").setLevel(logging.INFO)
    batches = None
    if data_dir is not None:
        batches = BatchConfig(
            data_dir=data_dir,
            max_lines=max_batch_lines,
            max_file_mb=max_file_mb,
            max_lines_in_flight=batch_lines_in_flight,
        )
    config = ServerConfig(
        host=host, port=port, served_model_name=served_model_name, batches=batches
    )
    # A taken folder or port should be known before the weights are read.
    if data_dir is not None:
        DataFolder(data_dir).close()
    listener = open_listener(config)
    ranker = load_ranker(
        model,
        task_files=task_file,
        device=device,
        precision=precision,
        keep=keep,
        max_tokens_per_pass=max_tokens_per_pass,
        prefix_cache_mb=prefix_cache_mb,
        trust_remote_code=trust_remote_code,
        chat=chat,
        adapters=read_adapters(adapter),
    )
    # From here on a client that comes waits until it is answered.
    listener.listen()
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listener.getsockname()[1]}"
    typer.echo(
        f"serving {ranker.model.name} on {address}, the interface is at {address}/docs", err=True
    )
    run_server(ranker, config, listener)
