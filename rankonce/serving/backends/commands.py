"""The commands that start the servers of other engines, as their own documentation has them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# By the names of ``rankonce.model.precision.PRECISIONS``; the others are of our own kernels.
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True, kw_only=True)
class EngineCommand:
    """What a server is started with.

    Attributes:
        python: of the environment in which the engine is installed.
        model: folder of the checkpoint, or the id of a repository.
        served_name: what the engine calls the model.
        dtype: of the weights, in torch's word; ``auto`` leaves it to the checkpoint.
        arguments: more of the engine's own.
    """

    python: str | Path
    model: str | Path
    served_name: str
    port: int
    dtype: str = "auto"
    arguments: Sequence[str] = ()

    def write(self, engine: str) -> list[str]:
        """Write the command of an engine."""
        return [str(self.python), *_COMMANDS[engine](self), *self.arguments]


def _vllm(command: EngineCommand) -> list[str]:
    return [
        *("-m", "vllm.entrypoints.openai.api_server", "--model", str(command.model)),
        *("--served-model-name", command.served_name, "--host", "127.0.0.1"),
        *("--port", str(command.port), "--dtype", command.dtype),
        # A prefix is read once, and every answer says how much of its prompt was known.
        *("--enable-prefix-caching", "--enable-prompt-tokens-details"),
    ]


def _sglang(command: EngineCommand) -> list[str]:
    return [
        *("-m", "sglang.launch_server", "--model-path", str(command.model)),
        *("--served-model-name", command.served_name, "--host", "127.0.0.1"),
        *("--port", str(command.port), "--dtype", command.dtype),
        # All items in one sequence, which works with this attention and without those two.
        *("--enable-mis", "--attention-backend", "flashinfer"),
        *("--disable-radix-cache", "--chunked-prefill-size", "-1"),
    ]


_COMMANDS: Mapping[str, Callable[[EngineCommand], list[str]]] = {"vllm": _vllm, "sglang": _sglang}
