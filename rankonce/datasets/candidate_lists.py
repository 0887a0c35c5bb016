"""Lists that were judged or shown as a whole, as requests with a grade for each candidate.

A ranking protocol scores the request and compares the order with the grades: 0 to 4 for a query's
items, 1 (clicked) or 0 for what an impression showed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from rankonce.datasets.common_form import Dataset
from rankonce.records import Event, Item, ScoreRequest, TrainingExample, Value

_QUERY_TASK, _IMPRESSION_TASK = "search-relevance", "similar-item"
_CLICK_LABELS = ("No", "Yes")


@dataclass(frozen=True, kw_only=True)
class CandidateList:
    """A request whose candidates belong together.

    Attributes:
        grades: one a candidate; ``None`` where it is not known.
        member_number: counts the members of the file, 0 for queries.
    """

    request: ScoreRequest
    grades: tuple[int | None, ...]
    member_number: int = 0

    @property
    def example(self) -> TrainingExample:
        """The same with the grades as labels of the task."""
        graded = self.request.task == _QUERY_TASK
        return TrainingExample(
            request=self.request,
            labels=tuple(
                None if grade is None else str(grade) if graded else _CLICK_LABELS[grade]
                for grade in self.grades
            ),
        )

    def part(self, start: int, end: int) -> "CandidateList":
        """Return the list of the candidates from ``start`` to before ``end``."""
        return replace(
            self,
            request=replace(self.request, candidates=self.request.candidates[start:end]),
            grades=self.grades[start:end],
        )


def query_lists(
    dataset: Dataset,
    *,
    split: str | None = None,
    locale: str | None = None,
    max_queries: int | None = None,
    unjudged_per_query: int = 0,
    max_text_chars: int | None = None,
    seed: int = 0,
) -> Iterator[CandidateList]:
    """Make a list of each query: its judged items in the order of the judgements.

    Args:
        split: take the judgements of this part only (ESCI: train, test).
        locale: take the queries of this locale only (ESCI: us, es, jp).
        unjudged_per_query: items drawn from all others as well, with grade 0.
        max_text_chars: cut the texts of items; else they are whole.
        seed: of the draw.

    Raises:
        DataError: the dataset has no queries.
    """
    queries = dataset.read("queries")
    judged = dataset.read("judgements")
    if locale is not None:
        queries = queries.filter(pl.col("locale") == locale)
    if split is not None:
        judged = judged.filter(pl.col("split") == split)
    judged = judged.join(queries.select("query"), on="query", how="semi", maintain_order="left")
    grouped = judged.group_by("query", maintain_order=True).agg("item", "grade").collect()
    grouped = grouped.head(grouped.height if max_queries is None else max_queries)
    texts = dict(queries.select("query", "text").collect().iter_rows())
    # Only what can be drawn or was judged needs to be in memory.
    items = dataset.read("items")
    if not unjudged_per_query:
        needed = grouped.lazy().select(item=pl.col("item").explode()).unique()
        items = items.join(needed, on="item", how="semi", maintain_order="left")
    documents = _documents(items, max_text_chars)
    ids = list(documents)
    random = np.random.default_rng(seed)
    for query, found, grades in grouped.iter_rows():
        pairs = [pair for pair in zip(found, grades, strict=True) if pair[0] in documents]
        if unjudged_per_query:
            known = set(found)
            most = min(len(ids), unjudged_per_query + len(known))
            drawn = [ids[place] for place in random.choice(len(ids), size=most, replace=False)]
            new = [item for item in drawn if item not in known]
            pairs += [(item, 0) for item in new[:unjudged_per_query]]
        if not pairs:
            continue
        yield CandidateList(
            request=ScoreRequest(
                task=_QUERY_TASK,
                id=query,
                profile={"query": texts[query]},
                candidates=tuple(Item(id=item, fields=documents[item]) for item, _ in pairs),
            ),
            grades=tuple(grade for _, grade in pairs),
        )


def impression_lists(
    dataset: Dataset, *, split: str | None = None, max_history: int | None = 100
) -> Iterator[CandidateList]:
    """Make a list of each impression, in the order of the file's members and of time.

    The source is what the member clicked last before; a member of whom no click is known by then
    has none, and the impression is left out. Undated clicks come before all dated events of the
    member, a second apart: their order is known, their times are not.

    Args:
        split: take the impressions of this part only, by the name of the folder that it lay in.
        max_history: the newest clicks that a request carries beside the source; ``None`` is all.

    Raises:
        DataError: the dataset has no events.
    """
    titled = dataset.read("items").filter(pl.col("title").is_not_null())
    fields = {
        item: _titled_fields(title, categories)
        for item, title, categories in titled.select("item", "title", "categories")
        .collect()
        .iter_rows()
    }
    number = 0
    dataset.read("events")
    with pq.ParquetFile(dataset.tables["events"]) as file:
        # A member's events lie in one row group.
        for group in range(file.num_row_groups):
            events = pl.DataFrame(pl.from_arrow(file.read_row_group(group)))
            for member in events.partition_by("member", maintain_order=True):
                yield from _lists_of_member(member, fields, number, split, max_history)
                number += 1


def _lists_of_member(
    events: pl.DataFrame,
    fields: Mapping[str, Mapping[str, Value]],
    number: int,
    split: str | None,
    max_history: int | None,
) -> Iterator[CandidateList]:
    dated = events.filter(pl.col("time").is_not_null())
    if not dated.height:
        return
    first = int(dated["time"][0])
    undated = events.filter(pl.col("time").is_null())["item"].to_list()
    clicks = [
        (item, first - len(undated) + place) for place, item in enumerate(undated) if item in fields
    ]
    clicked = dated.filter(pl.col("value") == 1).select("item", "time")
    clicks += [click for click in clicked.iter_rows() if click[0] in fields]
    moments = [when for _, when in clicks]
    shown = dated.filter(pl.col("impression").is_not_null()).sort(
        "time", "impression", "position", maintain_order=True
    )
    for (impression,), rows in shown.group_by("impression", maintain_order=True):
        name = str(impression)
        if split is not None and name.rpartition("-")[0] != split:
            continue
        now = int(rows["time"][0])
        past = clicks[: int(np.searchsorted(moments, now))] if moments else []
        pairs = [
            (item, None if value is None else int(value))
            for item, value in rows.select("item", "value").iter_rows()
            if item in fields
        ]
        if not past or not pairs:
            continue
        *earlier, (source, _) = past
        told = earlier if max_history is None else earlier[max(0, len(earlier) - max_history) :]
        profile: dict[str, Value] = {"source_title": fields[source]["title"]}
        if "genres" in fields[source]:
            profile["source_genres"] = fields[source]["genres"]
        yield CandidateList(
            request=ScoreRequest(
                task=_IMPRESSION_TASK,
                id=name,
                time=float(now),
                profile=profile,
                history=tuple(
                    Event(item=Item(id=item, fields=fields[item]), action="clicked", time=when)
                    for item, when in told
                ),
                candidates=tuple(Item(id=item, fields=fields[item]) for item, _ in pairs),
            ),
            grades=tuple(grade for _, grade in pairs),
            member_number=number,
        )


def _titled_fields(title: str, categories: list[str] | None) -> dict[str, Value]:
    return {"title": title, "genres": categories} if categories else {"title": title}


def _documents(items: pl.LazyFrame, max_chars: int | None) -> dict[str, dict[str, Value]]:
    """Give the fields of every item of which something is known; a title alone is its text."""
    text = pl.col("text") if max_chars is None else pl.col("text").str.head(max_chars)
    rows = items.select("item", "title", text).collect().iter_rows()
    documents: dict[str, dict[str, Value]] = {}
    for item, title, words in rows:
        if title is None and words is None:
            continue
        documents[item] = {"text": words if words is not None else title}
        if title is not None and words is not None:
            documents[item]["title"] = title
    return documents
