"""The servers that are compared: how each is started, asked, and its answer read."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rankonce.benchmarks.serve_load import Call
from rankonce.benchmarks.serve_workloads import LoadRequest, LoadWorkload
from rankonce.serving.backends.commands import EngineCommand
from rankonce.serving.backends.processes import ServerProcess, free_port

SERVED_NAME = "ranker"
# The start of vLLM compiles for minutes.
READY_S = 900.0


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the servers of a run have in common.

    Attributes:
        model: folder of the checkpoint.
        threads: that each server computes with.
        vllm_python: of the environment in which vLLM is installed; ``None`` leaves it out.
        arguments: more of them for the commands, by server.
        url: of a server of ours that runs already; ``None`` starts one.
    """

    model: Path
    threads: int
    vllm_python: Path | None = None
    arguments: Mapping[str, Sequence[str]] = field(default_factory=dict)
    url: str | None = None

    def command(self, server: str, port: int) -> list[str]:
        """Write the command that starts a server."""
        return [*_COMMANDS[server](self, port), *self.arguments.get(server, ())]

    def process(self, server: str, log: Path) -> ServerProcess:
        """Make the process of a server, not started yet."""
        port = free_port()
        return ServerProcess(
            self.command(server, port),
            port=port,
            log=log,
            # Ours answers before it is warm, and says so.
            health="/ready" if server == "rankonce" else "/health",
            environment=self._environment(server),
        )

    def version(self, server: str) -> str:
        """Name the version of a server."""
        if server != "vllm":
            return f"{server} {version(server)}"
        assert self.vllm_python is not None
        # Builds for other processors have names of their own.
        script = (
            "from importlib.metadata import distributions as d; "
            "print(*(f'{x.name} {x.version}' for x in d() if x.name.startswith('vllm')))"
        )
        done = subprocess.run(
            [self.vllm_python, "-c", script], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def _environment(self, server: str) -> dict[str, str]:
        shared = {
            "OMP_NUM_THREADS": str(self.threads),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)) if server != "vllm" else "",
        }
        return {**shared, **VLLM_ENVIRONMENT} if server == "vllm" else shared


# It binds its threads to cores of its own choice otherwise, which may not be ours to use.
VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


def _rankonce_command(setup: Setup, port: int) -> list[str]:
    command = [sys.executable, "-m", "rankonce.cli", "serve", "--model", str(setup.model)]
    return [*command, "--port", str(port), "--served-model-name", SERVED_NAME, "--plain"]


def _vllm_command(setup: Setup, port: int) -> list[str]:
    assert setup.vllm_python is not None
    command = EngineCommand(
        python=setup.vllm_python,
        model=setup.model,
        served_name=SERVED_NAME,
        port=port,
        dtype="float32",
    )
    return command.write("vllm")


def _transformers_command(setup: Setup, port: int) -> list[str]:
    command = [sys.executable, "-m", "rankonce.benchmarks.serve_transformers"]
    return [*command, "--model", str(setup.model), "--port", str(port)]


_COMMANDS: dict[str, Callable[[Setup, int], list[str]]] = {
    "rankonce": _rankonce_command,
    "vllm": _vllm_command,
    "transformers": _transformers_command,
}


@dataclass(frozen=True, kw_only=True)
class ServingArm:
    """One form of question at one server.

    Attributes:
        server: who answers.
        ask: writes a request as a call.
        read: the probabilities of the labels among themselves by candidate, the first labels at
            least; reads the answer's JSON.
        has_task: it needs a request of a task.
    """

    name: str
    server: str
    ask: Callable[[LoadRequest], Call]
    read: Callable[[LoadRequest, Any], list[list[float]]]
    has_task: bool = False

    def takes(self, workload: LoadWorkload) -> bool:
        """Whether the workload's requests have this form."""
        return workload.has_task or not self.has_task


def _call(path: str, body: Any) -> Call:
    return Call(path=path, body=json.dumps(body, ensure_ascii=False).encode())


def _ask_rank(request: LoadRequest) -> Call:
    asked = request.request
    assert asked is not None
    return _call(
        "/v1/rank",
        {
            "task": asked.task,
            "id": asked.id,
            "time": asked.time,
            "profile": dict(asked.profile),
            "history": [
                {"item": {"fields": dict(e.item.fields)}, "action": e.action, "time": e.time}
                for e in asked.history
            ],
            "candidates": [{"id": c.id, "fields": dict(c.fields)} for c in asked.candidates],
        },
    )


def _read_rank(request: LoadRequest, answer: Any) -> list[list[float]]:
    results = sorted(answer["results"], key=lambda result: result["index"])
    return [[result["probabilities"][name] for name in request.label_names] for result in results]


def _score_body(request: LoadRequest) -> dict[str, Any]:
    return {
        "query": request.query,
        "items": list(request.items),
        "label_token_ids": request.label_ids,
        "apply_softmax": True,
    }


def _ask_score(request: LoadRequest) -> Call:
    return _call("/v1/score", _score_body(request))


def _read_score(request: LoadRequest, answer: Any) -> list[list[float]]:
    rows: list[list[float]] = answer["scores"]
    return rows


def _ask_generative_scoring(request: LoadRequest) -> Call:
    return _call("/generative_scoring", _score_body(request))


def _read_generative_scoring(request: LoadRequest, answer: Any) -> list[list[float]]:
    # The probability of the first label is all that it tells.
    results = sorted(answer["data"], key=lambda result: result["index"])
    return [[result["score"]] for result in results]


ARMS = {
    arm.name: arm
    for arm in (
        ServingArm(
            name="rankonce rank", server="rankonce", ask=_ask_rank, read=_read_rank, has_task=True
        ),
        ServingArm(name="rankonce score", server="rankonce", ask=_ask_score, read=_read_score),
        ServingArm(
            name="vllm",
            server="vllm",
            ask=_ask_generative_scoring,
            read=_read_generative_scoring,
        ),
        ServingArm(name="transformers", server="transformers", ask=_ask_score, read=_read_score),
    )
}
