"""The training loop: examples in, a checkpoint out, the same bits when it is killed and resumed."""

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor
from torch.nn.functional import dropout
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rankonce.errors import MissingDependencyError, NumericsError, TrainingError
from rankonce.model.acceleration import accelerate_model
from rankonce.model.head import head_of
from rankonce.model.loading import use_segment_attention
from rankonce.model.packing import forward_pass
from rankonce.prompts.encoding import TextEncoder
from rankonce.prompts.rendering import Renderer
from rankonce.prompts.tasks import Task
from rankonce.records import TrainingExample
from rankonce.training.checkpoint import (
    cut_metrics,
    latest_checkpoint,
    save_checkpoint,
    save_model,
    write_run_record,
)
from rankonce.training.data import (
    TokenizedExample,
    TrainingBatch,
    pack_examples,
    shuffle_into_steps,
    split_by_tokens,
    tokenize_examples,
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained.

    Attributes:
        epochs: passes over the examples.
        labels_per_step: labels of one optimiser step, gathered over as many passes as it takes.
        max_tokens_per_pass: tokens of one forward and backward pass; bounds the memory.
        learning_rate: the peak, reached after ``warmup_share`` of the run; falls to
            ``final_share`` of it along a cosine.
        weight_decay: of AdamW, on matrices only.
        dropout: share of every attention's and MLP's output set to 0 while training.
        averaging: the model that is kept is an exponential average of the weights, of which this
            part stays from step to step (Polyak averaging); 0 keeps the last weights.
        max_gradient_norm: gradients are scaled down to it.
        seed: of the order of examples and the random numbers of training.
        steps_per_checkpoint: how much is lost at most when a run is killed.
    """

    epochs: int = 3
    labels_per_step: int = 256
    max_tokens_per_pass: int = 16_384
    learning_rate: float = 1e-3
    warmup_share: float = 0.05
    final_share: float = 0.05
    weight_decay: float = 0.1
    dropout: float = 0.0
    averaging: float = 0.0
    max_gradient_norm: float = 1.0
    seed: int = 0
    steps_per_checkpoint: int = 100


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What a model is trained on.

    Attributes:
        epoch: the examples of an epoch; may differ from epoch to epoch, never between two calls
            with the same number.
        valid: examples whose loss is measured after every epoch.
        fingerprint: says which data these are; a resumed run must have the same.
        split: tables that the data were cut into, where the recipe cut them.
    """

    epoch: Callable[[int], Iterable[TrainingExample]]
    valid: Sequence[TrainingExample]
    fingerprint: dict[str, str]
    split: dict[str, pl.DataFrame] = field(default_factory=dict)


def train(
    network: Any,
    tokenizer: Any,
    data: TrainingData,
    out: Path,
    *,
    tasks: dict[str, Task],
    config: TrainConfig,
    max_prompt_tokens: int,
    record: dict[str, Any] | None = None,
) -> None:
    """Fine-tune a model at its score rows and write it to ``out``.

    The loss is the cross-entropy over the task's labels, summed over a step's labels and divided by
    their number, however they fall into passes. A run that finds checkpoints in ``out`` goes on
    from the newest.

    Args:
        network: a transformers causal language model in fp32.
        max_prompt_tokens: the longest prompt, the same as in serving.
        record: what else the run record should say; a resumed run must say the same.

    Raises:
        TrainingError: ``out`` holds another run.
        NumericsError: the loss is NaN or infinite.
    """
    try:
        from accelerate import Accelerator
        from accelerate.utils import set_seed
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependencyError(error.name or "accelerate", extra="train") from error

    write_run_record(out, {"config": asdict(config), "data": data.fingerprint, **(record or {})})
    for name, table in data.split.items():
        (out / "split").mkdir(exist_ok=True)
        table.write_parquet(out / "split" / f"{name}.parquet")
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise TrainingError("processes: one process only; several would train on the same rows")
    set_seed(config.seed)
    use_segment_attention(network)
    accelerate_model(network, trainable=True)
    add_dropout(network, config.dropout)
    network.train()
    optimizer = torch.optim.AdamW(
        _parameter_groups(network, config), lr=config.learning_rate, betas=(0.9, 0.95)
    )
    # Moves with every step; a decay of 0 makes it the last weights.
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.averaging))
    network, optimizer = accelerator.prepare(network, optimizer)
    accelerator.register_for_checkpointing(averaged)
    renderer = Renderer(TextEncoder(tokenizer), max_prompt_tokens=max_prompt_tokens)

    done = 0
    if newest := latest_checkpoint(out):
        done, folder = newest
        accelerator.load_state(str(folder / "state"))
    cut_metrics(out, done)
    step = 0
    with _Reporter(out, SummaryWriter(str(out / "tensorboard"), purge_step=done + 1)) as reporter:
        for epoch in range(config.epochs):
            examples = list(tokenize_examples(data.epoch(epoch), renderer, tasks))
            steps = shuffle_into_steps(
                examples, labels_per_step=config.labels_per_step, seed=config.seed + epoch
            )
            reporter.start(f"epoch {epoch + 1}/{config.epochs}", len(steps))
            for place, step_examples in enumerate(steps, start=1):
                step += 1
                reporter.advance()
                if step <= done:
                    continue
                # By the part of the run, since epochs may differ in length.
                rate = learning_rate((epoch + place / len(steps)) / config.epochs, config)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                started = time.perf_counter()
                loss, norm = _optimize(accelerator, network, optimizer, step_examples, config)
                averaged.update_parameters(network)
                reporter.write(
                    step=step,
                    epoch=epoch,
                    loss=loss,
                    gradient_norm=norm,
                    learning_rate=rate,
                    labels=sum(example.num_labels for example in step_examples),
                    tokens_per_s=sum(example.num_tokens for example in step_examples)
                    / (time.perf_counter() - started),
                )
                if step % config.steps_per_checkpoint == 0:
                    save_checkpoint(
                        out,
                        step,
                        accelerator=accelerator,
                        network=averaged.module,
                        tokenizer=tokenizer,
                    )
            if data.valid and step > done:
                valid = tokenize_examples(data.valid, renderer, tasks)
                loss = mean_loss(averaged.module, valid, config.max_tokens_per_pass)
                reporter.write(step=step, epoch=epoch, valid_loss=loss)
    save_model(out, averaged.module, tokenizer)


