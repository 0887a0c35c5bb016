"""Quantised checkpoints: what is written loads again, ranks as before, and refusals are clear."""

import json
from pathlib import Path

import pytest

from rankonce.distillation.quantization import QuantizationOptions, quantize_model
from rankonce.errors import DataError, ModelError
from rankonce.model.loading import load_model
from rankonce.model.quantized import find_scheme, row_layers
from rankonce.ranker import EMBEDDED_MODEL, Ranker, RankerConfig
from rankonce.records import read_request

MODEL = str(EMBEDDED_MODEL)
DATA = Path(EMBEDDED_MODEL) / "demo.jsonl"
# Packed against separate: where fp32 sums differ in the last bit, an input may round to the next of
# its steps.
TOLERANCE = 0.05


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
    assert model.head.weight_VD.dtype.is_floating_point
    assert model.head.weight_VD.dtype.itemsize >= 2


@pytest.mark.parametrize("scheme", ["fp8", "cpu-int8"])
def test_packed_equals_separate_in_row_wise_checkpoints(tmp_path: Path, scheme: str) -> None:
    quantize_model(QuantizationOptions(model=MODEL, out=tmp_path / "q", scheme=scheme))
    ranker = Ranker(load_model(tmp_path / "q", device="cpu"), config=RankerConfig())
    assert len(list(row_layers(ranker.model.network))) == 4 * 7
    data = json.loads(DATA.read_text().splitlines()[0])
    packed = ranker.score(read_request(data)).candidates
    for index in (0, 3, 7):
        one = {**data, "candidates": [data["candidates"][index]]}
        alone = ranker.score(read_request(one)).candidates[0]
        together = next(c for c in packed if c.id == data["candidates"][index]["id"])
        for label, value in alone.log_probs.items():
            assert together.log_probs[label] == pytest.approx(value, abs=TOLERANCE)


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


def test_a_quantised_model_is_not_quantised_again(tmp_path: Path) -> None:
    quantize_model(QuantizationOptions(model=MODEL, out=tmp_path / "q", scheme="cpu-int8"))
    again = QuantizationOptions(model=str(tmp_path / "q"), out=tmp_path / "r", scheme="fp8")
    with pytest.raises(ModelError, match=r"quantised already \(cpu-int8\)"):
        quantize_model(again)
    with pytest.raises(ModelError, match=r"precision: .* is quantised already"):
        load_model(tmp_path / "q", device="cpu", precision="nf4")


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
