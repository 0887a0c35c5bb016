"""How loss falls with size and data on a simulated task, and whether a law of it predicts.

Short trials choose a learning rate for each size. Then models of a few sizes learn from a few
amounts of requests, each a part of the next. A law is fitted to these points and says, before
anything of it is run, where a point outside of them lies. Then that point is run. Losses are
expected over the labels that could have been drawn, as the simulator knows them: the smallest
possible one is the entropy of its truth, and no draw of valid labels adds noise.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch

from rankonce.benchmarks.records import write_record
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

# One request a step: models leave the constant after some hundred steps, whatever is in a step.
DEFAULT_CONFIG = TrainConfig(epochs=1, targets_per_step=10, steps_per_checkpoint=1_000_000)
# A point that has gone less of the way from a constant to the truth is still on a plateau.
_PLATEAU = 0.1
# Draws which requests the smaller amounts have.
_ORDER_SEED = 0


@dataclass(frozen=True, kw_only=True)
class ScalingStudy:
    """What is run.

    Attributes:
        task: of a simulated platform.
        sizes, amounts: names of models and train requests, every one with every other.
        held_out: size and train requests of the point that is predicted.
        rates: learning rates that every size tries, on ``trial_amount`` requests with the first
            seed.
        num_valid: the newest requests, on which every model is measured; as many before them are
            what trials are measured on.
        config: the same for every run; its seed and learning rate are replaced.
        seeds: of the weights, the order and the random numbers.
        output: JSON, rewritten after every run; one with the same study in it is gone on with.
    """

    task: str = "song-newcomer"
    sizes: tuple[str, ...] = ("0.07m", "0.16m", "0.4m")
    amounts: tuple[int, ...] = (400, 800, 1600)
    held_out: tuple[str, int] = ("0.4m", 3200)
    rates: tuple[float, ...] = (0.0015, 0.003, 0.006)
    trial_amount: int = 800
    num_valid: int = 250
    config: TrainConfig = DEFAULT_CONFIG
    seeds: tuple[int, ...] = (0, 1)
    output: Path = Path("results/scaling.json")

    def __post_init__(self) -> None:
        for size in (*self.sizes, self.held_out[0]):
            if size not in SIZES:
                raise DataError(f"size: should be one of {', '.join(SIZES)}, is {size!r}")
        if self.held_out[0] in self.sizes and self.held_out[1] in self.amounts:
            raise DataError("held_out: should be none of the points that the law is fitted to")

    def trial_sizes(self) -> tuple[str, ...]:
        """Sizes that need a learning rate, each once."""
        return tuple(dict.fromkeys((*self.sizes, self.held_out[0])))

    def points(self) -> Iterator[tuple[str, int]]:
        """Sizes and amounts that the law is fitted to, the cheap ones first."""
        return ((size, amount) for size in self.sizes for amount in self.amounts)


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """Requests with the labels that were drawn, and with the shares that they were drawn from."""

    drawn: Sequence[TokenizedExample]
    expected: Sequence[TokenizedExample]


@dataclass(frozen=True, kw_only=True)
class _Material:
    tokenizer: Any
    train: Sequence[TokenizedExample]
    trial: _Measured
    valid: _Measured


def measure_scaling(study: ScalingStudy) -> dict[str, Any]:
    """Run what the record does not have yet: trials, points, the prediction, what it is about.

    Raises:
        DataError: the task has no simulator, or ``output`` holds another study.
        MissingDependencyError: SciPy is not installed.
    """
    check_scipy()
    train, trial, valid = split_requests(study)
    record = _open_record(study, valid)
    material = _prepare(study, train, trial, valid)
    for size in study.trial_sizes():
        for rate in study.rates:
            what = (size, study.trial_amount, study.seeds[0], rate)
            _run_once(study, record, "trials", material, what)
    rates = choose_rates(record["trials"])
    # The first seed of every point comes first, so that a study cut short has the whole grid once.
    for seed, (size, amount) in product(study.seeds, study.points()):
        _run_once(study, record, "runs", material, (size, amount, seed, rates[size]))
    size, amount = study.held_out
    if "prediction" not in record:
        prediction = predict_loss(
            points_of(record), size=count_weights(build_model(size, seed=0)), data=amount
        )
        record["prediction"] = {
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "size": size,
            "requests": amount,
            **asdict(prediction),
        }
        record["warnings"] = find_warnings(record)
        write_record(study.output, record)
        for warning in record["warnings"]:
            print(f"warning: {warning}", file=sys.stderr)
    for seed in study.seeds:
        _run_once(study, record, "held_out", material, (size, amount, seed, rates[size]))
    return record


def split_requests(
    study: ScalingStudy,
) -> tuple[list[TrainingExample], list[SimulatedExample], list[SimulatedExample]]:
    """Draw the requests: train, what trials are measured on, and the newest for everything else.

    The first n of the train part are what n requests are, for every n.
    """
    most = max(*study.amounts, study.trial_amount, study.held_out[1])
    drawn = draw_simulated(study.task, most + 2 * study.num_valid)
    train = [one.example for one in drawn[:most]]
    # The earliest would be of another time than the valid ones, the more so the fewer they are.
    Random(_ORDER_SEED).shuffle(train)
    return train, drawn[most : -study.num_valid], drawn[-study.num_valid :]


def choose_rates(trials: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Give the learning rate of every size: the one whose trial has the smallest loss."""
    worst_first = sorted(trials, key=lambda run: run["expected_log_loss"], reverse=True)
    return {run["size"]: run["learning_rate"] for run in worst_first}


