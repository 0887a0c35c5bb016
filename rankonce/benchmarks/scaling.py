"""How loss falls with size and data on a simulated task, and whether a law of it predicts.

Models of a few sizes learn from a few amounts of requests, each a part of the next. A law is fitted
to these points and says, before anything of it is run, where a point outside of them lies. Then
that point is run. Losses are expected over the labels that could have been drawn, as the simulator
knows them: the smallest possible one is the entropy of its truth, and no draw of valid labels adds
noise.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import torch

from rankonce.benchmarks.scaling_law import Point, check_scipy, predict_loss
from rankonce.benchmarks.training_options import (
    draw_simulated,
    measure_labels,
    prepare_renderer,
    train_network,
)
from rankonce.datasets.domains.platform import SimulatedExample
from rankonce.environment import describe_environment
from rankonce.errors import DataError
from rankonce.model.sizes import SIZES, build_model
from rankonce.prompts.tasks import library_tasks
from rankonce.records import TrainingExample
from rankonce.training.data import TokenizedExample, tokenize_examples
from rankonce.training.loop import TrainConfig

DEFAULT_CONFIG = TrainConfig(
    epochs=4, targets_per_step=32, learning_rate=3e-3, steps_per_checkpoint=1_000_000
)
# Draws which requests the smaller amounts have.
_ORDER_SEED = 0


@dataclass(frozen=True, kw_only=True)
class ScalingStudy:
    """What is run.

    Attributes:
        task: of a simulated platform.
        sizes, amounts: names of models and train requests, every one with every other.
        held_out: size and train requests of the point that is predicted.
        num_valid: the newest requests, on which every model is measured.
        config: the same for every run; its seed is replaced.
        seeds: of the weights, the order and the random numbers.
        output: JSON, rewritten after every run; one with the same study in it is gone on with.
    """

    task: str = "search-relevance"
    sizes: tuple[str, ...] = ("0.07m", "0.16m", "0.4m")
    amounts: tuple[int, ...] = (250, 500, 1000)
    held_out: tuple[str, int] = ("0.4m", 2000)
    num_valid: int = 250
    config: TrainConfig = DEFAULT_CONFIG
    seeds: tuple[int, ...] = (0,)
    output: Path = Path("results/scaling.json")

    def __post_init__(self) -> None:
        for size in (*self.sizes, self.held_out[0]):
            if size not in SIZES:
                raise DataError(f"size: should be one of {', '.join(SIZES)}, is {size!r}")
        if self.held_out[0] in self.sizes and self.held_out[1] in self.amounts:
            raise DataError("held_out: should be none of the points that the law is fitted to")

    def points(self) -> Iterator[tuple[str, int]]:
        """Sizes and amounts that the law is fitted to, the cheap ones first."""
        return ((size, amount) for size in self.sizes for amount in self.amounts)


@dataclass(frozen=True, kw_only=True)
class _Material:
    tokenizer: Any
    train: Sequence[TokenizedExample]
    drawn: Sequence[TokenizedExample]
    expected: Sequence[TokenizedExample]


def measure_scaling(study: ScalingStudy) -> dict[str, Any]:
    """Run what the record does not have yet: the points, the prediction, the point it is about.

    Raises:
        DataError: the task has no simulator, or ``output`` holds another study.
        MissingDependencyError: SciPy is not installed.
    """
    check_scipy()
    train, valid = split_requests(study)
    record = _open_record(study, valid)
    material = _prepare(study, train, valid)
    for size, amount in study.points():
        for seed in study.seeds:
            _run_once(study, record, record["runs"], material, (size, amount, seed))
    if "prediction" not in record:
        size, amount = study.held_out
        prediction = predict_loss(
            points_of(record), size=count_weights(build_model(size, seed=0)), data=amount
        )
        record["prediction"] = {
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "size": size,
            "requests": amount,
            **asdict(prediction),
        }
        _write(study.output, record)
    for seed in study.seeds:
        _run_once(study, record, record["held_out"], material, (*study.held_out, seed))
    return record


def split_requests(
    study: ScalingStudy,
) -> tuple[list[TrainingExample], list[SimulatedExample]]:
    """Draw the requests: the first n of the train part are what n requests are, for every n."""
    most = max(*study.amounts, study.held_out[1])
    drawn = draw_simulated(study.task, most + study.num_valid)
    train = [one.example for one in drawn[: -study.num_valid]]
    # The earliest would be of another time than the valid ones, the more so the fewer they are.
    Random(_ORDER_SEED).shuffle(train)
    return train, drawn[-study.num_valid :]


def count_weights(network: Any) -> int:
    """Count the weights that are no embedding (Kaplan et al. 2020): N of the law."""
    embedding = network.get_input_embeddings().weight
    return sum(weight.numel() for weight in network.parameters() if weight is not embedding)


def points_of(record: Mapping[str, Any]) -> list[Point]:
    """Give the mean loss over the seeds of every point that the law is fitted to."""
    losses: dict[tuple[int, int], list[float]] = {}
    for run in record["runs"]:
        losses.setdefault((run["weights"], run["requests"]), []).append(run["expected_log_loss"])
    return [
        Point(size=size, data=data, loss=statistics.mean(of_seeds))
        for (size, data), of_seeds in losses.items()
    ]


def _run_once(
    study: ScalingStudy,
    record: Mapping[str, Any],
    runs: list[dict[str, Any]],
    material: _Material,
    what: tuple[str, int, int],
) -> None:
    """Train and measure one model, unless that has been done."""
    size, amount, seed = what
    if any((run["size"], run["requests"], run["seed"]) == what for run in runs):
        return
    done = len(record["runs"]) + len(record["held_out"])
    total = (len(list(study.points())) + 1) * len(study.seeds)
    name = f"{done + 1}/{total}: {size}, {amount} requests, seed {seed}"
    print(name, file=sys.stderr)
    started, network = time.perf_counter(), build_model(size, seed=seed)
    weights = count_weights(network)
    trained = train_network(
        network,
        material.tokenizer,
        material.train[:amount],
        config=replace(study.config, seed=seed),
        name=name,
    )
    runs.append(
        {
            "size": size,
            "weights": weights,
            "requests": amount,
            "seed": seed,
            "expected_log_loss": measure_labels(trained, material.expected)["log_loss"],
            **measure_labels(trained, material.drawn),
            "started": datetime.fromtimestamp(
                time.time() - (time.perf_counter() - started), UTC
            ).isoformat(timespec="seconds"),
            "seconds": time.perf_counter() - started,
        }
    )
    _write(study.output, record)


def _prepare(
    study: ScalingStudy, train: Sequence[TrainingExample], valid: Sequence[SimulatedExample]
) -> _Material:
    """Tokenise everything with one tokenizer, trained on the requests that all models have."""
    tasks = library_tasks()
    tokenizer, renderer = prepare_renderer(train[: min(study.amounts)], tasks)
    drawn = [one.example for one in valid]
    expected = [replace(one.example, labels=tuple(dict(t) for t in one.truth)) for one in valid]
    parts = [list(tokenize_examples(rows, renderer, tasks)) for rows in (train, drawn, expected)]
    return _Material(tokenizer=tokenizer, train=parts[0], drawn=parts[1], expected=parts[2])


def _open_record(study: ScalingStudy, valid: Sequence[SimulatedExample]) -> dict[str, Any]:
    """Read the record of the same study, or begin one."""
    described = json.loads(json.dumps({**asdict(study), "output": None}))
    if study.output.exists():
        record: dict[str, Any] = json.loads(study.output.read_text())
        if record.get("study") != described:
            raise DataError(f"output: {study.output} holds another study; name another file")
        return record
    truth = [shares for one in valid for shares in one.truth]
    names = list(truth[0])
    means = [statistics.mean(shares[name] for shares in truth) for name in names]
    return {
        "environment": {**describe_environment(), "threads": torch.get_num_threads()},
        "study": described,
        "truth": {
            "floor": statistics.mean(_entropy(list(shares.values())) for shares in truth),
            "constant": _entropy(means),
        },
        "runs": [],
        "held_out": [],
    }


def _entropy(shares: Sequence[float]) -> float:
    return -sum(share * math.log(share) for share in shares if share > 0)


def _write(output: Path, record: Mapping[str, Any]) -> None:
    """Replace the record whole, so that a run that is killed leaves one that can be read."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".part")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(output)
