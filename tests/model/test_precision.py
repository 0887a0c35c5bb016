"""Number formats of the weights: what is quantised, how far scores move, and what is refused."""

import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rankonce.errors import MissingDependencyError, ModelError
from rankonce.model import precision
from rankonce.model.attention import SegmentPass
from rankonce.model.loading import LoadedModel, load_model
from rankonce.model.precision import PRECISIONS, find_precision, loading_options
from rankonce.ranker import Ranker, RankerConfig
from tests.conftest import build_network, build_request, build_tokenizer

# Of log-probabilities, packed against separate: the median, and one candidate. 4-bit weights are
# multiplied in fp32. 8-bit products round their inputs to 127 steps, and where fp32 sums differ in
# their last bit, a value may round to the next step.
TOLERANCE = {"int8": (1e-5, 0.05), "nf4": (1e-5, 1e-5)}
# The block size of 4-bit weights divides these.
WIDTHS = {"hidden_size": 64, "intermediate_size": 128}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False, "attention_bias": True},
    "qwen2": {"tie_word_embeddings": True},
    "gemma3_text": {"tie_word_embeddings": True},
    "mixtral": {"tie_word_embeddings": False},
    # Not accelerated.
    "granite": {"tie_word_embeddings": False},
}
Load = Callable[[str, str], LoadedModel]

pytestmark = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="needs rankonce[quantize]"
)
quantized = pytest.mark.parametrize("name", ["int8", "nf4"])
architectures = pytest.mark.parametrize("architecture", SHAPES)


def save(folder: Path, architecture: str, **shape: Any) -> Path:
    network = build_network(architecture, **{**WIDTHS, **shape})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    network.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Save models, each once a session."""
    return cache(lambda name: save(tmp_path_factory.mktemp(name), name, **SHAPES[name]))


@pytest.fixture(scope="session")
def load(folder_of: Callable[[str], Path]) -> Load:
    """Load saved models, each once a session."""
    return cache(
        lambda architecture, name: load_model(folder_of(architecture), device="cpu", precision=name)
    )


def scores_of(model: LoadedModel, request: Any, **config: Any) -> Tensor:
    ranker = Ranker(model, config=RankerConfig(**{"prefix_cache_mb": 0, **config}))
    return as_tensor(ranker.score(request))


def as_tensor(result: Any) -> Tensor:
    return torch.tensor([list(one.log_probs.values()) for one in result.candidates])


def products_of(network: Any) -> dict[str, Any]:
    """Return the linear layers between the embeddings and the head."""
    return {
        path: module
        for path, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and path != "lm_head"
    }


def assert_near(pairs: Sequence[tuple[Tensor, Tensor]], name: str) -> None:
    differences = torch.cat([(actual - expected).abs().amax(1) for actual, expected in pairs])
    median, largest = TOLERANCE[name]
    assert float(differences.median()) <= median
    assert float(differences.max()) <= largest


def test_a_cpu_computes_in_fp32_and_a_gpu_in_bf16_unless_told() -> None:
    assert find_precision(None, "cpu") is PRECISIONS["fp32"]
    assert find_precision(None, "cuda:1") is PRECISIONS["bf16"]
    for name in ("fp8", "int8", "nf4"):
        assert find_precision(name, "cuda").dtype_on("cuda") is torch.bfloat16
        assert find_precision(name, "cpu").dtype_on("cpu") is torch.float32
    with pytest.raises(ModelError, match="one of fp32, bf16, fp16, fp8, int8, nf4, is 'int4'"):
        find_precision("int4", "cpu")


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_a_dtype_is_that_of_every_weight(load: Load, name: str, dtype: torch.dtype) -> None:
    model = load("llama", name)
    assert {one.dtype for one in model.network.parameters()} == {dtype}
    request = build_request(9)
    difference = scores_of(model, request) - scores_of(load("llama", "fp32"), request)
    assert float(difference.abs().mean()) <= {"fp32": 0, "fp16": 0.02, "bf16": 0.2}[name]


@quantized
@architectures
def test_linear_layers_are_quantised_and_nothing_else(
    load: Load, architecture: str, name: str
) -> None:
    model, plain = load(architecture, name), load(architecture, "fp32")
    products = products_of(model.network)
    assert products.keys() == products_of(plain.network).keys()
    kinds = {type(module).__name__ for module in products.values()}
    assert kinds == {{"int8": "Linear8bitLt", "nf4": "Linear4bit"}[name]}
    weights = {f"{path}.weight" for path in products}
    expected = dict(plain.network.named_parameters())
    assert "lm_head.weight" not in weights
    for path, parameter in model.network.named_parameters():
        if path not in weights:
            assert parameter.dtype == torch.float32, path
            assert torch.equal(parameter, expected[path]), path
    assert torch.equal(model.head.weight_VD, plain.head.weight_VD)
    embeddings = model.network.get_input_embeddings().weight
    assert (embeddings is model.head.weight_VD) == SHAPES[architecture]["tie_word_embeddings"]


def round_inputs(_: Any, inputs: tuple[torch.Tensor]) -> torch.Tensor:
    """Round the rows of an 8-bit product's input as bitsandbytes does: 127 steps to each side."""
    (x,) = inputs
    steps = x.half().float()
    scale = steps.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 127
    return (steps / scale).round() * scale


