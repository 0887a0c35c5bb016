"""The training loop: units in, a checkpoint out, the same bits when it is killed and resumed."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rankonce.errors import MissingDependencyError, NumericsError, TrainingError
from rankonce.model.acceleration import accelerate_model
from rankonce.model.loading import use_segment_attention
from rankonce.training.adapters import is_adapted, keep_trained_weights
from rankonce.training.checkpoint import (
    cut_metrics,
    finish_run,
    latest_checkpoint,
    save_checkpoint,
    save_model,
    write_run_record,
)
from rankonce.training.objectives import Learner, Objective, Unit
from rankonce.training.optimization import (
    Schedule,
    add_dropout,
    build_optimizers,
    layer_dropout,
    rate_factor,
)
from rankonce.training.reporter import Reporter
from rankonce.training.steps import (
    cut_into_steps,
    shuffle_stream,
    shuffle_units,
    split_by_tokens,
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained.

    Attributes:
        epochs: passes over the data.
        max_steps: optimiser steps after which a run ends; data that end before begin anew. Takes
            the place of ``epochs``; streams, whose length is not known, need it.
        targets_per_step: labels (or learnt tokens) of one optimiser step, gathered over as many
            passes as it takes.
        max_tokens_per_pass: tokens of one forward and backward pass; bounds the memory.
        learning_rate: the peak, reached after ``warmup_share`` of the run; falls to
            ``final_share`` of it as ``schedule`` says.
        weight_decay: on matrices only.
        sgd_from: part of the run after which SGD with momentum takes over from AdamW, at
            ``sgd_scale`` times its learning rate; 1 never does (Keskar & Socher 2017).
        dropout: share of every attention's and MLP's output set to 0 while training.
        first_dropout: the same in the lowest layer, from where it goes to ``dropout`` in the
            highest; ``None`` is ``dropout`` everywhere.
        averaging: the model that is kept is an exponential average of the weights, of which this
            part stays from step to step (Polyak averaging); 0 keeps the last weights.
        max_gradient_norm: gradients are scaled down to it.
        buffer_size: units of a stream among which the order is random.
        seed: of the order of units and the random numbers of training.
        steps_per_checkpoint: how much is lost at most when a run is killed.
    """

    epochs: int = 3
    max_steps: int | None = None
    targets_per_step: int = 256
    max_tokens_per_pass: int = 16_384
    learning_rate: float = 1e-3
    schedule: Schedule = "cosine"
    warmup_share: float = 0.05
    final_share: float = 0.05
    weight_decay: float = 0.1
    sgd_from: float = 1.0
    sgd_scale: float = 10.0
    dropout: float = 0.0
    first_dropout: float | None = None
    averaging: float = 0.0
    max_gradient_norm: float = 1.0
    buffer_size: int = 4096
    seed: int = 0
    steps_per_checkpoint: int = 100


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What a model is trained on.

    Attributes:
        units: the units of an epoch, tokenised; may differ from epoch to epoch, never between two
            calls with the same number.
        objective: how they become a loss.
        valid: units whose loss is measured after every epoch.
        is_stream: the units do not fit in memory.
    """

    units: Callable[[int], Iterable[Unit]]
    objective: Objective[Any]
    valid: Callable[[], Iterable[Unit]] = tuple
    is_stream: bool = False


@dataclass(kw_only=True)
class Position:
    """How far a run is; travels with its checkpoints.

    Attributes:
        epoch, place: the steps of the epoch that are done.
        step: all steps that are done.
        seconds: spent on these.
    """

    epoch: int = 0
    place: int = 0
    step: int = 0
    seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what a checkpoint kept."""
        for name, value in state.items():
            setattr(self, name, value)


