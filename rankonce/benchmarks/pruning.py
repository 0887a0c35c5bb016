"""What each way of pruning leaves of a ranker, without any training afterwards.

Members of MovieLens latest-small are split: train rows of some calibrate, held-out rows of all
members measure. Every arm cuts the same checkpoint to the same sizes.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from rankonce.benchmarks.records import write_record
from rankonce.datasets.movielens import movie_examples, movie_rows
from rankonce.distillation.pruning import PruneConfig, prune_checkpoint
from rankonce.environment import describe_environment
from rankonce.errors import DataError
from rankonce.evaluation.held_out import measure_held_out
from rankonce.prompts.tasks import library_tasks
from rankonce.ranker import EMBEDDED_MODEL
from rankonce.records import TrainingExample

_CANDIDATES = 20


@dataclass(frozen=True, kw_only=True)
class PruningStudy:
    """The size of the study.

    Attributes:
        data: folder of MovieLens latest-small.
        model: the embedded ranker by default.
        keeps: shares of the parameters.
        num_calibration, num_valid: examples of up to 20 candidates.
        seeds: of the random arm; the others have the first.
        output: JSON of everything.
    """

    data: Path
    model: Path = EMBEDDED_MODEL
    keeps: tuple[float, ...] = (0.8, 0.6)
    num_calibration: int = 60
    num_valid: int = 300
    seeds: tuple[int, ...] = (0, 1, 2)
    output: Path = Path("results/pruning.json")


def measure_pruning(study: PruningStudy) -> dict[str, Any]:
    """Prune in every way, score held-out rows, and write the record.

    Raises:
        DataError: the folder cannot be used.
    """
    calibration, valid = _read(study)
    arms = _arms(study)
    found = [{"arm": "whole", **_measure(study.model, valid)}]
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, config in track(
            arms, description="pruning", console=console, disable=not console.is_terminal
        ):
            out = Path(folder) / str(len(found))
            record = prune_checkpoint(study.model, out, config, calibration)
            found.append(
                {
                    "arm": name,
                    "config": asdict(config),
                    "before": record["before"],
                    "after": record["after"],
                    **_measure(out, valid),
                }
            )
    result = {
        "study": {**asdict(study), "data": "ml-small", "output": None}
        | {"model": study.model.name, "keeps": list(study.keeps), "seeds": list(study.seeds)},
        "candidates": {
            "calibration": sum(len(one.labels) for one in calibration),
            "valid": sum(len(one.labels) for one in valid),
        },
        "arms": found,
        "environment": describe_environment(),
    }
    write_record(study.output, result)
    return result


def describe_pruning(record: Mapping[str, Any]) -> str:
    """Write the record as a table in Markdown."""
    titles = ("arm", "parameters", "hidden", "MLP", "key/value heads", "vocabulary")
    lines = [
        f"| {' | '.join((*titles, 'AUC', 'log loss'))} |",
        f"| --- |{' ---: |' * (len(titles) + 1)}",
    ]
    before = next(arm["before"] for arm in record["arms"] if "before" in arm)
    for arm in record["arms"]:
        sizes = arm.get("after", before)
        names = ("hidden_size", "intermediate_size", "num_key_value_heads", "vocab_size")
        cells = [arm["arm"], f"{sizes['parameters']:,}", *(f"{sizes[name]:,}" for name in names)]
        lines.append(f"| {' | '.join(cells)} | {arm['auc']:.4f} | {arm['log_loss']:.4f} |")
    return "\n".join(lines)


def _arms(study: PruningStudy) -> list[tuple[str, PruneConfig]]:
    first = study.seeds[0]
    arms = [
        (
            "unused vocabulary dropped",
            PruneConfig(drop_unused_vocabulary=True, seed=first),
        )
    ]
    for keep in study.keeps:
        arms += [
            (f"{keep:g} activation", PruneConfig(keep=keep, seed=first)),
            (f"{keep:g} taylor", PruneConfig(keep=keep, importance="taylor", seed=first)),
            *(
                (
                    f"{keep:g} random, seed {seed}",
                    PruneConfig(keep=keep, importance="random", seed=seed),
                )
                for seed in study.seeds
            ),
            (
                f"{keep:g} activation, reconstruct",
                PruneConfig(keep=keep, reconstruct=True, seed=first),
            ),
            (
                f"{keep:g} taylor, reconstruct",
                PruneConfig(keep=keep, importance="taylor", reconstruct=True, seed=first),
            ),
            (
                f"{keep:g} activation, vocabulary",
                PruneConfig(keep=keep, drop_unused_vocabulary=True, seed=first),
            ),
        ]
    return arms


def _measure(folder: Path, examples: Sequence[TrainingExample]) -> dict[str, float]:
    (numbers,) = measure_held_out(folder, examples).values()
    return numbers


def _read(study: PruningStudy) -> tuple[list[TrainingExample], list[TrainingExample]]:
    from rankonce.training.recipes import ml_small

    stage = ml_small().stages[-1]
    source = stage.load(study.data, stage.config, library_tasks())
    if source is None:
        raise DataError(f"data: {study.data} should hold MovieLens latest-small")
    split = source.split
    parts = []
    for name, count in (("train", study.num_calibration), ("valid", study.num_valid)):
        movies = movie_rows(split[name], split["items"], train=split["train"])
        examples = list(movie_examples(movies, candidates_per_example=_CANDIDATES))
        # Every so many examples, so that members of all places take part.
        step = max(1, len(examples) // count)
        parts.append(examples[::step][:count])
    return parts[0], parts[1]
