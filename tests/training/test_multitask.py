"""The recipe of many tasks learns all but those held out, and nothing from after the cut."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from rankonce.datasets.domains import SIMULATED, TASK_SOURCES
from rankonce.datasets.domains.platform import Domain
from rankonce.datasets.simulator import split_of
from rankonce.prompts.encoding import TextEncoder
from rankonce.prompts.rendering import Renderer
from rankonce.prompts.tasks import library_tasks
from rankonce.records import TrainingExample
from rankonce.training import multitask
from rankonce.training.instructions import record_source
from rankonce.training.loop import TrainConfig
from rankonce.training.multitask import UNSEEN_TASKS, film_cut, load_multitask, load_questions
from rankonce.training.recipes import find_recipe, run_recipe
from rankonce.training.sequences import TokenSequence
from rankonce.training.stages import StageSource
from tests.conftest import build_tokenizer
from tests.datasets.test_simulator import write_films


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_films(tmp_path_factory.mktemp("films"), turn_after=None)


@pytest.fixture(autouse=True)
def few_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multitask, "_NUM_SIMULATED", 30)
    monkeypatch.setattr(multitask, "_NUM_REQUESTS", 10)
    monkeypatch.setattr(multitask, "_NUM_RECORDS", 4)


def test_all_tasks_but_those_held_out_come_evenly_and_from_before_the_cut(films: Path) -> None:
    source = load_multitask(films, TrainConfig(epochs=1), library_tasks())
    assert source.examples is not None
    cut = film_cut(films)
    configs = {domain.name: domain.config() for domain in SIMULATED}
    counts = dict.fromkeys(set(TASK_SOURCES) - set(UNSEEN_TASKS), 0)
    assert len(counts) >= 30
    for example in source.examples(0):
        task, time = example.request.task, float(example.request.time or 0)
        counts[task] += 1
        domain = TASK_SOURCES[task]
        if isinstance(domain, Domain):
            assert split_of(configs[domain.name], time) == "train"
        else:
            assert time < cut
    assert min(counts.values()) >= 1
    assert max(counts.values()) == 10
    for example in source.valid:
        task, time = example.request.task, float(example.request.time or 0)
        domain = TASK_SOURCES[task]
        if isinstance(domain, Domain):
            assert split_of(configs[domain.name], time) == "valid"
        else:
            assert time >= cut


def test_an_epoch_begins_with_many_tasks_and_has_an_order_of_its_own(films: Path) -> None:
    source = load_multitask(films, TrainConfig(epochs=2), library_tasks())
    assert source.examples is not None
    first, second = list(source.examples(0)), list(source.examples(1))
    assert len({example.request.task for example in first[:60]}) > 20
    assert first != second
    assert sorted(map(repr, first)) == sorted(map(repr, second))


def test_questions_are_about_requests_that_are_learnt(
    films: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt = load_multitask(films, TrainConfig(epochs=1), library_tasks())
    assert learnt.examples is not None
    known = {repr(example) for example in learnt.examples(0)}
    asked: list[TrainingExample] = []

    def note(records: Sequence[TrainingExample], *args: Any, **options: Any) -> StageSource:
        asked.extend(records)
        return record_source(records, *args, **options)

    monkeypatch.setattr(multitask, "record_source", note)
    source = load_questions(films, TrainConfig(epochs=1), library_tasks())
    assert {repr(example) for example in asked} <= known
    counts = Counter(example.request.task for example in asked)
    assert set(counts) == set(TASK_SOURCES) - set(UNSEEN_TASKS)
    assert max(counts.values()) == 4
    assert len({example.request.task for example in asked[:60]}) > 20
    assert {task.name for task in source.tasks} == set(counts)
    assert source.examples is None
    renderer = Renderer(TextEncoder(build_tokenizer(), chat=False), max_prompt_tokens=4096)
    unit = next(iter(source.open(renderer).units(0)))
    assert isinstance(unit, TokenSequence)
    assert 0 < sum(unit.learnt) < len(unit.token_ids)


def test_the_recipe_runs_its_three_stages(films: Path, tmp_path: Path) -> None:
    recipe = find_recipe("multitask")
    stages = [replace(one, config=replace(one.config, max_steps=2)) for one in recipe.stages]
    run_recipe(replace(recipe, stages=tuple(stages), size="0.07m"), films, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert set(record["tasks"]) == set(TASK_SOURCES) - set(UNSEEN_TASKS)
    assert record["data"]["until"] == pl.read_parquet(films / "ratings.parquet")[
        "timestamp"
    ].quantile(0.85, "nearest")
    for stage in ("1-pretrain", "2-instruct", "3-finetune"):
        assert (tmp_path / "run" / "stages" / stage / "metrics.jsonl").exists()


def test_requests_are_learnt_in_several_wordings_and_measured_in_one(films: Path) -> None:
    source = load_multitask(films, TrainConfig(epochs=2), library_tasks())
    assert source.examples is not None
    tokenizer = build_tokenizer()
    renderer = Renderer(TextEncoder(tokenizer, chat=False), max_prompt_tokens=4096)
    data = source.open(renderer)

    def own_wording(examples: Iterable[TrainingExample], units: Iterable[Any]) -> list[bool]:
        instructions = {task.name: task.instruction for task in source.tasks}
        return [
            instructions[example.request.task] in tokenizer.decode(list(unit.tokens.prefix_ids))
            for example, unit in zip(examples, units, strict=True)
        ]

    first, second = (own_wording(source.examples(n), data.units(n)) for n in range(2))
    share = sum(first) / len(first)
    assert 0.25 < share < 0.75
    assert first != second
    assert data.valid is not None
    assert all(own_wording(source.valid, data.valid()))
