"""Does an adapter per domain help a shared backbone? The idea of MLoRA on simulated platforms.

One task of each simulated domain. A backbone learns all of them; then each domain gets an adapter
that learns its own task alone. Beside the backbone stands one that went on learning everything for
as many examples as all adapters together: what more training does without adapters.
"""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rankonce.benchmarks.records import write_record
from rankonce.datasets.domains import SIMULATED
from rankonce.datasets.domains.platform import SimulatedExample, build_platform
from rankonce.environment import describe_environment
from rankonce.evaluation.metrics import auc, log_loss, paired_bootstrap_over_members
from rankonce.prompts.tasks import library_tasks
from rankonce.ranker import Ranker
from rankonce.records import TrainingExample
from rankonce.training.adapters import AdapterConfig
from rankonce.training.data import mix_tasks
from rankonce.training.loop import TrainConfig
from rankonce.training.runs import run_stages
from rankonce.training.stages import Stage, StageSource, Tasks, label_source

# One task a domain, all answered with Yes or No.
TASKS = {
    "jobs": "job-search",
    "feed": "post-like",
    "shopping": "product-purchase",
    "music": "song-finish",
}
_POSITIVE = "Yes"


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """The size of the study.

    Attributes:
        num_examples: of each task, train, valid and test together; ten candidates each.
        num_requests: of each platform's log, where histories and statistics come from.
        num_events: newest events of a history; the others are left out to save time.
        epochs: over the train part of all tasks, for the backbone.
        adapter_epochs: over the train part of one task, for its adapter.
        output: JSON of everything.
    """

    size: str = "1m"
    rank: int = 8
    num_examples: int = 100
    num_requests: int = 1500
    epochs: int = 4
    adapter_epochs: int = 2
    num_events: int = 8
    learning_rate: float = 1.5e-3
    adapter_learning_rate: float = 3e-3
    seed: int = 0
    output: Path = Path("results/adapters.json")


def run_study(options: StudyOptions) -> str:
    """Train backbone and adapters, measure both on the part after training, write the record.

    Returns:
        A table in Markdown.
    """
    examples = {name: build_examples(name, options) for name in TASKS}
    train = {
        name: [one.example for one in part if one.split == "train"]
        for name, part in examples.items()
    }
    test = {name: [one for one in part if one.split != "train"] for name, part in examples.items()}
    with tempfile.TemporaryDirectory() as folder:
        scores, parameters = _train_and_score(train, test, options, Path(folder))
    rows = [_measure(name, test[name], scores[name], options.seed) for name in TASKS]
    record = {
        "options": {**asdict(options), "output": str(options.output)},
        "tasks": TASKS,
        "train_examples": {name: len(part) for name, part in train.items()},
        "parameters": parameters,
        "rows": rows,
        "environment": describe_environment(),
    }
    write_record(options.output, record)
    return write_table(rows)


def write_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write the rows of a record as a table in Markdown."""
    lines = [
        "| task | rows | backbone | with its adapter | difference | went on instead "
        "| difference | the simulator itself |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        measured, gains = row["auc"], row["auc_difference"]
        cells = [
            row["task"],
            f"{row['rows']:,}",
            f"{measured['backbone']:.4f}",
            f"{measured['adapter']:.4f}",
            f"{gains['adapter']['value']:+.4f} ± {gains['adapter']['standard_error']:.4f}",
            f"{measured['continued']:.4f}",
            f"{gains['continued']['value']:+.4f} ± {gains['continued']['standard_error']:.4f}",
            f"{measured['truth']:.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def build_examples(name: str, options: StudyOptions) -> list[SimulatedExample]:
    """Make the examples of a domain's task, in the order of time."""
    (domain,) = (one for one in SIMULATED if one.name == name)
    config = replace(domain.config(), num_requests=options.num_requests, seed=options.seed)
    made = build_platform(domain, config).examples(TASKS[name], options.num_examples)
    return [_shorten(one, options.num_events) for one in made]


def _shorten(one: SimulatedExample, num_events: int) -> SimulatedExample:
    newest = sorted(one.example.request.history, key=lambda event: event.time)[-num_events:]
    request = replace(one.example.request, history=tuple(newest))
    return replace(one, example=replace(one.example, request=request))


