"""A table's model as teacher: boosted trees say of any member and film what the answer may be.

A few ten thousand answers are soon learnt by heart, with all their noise. Trees that were fitted to
them say what they have in common, and say it of films that a member never rated too: a ranker that
learns from these shares has as many rows as it likes, and finds in words what the trees know in
numbers. (A teacher that labels what nobody has labelled: Bucila et al., 2006.)
"""

from collections import defaultdict
from collections.abc import Callable

import numpy as np
import polars as pl

from rankonce.datasets.boosted_trees import fit_trees
from rankonce.datasets.movie_columns import past_features
from rankonce.datasets.movielens import read_films
from rankonce.datasets.statistics import read_labels, read_whole_numbers
from rankonce.prompts.features import Floats
from rankonce.training.catalogue import Catalogue

_SEEDS = (1, 2, 3, 4, 5)
_EARLY_SHARE = 0.8


def fit_teacher(
    train: pl.DataFrame, items: pl.DataFrame, *, since: float, catalogue: Catalogue | None = None
) -> Callable[[pl.DataFrame], Floats]:
    """Fit trees to the columns of ``past_features``, and to what another catalogue says by title.

    Args:
        train: user_id, item_id, label, timestamp, history_ids.
        items: item_id, title, genres.
        since: the trees are fitted to the train rows of this moment (s) and later; the columns say
            what all rows before said.
        catalogue: its like share and number of raters become two columns more.

    Returns:
        A function from rows (user_id, item_id, timestamp, history_ids) to P(liked), one a row.

    Raises:
        DataError: a column is missing or holds something else.
        MissingDependencyError: LightGBM is not installed.
    """
    elsewhere = {} if catalogue is None else catalogue.find(read_films(items))

    def describe(rows: pl.DataFrame) -> Floats:
        columns = past_features(train, items, rows).to_numpy()
        if catalogue is None:
            return columns
        known = [elsewhere.get(film, (np.nan, 0.0)) for film in rows["item_id"].to_list()]
        return np.hstack([columns, np.array(known).reshape(-1, 2)])

    rows = train.filter(pl.col("timestamp") >= since)
    moments = read_whole_numbers(rows, "timestamp")
    predict = fit_trees(
        describe(rows),
        read_labels(rows),
        early_R=moments < np.quantile(moments, _EARLY_SHARE),
        seeds=_SEEDS,
    )
    return lambda asked: predict(describe(asked))[:, 1]


def add_unrated(rows: pl.DataFrame, *, per_row: int, seed: int) -> pl.DataFrame:
    """Add films that a member has not rated, at the moments of the member's rows, without labels.

    They are drawn as often as they are rated.

    Args:
        rows: user_id, item_id, label, timestamp, history_ids.
        per_row: drawn for every row; those that the member rated or liked before are left out.
        seed: of the draw.
    """
    random = np.random.default_rng(seed)
    rated: dict[int, set[int]] = defaultdict(set)
    for member, film in rows.select("user_id", "item_id").iter_rows():
        rated[member].add(film)
    films = rows["item_id"].to_numpy()
    columns = ["user_id", "item_id", "label", "timestamp", "history_ids"]
    parts = [rows.select(columns)]
    for _ in range(per_row):
        drawn = rows.select(columns).with_columns(
            item_id=pl.Series(films[random.integers(len(films), size=len(films))]),
            label=pl.lit(None, dtype=rows.schema["label"]),
        )
        known = drawn.select("user_id", "item_id", "history_ids").iter_rows()
        is_new = [film not in rated[member] and film not in past for member, film, past in known]
        parts.append(drawn.filter(pl.Series(is_new)))
    return pl.concat(parts)


def hide_members(rows: pl.DataFrame, *, share: float, seed: int) -> pl.DataFrame:
    """Make members unknown: they keep their histories, and no earlier row is theirs.

    Args:
        rows: with user_id ≥ 0.
        share: of the members, in 0..1.
        seed: of the draw.
    """
    members = rows["user_id"].unique().sort()
    is_drawn = np.random.default_rng(seed).random(len(members)) < share
    drawn = members.filter(pl.Series(is_drawn))
    member = pl.col("user_id")
    hidden = pl.when(member.is_in(drawn.implode())).then(-1 - member).otherwise(member)
    return rows.with_columns(user_id=hidden)
