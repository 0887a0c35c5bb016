"""Training runs: they learn, resume with the same bits, and give checkpoints that load again."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankonce.errors import DataError, ModelError, NumericsError, RankOnceError, TrainingError
from rankonce.model.sizes import SIZES, build_model
from rankonce.prompts.encoding import TextEncoder
from rankonce.prompts.rendering import Renderer
from rankonce.prompts.tasks import library_tasks
from rankonce.ranker import Ranker
from rankonce.records import TrainingExample
from rankonce.training import loop
from rankonce.training.data import read_examples, tokenize_examples
from rankonce.training.loop import TrainConfig, TrainingData, train
from rankonce.training.objectives import LabelObjective, Learner
from rankonce.training.optimization import rate_factor
from rankonce.training.parallel import ParallelLearner, Processes
from rankonce.training.recipes import RECIPES
from rankonce.training.runs import run_stages
from rankonce.training.stages import Stage, StageSource, Tasks, finetune_source
from rankonce.training.steps import cut_into_steps, shuffle_units
from tests.conftest import build_network, build_request, build_tokenizer
from tests.training.test_gradients import build_examples


def write_examples(path: Path, count: int = 24) -> None:
    """Write examples that can be learnt: films whose title says Alien are liked."""
    lines = []
    for seed in range(count):
        request = build_request(6, seed=seed)
        lines.append(
            {
                "task": "movie-like",
                "id": str(seed),
                "candidates": [
                    {"fields": {"title": str(c.fields["title"])}} for c in request.candidates
                ],
                "labels": [
                    "Yes" if "Alien" in str(c.fields["title"]) else "No" for c in request.candidates
                ],
            }
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


CONFIG = TrainConfig(
    epochs=3,
    targets_per_step=24,
    max_tokens_per_pass=900,
    learning_rate=3e-3,
    averaging=0.5,
    dropout=0.05,
    steps_per_checkpoint=4,
)


def finetune_stage(config: TrainConfig) -> Stage:
    def load(path: Path, config: TrainConfig, tasks: Tasks) -> StageSource:
        return finetune_source([path], config, tasks)

    return Stage(name="finetune", load=load, config=config)


def run(folder: Path, out: str, config: TrainConfig = CONFIG, **options: Any) -> Path:
    run_stages(
        [finetune_stage(config)],
        folder / "examples.jsonl",
        folder / out,
        **{"name": "test", "size": "1m", "seed": 0, **options},
    )
    return folder / out


def stage_of(out: Path) -> Path:
    return out / "stages" / "1-finetune"


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = (stage_of(out) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    write_examples(folder / "examples.jsonl")
    return run(folder, "straight")


def test_a_run_learns_what_was_planted(trained: Path) -> None:
    steps = metrics(trained)
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    assert sum(step["loss"] for step in steps[-3:]) < 0.7 * sum(step["loss"] for step in steps[:3])


def test_a_finished_run_is_a_checkpoint_that_ranks(trained: Path) -> None:
    result = Ranker.from_pretrained(trained).score(build_request(20))
    assert result.distinct_score_ratio == 1.0
    assert (trained / "run.json").is_file()
    assert any((stage_of(trained) / "tensorboard").iterdir())


def test_a_run_from_a_checkpoint_starts_where_that_one_ended(trained: Path) -> None:
    config = replace(CONFIG, epochs=1, learning_rate=1e-5)
    out = run(trained.parent, "continued", config, model=str(trained))
    before, after = metrics(trained), metrics(out)
    first = sum(step["loss"] for step in before[: len(after)])
    assert sum(step["loss"] for step in after) < 0.7 * first
    assert (out / "tokenizer.json").read_text() == (trained / "tokenizer.json").read_text()


def test_a_stopped_run_resumes_with_the_same_bits(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimize, calls = loop._optimize, []

    def stop_after_six(*arguments: Any) -> Any:
        if len(calls) == 6:
            raise KeyboardInterrupt
        calls.append(1)
        return optimize(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_optimize", stop_after_six)
        with pytest.raises(KeyboardInterrupt):
            run(trained.parent, "stopped")
    # Step 6 was done, step 4 was the last one kept: 5 and 6 are done again.
    out = run(trained.parent, "stopped")
    expected = load_file(trained / "model.safetensors")
    actual = load_file(out / "model.safetensors")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert [step["loss"] for step in metrics(out)] == [step["loss"] for step in metrics(trained)]


def test_a_killed_process_resumes_with_the_same_bits(trained: Path) -> None:
    out = trained.parent / "killed"
    code = (
        "import sys; from pathlib import Path; from tests.training.test_loop import run;"
        "run(Path(sys.argv[1]), 'killed')"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(trained.parent)],
        cwd=root,
        env={
            **os.environ,
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "PYTHONPATH": str(root),
        },
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (stage_of(out) / "checkpoints" / "4").is_dir() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(trained.parent, "killed")
    expected = load_file(trained / "model.safetensors")
    actual = load_file(out / "model.safetensors")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_gradients_do_not_depend_on_how_labels_fall_into_passes(tokenizer: Any) -> None:
    from rankonce.model.loading import use_segment_attention

    gradients = []
    for budget in (100_000, 300):
        network = build_network("qwen3")
        use_segment_attention(network)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
        learner = ParallelLearner(
            Learner(network, LabelObjective()), Processes(), max_tokens_per_pass=budget
        )
        config = replace(CONFIG, max_gradient_norm=1e9)
        loop._optimize(learner, optimizer, build_examples(tokenizer), config)
        gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    scale = max(float(g.abs().max()) for g in gradients[0])
    for whole, cut in zip(*gradients, strict=True):
        torch.testing.assert_close(cut, whole, atol=1e-5 * scale, rtol=0)


def test_another_configuration_does_not_continue_a_run(trained: Path) -> None:
    with pytest.raises(TrainingError, match="another config"):
        run(trained.parent, "straight", replace(CONFIG, learning_rate=1.0))


def test_a_reworded_task_does_not_continue_a_run(trained: Path) -> None:
    task = library_tasks()["movie-like"]
    reworded = task.model_copy(update={"question": "Will it be liked? Answer Yes or No."})
    with pytest.raises(TrainingError, match="another tasks"):
        run(trained.parent, "straight", tasks=[reworded])


def test_a_torn_run_record_is_named(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "examples.jsonl").write_text((trained.parent / "examples.jsonl").read_text())
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "run.json").write_text('{"config": {')
    with pytest.raises(TrainingError, match=r"run\.json is not the record of a run"):
        run(tmp_path, "torn")


def test_examples_without_any_known_label_are_passed_over(tmp_path: Path) -> None:
    line = {"task": "movie-like", "candidates": [{"fields": {"title": "x"}}], "labels": [None]}
    write_examples(tmp_path / "examples.jsonl", count=2)
    with (tmp_path / "examples.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    # Each example has a pass of its own under this budget, the unknown one too.
    out = run(tmp_path, "out", replace(CONFIG, epochs=1, max_tokens_per_pass=1))
    assert sum(step["targets"] for step in metrics(out)) == 12


def test_a_line_separator_inside_a_title_does_not_end_a_line(tmp_path: Path) -> None:
    line = {
        "task": "movie-like",
        "candidates": [{"fields": {"title": "a\u2028b"}}],
        "labels": ["No"],
    }
    path = tmp_path / "examples.jsonl"
    path.write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    (example,) = read_examples(path)
    assert example.request.candidates[0].fields["title"] == "a\u2028b"


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    network = build_network("llama")
    torch.nn.init.constant_(network.lm_head.weight, torch.nan)
    renderer = Renderer(TextEncoder(tokenizer), max_prompt_tokens=4096)
    rows = [TrainingExample(request=build_request(2), labels=("Yes", "No"))]
    data = TrainingData(
        units=lambda _: tokenize_examples(rows, renderer, library_tasks()),
        objective=LabelObjective(),
    )
    with pytest.raises(NumericsError, match="loss"):
        train(network, tokenizer, data, tmp_path, config=CONFIG)


def test_every_example_is_in_exactly_one_step(tokenizer: Any) -> None:
    rows = build_examples(tokenizer)
    shuffled = shuffle_units(rows * 20, seed=3)
    steps = list(cut_into_steps(shuffled, targets_per_step=10))
    assert sorted(map(id, rows * 20)) == sorted(id(row) for step in steps for row in step)
    assert all(sum(row.num_targets for row in step) >= 10 for step in steps[:-1])
    assert shuffled != shuffle_units(rows * 20, seed=4)


def test_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    rates = [
        rate_factor(step / 100, schedule="cosine", warmup_share=0.1, final_share=0.1)
        for step in range(1, 101)
    ]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[54] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_named_by_their_parameters(size: str) -> None:
    with torch.device("meta"):
        network = build_model(size, seed=0)
    count = sum(p.numel() for p in network.parameters())
    assert count == pytest.approx(float(size.removesuffix("m")) * 1e6, rel=0.35)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds(name: str) -> None:
    recipe = RECIPES[name]()
    assert recipe.name == name
    assert recipe.size in SIZES


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("{", DataError, "line 1"),
        ('{"task": "movie-like", "candidates": [{"fields": {"title": "x"}}]}', DataError, "labels"),
        (
            '{"task": "movie-like", "candidates": [{"fields": {"title": "x"}}], "labels": []}',
            DataError,
            "one label for each of 1",
        ),
        (
            '{"task": "movie-like", "candidates": [{"fields": {"title": "x"}}], "labels": ["Hm"]}',
            DataError,
            "examples.jsonl: line 1: labels: should be of Yes, No",
        ),
        (
            '{"task": "movie-like", "candidates": [{"fields": {"title": "x"}}],'
            ' "labels": [{"Yes": 0.5, "No": 0.6}]}',
            DataError,
            "sum to 1",
        ),
        (
            '{"task": "movie-like", "candidates": [{"fields": {"title": "x"}}], "labels": [{}]}',
            DataError,
            "examples.jsonl: line 1: labels: should be of Yes, No, is {}",
        ),
        (
            '{"task": "movie-like", "candidates": [{"fields": {"title": "x"}}],'
            ' "labels": [{"Yes": true, "No": false}]}',
            DataError,
            "should be of Yes, No, is {'Yes': True",
        ),
        (
            '{"task": "movie-like", "candidates": [{"fields": {"title": "x"}}], "labels": [null]}',
            TrainingError,
            "labels: should be known of one candidate at least",
        ),
        (
            '{"task": "movie-like", "candidates": [{"title": "x"}], "labels": ["Yes"]}',
            DataError,
            r"candidates\[0\]",
        ),
    ],
)
def test_a_faulty_example_is_named(
    tmp_path: Path, line: str, error: type[RankOnceError], message: str
) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(error, match=message):
        run_stages([finetune_stage(CONFIG)], path, tmp_path / "out", name="x", size="1m", seed=0)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_run_from_scratch_can_take_the_shape_and_tokenizer_of_a_checkpoint(
    tmp_path: Path,
) -> None:
    write_examples(tmp_path / "examples.jsonl", 6)
    network, tokenizer = build_network("llama"), build_tokenizer()
    network.save_pretrained(tmp_path / "shape")
    tokenizer.save_pretrained(tmp_path / "shape")
    out = run(tmp_path, "out", size=str(tmp_path / "shape"), seed=3)
    start = AutoModelForCausalLM.from_pretrained(out / "start")
    sizes = {name: weight.shape for name, weight in network.state_dict().items()}
    assert {name: weight.shape for name, weight in start.state_dict().items()} == sizes
    embedding = start.get_input_embeddings().weight
    assert not torch.equal(embedding, network.get_input_embeddings().weight)
    text = "What a film, 2001!"
    assert AutoTokenizer.from_pretrained(out).encode(text) == tokenizer.encode(text)
    with pytest.raises(ModelError, match=r"size: should be one of .*, or a checkpoint's folder"):
        run(tmp_path, "none", size=str(tmp_path))


def test_null_is_a_label_that_is_not_known(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text(
        '{"task": "movie-like", "candidates": [{"fields": {"title": "x"}}], "labels": [null]}\n'
    )
    assert read_examples(path)[0].labels == (None,)
