"""What each way of pruning leaves of a ranker, without any training afterwards.

Members of MovieLens latest-small are split: train rows of some calibrate, held-out rows of all
members measure. Every arm cuts the same checkpoint; differences to the whole one are paired,
requests drawn with replacement.
"""

import tempfile
from collections.abc import Mapping
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
from rankonce.evaluation.labelled import evaluate_examples
from rankonce.prompts.tasks import library_tasks
from rankonce.ranker import EMBEDDED_MODEL, Ranker, RankerConfig
from rankonce.records import TrainingExample

_CANDIDATES = 20
_NUM_RESAMPLES = 1000


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
    keeps: tuple[float, ...] = (0.6, 0.3)
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
    config = RankerConfig(calibrate=False)
    whole = Ranker.from_pretrained(study.model, config=config)
    found: list[dict[str, Any]] = []
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, cut in track(
            arms, description="pruning", console=console, disable=not console.is_terminal
        ):
            out = Path(folder) / str(len(found))
            record = prune_checkpoint(study.model, out, cut, calibration)
            pruned = Ranker.from_pretrained(out, config=config)
            measured = evaluate_examples(
                {"pruned": pruned, "whole": whole}, valid, num_resamples=_NUM_RESAMPLES
            )
            first, second = (dict(row.metrics) for row in measured.rows)
            if not found:
                found.append({"arm": "whole", "sizes": record["before"], **second})
            (difference,) = measured.differences
            found.append(
                {
                    "arm": name,
                    "config": asdict(cut),
                    "sizes": record["after"],
                    **first,
                    "auc_difference": dict(difference.metrics),
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
        f"| {' | '.join((*titles, 'AUC', 'less the whole', 'log loss'))} |",
        f"| --- |{' ---: |' * (len(titles) + 2)}",
    ]
    for arm in record["arms"]:
        sizes = arm["sizes"]
        names = ("hidden_size", "intermediate_size", "num_key_value_heads", "vocab_size")
        cells = [arm["arm"], f"{sizes['parameters']:,}", *(f"{sizes[name]:,}" for name in names)]
        less = arm.get("auc_difference")
        cells += [
            f"{arm['auc']:.4f}",
            f"{less['difference']:+.4f} ({less['low']:+.4f}, {less['high']:+.4f})" if less else "–",
            f"{arm['log_loss']:.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
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
