"""Students: they learn from the store, resume with the same bits, and serve one read-out."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from rankonce.distillation.objective import AuxiliaryReadout, DistillConfig, DistillObjective
from rankonce.distillation.stages import Distillation
from rankonce.distillation.store import Cost, ScoreStore
from rankonce.distillation.teachers import LocalTeacher
from rankonce.errors import DataError, TrainingError
from rankonce.evaluation.held_out import measure_held_out
from rankonce.model.head import head_of
from rankonce.model.loading import use_segment_attention
from rankonce.model.sizes import build_model
from rankonce.prompts.tasks import library_tasks
from rankonce.ranker import Ranker
from rankonce.training import loop
from rankonce.training.adapters import AdapterConfig
from rankonce.training.data import read_examples, read_unlabelled
from rankonce.training.loop import TrainConfig
from rankonce.training.runs import run_stages
from rankonce.training.stages import Stage, StageSource, Tasks, finetune_source
from rankonce.training.tokenizer import train_tokenizer
from tests.conftest import build_network, build_tokenizer
from tests.distillation.conftest import SHORT
from tests.training.test_gradients import build_examples
from tests.training.test_loop import finetune_stage, stage_of, write_examples

LEARNT = DistillConfig()
WORDS = ("Heat", "Alien", "Up", "Solaris", "Fargo", "Brazil", "Casablanca", "M")


def distil(folder: Path, out: Path, config: DistillConfig = LEARNT, **options: Any) -> Cost:
    train = options.pop("train", SHORT)
    with ScoreStore(folder / "scores.sqlite") as store:
        teacher = LocalTeacher(folder / "teacher")
        distillation = Distillation(config=config, teacher=teacher, store=store)
        run_stages(
            [distillation.wrap(options.pop("stage", finetune_stage(train)))],
            folder / "examples.jsonl",
            out,
            **{"name": "distil", "size": "0.4m", "seed": 0, **options},
        )
    return distillation.cost


def losses(out: Path) -> list[float]:
    lines = (stage_of(out) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_a_second_student_makes_no_teacher_call(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distil(folder, tmp_path / "first")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the teacher's weights were loaded")

    monkeypatch.setattr("rankonce.distillation.teachers.Ranker.from_pretrained", refuse)
    assert distil(folder, tmp_path / "second", size="0.16m") == Cost()
    record = json.loads((tmp_path / "second" / "run.json").read_text())
    assert record["data"]["teacher"] == LocalTeacher(folder / "teacher").fingerprint


def test_two_readouts_resume_with_the_same_bits_and_one_is_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DistillConfig(target="two-logits")
    train = replace(SHORT, epochs=2, averaging=0.5, dropout=0.05)
    distil(folder, tmp_path / "straight", config, train=train)
    optimize, calls = loop._optimize, []

    def stop_after_six(*arguments: Any) -> Any:
        if len(calls) == 6:
            raise KeyboardInterrupt
        calls.append(1)
        return optimize(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_optimize", stop_after_six)
        with pytest.raises(KeyboardInterrupt):
            distil(folder, tmp_path / "stopped", config, train=train)
    distil(folder, tmp_path / "stopped", config, train=train)
    expected = load_file(tmp_path / "straight" / "model.safetensors")
    actual = load_file(tmp_path / "stopped" / "model.safetensors")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")
    with safe_open(tmp_path / "straight" / "start" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(expected)


def test_a_second_readout_starts_as_the_first_and_learns_apart(tokenizer: Any) -> None:
    network = build_network("llama")
    use_segment_attention(network)
    examples = [
        replace(
            one,
            targets=(None,) * len(one.targets),
            teacher=((-0.2, -1.7),) * len(one.targets),
        )
        for one in build_examples(tokenizer)
    ]
    ids = tuple(i for form in examples[0].tokens.label_ids for i in form)
    objective = DistillObjective(config=DistillConfig(target="two-logits"), label_ids=ids)
    extra = objective.build_extra(network)
    assert isinstance(extra, AuxiliaryReadout)
    hidden = torch.randn(5, 48)
    label_ids = examples[0].tokens.label_ids
    torch.testing.assert_close(
        extra.label_logprobs(hidden, label_ids), head_of(network).label_logprobs(hidden, label_ids)
    )
    objective.loss(network, objective.pack(examples), extra).backward()
    # Unlabelled requests move the layers and the second read-out, not the served one.
    assert float(extra.weight_VD.grad.abs().sum()) > 0  # type: ignore[union-attr]
    assert float(network.model.layers[0].mlp.up_proj.weight.grad.abs().sum()) > 0
    head = network.lm_head.weight.grad
    assert head is None or not head.any()


@pytest.mark.parametrize("target", ["soft", "two-logits"])
def test_an_adapter_learns_from_the_teacher(folder: Path, tmp_path: Path, target: str) -> None:
    base = tmp_path / "base"
    build_network("llama", hidden_size=64, intermediate_size=128).save_pretrained(base)
    build_tokenizer().save_pretrained(base)
    out = tmp_path / "films"
    distil(
        folder,
        out,
        DistillConfig(target=target),
        train=replace(SHORT, epochs=4, learning_rate=2e-2),
        model=str(base),
        adapter=AdapterConfig(name="films", rank=4),
    )
    requests = [one.request for one in read_examples(folder / "examples.jsonl")]

    def distance(model: Path) -> float:
        """Mean difference to what the teacher would say of the first answer, in probabilities."""
        first, second = (
            [
                np.exp(one.log_probs["Yes"])
                for result in Ranker.from_pretrained(folder).score_many(requests, progress=False)
                for one in result.candidates
            ]
            for folder in (model, folder / "teacher")
        )
        return float(np.abs(np.subtract(first, second)).mean())

    assert distance(out) < 0.8 * distance(base)
    weights = load_file(out / "adapter_model.safetensors")
    # The second read-out, and the backbone, stay where they are.
    assert all(".lora_" in name for name in weights)


def test_packed_lessons_are_those_of_separate_passes(tokenizer: Any) -> None:
    examples = [
        replace(one, teacher=tuple((-0.1 - i, -2.0) for i in range(len(one.targets))))
        for one in build_examples(tokenizer)
    ]
    config = DistillConfig(
        target="mixture", losses={"forward-kl": 1.0, "pairwise-margin": 0.5, "reverse-kl": 0.1}
    )
    objective = DistillObjective(config=config)
    gradients = []
    for parts in ([examples], [[one] for one in examples]):
        network = build_network("qwen3")
        use_segment_attention(network)
        for part in parts:
            objective.loss(network, objective.pack(part)).backward()
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
    scale = max(float(g.abs().max()) for g in gradients[0])
    for whole, cut in zip(*gradients, strict=True):
        torch.testing.assert_close(cut, whole, atol=1e-5 * scale, rtol=0)


def test_hidden_states_of_a_copy_agree_and_of_a_cut_are_learnt(
    folder: Path, tmp_path: Path
) -> None:
    config = DistillConfig(losses={"hidden-states": 1.0})
    still = replace(SHORT, learning_rate=1e-12)
    distil(folder, tmp_path / "copy", config, train=still, model=str(folder / "teacher"))
    assert max(losses(tmp_path / "copy")) < 1e-6

    ranker = LocalTeacher(folder / "teacher").ranker
    network = ranker.model.network
    ranker.model.acceleration.undo()
    network.model.layers = network.model.layers[:2]
    network.config.num_hidden_layers = 2
    network.config.layer_types = network.config.layer_types[:2]
    network.save_pretrained(tmp_path / "cut")
    ranker.model.tokenizer.save_pretrained(tmp_path / "cut")
    distil(
        folder,
        tmp_path / "out",
        config,
        train=replace(SHORT, epochs=3),
        model=str(tmp_path / "cut"),
    )
    steps = losses(tmp_path / "out")
    assert steps[-1] < 0.8 * steps[0]


def test_hidden_states_of_another_tokenizer_or_width_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    config = DistillConfig(losses={"hidden-states": 1.0})
    with pytest.raises(TrainingError, match=r"the width of its teacher .*, 128; it has 64"):
        distil(folder, tmp_path / "narrow", config)
    build_network("qwen3").save_pretrained(tmp_path / "other")
    build_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(TrainingError, match="needs one tokenizer for both"):
        distil(folder, tmp_path / "out", config, model=str(tmp_path / "other"))


def test_teacher_and_student_need_no_common_tokenizer(folder: Path, tmp_path: Path) -> None:
    build_model("0.4m", seed=0).save_pretrained(tmp_path / "other")
    texts = [f"{word} nights, {word} and its harbours" for word in WORDS for _ in range(9)]
    tokenizer = train_tokenizer(texts, list(library_tasks().values()))
    tokenizer.save_pretrained(tmp_path / "other")
    teacher = LocalTeacher(folder / "teacher")
    assert tokenizer.get_vocab() != teacher.ranker.model.tokenizer.get_vocab()
    out = tmp_path / "out"
    distil(folder, out, model=str(tmp_path / "other"), train=replace(SHORT, epochs=14))
    examples = read_examples(folder / "examples.jsonl")
    student = LocalTeacher(out).ranker

    def say(ranker: Any) -> list[float]:
        results = ranker.score_many([one.request for one in examples], progress=False)
        return [c.value for result in results for c in result.candidates]

    assert np.corrcoef(say(student), say(teacher.ranker))[0, 1] > 0.8


@pytest.mark.parametrize("target", ["hard", "max", "self-auxiliary"])
def test_targets_that_need_labels_refuse_requests_without_any(
    folder: Path, tmp_path: Path, target: str
) -> None:
    def load(path: Path, config: TrainConfig, tasks: Tasks) -> StageSource:
        return finetune_source([path], config, tasks, unlabelled_paths=[path])

    fault = f"target '{target}' needs known labels, .*examples.jsonl: line 1 has none"
    with pytest.raises(DataError, match=fault):
        distil(
            folder,
            tmp_path / "out",
            DistillConfig(target=target),
            stage=Stage(name="finetune", load=load, config=SHORT),
        )


def test_a_target_that_takes_a_teacher_needs_one() -> None:
    with pytest.raises(TrainingError, match="target 'soft' needs one, and a store"):
        Distillation(config=DistillConfig())


def test_labels_of_unlabelled_requests_are_not_looked_at(folder: Path) -> None:
    examples = read_unlabelled(folder / "examples.jsonl")
    assert {label for one in examples for label in one.labels} == {None}


def flip_labels(line: str, random: np.random.Generator) -> str:
    data = json.loads(line)
    flipped = {"Yes": "No", "No": "Yes"}
    data["labels"] = [x if random.random() > 0.3 else flipped[x] for x in data["labels"]]
    return json.dumps(data) + "\n"


def test_a_teacher_of_few_noisy_labels_teaches_more_than_they_do(tmp_path: Path) -> None:
    """A few labelled requests make a teacher, which labels many more for a smaller student."""
    write_examples(tmp_path / "all.jsonl", count=128)
    lines = (tmp_path / "all.jsonl").read_text().splitlines(keepends=True)
    random = np.random.default_rng(0)
    noisy = [flip_labels(line, random) for line in lines[:24]]
    (tmp_path / "examples.jsonl").write_text("".join(noisy))
    (tmp_path / "more.jsonl").write_text("".join(lines[24:104]))
    (tmp_path / "valid.jsonl").write_text("".join(lines[104:]))
    data = tmp_path / "examples.jsonl"
    train = replace(SHORT, max_steps=60, max_tokens_per_pass=4000)
    teacher = replace(train, max_steps=48)
    for name, size, config in (("teacher", "1m", teacher), ("alone", "0.4m", train)):
        stages = [finetune_stage(config)]
        run_stages(stages, data, tmp_path / name, name=name, size=size, seed=0)

    def load(path: Path, config: TrainConfig, tasks: Tasks) -> StageSource:
        more = [path.parent / "more.jsonl"]
        return finetune_source([path], config, tasks, unlabelled_paths=more)

    stage = Stage(name="finetune", load=load, config=train)
    cost = distil(tmp_path, tmp_path / "student", stage=stage)
    assert cost.num_calls == 104
    valid = read_examples(tmp_path / "valid.jsonl")
    aucs = {
        name: measure_held_out(tmp_path / name, valid)["movie-like"]["auc"]
        for name in ("student", "alone", "teacher")
    }
    # As many steps of as many labels; those of most requests come from the teacher alone.
    assert aucs["student"] > aucs["alone"] + 0.03, aucs
