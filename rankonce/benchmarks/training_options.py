"""What options of training change: quality on a simulated platform, memory and time of a pass.

Every arm differs from the default in one thing and is trained with the same seeds, from the same
weights, on the same requests in the same order; differences are paired by seed.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rankonce.benchmarks.records import write_record
from rankonce.benchmarks.training import demonstration_example
from rankonce.datasets.domains import TASK_SOURCES
from rankonce.datasets.domains.platform import Domain, SimulatedExample, build_platform
from rankonce.environment import describe_environment
from rankonce.errors import DataError
from rankonce.evaluation.metrics import auc
from rankonce.model.acceleration import accelerate_model
from rankonce.model.head import head_of
from rankonce.model.loading import use_segment_attention
from rankonce.model.packing import forward_pass
from rankonce.model.sizes import CONTEXT_TOKENS, build_model
from rankonce.prompts.encoding import TextEncoder
from rankonce.prompts.rendering import Renderer
from rankonce.prompts.tasks import library_tasks
from rankonce.records import TrainingExample
from rankonce.training.data import TokenizedExample, tokenize_examples
from rankonce.training.loop import TrainConfig, TrainingData, train
from rankonce.training.objectives import LabelObjective, Learner
from rankonce.training.recomputation import recompute_layers
from rankonce.training.stages import Tasks, label_source
from rankonce.training.steps import split_by_tokens
from rankonce.training.tokenizer import train_tokenizer

_DEFAULT = "default"
# What each arm changes.
ARMS: Mapping[str, Mapping[str, Any]] = {
    _DEFAULT: {},
    "dropout 0.2 in the lowest layer to 0 in the highest": {"first_dropout": 0.2},
    "SGD from 70 % on": {"sgd_from": 0.7},
    "warm-up, stable, decay": {"schedule": "warmup-stable-decay"},
}
DEFAULT_CONFIG = TrainConfig(
    epochs=2, targets_per_step=64, learning_rate=1.5e-3, steps_per_checkpoint=1_000_000
)


@dataclass(frozen=True, kw_only=True)
class OptionsBenchmark:
    """What is measured.

    Attributes:
        task: of a simulated platform.
        num_train, num_valid: requests.
        config: of the default arm.
        size: of the model that is trained; memory is measured on ``memory_size``.
        seeds: of the weights, the order and the random numbers.
        output: JSON, rewritten after every run.
    """

    task: str = "job-apply"
    num_train: int = 300
    num_valid: int = 150
    config: TrainConfig = DEFAULT_CONFIG
    size: str = "1m"
    memory_size: str = "3m"
    seeds: tuple[int, ...] = (0, 1, 2)
    output: Path = Path("results/training-options.json")


def measure_options(options: OptionsBenchmark) -> dict[str, Any]:
    """Train every arm with every seed, measure passes, and write the record."""
    started = time.perf_counter()
    train_rows, valid_rows = _read(options)
    tasks = library_tasks()
    tokenizer, renderer = prepare_renderer(train_rows, tasks)
    units, valid = (
        list(tokenize_examples(rows, renderer, tasks)) for rows in (train_rows, valid_rows)
    )
    record: dict[str, Any] = {
        "environment": {**describe_environment(), "threads": torch.get_num_threads()},
        "task": options.task,
        "size": options.size,
        "train": {"requests": len(units), "labels": sum(u.num_targets for u in units)},
        "valid": {"requests": len(valid), "labels": sum(u.num_targets for u in valid)},
        "epochs": options.config.epochs,
        "passes": {"size": options.memory_size, "arms": measure_passes(options.memory_size)},
        "runs": [],
    }
    for seed in options.seeds:
        for name, changes in ARMS.items():
            print(f"seed {seed}: {name}", file=sys.stderr)
            config = replace(options.config, seed=seed, **changes)
            network = build_model(options.size, seed=seed)
            trained = train_network(network, tokenizer, units, config=config, name=name)
            record["runs"].append({"arm": name, "seed": seed, **measure_labels(trained, valid)})
            record["minutes"] = (time.perf_counter() - started) / 60
            write_record(options.output, record)
    return record


def describe_options(record: Mapping[str, Any]) -> str:
    """Write the record as two tables in Markdown."""
    lines = ["| arm | log-loss | difference | AUC | difference |", "|---|---|---|---|---|"]
    by_arm: dict[str, dict[int, Mapping[str, float]]] = {}
    for run in record["runs"]:
        by_arm.setdefault(run["arm"], {})[run["seed"]] = run
    # A run that was cut short has seeds that not every arm has.
    seeds = set.intersection(*(set(runs) for runs in by_arm.values()))
    by_arm = {name: {seed: runs[seed] for seed in sorted(seeds)} for name, runs in by_arm.items()}
    for name, runs in by_arm.items():
        cells = [name]
        for metric in ("log_loss", "auc"):
            cells.append(f"{statistics.mean(run[metric] for run in runs.values()):.4f}")
            differences = [
                run[metric] - by_arm[_DEFAULT][seed][metric] for seed, run in runs.items()
            ]
            cells.append("" if name == _DEFAULT else _mean_and_error(differences))
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| pass | kept for the backward pass | seconds |", "|---|---|---|"]
    for name, numbers in record["passes"]["arms"].items():
        lines.append(f"| {name} | {numbers['kept_mb']:.0f} MB | {numbers['seconds']:.2f} |")
    return "\n".join(lines)


def measure_passes(size: str) -> dict[str, dict[str, float]]:
    """Count what a pass of the demonstration keeps for its gradients, and time it."""
    example = demonstration_example(20)
    return {
        f"{precision}{', checkpointed' if recomputes else ''}": _measure_pass(
            size, example, precision=precision, recomputes=recomputes
        )
        for precision in ("fp32", "bf16")
        for recomputes in (False, True)
    }


def _measure_pass(
    size: str, example: TokenizedExample, *, precision: str, recomputes: bool
) -> dict[str, float]:
    objective = LabelObjective()
    network = build_model(size, seed=0)
    use_segment_attention(network)
    accelerate_model(network, trainable=True)
    if recomputes:
        recompute_layers(network)
    learner = Learner(network.train(), objective)
    # Weights, and their rounded copies, do not grow with the pass.
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    shapes = {tuple(parameter.shape) for parameter in network.parameters()}
    shapes |= {shape[::-1] for shape in shapes}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tuple(tensor.shape) not in shapes:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def run(hook: Callable[[Tensor], Tensor]) -> float:
        network.zero_grad()
        started = time.perf_counter()
        with (
            torch.autograd.graph.saved_tensors_hooks(hook, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"),
        ):
            loss = learner(objective.pack([example]))
        loss.backward()
        return time.perf_counter() - started

    run(keep)
    seconds = statistics.median(run(lambda tensor: tensor) for _ in range(3))
    return {"kept_mb": sum(kept.values()) / 2**20, "seconds": seconds}


def prepare_renderer(rows: Sequence[TrainingExample], tasks: Tasks) -> tuple[Any, Renderer]:
    """Train a tokenizer on requests as they are rendered; give it and a renderer that uses it."""
    source = label_source(lambda _: rows, tasks=tasks, fingerprint={})
    bytewise = Renderer(TextEncoder(train_tokenizer([" "], source.tasks)), max_prompt_tokens=2**31)
    tokenizer = train_tokenizer(source.texts(bytewise), source.tasks)
    return tokenizer, Renderer(TextEncoder(tokenizer), max_prompt_tokens=CONTEXT_TOKENS)


def train_network(
    network: Any,
    tokenizer: Any,
    units: Sequence[TokenizedExample],
    *,
    config: TrainConfig,
    name: str,
) -> Any:
    """Train a model as a run of the loop does; give it as it is read back from disk."""
    with tempfile.TemporaryDirectory() as folder:
        data = TrainingData(units=lambda _: units, objective=LabelObjective())
        train(network, tokenizer, data, Path(folder), config=config, name=name)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def draw_simulated(task: str, count: int) -> list[SimulatedExample]:
    """Draw requests of a simulated platform, in the order of time.

    Raises:
        DataError: the task has no such platform.
    """
    domain = TASK_SOURCES.get(task)
    if not isinstance(domain, Domain):
        raise DataError(f"task: should be one of a simulated platform, is {task!r}")
    drawn = islice(build_platform(domain).examples(task, count), count)
    return sorted(drawn, key=lambda one: one.example.request.time or 0)


def _read(options: OptionsBenchmark) -> tuple[list[TrainingExample], list[TrainingExample]]:
    """Draw requests; the valid ones are the newest of what was drawn."""
    drawn = draw_simulated(options.task, options.num_train + options.num_valid)
    rows = [one.example for one in drawn]
    return rows[: -options.num_valid], rows[-options.num_valid :]


@torch.no_grad()
def measure_labels(network: Any, valid: Sequence[TokenizedExample]) -> dict[str, float]:
    """Log-loss over the labels, and AUC of the ranking values against the label that ranks."""
    use_segment_attention(network)
    accelerate_model(network)
    network.eval()
    objective, head = LabelObjective(), head_of(network)
    losses, likes, values = [], [], []
    for part in split_by_tokens(valid, max_tokens_per_pass=8192):
        batch = objective.pack(part)
        hidden_CD = forward_pass(network, batch.batch)
        for group in batch.groups:
            log_probs_RL = head.label_logprobs(hidden_CD[group.rows_R], group.label_ids)
            losses.append(-(group.targets_RL * log_probs_RL).sum(1))
            is_ranked_L = group.grades_L > 0
            likes.append(group.targets_RL[:, is_ranked_L].sum(1))
            values.append(log_probs_RL[:, is_ranked_L].logsumexp(1))
    return {
        "log_loss": float(torch.cat(losses).mean()),
        "auc": auc(torch.cat(likes).numpy() > 0.5, torch.cat(values).numpy()),
    }


def _mean_and_error(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:+.4f}"
    return f"{mean:+.4f} ± {statistics.stdev(values) / len(values) ** 0.5:.4f}"
