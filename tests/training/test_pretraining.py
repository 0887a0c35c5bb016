"""Pretraining runs: they learn, resume mid-stream with the same bits, and measure themselves."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankonce.errors import DataError, TrainingError
from rankonce.ranker import Ranker
from rankonce.training import loop
from rankonce.training.loop import TrainConfig
from rankonce.training.pretraining import PretrainingData, describe_loss, pretrain
from tests.conftest import build_request

CONFIG = TrainConfig(
    max_steps=9,
    targets_per_step=800,
    max_tokens_per_pass=1000,
    learning_rate=1e-2,
    buffer_size=20,
    steps_per_checkpoint=4,
    seed=3,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write films with ratings, notes, and a note that is held out."""
    path = tmp_path_factory.mktemp("pretraining")
    (path / "set").mkdir()
    films = range(30)
    pl.DataFrame(
        {
            "item_id": films,
            "title": [f"Film number {n} (19{n + 40})" for n in films],
            "genres": ["Drama|Crime" if n % 2 else "Comedy" for n in films],
        }
    ).write_parquet(path / "set" / "items.parquet")
    pl.DataFrame(
        {
            "user_id": [n % 7 for n in range(140)],
            "item_id": [n * 11 % 30 for n in range(140)],
            "rating": [1 + n % 5 for n in range(140)],
            "timestamp": range(140),
        }
    ).write_parquet(path / "set" / "ratings.parquet")
    notes = [{"text": f"A note on film {n}: it was shown in the evening."} for n in range(40)]
    (path / "notes.jsonl").write_text("".join(json.dumps(note) + "\n" for note in notes))
    (path / "held-out.txt").write_text("A note on film 40.\n\nIt was shown – in the evening.\n")
    return path


def run(folder: Path, out: str, config: TrainConfig = CONFIG, **options: Any) -> dict[str, float]:
    data = PretrainingData(
        weights={folder / "set": 1.0, folder / "notes.jsonl": 0.5},
        valid=[folder / "held-out.txt"],
        max_tokens_per_document=48,
    )
    measured = pretrain(data, folder / out, config=config, **{"size": "1m", **options})
    assert measured is not None
    return measured


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = (out / "stages" / "1-pretrain" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def measured(folder: Path) -> dict[str, float]:
    return run(folder, "straight")


def test_a_run_learns_and_gives_a_checkpoint_that_ranks(
    folder: Path, measured: dict[str, float]
) -> None:
    steps = [step for step in metrics(folder / "straight") if "loss" in step]
    assert [step["step"] for step in steps] == list(range(1, 10))
    # The data end within the run, and begin anew in other styles.
    assert steps[-1]["epoch"] > 0
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    result = Ranker.from_pretrained(folder / "straight").score(build_request(5))
    assert result.distinct_score_ratio == 1.0


def test_the_held_out_texts_are_measured_as_plain_transformers_does(
    folder: Path, measured: dict[str, float]
) -> None:
    out = folder / "straight"
    network = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out)
    texts = ["A note on film 40.", "It was shown – in the evening."]
    nats = tokens = 0.0
    for text in texts:
        ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = network(torch.tensor([ids])).logits[0, :-1]
        nats += float(cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
        tokens += len(ids) - 1
    num_bytes = sum(len(text.encode()) for text in texts)
    assert measured["loss"] == pytest.approx(nats / tokens, rel=1e-4)
    assert measured["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-3)
    assert measured["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-4)
    record = json.loads((out / "stages" / "1-pretrain" / "evaluation.json").read_text())
    assert record == {"texts": measured}
    assert f"{measured['bits_per_byte']:.4f}" in (out / "README.md").read_text()


def test_a_run_stopped_in_mid_stream_resumes_with_the_same_bits(
    folder: Path, measured: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    optimize, calls = loop._optimize, []

    def stop_after_six(*arguments: Any) -> tuple[float, float]:
        if len(calls) == 6:
            raise KeyboardInterrupt
        calls.append(1)
        return optimize(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_optimize", stop_after_six)
        with pytest.raises(KeyboardInterrupt):
            run(folder, "stopped")
    assert run(folder, "stopped") == measured
    expected = load_file(folder / "straight" / "model.safetensors")
    actual = load_file(folder / "stopped" / "model.safetensors")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_a_run_goes_on_from_a_checkpoint_over_epochs_in_memory(
    folder: Path, measured: dict[str, float]
) -> None:
    config = replace(CONFIG, max_steps=None, epochs=2, learning_rate=1e-3)
    better = run(folder, "continued", config, model=str(folder / "straight"))
    assert better["loss"] < measured["loss"]
    steps = [step for step in metrics(folder / "continued") if "loss" in step]
    assert steps[-1]["epoch"] == 2
    valid = [step for step in metrics(folder / "continued") if "valid_loss" in step]
    assert len(valid) == 2


def test_other_weights_do_not_continue_a_run(folder: Path, measured: dict[str, float]) -> None:
    data = PretrainingData(
        weights={folder / "set": 1.0, folder / "notes.jsonl": 1.0},
        valid=[folder / "held-out.txt"],
        max_tokens_per_document=48,
    )
    with pytest.raises(TrainingError, match="another data"):
        pretrain(data, folder / "straight", config=CONFIG, size="1m")


@pytest.mark.parametrize(("limit", "fault"), [(1, "2 or more, is 1"), (5000, "up to 4096")])
def test_a_length_that_no_document_can_have_is_refused(
    folder: Path, measured: dict[str, float], limit: int, fault: str
) -> None:
    data = PretrainingData(weights={folder / "set": 1.0}, max_tokens_per_document=limit)
    out = folder / f"limit-{limit}"
    with pytest.raises(TrainingError, match=f"max_tokens_per_document: should be {fault}"):
        pretrain(data, out, config=CONFIG, size="1m", model=str(folder / "straight"))


def test_held_out_files_without_any_text_are_refused(folder: Path) -> None:
    (folder / "blank.txt").write_text("\n\n")
    data = PretrainingData(weights={folder / "set": 1.0}, valid=[folder / "blank.txt"])
    with pytest.raises(DataError, match="valid: should hold at least one text"):
        pretrain(data, folder / "blank", config=CONFIG, size="1m")


def test_a_loss_of_one_bit_a_byte_is_told_so() -> None:
    assert describe_loss(math.log(2), num_tokens=6, num_bytes=6) == {
        "loss": pytest.approx(math.log(2)),
        "perplexity": pytest.approx(2.0),
        "bits_per_byte": pytest.approx(1.0),
    }
