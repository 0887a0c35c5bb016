"""Engines around one small checkpoint, and what plain transformers says of it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankonce.ranker import Ranker
from rankonce.serving.backends.opening import EngineOptions, open_ranker
from tests.conftest import build_network, build_tokenizer
from tests.serving.backends.engine_server import Plain, create_engine_app
from tests.serving.conftest import serving_app

# The Python of the environment in which vLLM is installed: make test-engines gives it.
VLLM_PYTHON = "RANKONCE_VLLM_PYTHON"


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A ranker over an engine.

    Attributes:
        tolerance: of log-probabilities, against plain transformers in FP32.
        gives_top: it tells the most probable tokens as well.
        tells_cached: it tells what its prefix cache spared.
    """

    name: str
    ranker: Ranker
    tolerance: float
    gives_top: bool = True
    tells_cached: bool = True


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that vLLM takes: it wants heads of at least 32."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    build_network("qwen3", hidden_size=64, head_dim=32).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def plain(checkpoint: Path) -> Plain:
    return Plain(AutoModelForCausalLM.from_pretrained(checkpoint).eval())


@pytest.fixture(scope="session")
def engine_url(checkpoint: Path, plain: Plain) -> Iterator[str]:
    """The engine of this test suite."""
    app = create_engine_app(plain, AutoTokenizer.from_pretrained(checkpoint))
    with serving_app(app) as client:
        yield str(client.base_url).rstrip("/")


@pytest.fixture(scope="session")
def packing_url(checkpoint: Path, plain: Plain) -> Iterator[str]:
    """The same, as SGLang packs items into its context."""
    app = create_engine_app(plain, AutoTokenizer.from_pretrained(checkpoint), packs_items=True)
    with serving_app(app) as client:
        yield str(client.base_url).rstrip("/")


@pytest.fixture(
    scope="session",
    params=["native", "vllm form", "sglang form", pytest.param("vllm", marks=pytest.mark.slow)],
)
def engine(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[Engine]:
    """Every engine: ours, the two wire forms, and a vLLM server that is started."""
    name = str(request.param)
    if name == "native":
        yield Engine(name=name, ranker=Ranker.from_pretrained(checkpoint), tolerance=1e-5)
        return
    if name == "vllm":
        options = EngineOptions(engine="vllm", python=vllm_python(), served_name="tiny")
    else:
        kind = name.removesuffix(" form")
        url = request.getfixturevalue("packing_url" if kind == "sglang" else "engine_url")
        options = EngineOptions(engine=kind, url=url, served_name="tiny")
    with open_ranker(options, checkpoint) as ranker:
        yield Engine(
            name=name,
            ranker=ranker,
            # vLLM's layers and head are of other kernels, in FP32 as well.
            tolerance=2e-4 if name == "vllm" else 1e-5,
            gives_top=options.engine != "sglang",
            tells_cached=options.engine != "sglang",
        )


def vllm_python() -> Path:
    """Return the Python of vLLM's environment, or skip the test; set what its CPU build wants."""
    path = os.environ.get(VLLM_PYTHON)
    if path is None:
        pytest.skip(f"no vLLM: make test-engines installs it, or set {VLLM_PYTHON}")
    for name, value in {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }.items():
        os.environ.setdefault(name, value)
    return Path(path)
