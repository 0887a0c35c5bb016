"""Make the embedded ranker's folder from a finished run of the recipe ``ml-small``.

    python -m rankonce.training.embedded RUN --data ML_SMALL_FOLDER --out rankonce/embedded

Writes the weights in fp16 (they are computed with in fp32), the tokenizer, the data's licence and
``demo.jsonl``: two members of opposite taste and the same hundred films for both, fifty of either
taste.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import polars as pl
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankonce.datasets.ml_small import add_histories, read_ml_small
from rankonce.datasets.movielens import movie_examples, movie_rows
from rankonce.errors import DataError, ModelError, RankOnceError
from rankonce.records import ScoreRequest
from rankonce.training.checkpoint import save_model

_NUM_FILMS = 100
# Half of the films are of one taste and not the other: the most rated ones.
_TASTES = ("Animation|Children|Musical|Romance", "Horror|Thriller|Sci-Fi")
# Films by their beginning, unique among the popular ones.
_MEMBERS: dict[str, dict[str, Sequence[str]]] = {
    "Ada, who loves animation, musicals and romance": {
        "liked": (
            "Lion King, The", "Snow White and the Seven Dwarfs", "Mary Poppins", "Toy Story (",
            "Little Mermaid, The", "Sound of Music, The", "Finding Nemo", "Pretty Woman",
            "My Fair Lady", "Shrek (", "Cinderella (", "You've Got Mail",
        ),
        "disliked": ("Saw (", "Scream (", "Terminator, The (", "From Dusk Till Dawn", "Predator ("),
    },
    "Bo, who loves horror, thrillers and science fiction": {
        "liked": (
            "Terminator, The (", "Predator (", "Scream (", "Saw (", "From Dusk Till Dawn",
            "Blade Runner (", "Thing, The (1982", "RoboCop (1987", "Evil Dead II", "Seven (a.k.a.",
            "Twelve Monkeys", "28 Days Later",
        ),
        "disliked": ("Little Mermaid, The", "Pretty Woman", "Sound of Music, The", "Mary Poppins",
                     "You've Got Mail"),
    },
}  # fmt: skip


def write_embedded(run: Path, data: Path, out: Path) -> None:
    """Write the folder; existing files of the same names are replaced.

    Raises:
        ModelError: ``run`` holds no finished model.
    """
    try:
        network = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float16)
    except (OSError, ValueError) as error:
        raise ModelError(f"run: {run} holds no finished model: {error}") from error
    save_model(out, network, AutoTokenizer.from_pretrained(run))
    shutil.copy(data / "LICENSE.txt", out / "LICENSE-ml-small.txt")
    lines = [json.dumps(asdict(request)) for request in demo_requests(data)]
    (out / "demo.jsonl").write_text("".join(f"{line}\n" for line in lines))


def demo_requests(data: Path) -> list[ScoreRequest]:
    """Build the two requests, with the statistics of the whole dataset."""
    ratings, items = read_ml_small(data)
    counts = ratings.group_by("item_id").agg(pl.len(), likes=pl.col("label").sum())
    popular = (
        counts.join(items, on="item_id")
        .sort("len", "item_id", descending=True)
        .filter(pl.col("genres").str.contains(r"^\w"))
    )
    now = int(ratings["timestamp"].max()) + 1  # type: ignore[arg-type]
    own = {
        name: [
            (_find(popular, title), action) for action, titles in taste.items() for title in titles
        ]
        for name, taste in _MEMBERS.items()
    }
    seen = {film for events in own.values() for film, _ in events}
    films = []
    for taste, other in (_TASTES, _TASTES[::-1]):
        fitting = popular.filter(
            pl.col("genres").str.contains(taste) & ~pl.col("genres").str.contains(other)
        )
        films += [film for film in fitting["item_id"] if film not in seen][: _NUM_FILMS // 2]
    requests = []
    for number, (name, events) in enumerate(own.items()):
        user = -1 - number
        mine = pl.DataFrame(
            {
                "user_id": [user] * len(events),
                "item_id": [film for film, _ in events],
                "label": [int(action == "liked") for _, action in events],
                # A film a day, the likes and dislikes mixed.
                "timestamp": [
                    now - 86_400 * (1 + place * 7 % len(events)) for place in range(len(events))
                ],
            },
            schema={key: ratings.schema[key] for key in ratings.columns[:4]},
        )
        known = pl.concat([ratings.select(mine.columns), mine])
        asked = pl.DataFrame(
            {
                "user_id": [user] * len(films),
                "item_id": films,
                "timestamp": [now] * len(films),
                "label": [0] * len(films),
            },
            schema={
                key: ratings.schema[key] for key in ("user_id", "item_id", "timestamp", "label")
            },
        )
        movies = movie_rows(add_histories(asked, known), items, train=add_histories(known, known))
        (example,) = movie_examples(movies, candidates_per_example=len(films), shared_history=True)
        requests.append(replace(example.request, id=name))
    return requests


def _find(films: pl.DataFrame, title: str) -> int:
    found = films.filter(pl.col("title").str.starts_with(title))
    if not found.height:
        raise DataError(f"title: no film begins with {title!r}")
    return int(found["item_id"][0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        write_embedded(arguments.run, arguments.data, arguments.out)
    except (RankOnceError, OSError) as error:
        sys.exit(f"error: {error}")
