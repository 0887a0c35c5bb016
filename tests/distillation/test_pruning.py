"""Whole checkpoints pruned: they load as any other and score as the masked model."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankonce.distillation.pruning import (
    PruneConfig,
    choose_shape,
    gradual_shapes,
    prune_checkpoint,
)
from rankonce.distillation.shapes import DecoderShape, ParameterAxes
from rankonce.errors import DataError, ModelError, TrainingError
from rankonce.ranker import Ranker
from rankonce.records import TrainingExample
from tests.conftest import build_network, build_request, build_tokenizer

EXAMPLES = [
    TrainingExample(
        request=build_request(3, seed=seed),
        labels=("Yes", "No", None if seed % 2 else "Yes"),
    )
    for seed in range(5)
]


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def save(architecture: str) -> Path:
        folder = tmp_path_factory.mktemp(architecture) / "model"
        build_network(architecture, initializer_range=0.1).save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
        return folder

    return save


def values(folder: Path, seeds: range = range(20, 24)) -> list[float]:
    ranker = Ranker.from_pretrained(folder, device="cpu")
    results = [ranker.score(build_request(4, seed=seed)) for seed in seeds]
    return [log_prob for r in results for c in r.candidates for log_prob in c.log_probs.values()]


@pytest.mark.parametrize(
    "options",
    [
        {"intermediate_size": 50},
        {"num_key_value_heads": 1, "importance": "taylor"},
        {"num_hidden_layers": 2, "importance": "taylor"},
        {"hidden_size": 36, "drop_unused_vocabulary": True},
        {"intermediate_size": 50, "num_key_value_heads": 1, "reconstruct": True},
        {"keep": 0.7, "importance": "random"},
    ],
    ids=str,
)
@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text"])
def test_a_pruned_checkpoint_loads_anywhere_and_scores_alike(
    save: Callable[[str], Path], tmp_path: Path, architecture: str, options: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    record = prune_checkpoint(save(architecture), out, PruneConfig(**options), EXAMPLES)
    plain, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert sum(one.numel() for one in plain.parameters()) == record["after"]["parameters"]
    assert record["after"]["parameters"] < record["before"]["parameters"]
    assert json.loads((out / "pruning.json").read_text())["after"] == record["after"]
    ranker = Ranker.from_pretrained(out, device="cpu")
    prepared = ranker.prepare(build_request(3, seed=40))
    result = ranker.finish(prepared, ranker.forward([prepared.rendered.tokens])[0])
    tokens = prepared.rendered.tokens
    for segment, candidate in zip(tokens.segment_ids, result.candidates, strict=True):
        with torch.no_grad():
            logits = plain(torch.tensor([[*tokens.prefix_ids, *segment]])).logits[0, -1]
        labels = torch.stack([logits[list(ids)].logsumexp(0) for ids in tokens.label_ids])
        expected = labels.log_softmax(0).tolist()
        assert list(candidate.log_probs.values()) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral", "gemma2"])
def test_every_architecture_is_pruned_in_all_ways_at_once(
    save: Callable[[str], Path], tmp_path: Path, architecture: str
) -> None:
    config = PruneConfig(
        num_hidden_layers=2,
        intermediate_size=33,
        num_key_value_heads=1,
        hidden_size=38,
        drop_unused_vocabulary=True,
        importance="taylor",
    )
    record = prune_checkpoint(save(architecture), tmp_path / "out", config, EXAMPLES)
    sizes = {name: record["after"][name] for name in config.sizes()}
    assert sizes == config.sizes()
    assert len(set(values(tmp_path / "out"))) > 20


def test_dropping_tokens_changes_no_score_of_texts_that_need_none_of_them(
    save: Callable[[str], Path], tmp_path: Path
) -> None:
    before = save("qwen3")
    examples = [
        replace(EXAMPLES[0], request=build_request(4, seed=seed), labels=(None,) * 4)
        for seed in range(20, 24)
    ]
    out = tmp_path / "out"
    record = prune_checkpoint(before, out, PruneConfig(drop_unused_vocabulary=True), examples)
    assert record["after"]["vocab_size"] < record["before"]["vocab_size"]
    assert values(out) == pytest.approx(values(before), abs=1e-6)
    old, new = AutoTokenizer.from_pretrained(before), AutoTokenizer.from_pretrained(out)
    assert len(new) == record["after"]["vocab_size"]
    for text in ("Die Straße 東京 \U0001f600", "candidates query relevant applied", "\x00<s>"):
        assert new.decode(new(text).input_ids) == old.decode(old(text).input_ids)
    assert len(new("Would the job seeker apply").input_ids) > len(
        old("Would the job seeker apply").input_ids
    )
    assert new.convert_ids_to_tokens([new.bos_token_id, new.eos_token_id]) == ["<s>", "</s>"]
    config = AutoModelForCausalLM.from_pretrained(out).config
    assert (config.bos_token_id, config.eos_token_id) == (new.bos_token_id, new.eos_token_id)


def test_labels_of_given_tasks_stay(save: Callable[[str], Path], tmp_path: Path) -> None:
    from rankonce.prompts.tasks import library_tasks

    config = PruneConfig(drop_unused_vocabulary=True)
    task = library_tasks()["search-relevance"]
    prune_checkpoint(save("llama"), tmp_path / "with", config, EXAMPLES, tasks=[task])
    kept = AutoTokenizer.from_pretrained(tmp_path / "with").get_vocab()
    assert all(f"Ġ{name}" in kept for name in task.label_names)


def test_the_most_important_stays(save: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    network = build_network("qwen3")
    dead = [3, 17, 40, 41]
    with torch.no_grad():
        for layer in network.model.layers:
            layer.mlp.up_proj.weight[dead] = 0
    network.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    expected = values(folder)
    for name in ("activation", "taylor"):
        config = PruneConfig(intermediate_size=92, importance=name)  # type: ignore[arg-type]
        record = prune_checkpoint(folder, tmp_path / name, config, EXAMPLES)
        assert all(not set(dead) & set(kept) for kept in record["kept"]["neurons"])
        assert values(tmp_path / name) == pytest.approx(expected, abs=1e-4)


def test_refitted_neurons_stay_nearer_than_dropped_ones(
    save: Callable[[str], Path], tmp_path: Path
) -> None:
    before = save("qwen3")
    expected = torch.tensor(values(before))
    distance = {}
    for name, reconstruct in (("plain", False), ("fitted", True)):
        config = PruneConfig(intermediate_size=60, reconstruct=reconstruct)
        prune_checkpoint(before, tmp_path / name, config, EXAMPLES)
        distance[name] = float((torch.tensor(values(tmp_path / name)) - expected).abs().mean())
    assert distance["fitted"] < 0.8 * distance["plain"]


def test_half_precision_stays(save: Callable[[str], Path], tmp_path: Path) -> None:
    build_network("qwen3").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    prune_checkpoint(tmp_path / "model", tmp_path / "out", PruneConfig(hidden_size=40), EXAMPLES)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize("keep", [0.8, 0.5, 0.27])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_steps_end_at_the_shape_of_one_cut_and_shrink_evenly(keep: float, steps: int) -> None:
    from rankonce.model.sizes import build_model

    config = build_model("1m", seed=0).config
    axes, before = ParameterAxes.of(config), DecoderShape.of(config)
    found = gradual_shapes(config, keep, steps)
    assert len(found) == steps
    end = choose_shape(config, PruneConfig(keep=keep))
    assert found[-1].sizes() == {name: getattr(end, name) for name in found[-1].sizes()}
    counts = [axes.count(before)]
    for one in found:
        counts.append(axes.count(replace(before, **one.sizes())))
    assert counts == sorted(counts, reverse=True)
    for step, count in enumerate(counts):
        wanted = counts[0] * keep ** (step / steps)
        assert 0.93 * wanted <= count <= wanted


def test_depth_of_the_steps_falls_evenly_too() -> None:
    from rankonce.model.sizes import build_model

    config = build_model("3m", seed=0).config
    like = PruneConfig(keep=0.5, num_hidden_layers=3, importance="taylor", seed=7)
    found = gradual_shapes(config, 0.5, 3, like=like)
    assert [one.num_hidden_layers for one in found] == [5, 4, 3]
    assert {(one.importance, one.seed, one.keep) for one in found} == {("taylor", 7, None)}


def test_bad_input_names_the_field(save: Callable[[str], Path], tmp_path: Path) -> None:
    def refuse(kind: type[Exception], message: str, **options: Any) -> None:
        with pytest.raises(kind, match=message):
            prune_checkpoint(folder, tmp_path / "out", PruneConfig(**options), EXAMPLES)

    folder = save("llama")
    refuse(TrainingError, "keep: should be above 0 and below 1, is 1.2", keep=1.2)
    refuse(TrainingError, "keep: should be given, or one of num_hidden_layers")
    refuse(TrainingError, "hidden_size: should be 1 or more, is 0", hidden_size=0)
    refuse(TrainingError, "importance: should be one of activation, taylor", importance="size")
    refuse(ModelError, "num_key_value_heads: should be from 1 to 2, is 3", num_key_value_heads=3)
    refuse(ModelError, "hidden_size: should be a multiple of the 4 heads", hidden_size=45)
    refuse(ModelError, "keep: should be 0.[0-9]+ or more with these sizes", keep=0.001)
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="examples: should hold at least one"):
        prune_checkpoint(folder, tmp_path / "out", PruneConfig(keep=0.5), [])
    unknown = [replace(one, labels=(None,) * 3) for one in EXAMPLES]
    with pytest.raises(DataError, match="labels: should be known of one candidate"):
        prune_checkpoint(
            folder, tmp_path / "out", PruneConfig(keep=0.5, importance="taylor"), unknown
        )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    with pytest.raises(TrainingError, match=r"out: .*full holds something already"):
        prune_checkpoint(folder, tmp_path / "full", PruneConfig(keep=0.5), EXAMPLES)
    with pytest.raises(ModelError, match="mixtral has experts"):
        prune_checkpoint(save("mixtral"), tmp_path / "out", PruneConfig(keep=0.5), EXAMPLES)