def find_warnings(record: Mapping[str, Any]) -> list[str]:
    """Say what speaks against the law before its prediction is tested."""
    prediction, truth = record["prediction"], record["truth"]
    found = [
        f"{name} lies on a bound of the fit: the points do not determine it"
        for name in prediction["on_bounds"]
    ]
    points, names = points_of(record), {run["weights"]: run["size"] for run in record["runs"]}
    for point in points:
        gone = truth["constant"] - statistics.mean(point.losses)
        if (share := gone / (truth["constant"] - truth["floor"])) < _PLATEAU:
            found.append(
                f"{names[point.size]} with {point.data:,} requests has gone {share:.1%} of the way "
                f"from a constant to the truth, less than {_PLATEAU:.0%}: the grid holds a plateau"
            )
    tried = sorted({run["learning_rate"] for run in record["trials"]})
    for size, rate in choose_rates(record["trials"]).items():
        if len(tried) > 1 and rate in (tried[0], tried[-1]):
            found.append(f"{size} has the outermost of the learning rates that were tried, {rate}")
    if (noise := prediction["seed_noise"]) is None:
        found.append("a point has one seed: their noise is known from the misfit of the law alone")
        return found
    by_chance = noise / len(points[0].losses) ** 0.5
    deviation = statistics.stdev(math.log(statistics.mean(point.losses)) for point in points)
    if deviation < 2 * by_chance:
        found.append(
            f"log L deviates by {deviation:.4f} between points, and by {by_chance:.4f} by the "
            "chance of seeds alone: the grid hardly shows size and data"
        )
    return found


def count_weights(network: Any) -> int:
    """Count the weights that are no embedding (Kaplan et al. 2020): N of the law."""
    embedding = network.get_input_embeddings().weight
    return sum(weight.numel() for weight in network.parameters() if weight is not embedding)


def points_of(record: Mapping[str, Any]) -> list[Point]:
    """Give the points that the law is fitted to, each with the losses of its seeds."""
    losses: dict[tuple[int, int], list[float]] = {}
    for run in record["runs"]:
        losses.setdefault((run["weights"], run["requests"]), []).append(run["expected_log_loss"])
    return [
        Point(size=size, data=data, losses=tuple(of_seeds))
        for (size, data), of_seeds in losses.items()
    ]


def _run_once(
    study: ScalingStudy,
    record: Mapping[str, Any],
    part: Literal["trials", "runs", "held_out"],
    material: _Material,
    what: tuple[str, int, int, float],
) -> None:
    """Train and measure one model, unless that has been done."""
    size, amount, seed, rate = what
    runs: list[dict[str, Any]] = record[part]
    keys = ("size", "requests", "seed", "learning_rate")
    if any(tuple(run[key] for key in keys) == what for run in runs):
        return
    done = sum(len(record[other]) for other in ("trials", "runs", "held_out"))
    total = len(study.trial_sizes()) * len(study.rates)
    total += (len(list(study.points())) + 1) * len(study.seeds)
    name = f"{done + 1}/{total}: {size}, {amount} requests, seed {seed}, learning rate {rate}"
    measured = material.trial if part == "trials" else material.valid
    print(name, file=sys.stderr)
    started, network = time.perf_counter(), build_model(size, seed=seed)
    weights = count_weights(network)
    trained = train_network(
        network,
        material.tokenizer,
        material.train[:amount],
        config=replace(study.config, seed=seed, learning_rate=rate),
        name=name,
    )
    runs.append(
        {
            "size": size,
            "weights": weights,
            "requests": amount,
            "seed": seed,
            "learning_rate": rate,
            "expected_log_loss": measure_labels(trained, measured.expected)["log_loss"],
            **measure_labels(trained, measured.drawn),
            "started": datetime.fromtimestamp(
                time.time() - (time.perf_counter() - started), UTC
            ).isoformat(timespec="seconds"),
            "seconds": time.perf_counter() - started,
        }
    )
    write_record(study.output, record)


def _prepare(
    study: ScalingStudy,
    train: Sequence[TrainingExample],
    trial: Sequence[SimulatedExample],
    valid: Sequence[SimulatedExample],
) -> _Material:
    """Tokenise everything with one tokenizer, trained on the requests that all models have."""
    tasks = library_tasks()
    tokenizer, renderer = prepare_renderer(train[: min(study.amounts)], tasks)

    def tokenize(rows: Iterable[TrainingExample]) -> list[TokenizedExample]:
        return list(tokenize_examples(rows, renderer, tasks))

    def measure_on(rows: Sequence[SimulatedExample]) -> _Measured:
        shares = (replace(one.example, labels=tuple(map(dict, one.truth))) for one in rows)
        return _Measured(drawn=tokenize(one.example for one in rows), expected=tokenize(shares))

    return _Material(
        tokenizer=tokenizer,
        train=tokenize(train),
        trial=measure_on(trial),
        valid=measure_on(valid),
    )


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
        "trials": [],
        "runs": [],
        "held_out": [],
    }


def _entropy(shares: Sequence[float]) -> float:
    return -sum(share * math.log(share) for share in shares if share > 0)