def _stage(
    examples: Sequence[TrainingExample], options: StudyOptions, *, epochs: int, rate: float
) -> Stage:
    def load(_: Path, config: TrainConfig, tasks: Tasks) -> StageSource:
        def epoch(number: int) -> Iterable[TrainingExample]:
            return mix_tasks(examples, temperature=1.0, seed=config.seed + number)

        fingerprint = {"simulated": [one.request.id for one in examples]}
        return label_source(epoch, tasks=tasks, fingerprint=fingerprint)

    config = TrainConfig(
        epochs=epochs,
        targets_per_step=128,
        learning_rate=rate,
        seed=options.seed,
        steps_per_checkpoint=1000,
    )
    return Stage(name="finetune", load=load, config=config)


def _train_and_score(
    train: Mapping[str, Sequence[TrainingExample]],
    test: Mapping[str, Sequence[SimulatedExample]],
    options: StudyOptions,
    folder: Path,
) -> tuple[dict[str, dict[str, list[float]]], dict[str, int]]:
    """Return P(Yes) of every test row by domain and arm, and the weights of both."""

    def run(name: str, stage: Stage, **more: Any) -> Path:
        out = folder / name
        run_stages([stage], folder, out, name=name, size=options.size, seed=options.seed, **more)
        return out

    every = [example for part in train.values() for example in part]
    backbone = run(
        "backbone", _stage(every, options, epochs=options.epochs, rate=options.learning_rate)
    )
    # From the end of a cosine, as adapters do, and at a third of the peak.
    going_on = _stage(every, options, epochs=options.adapter_epochs, rate=options.learning_rate / 3)
    continued = run("continued", going_on, model=str(backbone))
    rate = options.adapter_learning_rate
    adapters = {
        name: run(
            name,
            _stage(part, options, epochs=options.adapter_epochs, rate=rate),
            model=str(backbone),
            adapter=AdapterConfig(name=name, rank=options.rank),
        )
        for name, part in train.items()
    }
    shared = Ranker.from_pretrained(backbone, adapters=adapters)
    other = Ranker.from_pretrained(continued)
    scores: dict[str, dict[str, list[float]]] = {}
    for name, part in test.items():
        arms = {"backbone": (shared, ""), "adapter": (shared, name), "continued": (other, "")}
        scores[name] = {
            arm: _probabilities(ranker, part, adapter) for arm, (ranker, adapter) in arms.items()
        }
    weights = list(shared.loaded.network.named_parameters())
    return scores, {
        "backbone": sum(weight.numel() for key, weight in weights if ".lora_" not in key),
        "adapter": sum(weight.numel() for key, weight in weights if ".lora_" in key) // len(train),
    }


def _probabilities(
    ranker: Ranker, examples: Sequence[SimulatedExample], adapter: str
) -> list[float]:
    requests = [replace(one.example.request, adapter=adapter) for one in examples]
    return [
        float(np.exp(candidate.log_probs[_POSITIVE]))
        for result in ranker.score_many(requests)
        for candidate in result.candidates
    ]


def _measure(
    name: str,
    examples: Sequence[SimulatedExample],
    scores: Mapping[str, Sequence[float]],
    seed: int,
) -> dict[str, Any]:
    assert library_tasks()[TASKS[name]].label_names[0] == _POSITIVE
    labels = [int(label == _POSITIVE) for one in examples for label in one.example.labels]
    requests = [row for row, one in enumerate(examples) for _ in one.example.labels]
    truth = [shares[_POSITIVE] for one in examples for shares in one.truth]
    every = {**scores, "truth": truth}
    return {
        "domain": name,
        "task": TASKS[name],
        "rows": len(labels),
        "auc": {arm: auc(labels, values) for arm, values in every.items()},
        "log_loss": {arm: log_loss(labels, values) for arm, values in every.items()},
        "auc_difference": {
            arm: asdict(
                paired_bootstrap_over_members(
                    "auc", labels, scores[arm], scores["backbone"], requests, seed=seed
                )
            )
            for arm in ("adapter", "continued")
        },
    }
