"""The first questions fit every task, and are really asked."""

import asyncio
import logging

import pytest

from rankonce.prompts.tasks import library_tasks
from rankonce.serving.engine import Engine, ServerConfig
from rankonce.serving.warm_up import choose_tasks, rank_question, warm_up
from tests.serving.conftest import build_ranker


def test_every_task_gets_a_question_that_it_takes() -> None:
    ranker = build_ranker(chat=False)
    for task in library_tasks().values():
        prepared = ranker.prepare(rank_question(task))
        assert len(set(prepared.rendered.tokens.segment_ids)) == 7, task.name


def test_the_operators_tasks_and_one_of_each_kind_are_chosen() -> None:
    library = library_tasks()
    kinds = [task.ranking.kind for task in choose_tasks(dict(library))]
    assert sorted(kinds) == ["expected_grade", "log_odds"]
    own = library["movie-like"].model_copy(update={"name": "mine"})
    changed = library["job-apply"].model_copy(update={"instruction": "Other words."})
    chosen = choose_tasks({**library, "mine": own, "job-apply": changed})
    assert chosen[:2] == [changed, own]
    assert len(chosen) == 4
    pinned = choose_tasks(dict(library), pinned=("movie-like", "job-apply"))
    assert {"movie-like", "job-apply"} <= {task.name for task in pinned}
    assert len({task.name for task in pinned}) == len(pinned)


@pytest.mark.parametrize(("chat", "num_questions"), [(False, 6), (True, 7)])
def test_a_question_of_every_kind_runs_through_the_model(
    chat: bool, num_questions: int, caplog: pytest.LogCaptureFixture
) -> None:
    ranker = build_ranker(chat=chat)

    async def warm() -> int:
        engine = Engine(ranker, ServerConfig())
        async with engine.running():
            await warm_up(engine)
        return engine.observations.snapshot().num_passes

    with caplog.at_level(logging.INFO, "rankonce.serving"):
        assert asyncio.run(warm()) == num_questions
    assert f"warm-up: {num_questions} questions" in caplog.text
    assert ("does not answer chat: messages: the model has no chat template" in caplog.text) is (
        not chat
    )
