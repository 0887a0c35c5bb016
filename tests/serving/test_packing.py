"""Prompts that share their beginning are packed, and come back in their own order."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankonce.serving.packing import EncodedPrompts, PackedPrompts, pack_prompts
from tests.serving.conftest import Served

PROMPTS = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple), min_size=1, max_size=12
)


def computed_tokens(packed: PackedPrompts) -> int:
    return sum(
        len(request.prefix_ids) + sum(map(len, request.segment_ids)) for request in packed.requests
    )


def pack(prompts: list[tuple[int, ...]], head: tuple[int, ...] = ()) -> PackedPrompts:
    return pack_prompts(EncodedPrompts(head=head, tails=prompts), [7])


@given(PROMPTS, st.lists(st.integers(0, 2), max_size=5).map(tuple))
def test_a_head_that_is_known_changes_nothing(
    tails: list[tuple[int, ...]], head: tuple[int, ...]
) -> None:
    assert pack(tails, head) == pack([head + tail for tail in tails])


@given(PROMPTS)
def test_packed_prompts_are_the_prompts(prompts: list[tuple[int, ...]]) -> None:
    packed = pack(prompts)
    found = {}
    for request, places in zip(packed.requests, packed.places, strict=True):
        assert request.label_ids == ((7,),)
        for segment, place in zip(request.segment_ids, places, strict=True):
            assert segment, "every prompt keeps a token of its own"
            found[place] = request.prefix_ids + segment
    assert [found[place] for place in range(len(prompts))] == prompts
    assert sum(map(len, packed.places)) == len(prompts)


@given(PROMPTS)
def test_packing_never_costs_tokens(prompts: list[tuple[int, ...]]) -> None:
    packed = pack(prompts)
    assert packed.num_tokens == sum(map(len, prompts))
    assert computed_tokens(packed) <= packed.num_tokens


def test_all_of_one_prompt_but_its_last_token_can_be_known() -> None:
    (request,) = pack([(1, 2, 3)]).requests
    assert request.prefix_ids == (1, 2)
    assert request.segment_ids == ((3,),)


def test_prompts_that_share_nothing_are_separate_requests() -> None:
    packed = pack([(1, 5), (2, 5), (3, 5)])
    assert [one.prefix_ids for one in packed.requests] == [(1,), (2,), (3,)]


def test_equal_prompts_share_all_but_the_last_token() -> None:
    (request,) = pack([(1, 2, 3), (1, 2, 3)]).requests
    assert request.prefix_ids == (1, 2)
    assert request.segment_ids == ((3,), (3,))


def test_members_with_one_instruction_are_grouped_by_member() -> None:
    instruction = tuple(range(50))
    prompts = [
        (*instruction, *range(1000 * member, 1000 * member + 200), 5000 + candidate)
        for member in range(1, 4)
        for candidate in range(10)
    ]
    random.Random(0).shuffle(prompts)
    packed = pack(prompts)
    assert [len(request.prefix_ids) for request in packed.requests] == [250] * 3
    assert computed_tokens(packed) == 3 * (250 + 10)


def test_single_prompts_with_one_instruction_share_it() -> None:
    prompts = [(*range(50), 100 + member, 200 + member) for member in range(5)]
    (request,) = pack(prompts).requests
    assert len(request.prefix_ids) == 50


def test_a_conversation_that_grows_is_packed_whatever_its_length() -> None:
    packed = pack([tuple(range(length)) for length in range(1, 3000)])
    assert computed_tokens(packed) < packed.num_tokens / 2 + 3000


@pytest.mark.parametrize("num_prompts", [2, 63])
def test_usage_shows_that_a_beginning_was_read_once(plain: Served, num_prompts: int) -> None:
    beginning = "Films that the member has rated, oldest first: Heat, Alien and Up.\nFilm: "
    prompts = [f"{beginning}{index} M\nAnswer:" for index in range(num_prompts)]
    lengths = [len(plain.tokenizer(prompt).input_ids) for prompt in prompts]
    usage = _usage(plain, prompts)
    shared = len(plain.tokenizer(beginning).input_ids)
    assert usage["prompt_tokens"] == sum(lengths)
    assert usage["completion_tokens"] == num_prompts
    assert usage["total_tokens"] == sum(lengths) + num_prompts
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    # The last token of the beginning may melt into the number that follows.
    assert cached >= (num_prompts - 1) * (shared - 1)
    again = _usage(plain, prompts)["prompt_tokens_details"]["cached_tokens"]
    assert again >= num_prompts * (shared - 1), "the prefix cache holds the beginning now"


def test_a_conversation_that_goes_on_is_read_from_where_it_was(chatty: Served) -> None:
    turns = [
        {"role": "user", "content": "Tell me about Heat, Alien and Up, and why they are films"}
    ]

    def ask() -> tuple[int, float]:
        body = {"messages": turns, "max_tokens": 1, "logprobs": True, "labels": ["Yes"]}
        answer = chatty.http.post("/v1/chat/completions", json=body).json()
        usage = answer["usage"]
        logprobs = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return usage["prompt_tokens_details"]["cached_tokens"], logprobs[0]["logprob"]

    _, first = ask()
    cached, again = ask()
    ids = chatty.tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert cached == len(ids) - 1
    assert again == pytest.approx(first, abs=1e-5)
    assert first == pytest.approx(
        float(chatty.plain_logprobs(ids)[chatty.tokenizer.convert_tokens_to_ids("Yes")]), abs=1e-5
    )
    turns += [{"role": "assistant", "content": "Yes"}, {"role": "user", "content": "And M?"}]
    grown, _ = ask()
    assert len(ids) - 32 < grown < len(ids)


def _usage(served: Served, prompts: list[str]) -> dict[str, Any]:
    response = served.http.post("/v1/completions", json={"prompt": prompts, "max_tokens": 1})
    usage: dict[str, Any] = response.json()["usage"]
    return usage