def train(
    network: Any,
    tokenizer: Any,
    data: TrainingData,
    out: Path,
    *,
    config: TrainConfig,
    name: str = "training",
    record: dict[str, Any] | None = None,
) -> None:
    """Train a model and write it to ``out``.

    A step's loss is summed over its targets and divided by their number, however they fall into
    passes. A run that finds checkpoints in ``out`` goes on from the newest.

    Args:
        network: a transformers causal language model in fp32.
        name: of the stage, for people.
        record: what else the run record should say, as which data these are; a resumed run must
            say the same.

    Raises:
        TrainingError: ``out`` holds another run, or a stream comes without ``max_steps``.
        NumericsError: the loss is NaN or infinite.
    """
    try:
        from accelerate import Accelerator
        from accelerate.utils import set_seed
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependencyError(error.name or "accelerate", extra="train") from error

    if data.is_stream and config.max_steps is None:
        raise TrainingError("max_steps: should be given, since the length of a stream is not known")
    write_run_record(
        out, {"config": asdict(config), "objective": repr(data.objective), **(record or {})}
    )
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise TrainingError("processes: one process only; several would train on the same rows")
    set_seed(config.seed)
    use_segment_attention(network)
    accelerate_model(network, trainable=True)
    num_layers = network.config.get_text_config().num_hidden_layers
    add_dropout(network, layer_dropout(num_layers, last=config.dropout, first=config.first_dropout))
    network.train()
    optimizers = build_optimizers(
        network, weight_decay=config.weight_decay, with_sgd=config.sgd_from < 1
    )
    averaged: Any = None
    if config.averaging:
        averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.averaging))
    learner = accelerator.prepare(Learner(network, data.objective))
    optimizers = [accelerator.prepare(optimizer) for optimizer in optimizers]
    position = Position()
    accelerator.register_for_checkpointing(position, *([averaged] if config.averaging else []))
    if is_adapted(network):
        keep_trained_weights(accelerator)
    kept = averaged.module if config.averaging else network

    if newest := latest_checkpoint(out):
        accelerator.load_state(str(newest[1] / "state"))
    cut_metrics(out, position.step)
    writer = SummaryWriter(str(out / "tensorboard"), purge_step=position.step + 1)
    with Reporter(out, writer, name=name) as reporter:
        for units, progress in _plan_steps(data, config, position):
            started = time.perf_counter()
            optimizer = optimizers[progress > config.sgd_from]
            rate = config.learning_rate * rate_factor(
                progress,
                schedule=config.schedule,
                warmup_share=config.warmup_share,
                final_share=config.final_share,
            )
            for group in optimizer.param_groups:
                group["lr"] = rate * (config.sgd_scale if progress > config.sgd_from else 1.0)
            loss, norm = _optimize(accelerator, learner, optimizer, units, config)
            if config.averaging:
                averaged.update_parameters(network)
            seconds = time.perf_counter() - started
            position.seconds += seconds
            reporter.write(
                step=position.step,
                progress=progress,
                epoch=position.epoch,
                loss=loss,
                gradient_norm=norm,
                learning_rate=rate,
                targets=sum(unit.num_targets for unit in units),
                tokens_per_s=sum(unit.num_tokens for unit in units) / seconds,
            )
            if position.step % config.steps_per_checkpoint == 0:
                save_checkpoint(
                    out, position.step, accelerator=accelerator, network=kept, tokenizer=tokenizer
                )
            ends_epoch = progress >= 1 or position.place == 0
            if ends_epoch and (loss_of_valid := mean_loss(kept, data, config)) is not None:
                reporter.write(
                    step=position.step,
                    progress=progress,
                    epoch=position.epoch,
                    valid_loss=loss_of_valid,
                )
    save_model(out, kept, tokenizer)
    finish_run(out, steps=position.step, seconds=position.seconds)


def _plan_steps(
    data: TrainingData, config: TrainConfig, position: Position
) -> Iterator[tuple[Sequence[Unit], float]]:
    """Give the steps from a position on, each with the part of the run that it completes.

    The position is moved on with every step: to the next epoch's beginning with an epoch's last.
    """
    for epoch in count(position.epoch):
        if config.max_steps is None and epoch >= config.epochs:
            return
        seed = config.seed + epoch
        units = data.units(epoch)
        if data.is_stream:
            order = shuffle_stream(units, buffer_size=config.buffer_size, seed=seed)
        else:
            order = iter(shuffle_units(list(units), seed=seed))
        steps: Iterable[list[Unit]] = cut_into_steps(
            order, targets_per_step=config.targets_per_step
        )
        num_steps = 0
        if config.max_steps is None:
            steps = list(steps)
            num_steps = len(steps)
        is_empty = True
        for place, (step_units, is_last) in enumerate(_mark_last(steps), start=1):
            is_empty = False
            if place <= position.place:
                continue
            if config.max_steps is not None and position.step >= config.max_steps:
                return
            position.epoch, position.place = (epoch + 1, 0) if is_last else (epoch, place)
            position.step += 1
            if config.max_steps is not None:
                progress = position.step / config.max_steps
            else:
                # By the part of the epoch, since epochs may differ in length.
                progress = (epoch + place / num_steps) / config.epochs
            yield step_units, progress
        if is_empty:
            raise TrainingError("data: should hold at least one example or text, hold none")


def _mark_last(steps: Iterable[list[Unit]]) -> Iterator[tuple[list[Unit], bool]]:
    """Say of every step whether it is the last one."""
    before: list[Unit] | None = None
    for step in steps:
        if before is not None:
            yield before, False
        before = step
    if before is not None:
        yield before, True


@torch.no_grad()
def mean_loss(network: Any, data: TrainingData, config: TrainConfig) -> float | None:
    """Mean loss over the targets of the valid units, ``None`` if there are none."""
    units = list(data.valid())
    if not units:
        return None
    was_training = network.training
    network.eval()
    total = 0.0
    for part in split_by_tokens(units, max_tokens_per_pass=config.max_tokens_per_pass):
        batch = data.objective.pack(part, network.device)
        total += float(data.objective.loss(network, batch))
    network.train(was_training)
    return total / max(1, sum(unit.num_targets for unit in units))


def _optimize(
    accelerator: Any, learner: Any, optimizer: Any, units: Sequence[Unit], config: TrainConfig
) -> tuple[float, float]:
    objective = accelerator.unwrap_model(learner).objective
    num_targets = max(1, sum(unit.num_targets for unit in units))
    total = 0.0
    optimizer.zero_grad()
    for part in split_by_tokens(units, max_tokens_per_pass=config.max_tokens_per_pass):
        if not any(unit.num_targets for unit in part):
            continue
        loss = learner(objective.pack(part, accelerator.device)) / num_targets
        if not torch.isfinite(loss):
            raise NumericsError(
                f"loss: is {loss.item()}; lower the learning rate or look at the data"
            )
        accelerator.backward(loss)
        total += float(loss.detach())
    norm = accelerator.clip_grad_norm_(learner.parameters(), config.max_gradient_norm)
    optimizer.step()
    return total, float(norm)
