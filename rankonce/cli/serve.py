"""``rankonce serve``: scores over HTTP."""

import ipaddress
import logging
import shlex
import signal
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING, Any

import typer

from rankonce.cli.cluster.options import (
    MaxReplicasOption,
    RayAddressOption,
    RayOption,
    ReplicasOption,
    TargetQuestionsOption,
    read_scale,
)
from rankonce.cli.options import (
    AdapterOption,
    ChatOption,
    DeviceOption,
    Engine,
    EngineArgsOption,
    EngineKeyOption,
    EngineModelOption,
    EngineOption,
    EnginePythonOption,
    EngineUrlOption,
    KeepOption,
    MaxTokensPerPassOption,
    PrecisionOption,
    PrefixCacheOption,
    TaskFileOption,
    TrustRemoteCodeOption,
    open_ranker,
    read_adapters,
    read_engine,
)
from rankonce.cli.serve_options import (
    AllowAdapterLoadingOption,
    ApiKeysOption,
    BatchLinesInFlightOption,
    BodyTimeoutOption,
    DataDirOption,
    DrainDelayOption,
    DrainTimeoutOption,
    HeaderTimeoutOption,
    HostOption,
    LogBodiesOption,
    LogFormat,
    LogFormatOption,
    MaxBatchLinesOption,
    MaxBodyMbOption,
    MaxCandidatesOption,
    MaxFileMbOption,
    MaxOpenBodyMbOption,
    MaxQuestionsOption,
    MaxQueueSOption,
    MaxWaitMsOption,
    ModelsOption,
    OpenMetricsOption,
    OtlpEndpointOption,
    PinTaskOption,
    PortOption,
    PrintEngineCommandOption,
    RequestsPerMinuteOption,
    ResultCachePairsOption,
    ServedModelNameOption,
    TextThreadsOption,
    TokensPerMinuteOption,
    WarmUpOption,
    WriteTimeoutOption,
)
from rankonce.errors import MissingDependencyError

if TYPE_CHECKING:
    from rankonce.ranker import Ranker
    from rankonce.serving.backends.opening import EngineOptions
    from rankonce.serving.engine import ServerConfig
    from rankonce.serving.operations import OperationsConfig

logger = logging.getLogger(__name__)


