"""The recipe of many tasks learns all but those held out, and nothing from after the cut."""

import json
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from rankonce.datasets.domains import SIMULATED, TASK_SOURCES
from rankonce.datasets.domains.platform import Domain
from rankonce.datasets.simulator import split_of
from rankonce.prompts.tasks import library_tasks
from rankonce.training import multitask
from rankonce.training.loop import TrainConfig
from rankonce.training.multitask import UNSEEN_TASKS, film_cut, load_multitask
from rankonce.training.recipes import find_recipe, run_recipe
from tests.datasets.test_simulator import write_films


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_films(tmp_path_factory.mktemp("films"), turn_after=None)


@pytest.fixture(autouse=True)
def few_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multitask, "_NUM_SIMULATED", 30)
    monkeypatch.setattr(multitask, "_NUM_REQUESTS", 10)


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


def test_the_recipe_reads_texts_and_then_learns_the_tasks(films: Path, tmp_path: Path) -> None:
    recipe = find_recipe("multitask")
    stages = [replace(one, config=replace(one.config, max_steps=2)) for one in recipe.stages]
    run_recipe(replace(recipe, stages=tuple(stages), size="0.07m"), films, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert set(record["tasks"]) == set(TASK_SOURCES) - set(UNSEEN_TASKS)
    assert record["data"]["until"] == pl.read_parquet(films / "ratings.parquet")[
        "timestamp"
    ].quantile(0.85, "nearest")
    assert (tmp_path / "run" / "stages" / "2-finetune" / "metrics.jsonl").exists()
