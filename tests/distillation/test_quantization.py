"""Quantised checkpoints: what is written loads again, ranks as before, and refusals are clear."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rankonce.distillation.quantization import QuantizationOptions, quantize_model
from rankonce.errors import DataError, ModelError
from rankonce.model.loading import load_model
from rankonce.model.quantized import find_scheme, row_layers
from rankonce.ranker import EMBEDDED_MODEL, Ranker, RankerConfig
from rankonce.records import read_request
from tests.conftest import build_network, build_tokenizer

MODEL = str(EMBEDDED_MODEL)
DATA = Path(EMBEDDED_MODEL) / "demo.jsonl"
# Packed against separate, of log-probabilities: the median, and one candidate. Where fp32 sums
# differ in their last bit, a value of an input may round to the next of its steps.
TOLERANCE = (1e-6, 1e-3)


@pytest.mark.parametrize("scheme", ["fp8", "cpu-int8", "int8", "nf4"])
def test_a_quantised_checkpoint_loads_and_keeps_the_ranking(tmp_path: Path, scheme: str) -> None:
    out = tmp_path / "q"
    options = QuantizationOptions(model=MODEL, out=out, scheme=scheme, data=DATA, device="cpu")
    record = quantize_model(options)
    assert record["verdict"] == "accepted", record["failures"]
    assert 0 < record["arms"]["quantised"]["against"]["unquantised"]["max_delta"] < 0.2
    assert json.loads((out / "quantization.json").read_text())["scheme"] == scheme
    model = load_model(out, device="cpu")
    assert find_scheme(model.network.config) == scheme
    # The head and the embeddings stay float.
    assert model.head.weight_VD.dtype == torch.float32
    kept = [weight for weight in model.network.parameters() if weight.is_floating_point()]
    assert {weight.dtype for weight in kept} == {torch.float32}


@pytest.mark.parametrize("prefix_cache_mb", [0, 16])
@pytest.mark.parametrize("scheme", ["fp8", "cpu-int8"])
def test_packed_equals_separate_in_row_wise_checkpoints(
    written: Callable[[str], Path], scheme: str, prefix_cache_mb: int
) -> None:
    model = load_model(written(scheme), device="cpu")
    ranker = Ranker(model, config=RankerConfig(prefix_cache_mb=prefix_cache_mb))
    assert len(list(row_layers(ranker.model.network))) == 4 * 7
    differences = []
    for line in DATA.read_text().splitlines():
        data = json.loads(line)
        packed = ranker.score(read_request(data)).candidates
        for index in range(0, len(packed), 9):
            one = {**data, "candidates": [data["candidates"][index]]}
            alone = ranker.score(read_request(one)).candidates[0]
            differences += [
                abs(packed[index].log_probs[label] - value)
                for label, value in alone.log_probs.items()
            ]
    assert len(differences) >= 20
    assert np.median(differences) <= TOLERANCE[0]
    assert max(differences) <= TOLERANCE[1]


def test_what_misses_a_bar_is_kept_and_marked(tmp_path: Path) -> None:
    out = tmp_path / "q"
    record = quantize_model(
        QuantizationOptions(
            model=MODEL, out=out, scheme="fp8", data=DATA, accept={"kendall_tau": 1.0}, device="cpu"
        )
    )
    assert record["verdict"] == "refused"
    assert record["failures"][0].startswith("kendall_tau should be ≥ 1.0, is 0.99")
    assert (out / "model.safetensors").is_file()


def test_a_bar_that_was_asked_for_and_cannot_be_measured_is_missed(tmp_path: Path) -> None:
    unlabelled = tmp_path / "requests.jsonl"
    lines = [json.loads(line) for line in DATA.read_text().splitlines()]
    unlabelled.write_text("".join(f"{json.dumps({**one, 'labels': None})}\n" for one in lines))
    options = QuantizationOptions(
        model=MODEL, out=tmp_path / "q", scheme="fp8", data=unlabelled, device="cpu"
    )
    record = quantize_model(options)
    assert record["verdict"] == "accepted"
    assert record["unmeasured"] == ["calibration_error_rise", "auc_loss"]
    record = quantize_model(
        replace(options, out=tmp_path / "r", accept={"auc_loss": 0.001, "kendall_tau": 0.5})
    )
    assert record["verdict"] == "refused"
    assert record["failures"] == ["auc_loss cannot be measured on these requests"]


def test_a_quantised_model_is_not_quantised_again(
    written: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = written("cpu-int8")
    again = QuantizationOptions(model=str(folder), out=tmp_path / "r", scheme="fp8")
    with pytest.raises(ModelError, match=r"quantised already \(cpu-int8\)"):
        quantize_model(again)
    with pytest.raises(ModelError, match=r"precision: .* is quantised already"):
        load_model(folder, device="cpu", precision="nf4")


def test_bad_options_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="to: should be one of fp8"):
        QuantizationOptions(model=MODEL, out=tmp_path, scheme="int3")
    with pytest.raises(DataError, match="data: should be given"):
        QuantizationOptions(model=MODEL, out=tmp_path, scheme="fp8", accept={"kendall_tau": 0.9})
    with pytest.raises(DataError, match="accept: should name top_agreement"):
        QuantizationOptions(model=MODEL, out=tmp_path, scheme="fp8", data=DATA, accept={"tau": 0.9})
    with pytest.raises(ModelError, match="exists and is not empty"):
        quantize_model(QuantizationOptions(model=MODEL, out=tmp_path, scheme="fp8"))


@pytest.mark.parametrize("scheme", ["fp8", "cpu-int8"])
def test_experts_are_refused_by_name(tmp_path: Path, scheme: str) -> None:
    source = tmp_path / "experts"
    build_network("mixtral").save_pretrained(source)
    build_tokenizer().save_pretrained(source)
    options = QuantizationOptions(
        model=str(source), out=tmp_path / "q", scheme=scheme, device="cpu"
    )
    fault = rf"MixtralForCausalLM: model\.layers\.0\.mlp\.experts\.\w+ holds experts .* {scheme} "
    with pytest.raises(ModelError, match=fault):
        quantize_model(options)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("scheme", ["fp8", "cpu-int8"])
def test_what_stays_float_keeps_its_bits_and_dtype(tmp_path: Path, scheme: str) -> None:
    source = tmp_path / "half"
    network = build_network("qwen2", tie_word_embeddings=True).to(torch.bfloat16)
    network.save_pretrained(source)
    build_tokenizer().save_pretrained(source)
    quantize_model(
        QuantizationOptions(model=str(source), out=tmp_path / "q", scheme=scheme, device="cpu")
    )
    stored = load_file(tmp_path / "q" / "model.safetensors")
    weights = network.state_dict()
    kept = [name for name in stored if not name.endswith(("_proj.weight", "_proj.bias", "_scale"))]
    assert len(kept) == 2 + 2 * 3
    for name in kept:
        assert torch.equal(stored[name], weights[name]), name
    name = "model.layers.1.mlp.down_proj.weight"
    nearest_ND = stored[name].float() * stored[f"{name}_scale"]
    step_N = stored[f"{name}_scale"] * (16 if scheme == "fp8" else 0.5)
    assert ((nearest_ND - weights[name].float()).abs() <= 1.001 * step_N).all()