def serve(
    context: typer.Context,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    served_model_name: ServedModelNameOption = None,
    data_dir: DataDirOption = None,
    max_batch_lines: MaxBatchLinesOption = 50_000,
    max_file_mb: MaxFileMbOption = 200,
    batch_lines_in_flight: BatchLinesInFlightOption = 8,
    model: ModelsOption = None,
    task_file: TaskFileOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    keep: KeepOption = None,
    max_tokens_per_pass: MaxTokensPerPassOption = None,
    prefix_cache_mb: PrefixCacheOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    chat: ChatOption = None,
    adapter: AdapterOption = None,
    allow_adapter_loading: AllowAdapterLoadingOption = False,
    engine: EngineOption = Engine.NATIVE,
    engine_url: EngineUrlOption = None,
    engine_python: EnginePythonOption = None,
    engine_model: EngineModelOption = None,
    engine_args: EngineArgsOption = None,
    engine_api_key: EngineKeyOption = None,
    print_engine_command: PrintEngineCommandOption = False,
    max_wait_ms: MaxWaitMsOption = 5.0,
    max_questions: MaxQuestionsOption = 1024,
    max_queue_s: MaxQueueSOption = 30.0,
    text_threads: TextThreadsOption = 2,
    result_cache_pairs: ResultCachePairsOption = 0,
    pin_task: PinTaskOption = None,
    max_candidates: MaxCandidatesOption = 10_000,
    max_body_mb: MaxBodyMbOption = 32,
    max_open_body_mb: MaxOpenBodyMbOption = 512,
    header_timeout: HeaderTimeoutOption = 10,
    body_timeout: BodyTimeoutOption = 30,
    write_timeout: WriteTimeoutOption = 30,
    api_keys: ApiKeysOption = None,
    requests_per_minute: RequestsPerMinuteOption = None,
    tokens_per_minute: TokensPerMinuteOption = None,
    open_metrics: OpenMetricsOption = False,
    log_format: LogFormatOption = LogFormat.TEXT,
    log_bodies: LogBodiesOption = False,
    otlp_endpoint: OtlpEndpointOption = None,
    warm_up: WarmUpOption = True,
    drain_delay: DrainDelayOption = 0,
    drain_timeout: DrainTimeoutOption = 30,
    ray: RayOption = False,
    ray_address: RayAddressOption = None,
    replicas: ReplicasOption = None,
    max_replicas: MaxReplicasOption = None,
    target_questions: TargetQuestionsOption = None,
) -> None:
    """Serve scores over HTTP, to clients of OpenAI, SGLang, vLLM, Cohere, Jina and others too.

    rankonce serve --port 8000
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        library = (error.name or "fastapi").replace("_", "-")
        raise MissingDependencyError(library, extra="serve") from error
    scale = read_scale(
        context,
        ray,
        ray_address,
        replicas,
        max_replicas,
        target_questions,
        engine=engine.value,
    )
    models = _read_models(model, served_model_name=served_model_name)
    adapters = read_adapters(adapter)
    other_engine = read_engine(
        engine,
        url=engine_url,
        python=engine_python,
        model=engine_model,
        args=engine_args,
        api_key=engine_api_key,
        precision=precision,
        unused={
            "--device": device,
            "--keep": keep,
            "--prefix-cache-mb": prefix_cache_mb,
            "--adapter": adapter,
            "--allow-adapter-loading": allow_adapter_loading,
        },
    )
    if other_engine is not None and len(models) > 1:
        raise typer.BadParameter(
            f"gives one model for --engine {engine.value}", param_hint="--model"
        )
    if print_engine_command:
        _print_engine_command(other_engine, next(iter(models.values())))
        return
    if len(models) > 1 and adapters:
        raise typer.BadParameter(
            "goes with one model; load adapters over several at run time", param_hint="--adapter"
        )
    from rankonce.serving.app import open_listener
    from rankonce.serving.batcher import BatcherConfig
    from rankonce.serving.batches.config import BatchConfig
    from rankonce.serving.batches.folder import DataFolder
    from rankonce.serving.engine import ServerConfig
    from rankonce.serving.keys import read_keys
    from rankonce.serving.logs import configure_logs
    from rankonce.serving.operations import OperationsConfig

    configure_logs(log_format.value, log_bodies=log_bodies)
    _stop_when_told()
    operations = OperationsConfig(
        keys=read_keys(api_keys) if api_keys else None,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        open_metrics=open_metrics,
        log_bodies=log_bodies,
        otlp_endpoint=otlp_endpoint,
        header_timeout_s=header_timeout,
        body_timeout_s=body_timeout,
        write_timeout_s=write_timeout,
        max_open_body_mb=max_open_body_mb,
        warm_up=warm_up,
        drain_delay_s=drain_delay,
        drain_timeout_s=drain_timeout,
    )
    batches = None
    if data_dir is not None:
        batches = BatchConfig(
            data_dir=data_dir,
            max_lines=max_batch_lines,
            max_file_mb=max_file_mb,
            max_lines_in_flight=batch_lines_in_flight,
        )
    config = ServerConfig(
        host=host,
        port=port,
        served_model_name=served_model_name,
        batching=BatcherConfig(
            max_wait_ms=max_wait_ms,
            max_questions=max_questions,
            max_queue_s=max_queue_s,
            num_text_threads=text_threads,
        ),
        result_cache_pairs=result_cache_pairs,
        pinned_tasks=tuple(pin_task or ()),
        max_candidates=max_candidates,
        max_body_mb=max_body_mb,
        batches=batches,
        allow_adapter_loading=allow_adapter_loading,
    )
    _warn_of_exposure(host, operations)
    if allow_adapter_loading and operations.keys is None and not _is_loopback(host):
        raise typer.BadParameter(
            f"lets whoever reaches {host} load any folder: give keys with --api-keys FILE, one "
            "with the word adapters",
            param_hint="--allow-adapter-loading",
        )
    loading: dict[str, Any] = {
        "task_files": task_file,
        "device": device,
        "precision": precision,
        "keep": keep,
        "max_tokens_per_pass": max_tokens_per_pass,
        "prefix_cache_mb": prefix_cache_mb,
        "trust_remote_code": trust_remote_code,
        "chat": chat,
        "adapters": adapters,
    }
    if scale is not None:
        from rankonce.cli.cluster.serving import ReplicaPlan, serve_on_ray

        plan = ReplicaPlan(
            models=models,
            loading=loading,
            config=config,
            operations=operations,
            log_format=log_format.value,
        )
        serve_on_ray(plan, scale)
        return
    # A taken folder or port should be known before the weights are read.
    if data_dir is not None:
        DataFolder(data_dir).close()
    listener = open_listener(config)
    with ExitStack() as stack:
        rankers = {
            name: stack.enter_context(open_ranker(other_engine, source, **loading))
            for name, source in models.items()
        }
        if not _run(rankers, config, listener, operations):
            raise typer.Exit(1)


def _run(
    rankers: "Mapping[str, Ranker]",
    config: "ServerConfig",
    listener: "socket",
    operations: "OperationsConfig",
) -> bool:
    """Serve until told to stop; whether the server could answer."""
    from rankonce.serving.app import run_server

    # From here on a client that comes waits until it is answered.
    listener.listen()
    shown = f"[{config.host}]" if ":" in config.host else config.host
    address = f"http://{shown}:{listener.getsockname()[1]}"
    shown_names = ", ".join(ranker.model.name for ranker in rankers.values())
    # A line of the log like any other, so that whoever reads JSON lines can read it too.
    logger.info("serving %s on %s, the interface is at %s/docs", shown_names, address, address)
    # A single model without a name of its own is called by its checkpoint's.
    return run_server(rankers.get("", rankers), config, listener, operations)


def _print_engine_command(engine: "EngineOptions | None", model: str | None) -> None:
    from rankonce.ranker import EMBEDDED_MODEL

    if engine is None or engine.url is not None:
        raise typer.BadParameter(
            "goes with an --engine that is started", param_hint="--print-engine-command"
        )
    command = engine.command(model or EMBEDDED_MODEL, port=engine.default_port)
    typer.echo(shlex.join(command.write(engine.engine)))


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


def _stop_when_told() -> None:
    """Stop on SIGTERM while the model loads; the first process of a container ignores it else."""

    def stop(*_: object) -> None:
        raise SystemExit(0)

    # The server has a handler of its own, and leaves this one behind.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


def _warn_of_exposure(host: str, operations: "OperationsConfig") -> None:
    """Say loudly what others on the network can do."""
    if not _is_loopback(host) and operations.keys is None:
        logger.warning(
            "ANYONE WHO REACHES %s MAY ASK THIS SERVER: there are no API keys, give them with "
            "--api-keys FILE",
            host,
        )
    if operations.log_bodies:
        logger.warning("THE LOG SHOWS WHAT MEMBERS WROTE: --log-bodies is on")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
