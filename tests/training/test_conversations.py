"""Only answers are learnt, each with the token that ends it, whatever the chat template."""

import logging
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from rankonce.errors import DataError, ModelError
from rankonce.prompts.conversations import Conversation, Turn
from rankonce.prompts.encoding import TextEncoder
from rankonce.prompts.rendering import Renderer
from rankonce.training.conversations import (
    TooLong,
    tokenize_conversation,
    tokenize_conversations,
)
from rankonce.training.tokenizer import train_tokenizer
from tests.conftest import CHAT_TEMPLATE, build_tokenizer
from tests.prompts.test_encoding import HOSTILE, LLAMA_2_TEMPLATE, sentencepiece_tokenizer

LLAMA_3 = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m.role "
    "+ '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported, not system') }}"
    "{% endif %}{% endfor %}"
)
# As Qwen 3 has it: an empty thought before the last answer alone.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
# An answer ends with the role of the next turn, the last one with nothing.
ENDLESS = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LETTERS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
# Each template with what stands behind an answer.
TEMPLATES = {
    "chatml": (CHAT_TEMPLATE, "<|im_end|>"),
    "llama-3": (LLAMA_3, "<|eot_id|>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "mistral": (MISTRAL, "</s>"),
    "thinking": (THINKING, "<|im_end|>"),
}
SPECIAL = (
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>",
    "[INST]", "[/INST]", "<|user|>", "<|assistant|>",
)  # fmt: skip


@cache
def tokenizer_of(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = template
    return tokenizer


def renderer_of(tokenizer: Any, max_tokens: int = 4096) -> Renderer:
    return Renderer(TextEncoder(tokenizer), max_prompt_tokens=max_tokens)


def talk(*contents: str, system: str | None = None, weights: tuple[int, ...] = ()) -> Conversation:
    turns = [] if system is None else [Turn(role="system", content=system)]
    for place, content in enumerate(contents):
        is_learnt = not weights or bool(weights[place // 2])
        role: Any = ("user", "assistant")[place % 2]
        turns.append(Turn(role=role, content=content, is_learnt=is_learnt))
    return Conversation(turns=tuple(turns), source="chat.jsonl: line 3")


def learnt_texts(tokenizer: Any, conversation: Conversation, **options: Any) -> list[str]:
    """Decode every unbroken run of learnt tokens."""
    unit = tokenize_conversation(conversation, renderer_of(tokenizer, **options))
    runs: list[list[int]] = [[]]
    for token_id, is_learnt in zip(unit.token_ids, unit.learnt, strict=True):
        if is_learnt:
            runs[-1].append(token_id)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


TALK = talk("Which film?", "Heat (1995).", "Why that one?", "It is a drama, like Alien.")


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_and_their_ends_are_learnt_and_nothing_else(name: str) -> None:
    template, end = TEMPLATES[name]
    space = " " if name == "mistral" else ""
    assert learnt_texts(tokenizer_of(template), TALK) == [
        f"{space}Heat (1995).{end}",
        f"{space}It is a drama, like Alien.{end}",
    ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_the_template_itself(name: str) -> None:
    tokenizer = tokenizer_of(TEMPLATES[name][0])
    unit = tokenize_conversation(TALK, renderer_of(tokenizer))
    messages = [{"role": turn.role, "content": turn.content} for turn in TALK.turns]
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert list(unit.token_ids) == whole


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_stands_before_the_last_answer_is_the_prompt_that_asks_for_it(name: str) -> None:
    tokenizer = tokenizer_of(TEMPLATES[name][0])
    renderer = renderer_of(tokenizer)
    unit = tokenize_conversation(talk("Which film?", "Heat."), renderer)
    prompt = renderer.encoder.encode_chat([("user", "Which film?")])
    assert unit.token_ids[: unit.learnt.index(True)] == prompt


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_the_system_says_is_read_and_not_learnt(name: str) -> None:
    tokenizer = tokenizer_of(TEMPLATES[name][0])
    asked = talk("Which film?", "Heat.", system="You rank films.")
    unit = tokenize_conversation(asked, renderer_of(tokenizer))
    assert tokenizer.decode(unit.token_ids).count("You rank films.") == 1
    (answer,) = learnt_texts(tokenizer, asked)
    assert answer.strip() == f"Heat.{TEMPLATES[name][1]}"


def test_without_a_template_questions_stand_as_plain_prompts_do() -> None:
    tokenizer = tokenizer_of(None)
    asked = talk("Which film?", "Heat.", "Why?", "It fits.", system="You rank films.")
    unit = tokenize_conversation(asked, renderer_of(tokenizer))
    assert tokenizer.decode(unit.token_ids) == (
        "You rank films.\nWhich film?\nAnswer: Heat.</s>\nWhy?\nAnswer: It fits.</s>"
    )
    assert learnt_texts(tokenizer, asked) == [" Heat.</s>", " It fits.</s>"]


def test_a_plain_answer_is_the_label_of_a_plain_prompt() -> None:
    encoder = TextEncoder(tokenizer_of(None))
    unit = tokenize_conversation(talk("Like it?", "Yes"), renderer_of(tokenizer_of(None)))
    learnt = [i for i, flag in zip(unit.token_ids, unit.learnt, strict=True) if flag]
    assert learnt[:-1] == encoder.encode_answer("Answer:", " Yes")


def test_a_tokenizer_from_scratch_begins_and_ends_conversations() -> None:
    tokenizer = train_tokenizer(["Which film? Heat."], [])
    unit = tokenize_conversation(TALK, renderer_of(tokenizer))
    assert unit.token_ids[0] == tokenizer.bos_token_id
    assert not unit.learnt[0]
    assert unit.token_ids[-1] == tokenizer.eos_token_id
    assert unit.learnt[-1]
    assert learnt_texts(tokenizer, TALK) == [
        " Heat (1995).</s>",
        " It is a drama, like Alien.</s>",
    ]


@pytest.mark.parametrize(
    "template", [None, LLAMA_2_TEMPLATE + " {{ (messages[2] | default({})).content }}"]
)
@pytest.mark.parametrize("space_after_special", [False, True])
def test_a_sentencepiece_tokenizer_learns_whole_answers(
    template: str | None, space_after_special: bool
) -> None:
    tokenizer = sentencepiece_tokenizer(template, space_after_special=space_after_special)
    asked = talk("Which film?", "Heat at five", system="You rank films.")
    (answer,) = learnt_texts(tokenizer, asked)
    assert answer.removesuffix("</s>").strip() == "Heat at five"
    unit = tokenize_conversation(asked, renderer_of(tokenizer))
    assert unit.token_ids[-1] == tokenizer.eos_token_id
    assert unit.learnt[-1]


def test_where_no_token_ends_the_last_answer_that_of_a_text_does() -> None:
    assert learnt_texts(tokenizer_of(ENDLESS), TALK) == [
        "Heat (1995).<|user|>",
        "It is a drama, like Alien.</s>",
    ]
    assert learnt_texts(tokenizer_of(LETTERS), TALK) == [
        "Heat (1995).",
        "It is a drama, like Alien.\n</s>",
    ]


def test_a_tokenizer_without_an_end_of_text_is_named() -> None:
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="eos_token"):
        tokenize_conversation(TALK, renderer_of(tokenizer))


TOKENIZERS = {name: tokenizer_of(pair[0]) for name, pair in TEMPLATES.items()}
RENDERERS = {
    name: (tokenizer, renderer_of(tokenizer))
    for name, tokenizer in {**TOKENIZERS, None: tokenizer_of(None)}.items()
}


@pytest.mark.parametrize("name", RENDERERS)
@given(
    contents=st.lists(
        st.one_of(
            st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip),
            st.sampled_from([*HOSTILE, *SPECIAL]),
        ),
        min_size=4,
        max_size=4,
    )
)
def test_any_answer_is_learnt_whole_and_no_text_becomes_a_special_token(
    name: str | None, contents: list[str]
) -> None:
    tokenizer, renderer = RENDERERS[name]
    unit = tokenize_conversation(talk(*contents), renderer)
    harmless = tokenize_conversation(TALK, renderer)

    def special(ids: Any) -> list[int]:
        return [i for i in ids if i in tokenizer.added_tokens_decoder]

    assert special(unit.token_ids) == special(harmless.token_ids)
    learnt = [i for i, flag in zip(unit.token_ids, unit.learnt, strict=True) if flag]
    assert special(learnt) == special(
        i for i, flag in zip(harmless.token_ids, harmless.learnt, strict=True) if flag
    )
    text = tokenizer.decode(learnt, clean_up_tokenization_spaces=False)
    for answer in contents[1::2]:
        # A line break of the header may be one token with line breaks of the answer.
        assert answer.strip() in text
    assert text.count(TEMPLATES[name][1] if name else "</s>") >= 2


def test_answers_of_weight_0_are_context() -> None:
    asked = talk("Which film?", "Alien.", "And now?", "Heat.", weights=(0, 1))
    assert learnt_texts(tokenizer_of(CHAT_TEMPLATE), asked) == ["Heat.<|im_end|>"]


def test_a_conversation_that_does_not_fit_is_refused_by_name() -> None:
    renderer = renderer_of(tokenizer_of(CHAT_TEMPLATE), 20)
    with pytest.raises(
        DataError, match=r"chat\.jsonl: line 3: turns: .* tokens, the model takes 20"
    ):
        list(tokenize_conversations([TALK], renderer))


@pytest.mark.parametrize(("too_long", "room"), [("cut", 40), ("refuse", 4096)])
def test_a_conversation_is_cut_behind_an_answer_and_that_is_reported(
    too_long: TooLong, room: int, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tokenizer_of(CHAT_TEMPLATE)
    whole = renderer_of(tokenizer)
    first = tokenize_conversation(talk("Which film?", "Heat (1995)."), whole)
    assert first.num_tokens <= 40 < tokenize_conversation(TALK, whole).num_tokens
    with caplog.at_level(logging.WARNING):
        (unit,) = tokenize_conversations([TALK], renderer_of(tokenizer, room), too_long=too_long)
    assert (unit == first) == (too_long == "cut")
    assert ("1 conversations were cut" in caplog.text) == (too_long == "cut")


def test_a_conversation_whose_first_answer_does_not_fit_is_refused_even_where_others_are_cut() -> (
    None
):
    with pytest.raises(DataError, match="line 3: turns: the conversation has"):
        list(tokenize_conversations([TALK], renderer_of(tokenizer_of(None), 5), too_long="cut"))


def test_a_template_that_leaves_an_answer_out_is_named() -> None:
    template = CHAT_TEMPLATE.replace("{{ m.content }}", "{{ m.content if m.role != 'assistant' }}")
    with pytest.raises(DataError, match=r"line 3: messages\[1\]: the chat template leaves"):
        list(tokenize_conversations([TALK], renderer_of(tokenizer_of(template))))
