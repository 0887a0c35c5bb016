"""A ranker recovers what was planted on a simulated platform, up to what nobody can know."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from rankonce.datasets.domains.platform import SimulatedExample, build_platform
from rankonce.datasets.domains.songs import SONGS, SongsConfig
from rankonce.ranker import Ranker
from rankonce.records import TrainingExample
from rankonce.training.loop import TrainConfig
from rankonce.training.runs import run_stages
from rankonce.training.stages import Stage, StageSource, Tasks, finetune_source

NUM_REQUESTS = 600
# Attributes alone, or popularity alone, decide what is liked.
PLANTED: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "popularity": (
        "song-newcomer",
        "Yes",
        {"popularity_effect": 3.0, "weights": {}, "num_items": 200},
    ),
    "taste": (
        "song-like",
        "like",
        {"popularity_effect": 0.0, "weights": {"genre": 3.0}, "num_items": 200, "num_members": 60},
    ),
}


def simulate(task: str, *, weights: Mapping[str, float], **changes: Any) -> list[SimulatedExample]:
    known = SongsConfig()
    config = replace(
        known,
        attributes=tuple(
            replace(one, weight=weights.get(one.name, 0.1)) for one in known.attributes
        ),
        position_effect=0.0,
        noise=0.0,
        **changes,
    )
    made = list(build_platform(SONGS, config).examples(task, NUM_REQUESTS))
    some = made[:: len(made) // NUM_REQUESTS]
    # What is told in numbers is enough, and short.
    return [replace(one, example=without_history(one)) for one in some]


def without_history(one: SimulatedExample) -> TrainingExample:
    return replace(one.example, request=replace(one.example.request, history=()))


def train(examples: Sequence[SimulatedExample], out: Path) -> Ranker:
    """Train on the truth's own shares, so that no luck of labels stands between."""
    path = out / "train.jsonl"
    with path.open("w") as file:
        for one in examples:
            shares = [dict(share) for share in one.truth]
            file.write(json.dumps({**asdict(one.example.request), "labels": shares}) + "\n")

    def load(path: Path, config: TrainConfig, tasks: Tasks) -> StageSource:
        return finetune_source([path], config, tasks)

    config = TrainConfig(epochs=2, learning_rate=4e-3, targets_per_step=64, seed=0)
    stage = Stage(name="finetune", load=load, config=config)
    run_stages([stage], path, out / "run", name="planted", size="0.07m", seed=0)
    return Ranker.from_pretrained(out / "run")


@pytest.mark.parametrize("planted", PLANTED)
def test_a_ranker_recovers_what_was_planted(planted: str, tmp_path: Path) -> None:
    task, label, changes = PLANTED[planted]
    made = simulate(task, **changes)
    ranker = train([one for one in made if one.split == "train"], tmp_path)
    later = [one for one in made if one.split == "test"]
    results = ranker.score_many([one.example.request for one in later], progress=False)
    values = [one.value for result in results for one in result.candidates]
    truths = [share[label] for one in later for share in one.truth]
    drawn = [found == label for one in later for found in one.example.labels]
    ceiling, reached = roc_auc_score(drawn, truths), roc_auc_score(drawn, values)
    assert ceiling > 0.85
    assert ceiling - 0.05 < reached < ceiling + 0.02
    # Not only who stands above whom, but how likely it is.
    shares = 1 / (1 + np.exp(-np.array(values)))
    assert np.abs(shares - truths).mean() < 0.1
