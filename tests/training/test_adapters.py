"""Adapters in training: only they learn, their gradients are PEFT's, and runs resume bit by bit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from rankonce.errors import TrainingError
from rankonce.model.acceleration import accelerate_model
from rankonce.model.loading import use_segment_attention
from rankonce.ranker import Ranker
from rankonce.training import loop
from rankonce.training.adapters import AdapterConfig, load_network
from rankonce.training.objectives import LabelObjective
from rankonce.training.runs import run_stages
from tests.conftest import ARCHITECTURES, build_network, build_request, build_tokenizer
from tests.training.test_gradients import build_examples, separate_loss
from tests.training.test_loop import CONFIG, finetune_stage, metrics, stage_of, write_examples

FILMS = AdapterConfig(name="films", rank=4)
# Small rates suit whole models; an adapter begins at zero.
ADAPTER_CONFIG = replace(CONFIG, averaging=0.0, dropout=0.0, learning_rate=2e-2)


def disturb(network: Any, *, seed: int = 0) -> None:
    """Move an adapter off its beginning, where it changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.requires_grad:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a checkpoint whose layers NF4 takes on a CPU."""
    folder = tmp_path_factory.mktemp("adapters") / "base"
    build_network("llama", hidden_size=64, intermediate_size=128).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    write_examples(folder.parent / "examples.jsonl")
    return folder


def run(base: Path, out: str, config: Any = ADAPTER_CONFIG, **options: Any) -> Path:
    run_stages(
        [finetune_stage(config)],
        base.parent / "examples.jsonl",
        base.parent / out,
        **{
            "name": "test",
            "size": "1m",
            "seed": 0,
            "model": str(base),
            "adapter": FILMS,
            **options,
        },
    )
    return base.parent / out


@pytest.fixture(scope="module")
def trained(base: Path) -> Path:
    return run(base, "films")


# PEFT's own patterns for the experts of Mixtral, which the adapter leaves alone.
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_those_of_plain_peft_on_separate_prompts(
    tokenizer: Any, architecture: str, tmp_path: Path
) -> None:
    build_network(architecture).save_pretrained(tmp_path / "base")
    packed = load_network(tmp_path / "base", FILMS, base=str(tmp_path / "base"))
    disturb(packed)
    config = packed.peft_config["adapter-films"]
    config = replace(config, base_model_name_or_path=None)
    plain = get_peft_model(build_network(architecture), config, "adapter-films")
    plain.load_state_dict(
        {f"base_model.model.{name}": weight for name, weight in packed.state_dict().items()}
    )
    examples = build_examples(tokenizer)
    use_segment_attention(packed)
    accelerate_model(packed, trainable=True)
    objective = LabelObjective()
    loss = objective.loss(packed, objective.pack(examples))
    expected = separate_loss(plain, examples)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward(), expected.backward()
    wanted = {
        name.removeprefix("base_model.model."): weight.grad
        for name, weight in plain.named_parameters()
        if weight.requires_grad
    }
    actual = {name: weight.grad for name, weight in packed.named_parameters()}
    assert wanted.keys() == {name for name, grad in actual.items() if grad is not None}
    scale = max(float(grad.abs().max()) for grad in wanted.values())
    assert scale > 0
    for name, grad in wanted.items():
        assert float((actual[name] - grad).abs().max()) <= 1e-5 * scale, name


def test_every_layer_of_the_decoder_is_adapted_unless_targets_say_otherwise(base: Path) -> None:
    def adapted(config: AdapterConfig) -> set[str]:
        network = load_network(base, config, base=str(base))
        names = [name for name, weight in network.named_parameters() if weight.requires_grad]
        return {name.split(".lora_")[0].rsplit(".")[-1] for name in names}

    attention, mlp = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
    assert adapted(FILMS) == attention | mlp
    assert adapted(replace(FILMS, targets=("q_proj", "v_proj"))) == {"q_proj", "v_proj"}
    with pytest.raises(TrainingError, match=r"targets: .*nowhere"):
        adapted(replace(FILMS, targets=("nowhere",)))


def test_an_adapter_learns_and_its_backbone_stays(base: Path, trained: Path) -> None:
    steps = metrics(trained)
    assert sum(step["loss"] for step in steps[-3:]) < 0.7 * sum(step["loss"] for step in steps[:3])
    request = build_request(12)
    before = Ranker.from_pretrained(base).score(request).candidates
    after = Ranker.from_pretrained(trained).score(request).candidates
    assert max(abs(a.value - b.value) for a, b in zip(before, after, strict=True)) > 0.1


def test_a_run_is_a_folder_in_pefts_form_with_its_record(base: Path, trained: Path) -> None:
    files = {path.name for path in trained.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} < files
    assert "model.safetensors" not in files
    assert all(".lora_" in name for name in load_file(trained / "adapter_model.safetensors"))
    config = json.loads((trained / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    record = json.loads((trained / "run.json").read_text())
    assert record["adapter"]["name"] == "films"
    assert list(record["tasks"]) == ["movie-like"]
    assert "rank 4 over" in (trained / "README.md").read_text()


def test_checkpoints_hold_the_adapter_and_not_the_backbone(trained: Path) -> None:
    for checkpoint in (stage_of(trained) / "checkpoints").iterdir():
        state = FileSystemReader(checkpoint / "state").read_metadata().state_dict_metadata
        weights = [name for name in state if name.startswith("model.")]
        assert weights
        assert all(".lora_" in name for name in weights)
        assert (checkpoint / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("options", [{}, {"averaging": 0.5, "dropout": 0.05}])
def test_a_run_that_stops_ends_with_the_same_bits(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, float]
) -> None:
    config = replace(ADAPTER_CONFIG, epochs=1, **options)
    adapter = replace(FILMS, dropout=0.1)
    straight = run(base, str(tmp_path / "straight"), config, adapter=adapter)
    save = loop.save_checkpoint

    def save_and_stop(out: Path, step: int, **parts: Any) -> None:
        save(out, step, **parts)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run(base, str(tmp_path / "stopped"), config, adapter=adapter)
    stopped = run(base, str(tmp_path / "stopped"), config, adapter=adapter)
    name = "adapter_model.safetensors"
    assert (stopped / name).read_bytes() == (straight / name).read_bytes()
    assert [step["loss"] for step in metrics(stopped)] == [s["loss"] for s in metrics(straight)]


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_an_adapter_learns_over_a_quantised_backbone(base: Path, quantize: Any) -> None:
    adapter = replace(FILMS, quantize=quantize)
    out = run(base, f"films-{quantize}", replace(ADAPTER_CONFIG, epochs=2), adapter=adapter)
    steps = metrics(out)
    assert sum(step["loss"] for step in steps[-3:]) < 0.8 * sum(step["loss"] for step in steps[:3])
    weights = load_file(out / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_an_adapter_goes_from_stage_to_stage(base: Path) -> None:
    first = finetune_stage(replace(ADAPTER_CONFIG, epochs=1))
    second = replace(first, name="again", config=replace(first.config, learning_rate=1e-6))
    out = base.parent / "two"
    run_stages(
        [first, second],
        base.parent / "examples.jsonl",
        out,
        name="test",
        size="1m",
        seed=0,
        model=str(base),
        adapter=FILMS,
    )
    weights = [
        load_file(folder / "adapter_model.safetensors")
        for folder in (stage_of(out), out / "stages" / "2-again", out)
    ]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-4, rtol=0)
        assert torch.equal(weights[2][name], weights[1][name])


def test_reentrant_checkpointing_leaves_an_adapter_its_gradients(base: Path) -> None:
    network = load_network(base, FILMS, base=str(base))
    network.train()
    # The newer name first; versions that have only the other one are supported.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next(getattr(network, name) for name in names if hasattr(network, name))
    enable({"use_reentrant": True})
    network(torch.arange(5, 15)[None]).logits.sum().backward()
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    assert all(weight.grad is not None for weight in trained)


def test_what_no_adapter_can_be_is_refused(base: Path, trained: Path) -> None:
    with pytest.raises(TrainingError, match="model: should be given"):
        run(base, "scratch", model=None)
    config = replace(ADAPTER_CONFIG, averaging=0.9)
    with pytest.raises(TrainingError, match="averaging: should be 0 over a backbone in nf4"):
        run(base, "averaged", config, adapter=replace(FILMS, quantize="nf4"))
    with pytest.raises(TrainingError, match="another adapter"):
        run(base, trained.name, adapter=replace(FILMS, rank=8))
    with pytest.raises(TrainingError, match="rank: should be 1 or more, is 0"):
        AdapterConfig(rank=0)