def add_dropout(network: Any, share: float) -> None:
    """Drop parts of what every layer adds to the hidden states, while the model is in training.

    Raises:
        TrainingError: the architecture's layers have no ``self_attn`` and ``mlp``.
    """
    if not share:
        return
    layers = getattr(network.base_model, "layers", None)
    if layers is None:
        raise TrainingError(f"dropout: {type(network).__name__} has no layers of the usual form")
    for layer in layers:
        for name, last in (("self_attn", "o_proj"), ("mlp", "down_proj")):
            if not hasattr(layer, name):
                raise TrainingError(f"dropout: {type(layer).__name__} has no {name}; leave it at 0")
            # The product that ends it, where there is one: accelerated layers call that alone.
            module = getattr(layer, name)
            getattr(module, last, module).register_forward_hook(partial(_drop, share=share))


def _drop(module: torch.nn.Module, _: Any, output: Any, *, share: float) -> Any:
    if isinstance(output, tuple):
        return (dropout(output[0], share, module.training), *output[1:])
    return dropout(output, share, module.training)


def learning_rate(progress: float, config: TrainConfig) -> float:
    """Linear warm-up to the peak, then a cosine down to ``final_share`` of it.

    Args:
        progress: part of the run that is done after this step, in 0..1.
    """
    if progress < config.warmup_share:
        return config.learning_rate * progress / config.warmup_share
    cosine = (
        1 + math.cos(math.pi * (progress - config.warmup_share) / (1 - config.warmup_share))
    ) / 2
    return config.learning_rate * (config.final_share + (1 - config.final_share) * cosine)


def label_loss(network: Any, batch: TrainingBatch) -> Tensor:
    """Cross-entropy of the task's labels with their targets, summed over a pass."""
    hidden_CD = forward_pass(network, batch.batch)
    head = head_of(network)
    total = hidden_CD.new_zeros(())
    for label_ids, rows, targets_RL in batch.label_groups:
        log_probs_RL = head.label_logprobs(hidden_CD[rows], label_ids)
        total = total - (targets_RL * log_probs_RL).sum()
    return total


@torch.no_grad()
def mean_loss(
    network: Any, examples: Iterable[TokenizedExample], max_tokens_per_pass: int
) -> float:
    """Mean cross-entropy over the labels of examples."""
    network.eval()
    everything = list(examples)
    total = 0.0
    for part in split_by_tokens(everything, max_tokens_per_pass=max_tokens_per_pass):
        total += float(label_loss(network, pack_examples(part, network.device)))
    network.train()
    return total / max(1, sum(example.num_labels for example in everything))


def _optimize(
    accelerator: Any,
    network: Any,
    optimizer: Any,
    examples: Sequence[TokenizedExample],
    config: TrainConfig,
) -> tuple[float, float]:
    num_labels = sum(example.num_labels for example in examples)
    total = 0.0
    optimizer.zero_grad()
    for part in split_by_tokens(examples, max_tokens_per_pass=config.max_tokens_per_pass):
        if not any(example.num_labels for example in part):
            continue
        loss = label_loss(network, pack_examples(part, accelerator.device)) / max(1, num_labels)
        if not torch.isfinite(loss):
            raise NumericsError(
                f"loss: is {loss.item()}; lower the learning rate or look at the data"
            )
        accelerator.backward(loss)
        total += float(loss.detach())
    norm = accelerator.clip_grad_norm_(network.parameters(), config.max_gradient_norm)
    optimizer.step()
    return total, float(norm)


def _parameter_groups(network: Any, config: TrainConfig) -> list[dict[str, Any]]:
    matrices = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


class _Reporter:
    """Progress bar on stderr, metrics as JSON lines and for TensorBoard."""

    def __init__(self, out: Path, writer: Any) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("loss {task.fields[loss]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._console = console
        self._writer = writer
        self._file = (out / "metrics.jsonl").open("a")

    def __enter__(self) -> "_Reporter":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._writer.close()
        self._file.close()

    def start(self, description: str, total: int) -> None:
        for task in self._progress.task_ids:
            self._progress.remove_task(task)
        self._task = self._progress.add_task(description, total=total, loss="-")

    def advance(self) -> None:
        self._progress.advance(self._task)

    def write(self, *, step: int, **metrics: float) -> None:
        """Write the metrics of a step."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        if "loss" in metrics:
            self._progress.update(self._task, loss=f"{metrics['loss']:.4f}")
        if "valid_loss" in metrics:
            self._console.print(f"step {step}: valid loss {metrics['valid_loss']:.4f}")
