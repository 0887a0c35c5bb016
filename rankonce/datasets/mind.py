"""MIND: what readers of Microsoft News were shown and clicked in six weeks of 2019.

    behaviors.tsv  impression id, user, time ("11/15/2019 10:22:32 AM"), history (ids of news that
                   the user had clicked before, oldest first, may be empty), impressions
                   ("N123-1 N456-0": clicked or not; without marks in the test part, may be empty)
    news.tsv       id, category, subcategory, title, abstract (may be empty), address, entities of
                   the title, entities of the abstract

Both are separated by tabs, without header and without quotes: a title may begin with one. Every
part (train, dev, test) lies in its own folder or archive; all that are there are read together,
and impression ids get the name of the folder in front, as they begin at 1 in each.

Every news of an impression is an event: "clicked" with value 1, "shown" with 0, or without a value
where the part does not tell. The history has no times. That of a member's earliest impression
stands before everything else as undated clicks; later clicks are known from the impressions
themselves. Times are taken as UTC: the zone is not published.

Source: https://msnews.github.io. Licence: Microsoft Research License Terms (research use, no
commercial use, no redistribution). F. Wu et al., "MIND: A Large-scale Dataset for News
Recommendation", ACL 2020.
"""

from pathlib import Path

import polars as pl

from rankonce.datasets.common_form import Adapter, SourceFiles, TableWriter
from rankonce.datasets.download import RemoteFile
from rankonce.datasets.text_files import MAYBE_TEXT, TEXT, check_rows, read_table

# The address on the dataset's own page has stopped answering; these are mirrors of its authors'
# recommenders project.
_MIRRORS = (
    "https://recodatasets.z20.web.core.windows.net/newsrec/",
    "https://huggingface.co/datasets/Recommenders/MIND/resolve/main/",
)
# An impression holds 37 news on average and up to 300.
_IMPRESSIONS_PER_BATCH = 20_000
_NEWS = {
    "item": TEXT,
    "category": MAYBE_TEXT,
    "subcategory": MAYBE_TEXT,
    "title": MAYBE_TEXT,
    "text": MAYBE_TEXT,
    "address": MAYBE_TEXT,
    "title entities": MAYBE_TEXT,
    "abstract entities": MAYBE_TEXT,
}
_BEHAVIORS = {
    "id": TEXT,
    "member": TEXT,
    "when": TEXT,
    "history": MAYBE_TEXT,
    "shown": MAYBE_TEXT,
}


def _convert(files: SourceFiles, tables: TableWriter) -> None:
    for path in files.all("news.tsv"):
        for frame in read_table(path, _NEWS, separator="\t", header=False, quotes=False):
            tables.add_items(
                frame.with_columns(
                    categories=pl.concat_list("category", "subcategory").list.drop_nulls()
                )
            )
    # member -> (time of the earliest impression, its history)
    earliest: dict[str, tuple[int, str]] = {}
    for path in files.all("behaviors.tsv"):
        for frame in read_table(
            path,
            _BEHAVIORS,
            separator="\t",
            header=False,
            quotes=False,
            rows_per_batch=_IMPRESSIONS_PER_BATCH,
        ):
            dated = _read_times(path, frame)
            tables.drop("empty impressions", dated["shown"].null_count())
            tables.add_events(_impressions(path, dated))
            seen = dated.select("member", "time", "history").iter_rows()
            for member, time, history in seen:
                if member not in earliest or time < earliest[member][0]:
                    earliest[member] = (time, history or "")
    members = list(earliest)
    for start in range(0, len(members), _IMPRESSIONS_PER_BATCH):
        some = members[start : start + _IMPRESSIONS_PER_BATCH]
        tables.add_events(_histories(some, [earliest[member][1] for member in some]))


def _read_times(path: Path, frame: pl.DataFrame) -> pl.DataFrame:
    moments = pl.col("when").str.to_datetime("%m/%d/%Y %I:%M:%S %p", strict=False)
    dated = frame.with_columns(time=moments.dt.epoch("s"))
    check_rows(
        path, dated, pl.col("time").is_not_null(), "time should be like 11/15/2019 10:22:32 AM"
    )
    return dated


def _impressions(path: Path, frame: pl.DataFrame) -> pl.DataFrame:
    parts = frame.filter(pl.col("shown").is_not_null()).with_columns(
        shown=pl.col("shown").str.split(" ")
    )
    places = parts.with_columns(position=pl.int_ranges(1, pl.col("shown").list.len() + 1))
    rows = places.explode("shown", "position").filter(pl.col("shown") != "")
    split = rows.with_columns(
        item=pl.col("shown").str.extract(r"^(\w+)(?:-[01])?$"),
        value=pl.col("shown").str.extract(r"-([01])$").cast(pl.Float64),
    )
    check_rows(
        path,
        split.select("item", "shown", "line"),
        pl.col("item").is_not_null(),
        "an impression should be like N123-1, N123-0 or N123",
    )
    return split.select(
        "member",
        "item",
        "value",
        "time",
        "position",
        action=pl.when(pl.col("value") == 1).then(pl.lit("clicked")).otherwise(pl.lit("shown")),
        impression=pl.lit(f"{path.parent.name}-") + pl.col("id"),
    )


def _histories(members: list[str], histories: list[str]) -> pl.DataFrame:
    rows = pl.DataFrame({"member": members, "item": histories}).with_columns(
        pl.col("item").str.split(" ")
    )
    return (
        rows.with_columns(position=pl.int_ranges(1, pl.col("item").list.len() + 1))
        .explode("item", "position")
        .filter(pl.col("item") != "")
        .with_columns(action=pl.lit("clicked"), value=pl.lit(1.0))
    )


def _adapter(name: str, size: str, archives: tuple[str, ...]) -> Adapter:
    return Adapter(
        name=name,
        domain="news",
        size=size,
        licence="Microsoft Research License Terms: research use, no redistribution",
        page="https://msnews.github.io",
        files=tuple(
            RemoteFile(name=archive, addresses=tuple(mirror + archive for mirror in _MIRRORS))
            for archive in archives
        ),
        parts=("behaviors.tsv", "news.tsv"),
        tasks=("similar-item",),
        version=1,
        convert=_convert,
        has_impressions=True,
    )


ADAPTERS = (
    _adapter(
        "mind-small",
        "230,000 impressions of 50,000 members, 65,000 news; 84 MB",
        ("MINDsmall_train.zip", "MINDsmall_dev.zip"),
    ),
    _adapter(
        "mind-large",
        "2,600,000 impressions of 750,000 members, 104,000 news; 640 MB",
        ("MINDlarge_train.zip", "MINDlarge_dev.zip"),
    ),
)
