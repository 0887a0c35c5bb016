"""History policies: what they keep, what they report."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankonce.errors import PromptTooLongError, RequestError
from rankonce.prompts.encoding import TextEncoder
from rankonce.prompts.history import POLICIES, choose_events
from rankonce.prompts.rendering import Renderer
from rankonce.prompts.tasks import HistoryLines, find_task, library_tasks
from rankonce.records import Event, HistoryReport, Item, ScoreRequest
from tests.conftest import build_tokenizer


def event(time: float, action: str = "liked", title: str = "Heat") -> Event:
    return Event(item=Item(fields={"title": title}), action=action, time=time)


def choose(
    events: list[Event],
    *,
    policy: str,
    max_events: int | None = None,
    max_tokens: int = 10**6,
    tokens: list[int] | None = None,
    candidates: tuple[str, ...] = ("Alien",),
) -> tuple[list[int], HistoryReport]:
    spec = HistoryLines(policy=policy, max_events=max_events)  # type: ignore[arg-type]
    items = [Item(fields={"title": title}) for title in candidates]
    return choose_events(events, items, tokens or [1] * len(events), spec, max_tokens=max_tokens)


def test_chronological_keeps_everything_that_fits_oldest_first() -> None:
    kept, report = choose([event(30), event(10), event(20)], policy="chronological")
    assert kept == [1, 2, 0]
    assert report == HistoryReport(policy="chronological", num_events=3, num_kept=3, dropped={})


def test_the_oldest_events_go_first_when_the_token_budget_is_short() -> None:
    events = [event(30), event(10), event(20)]
    kept, report = choose(events, policy="chronological", tokens=[4, 1, 5], max_tokens=9)
    assert kept == [2, 0]
    assert report.num_kept == 2
    assert report.dropped == {1: "over the budget of 9 history tokens"}


def test_an_event_behind_one_that_does_not_fit_is_dropped_as_well() -> None:
    # The history has no holes: event 1 alone would fit.
    kept, report = choose(
        [event(30), event(10), event(20)], policy="chronological", tokens=[4, 1, 6], max_tokens=9
    )
    assert kept == [0]
    assert list(report.dropped) == [1, 2]


def test_recent_keeps_the_newest_events_up_to_its_bound() -> None:
    kept, report = choose([event(5), event(1), event(4), event(3)], policy="recent", max_events=2)
    assert kept == [2, 0]
    reason = "not among the 2 events of policy recent"
    assert report.dropped == {1: reason, 3: reason}


def test_of_equal_times_the_later_entry_is_the_newer_one() -> None:
    kept, _ = choose([event(1), event(1), event(1)], policy="recent", max_events=2)
    assert kept == [1, 2]


def test_balanced_takes_turns_between_the_actions() -> None:
    events = [event(time, "liked") for time in range(8)] + [event(-1, "disliked")]
    kept, _ = choose(events, policy="balanced", max_events=4)
    assert kept == [8, 5, 6, 7]


def test_similar_keeps_events_that_share_words_with_the_candidates() -> None:
    events = [event(1, title="Alien"), event(2, title="Up"), event(3, title="Alien 3")]
    kept, _ = choose(events, policy="similar", max_events=2, candidates=("Aliens", "alien"))
    assert kept == [0, 2]


def test_similar_prefers_the_newer_of_equally_similar_events() -> None:
    events = [event(time, title="Up") for time in (3, 1, 2)]
    kept, _ = choose(events, policy="similar", max_events=2)
    assert kept == [2, 0]


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"chronological"}))
def test_a_policy_that_picks_needs_a_bound(policy: str) -> None:
    with pytest.raises(ValueError, match=f"policy {policy} needs max_events"):
        HistoryLines(policy=policy)  # type: ignore[arg-type]


EVENTS = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from(["liked", "disliked", "seen"]),
              st.sampled_from(["Heat", "Alien", "Alien 3", "Up"]), st.integers(1, 9)),
    max_size=12,
)  # fmt: skip


@given(
    drawn=EVENTS,
    policy=st.sampled_from(sorted(POLICIES)),
    max_events=st.integers(1, 14),
    max_tokens=st.integers(0, 60),
)
def test_kept_and_dropped_are_all_events_and_kept_are_in_time_order(
    drawn: list[tuple[int, str, str, int]], policy: str, max_events: int, max_tokens: int
) -> None:
    events = [event(time, action, title) for time, action, title, _ in drawn]
    tokens = [number for *_, number in drawn]
    kept, report = choose(
        events, policy=policy, max_events=max_events, max_tokens=max_tokens, tokens=tokens
    )
    assert sorted([*kept, *report.dropped]) == list(range(len(events)))
    assert list(report.dropped) == sorted(report.dropped)
    assert kept == sorted(kept, key=lambda index: (events[index].time, index))
    assert (report.num_kept, report.num_events) == (len(kept), len(events))
    assert len(kept) <= max_events
    assert sum(tokens[index] for index in kept) <= max_tokens
    if policy in ("chronological", "recent") and kept:
        oldest = (events[kept[0]].time, kept[0])
        assert all((events[index].time, index) < oldest for index in report.dropped)


def request(num_events: int) -> ScoreRequest:
    return ScoreRequest(
        task="movie-like",
        time=10_000,
        history=tuple(event(1_000 + place, title=f"Heat {place}") for place in range(num_events)),
        candidates=(Item(fields={"title": "Alien"}),),
    )


def render(max_prompt_tokens: int, num_events: int) -> tuple[str, HistoryReport, int]:
    renderer = Renderer(TextEncoder(build_tokenizer()), max_prompt_tokens=max_prompt_tokens)
    rendered = renderer.render(find_task("movie-like", library_tasks()), request(num_events))
    tokens = rendered.tokens
    return rendered.prefix, rendered.history, len(tokens.prefix_ids) + len(tokens.segment_ids[0])


def test_a_short_context_shortens_the_history_and_the_report_says_so() -> None:
    _, _, whole = render(4096, 12)
    prefix, report, num_tokens = render(whole - 30, 12)
    assert num_tokens <= whole - 30
    written = [int(number) for number in re.findall(r"liked: Heat (\d+)", prefix)]
    assert written == [place for place in range(12) if place not in report.dropped]
    assert 0 < report.num_kept < 12
    assert all("history tokens" in reason for reason in report.dropped.values())


def test_a_context_without_room_for_any_event_still_scores_with_an_empty_history() -> None:
    _, _, bare = render(4096, 0)
    prefix, report, num_tokens = render(bare, 20)
    assert (report.num_kept, num_tokens) == (0, bare)
    assert "The member has rated no film yet." in prefix


def test_a_prompt_that_does_not_fit_without_history_is_refused() -> None:
    _, _, bare = render(4096, 0)
    with pytest.raises(PromptTooLongError, match=rf"{bare} tokens .* takes {bare - 1}"):
        render(bare - 1, 20)


@pytest.mark.parametrize("room", range(0, 120, 7))
def test_every_context_that_holds_the_bare_prompt_is_kept(room: int) -> None:
    _, _, bare = render(4096, 0)
    _, _, num_tokens = render(bare + room, 20)
    assert num_tokens <= bare + room


def test_a_task_without_history_refuses_events() -> None:
    renderer = Renderer(TextEncoder(build_tokenizer()), max_prompt_tokens=4096)
    with pytest.raises(RequestError, match="history: task 'search-relevance' has no history"):
        renderer.render(
            find_task("search-relevance", library_tasks()),
            ScoreRequest(
                task="search-relevance",
                profile={"query": "wing"},
                history=(event(1),),
                candidates=(Item(fields={"text": "flutter"}),),
            ),
        )
