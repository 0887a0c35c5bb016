"""From options to a ranker: join an engine, start one, or load it into this process."""

import logging
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from rankonce.errors import EngineError, MissingDependencyError, ModelError
from rankonce.model.adapters import is_adapter
from rankonce.model.known import read_known_model
from rankonce.prompts.tasks import Task
from rankonce.ranker import EMBEDDED_MODEL, Ranker, RankerConfig
from rankonce.serving.backends.base import Backend
from rankonce.serving.backends.commands import DTYPES, EngineCommand
from rankonce.serving.backends.scorer import EngineScorer

logger = logging.getLogger(__name__)

ENGINES = ("vllm", "sglang")
# An engine may compile for minutes before it answers.
_READY_S = 900.0


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Which engine, and where it is.

    Attributes:
        engine: one of ``ENGINES``.
        url: of a server that runs; ``None`` starts the engine.
        python: of the environment in which it is installed; ``None`` is this one.
        served_name: what it calls the model; the checkpoint's name, as it was given, by default.
        api_key: that the server wants.
        precision: of the weights; fp32 on a CPU and the checkpoint's own on a GPU by default.
        arguments: more of the engine's own, for one that is started.
    """

    engine: str
    url: str | None = None
    python: Path | None = None
    served_name: str | None = None
    api_key: str | None = None
    precision: str | None = None
    arguments: Sequence[str] = ()

    @property
    def default_port(self) -> int:
        """The port of a command that is printed; 8000, which is vLLM's own, is our server's."""
        return {"vllm": 8001, "sglang": 30_000}[self.engine]

    @property
    def dtype(self) -> str:
        """The precision in torch's word.

        Raises:
            EngineError: the engine has no such precision.
        """
        if self.precision is None:
            return "auto" if torch.cuda.is_available() else "float32"
        if self.precision not in DTYPES:
            raise EngineError(
                f"precision: {self.engine} should have one of {', '.join(DTYPES)}, is "
                f"{self.precision}; other weights are in the checkpoint, or in --engine-args"
            )
        return DTYPES[self.precision]

    def command(self, model: str | Path, *, port: int) -> EngineCommand:
        """Describe the server that would be started."""
        return EngineCommand(
            python=self.python or sys.executable,
            model=model,
            served_name=self.served_name or str(model),
            port=port,
            dtype=self.dtype,
            arguments=self.arguments,
        )


@contextmanager
def open_ranker(
    options: EngineOptions,
    name: str | Path = EMBEDDED_MODEL,
    *,
    tasks: Sequence[Task] = (),
    config: RankerConfig | None = None,
    trust_remote_code: bool = False,
) -> Iterator[Ranker]:
    """Have a ranker inside this context whose passes another engine computes.

    Args:
        name: the checkpoint; its tokenizer and calibration are read here, its weights there.
        tasks, config, trust_remote_code: as for ``Ranker.from_pretrained``.

    Raises:
        ModelError: the checkpoint is not there, or its tokenizer is not the engine's.
        EngineError: the engine is not installed, does not start or answer, or serves another model.
    """
    if is_adapter(name):
        raise ModelError(
            f"adapter: {name} is one, and the engine {options.engine} takes whole checkpoints; "
            "merge it into one (rankonce merge)"
        )
    model = read_known_model(name, trust_remote_code=trust_remote_code)
    with open_backend(options, model.name) as backend:
        bound = min(model.max_prompt_tokens, backend.max_prompt_tokens)
        ranker = Ranker(
            replace(model, max_prompt_tokens=bound),
            tasks=tasks,
            config=config,
            scorer=EngineScorer(backend),
        )
        check_tokenizer(backend, ranker)
        yield ranker


@contextmanager
def open_backend(options: EngineOptions, model: str) -> Iterator[Backend]:
    """Join or start an engine that has a checkpoint.

    Raises:
        EngineError: as ``open_ranker``.
    """
    if options.url is not None:
        with closing(_join(options, options.url, options.served_name or model)) as backend:
            yield backend
        return
    _check_installed(options)
    if options.engine == "vllm" and options.python is None:
        from rankonce.serving.backends.vllm_local import VllmInProcess

        own = _read_arguments(options.arguments)
        with closing(VllmInProcess(model, dtype=options.dtype, options=own)) as local:
            yield local
        return
    with _started(options, model) as backend:
        yield backend


def check_tokenizer(backend: Backend, ranker: Ranker) -> None:
    """Make sure that label words are the same tokens here and in the engine.

    Raises:
        ModelError: names the first word that is not.
    """
    names = {name for task in ranker.tasks.values() for name in task.label_names}
    for word in (form for name in sorted(names) for form in (name, f" {name}")):
        theirs = backend.tokenize(word)
        if theirs is None:
            logger.info("engine %s does not tell its tokens: not compared", backend.engine)
            return
        ours = ranker.model.tokenizer.encode(word, add_special_tokens=False)
        if theirs != ours:
            raise ModelError(
                f"tokenizer: the engine {backend.engine} makes {theirs} of {word!r}, that of "
                f"{ranker.model.name} makes {ours}; they should be of one checkpoint"
            )


def _join(options: EngineOptions, url: str, served_name: str, **more: object) -> Backend:
    try:
        from rankonce.serving.backends.remote import RemoteConfig
        from rankonce.serving.backends.sglang import SglangServer
        from rankonce.serving.backends.vllm import VllmServer
    except ModuleNotFoundError as error:
        raise MissingDependencyError(str(error.name), extra="engine") from error
    config = RemoteConfig(url=url, model=served_name, api_key=options.api_key, **more)  # type: ignore[arg-type]
    return VllmServer(config) if options.engine == "vllm" else SglangServer(config)


@contextmanager
def _started(options: EngineOptions, model: str) -> Iterator[Backend]:
    try:
        from rankonce.serving.backends.processes import ServerProcess, free_port, running
    except ModuleNotFoundError as error:
        raise MissingDependencyError(str(error.name), extra="engine") from error
    port = free_port()
    command = options.command(model, port=port)
    with tempfile.TemporaryDirectory() as folder:
        process = ServerProcess(
            command.write(options.engine),
            port=port,
            log=Path(folder) / "log",
            # Another environment has other libraries.
            environment={"PYTHONPATH": ""},
        )
        logger.warning("starting %s: %s", options.engine, shlex.join(process.command))

        def tell_fate() -> str:
            return "" if process.is_running else f"it ended:\n{process.log_tail()}"

        with (
            running(process, timeout_s=_READY_S),
            closing(
                _join(options, process.url, command.served_name, tell_fate=tell_fate)
            ) as backend,
        ):
            yield backend


def _check_installed(options: EngineOptions) -> None:
    engine, python = options.engine, options.python
    if python is None:
        if find_spec(engine) is not None:
            return
        place = "in the Python that runs RankOnce"
    else:
        if not python.is_file():
            raise EngineError(f"engine-python: there is no {python}")
        script = f"import importlib.util, sys; sys.exit(not importlib.util.find_spec({engine!r}))"
        if subprocess.run([python, "-c", script], capture_output=True).returncode == 0:
            return
        place = f"for {python}"
    raise EngineError(
        f"engine: {engine} is not installed {place}; name the Python that has it with "
        "--engine-python, or join a server with --engine-url"
    )


def _read_arguments(arguments: Sequence[str]) -> dict[str, str | int | bool]:
    """Read ``--max-model-len 4096 --enforce-eager`` as arguments of a function in Python."""
    options: dict[str, str | int | bool] = {}
    name = ""
    for text in arguments:
        if text.startswith("--"):
            name, _, value = text[2:].partition("=")
            name = name.replace("-", "_")
            options[name] = _read_value(value) if value else True
        elif name:
            options[name] = _read_value(text)
            name = ""
        else:
            raise EngineError(f"engine-args: should be --NAME VALUE, is {text!r}")
    return options


def _read_value(text: str) -> str | int:
    return int(text) if text.isdecimal() else text
