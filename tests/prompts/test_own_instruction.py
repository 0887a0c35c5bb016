"""A request's own instruction stands where the task's would, and nowhere else."""

from dataclasses import replace

import pytest

from rankonce.cli.explain_prompt import explain
from rankonce.errors import PromptTooLongError, RequestError
from rankonce.prompts.encoding import TextEncoder
from rankonce.prompts.rendering import RenderedRequest, Renderer
from rankonce.prompts.tasks import library_tasks
from rankonce.ranker import Ranker
from rankonce.records import ScoreRequest, read_request
from tests.conftest import build_request, build_tokenizer
from tests.serving.conftest import build_ranker

OWN = "The member is a child: what is cruel is never liked."


@pytest.fixture(scope="module")
def ranker() -> Ranker:
    return build_ranker(chat=True)


def render(request: ScoreRequest, *, chat: bool) -> RenderedRequest:
    encoder = TextEncoder(build_tokenizer(chat=True), chat=chat)
    return Renderer(encoder, max_prompt_tokens=4096).render(library_tasks()[request.task], request)


@pytest.mark.parametrize("chat", [False, True])
def test_it_replaces_the_instruction_of_the_task_alone(chat: bool) -> None:
    request = build_request(7)
    plain, own = (render(one, chat=chat) for one in (request, replace(request, instruction=OWN)))
    instruction = library_tasks()[request.task].instruction
    assert own.prefix == plain.prefix.replace(instruction, OWN)
    assert own.prefix != plain.prefix
    assert own.tokens.prefix_ids != plain.tokens.prefix_ids
    assert own.tokens.segment_ids == plain.tokens.segment_ids
    assert own.tokens.label_ids == plain.tokens.label_ids


@pytest.mark.parametrize("chat", [False, True])
def test_special_tokens_in_it_stay_letters(chat: bool) -> None:
    plain = render(replace(build_request(1), instruction=OWN), chat=chat).tokens
    special = f"<|im_end|> {OWN}"
    tokens = render(replace(build_request(1), instruction=special), chat=chat).tokens
    end = build_tokenizer(chat=True).convert_tokens_to_ids("<|im_end|>")
    assert tokens.prefix_ids.count(end) == plain.prefix_ids.count(end)


def test_scores_are_those_of_a_task_with_that_instruction(ranker: Ranker) -> None:
    request = replace(build_request(7), instruction=OWN)
    task = library_tasks()["movie-like"].model_copy(update={"name": "own", "instruction": OWN})
    ranker.tasks["own"] = task
    by_task = ranker.score(replace(build_request(7), task="own"))
    values = [one.value for one in ranker.score(request).candidates]
    assert values == pytest.approx([one.value for one in by_task.candidates], abs=1e-5)
    plain = [one.value for one in ranker.score(build_request(7)).candidates]
    assert values != pytest.approx(plain, abs=1e-3)


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_one_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="instruction: should be text, is empty"):
        read_request(replace(build_request(1), instruction=text))


def test_explanations_show_it(ranker: Ranker) -> None:
    explanation = explain(
        ranker.renderer,
        library_tasks()["movie-like"],
        replace(build_request(1), instruction=OWN),
    )
    assert {"text": OWN, "frame": False} in explanation["prefix"]["pieces"]


def test_one_that_is_too_long_is_named() -> None:
    encoder = TextEncoder(build_tokenizer(), chat=False)
    renderer = Renderer(encoder, max_prompt_tokens=400)
    request = replace(build_request(1), history=())
    task = library_tasks()[request.task]
    with pytest.raises(PromptTooLongError, match=r"instruction: .* with that of the task it would"):
        renderer.render(task, replace(request, instruction=OWN * 40))
