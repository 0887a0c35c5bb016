"""MIND: impressions of two parts, and requests whose past is strictly before."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankonce.datasets.candidate_lists import CandidateList, impression_lists
from rankonce.datasets.common_form import Dataset
from rankonce.datasets.sources import find_adapter, prepare_dataset
from rankonce.errors import DataError

NEWS = "".join(
    f"{item}\t{category}\t{part}\t{title}\t{abstract}\thttps://assets.msn.com/{item}\t[]\t[]\n"
    for item, category, part, title, abstract in [
        ("N1", "sports", "golf", '"Brave" round', "Said so."),
        ("N2", "news", "newsworld", "Élection", ""),
        ("N3", "", "", "No category", ""),
        ("N4", "finance", "markets", "Stocks", ""),
        ("N5", "finance", "markets", "", "Without a title"),
    ]
)
TRAIN = (
    "1\tU1\t11/11/2019 9:05:58 AM\tN1 N2\tN3-0 N4-1\n"
    "2\tU1\t11/11/2019 9:05:58 AM\tN1 N2\tN2-1 N5-0 N9-0\n"
    "3\tU2\t11/12/2019 12:00:00 AM\t\tN1-1 N2-0\n"
    "4\tU2\t11/12/2019 12:00:01 PM\t\t\n"
    "5\tU2\t11/13/2019 12:00:01 PM\t\tN4-0\n"
)
DEV = "1\tU1\t11/15/2019 1:00:00 PM\tN1 N2 N4\tN3 N2\n"


def prepare(tmp_path: Path, train: str = TRAIN, dev: str | None = DEV) -> Dataset:
    for name, behaviors in (("MINDsmall_train", train), ("MINDsmall_dev", dev)):
        if behaviors is None:
            continue
        folder = tmp_path / "given" / name
        folder.mkdir(parents=True)
        (folder / "news.tsv").write_text(NEWS, encoding="utf-8")
        (folder / "behaviors.tsv").write_text(behaviors, encoding="utf-8")
    return prepare_dataset(find_adapter("mind-small"), tmp_path / "out", given=tmp_path / "given")


def test_impressions_become_events_and_the_first_history_undated_clicks(tmp_path: Path) -> None:
    dataset = prepare(tmp_path)
    columns = ("item", "action", "value", "time", "impression", "position")
    events = dataset.read("events").filter(member="U1").select(columns).collect()
    assert events.rows() == [
        ("N1", "clicked", 1.0, None, None, 1),
        ("N2", "clicked", 1.0, None, None, 2),
        ("N3", "shown", 0.0, 1573463158, "MINDsmall_train-1", 1),
        ("N4", "clicked", 1.0, 1573463158, "MINDsmall_train-1", 2),
        ("N2", "clicked", 1.0, 1573463158, "MINDsmall_train-2", 1),
        ("N5", "shown", 0.0, 1573463158, "MINDsmall_train-2", 2),
        ("N9", "shown", 0.0, 1573463158, "MINDsmall_train-2", 3),
        ("N3", "shown", None, 1573822800, "MINDsmall_dev-1", 1),
        ("N2", "shown", None, 1573822800, "MINDsmall_dev-1", 2),
    ]
    assert dataset.manifest["dropped"] == {"empty impressions": 1, "repeated items": 5}
    titles = dataset.read("items").collect()
    assert titles["title"].to_list() == ['"Brave" round', "Élection", "No category", "Stocks", None]
    assert titles["categories"].to_list()[1:3] == [["news", "newsworld"], []]


def by_id(dataset: Dataset, **options: str) -> dict[str | None, CandidateList]:
    return {one.request.id: one for one in impression_lists(dataset, **options)}


def test_an_impression_becomes_a_request_about_the_last_click(tmp_path: Path) -> None:
    lists = by_id(prepare(tmp_path))
    # U2 has clicked nothing before the first impression.
    train, dev = "MINDsmall_train", "MINDsmall_dev"
    assert set(lists) == {f"{train}-1", f"{train}-2", f"{train}-5", f"{dev}-1"}
    first, second = lists["MINDsmall_train-1"], lists["MINDsmall_train-2"]
    assert first.request.profile == {
        "source_title": "Élection",
        "source_genres": ["news", "newsworld"],
    }
    assert [c.id for c in first.request.candidates] == ["N3", "N4"]
    assert first.example.labels == ("No", "Yes")
    # The click of the same second is not yet known.
    assert second.request.history == first.request.history
    assert [(e.item.id, e.time) for e in first.request.history] == [("N1", 1573463158 - 2)]
    assert [c.id for c in second.request.candidates] == ["N2"]
    later = lists["MINDsmall_dev-1"]
    assert [e.item.id for e in later.request.history] == ["N1", "N2", "N4"]
    assert later.grades == (None, None)
    assert later.example.labels == (None, None)
    assert lists["MINDsmall_train-5"].request.profile["source_title"] == '"Brave" round'


def test_a_part_can_be_chosen(tmp_path: Path) -> None:
    assert list(by_id(prepare(tmp_path), split="MINDsmall_dev")) == ["MINDsmall_dev-1"]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 3),
            st.integers(0, 5),
            st.lists(st.integers(1, 5), max_size=3, unique=True),
            st.lists(st.tuples(st.integers(1, 5), st.integers(0, 1)), min_size=1, max_size=4),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_no_click_of_the_same_second_or_later_is_in_a_request(
    tmp_path_factory: pytest.TempPathFactory,
    behaviors: list[tuple[int, int, list[int], list[tuple[int, int]]]],
) -> None:
    lines = "".join(
        f"{number}\tU{member}\t11/11/2019 9:05:0{second} AM\t"
        f"{' '.join(f'N{one}' for one in history)}\t{' '.join(f'N{i}-{c}' for i, c in shown)}\n"
        for number, (member, second, history, shown) in enumerate(behaviors)
    )
    dataset = prepare(tmp_path_factory.mktemp("mind"), lines, None)
    start = 1573463100
    clicks = {
        (member, start + second, f"N{item}")
        for member, second, _, shown in behaviors
        for item, clicked in shown
        if clicked
    }
    for one in impression_lists(dataset):
        number = int(str(one.request.id).rpartition("-")[2])
        member = behaviors[number][0]
        assert one.request.time == start + behaviors[number][1]
        moments = [event.time for event in one.request.history]
        assert moments == sorted(moments)
        first = min(start + second for who, second, _, _ in behaviors if who == member)
        for event in one.request.history:
            assert event.time < one.request.time
            # What is dated was clicked then; the rest is older than all that is dated.
            assert event.time < first or (member, event.time, event.item.id) in clicks


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("1\tU1\t2019-11-11\t\tN1-0\n", r"line 1: time should be like 11/15/2019 10:22:32 AM"),
        (TRAIN + "6\tU1\t11/11/2019 9:05:58 AM\t\tN1-2\n", r"line 6: an impression should be like"),
        (TRAIN + "6\tU1\t11/11/2019 9:05:58 AM\tN1-0\n", r"line 6: should have 5 fields, has 4"),
        (TRAIN + "6\t\t11/11/2019 9:05:58 AM\t\tN1-0\n", r"line 6: member: should be text"),
    ],
)
def test_a_broken_impression_is_named(tmp_path: Path, train: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"MINDsmall_train/behaviors\.tsv: {message}"):
        prepare(tmp_path, train, None)
