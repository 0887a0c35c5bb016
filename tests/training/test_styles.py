"""Training draws a wording for every example; scoring never does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rankonce.cli.tasks import example_request
from rankonce.errors import DataError
from rankonce.model.loading import LoadedModel
from rankonce.prompts.encoding import TextEncoder
from rankonce.prompts.rendering import Renderer
from rankonce.prompts.tasks import library_tasks
from rankonce.ranker import Ranker
from rankonce.records import TrainingExample, read_request
from rankonce.training.data import tokenize_examples
from rankonce.training.loop import TrainConfig
from rankonce.training.stages import finetune_source

NAME = "movie-rating"
TASK = library_tasks()[NAME]
ONE_WORDING = TASK.model_copy(update={"styles": {}})


@pytest.fixture(scope="module")
def renderer(tokenizer: Any) -> Renderer:
    return Renderer(TextEncoder(tokenizer), max_prompt_tokens=4096)


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    path = tmp_path / "examples.jsonl"
    line = json.dumps({**example_request(TASK), "labels": ["4", None]})
    path.write_text(f"{line}\n" * 30)
    return path


def wordings_read(units: Any, renderer: Renderer) -> list[int]:
    """Say of every unit in which wording of the task it is, 0 for the task's own."""
    request = read_request(example_request(TASK))
    known = [renderer.render(wording, request).tokens for wording in TASK.wordings()]
    return [known.index(unit.tokens) for unit in units]


def test_every_wording_comes_and_epochs_differ(examples: Path, renderer: Renderer) -> None:
    source = finetune_source([examples], TrainConfig(seed=1), library_tasks(), styles=True)
    data = source.open(renderer)
    first, again, second = (wordings_read(data.units(n), renderer) for n in (0, 0, 1))
    assert set(first) == set(second) == {0, 1, 2}
    assert first == again
    assert first != second


def test_labels_and_targets_do_not_depend_on_the_wording(
    examples: Path, renderer: Renderer
) -> None:
    source = finetune_source([examples], TrainConfig(), library_tasks(), styles=True)
    units: list[Any] = list(source.open(renderer).units(0))
    assert {unit.targets for unit in units} == {((0.0, 0.0, 0.0, 1.0, 0.0), None)}
    assert len({unit.tokens.label_ids for unit in units}) == 1


def test_without_styles_and_for_valid_examples_the_own_wording_is_read(
    examples: Path, renderer: Renderer
) -> None:
    plain = finetune_source([examples], TrainConfig(), library_tasks())
    assert set(wordings_read(plain.open(renderer).units(0), renderer)) == {0}
    styled = finetune_source(
        [examples], TrainConfig(), library_tasks(), valid_paths=[examples], styles=True
    )
    assert set(wordings_read(styled.open(renderer).valid(), renderer)) == {0}
    assert plain.fingerprint != styled.fingerprint


def test_styles_of_tasks_that_have_none_are_refused(examples: Path) -> None:
    tasks = {NAME: ONE_WORDING}
    finetune_source([examples], TrainConfig(), tasks)
    with pytest.raises(DataError, match="styles: should be left out: movie-rating has no"):
        finetune_source([examples], TrainConfig(), tasks, styles=True)


def test_a_tokenizer_is_trained_on_the_wordings_that_are_read(
    examples: Path, renderer: Renderer
) -> None:
    source = finetune_source([examples], TrainConfig(), library_tasks(), styles=True)
    text = "\n".join(source.texts(renderer))
    assert all(wording.question in text for wording in TASK.wordings())


def test_a_task_without_styles_keeps_its_wording(renderer: Renderer) -> None:
    request = read_request(example_request(TASK))
    rows = [TrainingExample(request=request, labels=("4", None))] * 9
    units = tokenize_examples(rows, renderer, {NAME: ONE_WORDING}, style_seed=3)
    assert {unit.tokens for unit in units} == {renderer.render(TASK, request).tokens}


def test_scoring_always_reads_the_own_wording(
    load_random: Callable[..., LoadedModel], renderer: Renderer
) -> None:
    ranker = Ranker(load_random("llama"))
    request = read_request(example_request(TASK))
    own = renderer.render(TASK, request).tokens
    assert [ranker.prepare(request).rendered.tokens for _ in range(5)] == [own] * 5