@quantized
@architectures
def test_scores_are_those_of_the_weights_that_it_holds(
    load: Load, architecture: str, name: str
) -> None:
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    model, plain = load(architecture, name), load(architecture, "fp32")
    held = build_network(architecture, **WIDTHS, **SHAPES[architecture])
    held.load_state_dict(plain.network.state_dict())
    request = build_request(9)
    for path, module in products_of(model.network).items():
        weight = dequantize_bnb_weight(module.weight, getattr(module, "state", None))
        with torch.no_grad():
            original = held.get_submodule(path).weight
            rounding = float((weight - original).norm() / original.norm())
            assert rounding <= {"int8": 0.01, "nf4": 0.1}[name], path
            original.copy_(weight)
        if name == "int8":
            held.get_submodule(path).register_forward_pre_hook(round_inputs)
    tokens = Ranker(model).prepare(request).rendered.tokens
    labels = [ids[0] for ids in tokens.label_ids]
    with torch.no_grad():
        expected = torch.stack(
            [
                held(torch.tensor([[*tokens.prefix_ids, *segment]])).logits[0, -1, labels]
                for segment in tokens.segment_ids
            ]
        ).log_softmax(-1)
    difference = (scores_of(model, request) - expected).abs()
    # A number between two steps may be rounded to the other one.
    assert float(difference.mean()) <= {"int8": 0.1, "nf4": 1e-5}[name]


@quantized
@architectures
def test_scores_do_not_depend_on_the_other_candidates(
    load: Load, architecture: str, name: str
) -> None:
    model, request = load(architecture, name), build_request(13)
    scores = scores_of(model, request)
    assert len(set(scores[:, 0].tolist())) == 13
    alone = [
        scores_of(model, replace(request, candidates=(candidate,)))
        for candidate in request.candidates
    ]
    fewer = replace(request, candidates=request.candidates[::3])
    reverse = replace(request, candidates=request.candidates[::-1])
    cached = Ranker(model, config=RankerConfig(prefix_cache_mb=8))
    results = [cached.score(request) for _ in range(2)]
    assert results[1].usage.cached_tokens > 0
    assert_near([(torch.cat(alone), scores)], name)
    assert_near([(as_tensor(results[0]), scores), (as_tensor(results[1]), scores)], name)
    assert_near([(scores_of(model, fewer), scores[::3])], name)
    assert_near([(scores_of(model, reverse).flip(0), scores)], name)
    assert_near([(scores_of(model, request, max_tokens_per_pass=300), scores)], name)


