"""Who takes part in a pass: the short before the long, the urgent before all, and nobody never."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankonce.layout import TokenizedRequest
from rankonce.model.loading import prepare_model
from rankonce.model.scoring import Scorer
from rankonce.serving.turns import Question, Turn, plan_turns
from tests.conftest import build_network

PASS = 100


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    network = build_network("llama", num_hidden_layers=1)
    return Scorer(
        prepare_model(network, None, name="tiny"), cache_bytes=10_000_000, max_graph_tokens=0
    )


def question(
    prefix: int, segments: list[int], *, arrived: float = 0.0, priority: int = 0,
    adapter: str | None = None, first: int = 5,
) -> Question:  # fmt: skip
    request = TokenizedRequest(
        prefix_ids=tuple(first + i % 500 for i in range(prefix)),
        segment_ids=tuple((7,) * n for n in segments),
        label_ids=((1,), (2,)),
        adapter=adapter,
    )
    return Question(requests=[request], arrived=arrived, priority=priority)


def plan(waiting: list[Question], scorer: Scorer, clock: float) -> dict[Question, int]:
    """Plan a pass as the batcher does; returns the tokens that each question computes."""
    spent: dict[Question, int] = {}
    for one, turns in plan_turns(waiting, scorer, max_tokens=PASS):
        one.since = clock
        spent[one] = spent.get(one, 0) + sum(cost(turn) for turn in turns)
        for request, last in turns:
            request.num_done = last
    return spent


def cost(turn: Turn) -> int:
    request, last = turn
    prefix = len(request.tokens.prefix_ids) if request.num_done == 0 else 0
    return prefix + sum(map(len, request.tokens.segment_ids[request.num_done : last]))


def passes(waiting: list[Question], scorer: Scorer) -> Iterator[dict[Question, int]]:
    """Plan until nobody waits."""
    clock = 1000.0
    while left := [one for one in waiting if not one.is_done]:
        clock += 1
        yield plan(left, scorer, clock)


def test_short_questions_do_not_wait_for_a_long_one(scorer: Scorer) -> None:
    long = question(10, [5] * 1000, arrived=0)
    assert plan([long], scorer, 1.0) == {long: PASS}
    shorts = [question(10, [5, 5], arrived=1.5 + i) for i in range(3)]
    spent = plan([long, *shorts], scorer, 2.0)
    assert all(one.is_done for one in shorts)
    assert spent == {**dict.fromkeys(shorts, 20), long: 40}


def test_a_long_question_keeps_a_quarter_of_every_pass(scorer: Scorer) -> None:
    long = question(10, [5] * 40, arrived=0)
    shorts = [question(10, [5, 5], arrived=1 + i) for i in range(60)]
    shares = [spent.get(long, 0) for spent in passes([long, *shorts], scorer)]
    turns = [share for share in shares if share]
    assert len(turns) <= 9
    assert shares[: len(turns)] == turns
    assert min(turns[:-1]) >= 25


def test_long_questions_take_turns(scorer: Scorer) -> None:
    longs = [question(10, [5] * 60, arrived=i) for i in range(3)]
    first = [next(iter(spent)) for spent in list(passes(longs, scorer))[:3]]
    assert first == longs


def test_what_fits_whole_into_an_empty_pass_is_not_cut(scorer: Scorer) -> None:
    mediums = [question(20, [10] * 4, arrived=i) for i in range(4)]
    planned = list(passes(mediums, scorer))
    assert [list(spent.values()) for spent in planned] == [[60], [60], [60], [60]]


def test_urgent_questions_come_first(scorer: Scorer) -> None:
    waiting = [question(5, [5] * 3, arrived=i, priority=p) for i, p in enumerate([5, 0, 5, -1, 0])]
    waiting += [question(5, [5] * 15, arrived=0, priority=-2)]
    order = [one.priority for spent in passes(waiting, scorer) for one in spent]
    assert order == sorted(order)


def test_one_adapter_a_pass_and_none_waits_forever(scorer: Scorer) -> None:
    waiting = [question(5, [5] * 60, adapter="films", arrived=0)]
    waiting += [question(5, [5] * 60, arrived=1)]
    planned = list(passes(waiting, scorer))
    assert all(len({one.adapter for one in spent}) == 1 for spent in planned)
    assert {one.adapter for spent in planned[:2] for one in spent} == {"films", None}


def test_a_prompt_longer_than_a_pass_runs_by_itself(scorer: Scorer) -> None:
    huge = question(3 * PASS, [5] * 4, arrived=1)
    shorts = [question(5, [5], arrived=0 + i) for i in range(40)]
    planned = list(passes([huge, *shorts], scorer))
    assert planned[0] == {huge: 3 * PASS + 5}
    assert huge.is_done


def test_few_cut_questions_are_under_way_at_once(scorer: Scorer) -> None:
    longs = [question(10, [5] * 60, arrived=i) for i in range(30)]
    for _ in passes(longs, scorer):
        assert sum(one.is_cut for one in longs) <= 9
    assert all(one.is_done for one in longs)


def test_prompts_without_anything_in_common_are_one_question(scorer: Scorer) -> None:
    many = Question(requests=[question(0, [9]).requests[0] for _ in range(200)], arrived=0)
    one = question(5, [5], arrived=1)
    assert plan([many, one], scorer, 2.0)[one] == 10


shapes = st.tuples(
    st.integers(0, 150), st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(-1, 1)
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(shapes, min_size=1, max_size=12))
def test_every_candidate_gets_one_turn_and_passes_keep_their_bound(
    scorer: Scorer, asked: list[tuple[int, list[int], int]]
) -> None:
    waiting = [
        question(prefix, segments, arrived=i, priority=priority)
        for i, (prefix, segments, priority) in enumerate(asked)
    ]
    total = 0
    for spent in passes(waiting, scorer):
        assert spent
        alone = len(spent) == 1
        assert sum(spent.values()) <= PASS or alone
        total += sum(spent.values())
    assert total == sum(prefix + sum(segments) for prefix, segments, _ in asked)
    assert all(one.left_tokens == 0 for one in waiting)
