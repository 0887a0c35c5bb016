"""``rankonce serve``: scores over HTTP."""

import logging
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
    max_wait_ms: Annotated[
        float,
        typer.Option(min=0, help="How long a pass waits for questions that are being read."),
    ] = 5.0,
    max_questions: Annotated[
        int, typer.Option(min=1, help="Questions under way; more are refused with 429.")
    ] = 1024,
    text_threads: Annotated[
        int, typer.Option(min=1, help="Threads that tokenise and write answers.")
    ] = 2,
    result_cache_pairs: Annotated[
        int,
        typer.Option(min=0, help="Keep the scores of so many pairs of prefix and candidate."),
    ] = 0,
    pin_task: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK", help="Read its instruction at the start; may be repeated."),
    ] = None,
) -> None:
    """Serve scores over HTTP, to clients of OpenAI, SGLang, Cohere and Jina too.

    rankonce serve --port 8000
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(error.name or "fastapi", extra="serve") from error
    from rankonce.serving.app import open_listener, run_server
    from rankonce.serving.batcher import BatcherConfig
    from rankonce.serving.engine import ServerConfig

    # A server's log says how the model runs; uvicorn's has the same level.
    logging.getLogger("rankonce").setLevel(logging.INFO)
    config = ServerConfig(
        host=host,
        port=port,
        served_model_name=served_model_name,
        batching=BatcherConfig(
            max_wait_ms=max_wait_ms, max_questions=max_questions, num_text_threads=text_threads
        ),
        result_cache_pairs=result_cache_pairs,
        pinned_tasks=tuple(pin_task or ()),
    )
    # A taken port should be known before the weights are read.
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