@quantized
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "mixtral"])
def test_quantised_layers_run_one_by_one_in_accelerated_ones(
    folder_of: Callable[[str], Path], architecture: str, name: str
) -> None:
    model = load_model(folder_of(architecture), device="cpu", precision=name)
    request = build_request(9)
    assert model.acceleration.report[-1] == (
        "layers that are not plain linears (adapters, 8 and 4 bits) run one by one"
    )
    scores = scores_of(model, request)
    rows: list[Tensor] = []
    layer = model.network.base_model.layers[-1]
    with layer.register_forward_hook(lambda *given: rows.append(given[2])):
        scores_of(model, request)
    assert rows[0].shape == (1, 9, 64)
    model.acceleration.undo()
    assert_near([(scores_of(model, request), scores)], name)


def test_an_8_bit_model_whose_rounding_falls_the_other_way_is_not_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = save(tmp_path, "granite")
    take_up = SegmentPass.take_up

    def with_noise(self: SegmentPass, k_TGK: Tensor, v_TGK: Tensor) -> tuple[Tensor, Tensor]:
        # What one step of an 8-bit input moves.
        return take_up(self, k_TGK, v_TGK * 1.005)

    monkeypatch.setattr(SegmentPass, "take_up", with_noise)
    load_model(folder, device="cpu", precision="int8")
    for name in ("fp32", "nf4"):
        with pytest.raises(ModelError, match="packed and separate logits differ"):
            load_model(folder, device="cpu", precision=name)


@pytest.mark.parametrize(("width", "refused"), [(64, False), (80, True), (48, True)])
def test_4_bit_layers_that_a_cpu_unpacks_wrongly_are_refused_by_name(
    tmp_path: Path, width: int, refused: bool
) -> None:
    # Any number of outputs will do: keys have 16.
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16}
    folder = save(tmp_path, "llama", hidden_size=width, **heads)
    load_model(folder, device="cpu", precision="int8")
    if not refused:
        load_model(folder, device="cpu", precision="nf4")
        return
    fault = rf"multiple of 64 inputs; model\.layers\.0\.self_attn\.q_proj has {width}, use int8"
    with pytest.raises(ModelError, match=fault):
        load_model(folder, device="cpu", precision="nf4")


def test_a_checkpoint_that_was_saved_in_4_bits_scores_as_before(
    folder_of: Callable[[str], Path], load: Load, tmp_path: Path
) -> None:
    model, request = load("llama", "nf4"), build_request(5)
    fresh = load_model(folder_of("llama"), device="cpu", precision="nf4")
    fresh.network.save_pretrained(tmp_path)
    fresh.tokenizer.save_pretrained(tmp_path)
    saved = load_model(tmp_path, device="cpu")
    assert_near([(scores_of(saved, request), scores_of(model, request))], "nf4")


@pytest.mark.parametrize("missing", ["bitsandbytes", "accelerate"])
def test_a_missing_library_is_named_with_its_extra(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "find_spec", lambda name: None if name == missing else name)
    for name in ("int8", "nf4"):
        with pytest.raises(MissingDependencyError, match=rf"{missing} is .*rankonce\[quantize\]"):
            loading_options(PRECISIONS[name], "cpu")
    assert loading_options(PRECISIONS["fp8"], "cpu") == {"dtype": torch.float32}


QUIETLY = """
import importlib.machinery, logging, sys, types

kernels = types.ModuleType("kernels")
kernels.__spec__ = importlib.machinery.ModuleSpec("kernels", None)
kernels.get_kernel = lambda *given, **options: print("the hub is asked for", given)
sys.modules["kernels"] = kernels
from rankonce.model.loading import load_model
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()
for name in ("int8", "nf4"):
    load_model(sys.argv[1], device="cpu", precision=name)
print(sys.modules["kernels"] is kernels, "bitsandbytes" in sys.modules)
"""


def test_loading_says_nothing_and_asks_no_hub_for_kernels(
    folder_of: Callable[[str], Path],
) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", QUIETLY, folder_of("llama")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("True True\n", "", 0)


def test_what_bitsandbytes_says_of_every_product_is_not_logged(
    load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        scores_of(load("qwen2", "int8"), build_request(2))
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")]
