"""The training loop: units in, a checkpoint out, the same bits when it is killed and resumed."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from rankonce.errors import TrainingError
from rankonce.model.acceleration import accelerate_model
from rankonce.model.loading import use_segment_attention
from rankonce.training.checkpoint import (
    RunState,
    cut_metrics,
    finish_run,
    latest_checkpoint,
    save_checkpoint,
    save_kept,
    write_run_record,
)
from rankonce.training.fp8 import check_fp8, train_in_fp8
from rankonce.training.objectives import Learner, Objective, Unit
from rankonce.training.optimization import (
    Schedule,
    WeightAverage,
    add_dropout,
    build_optimizers,
    layer_dropout,
    rate_factor,
)
from rankonce.training.parallel import (
    ParallelLearner,
    Processes,
    Sharding,
    StepSums,
)
from rankonce.training.recomputation import recompute_layers
from rankonce.training.reporter import open_report
from rankonce.training.steps import cut_into_steps, shuffle_stream, shuffle_units
from rankonce.training.throughput import known_peak_tflops, throughput

Precision = Literal["fp32", "bf16"]


# Numbers of a configuration, from and to.
_BOUNDS: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(
        (
            "epochs",
            "max_steps",
            "targets_per_step",
            "max_tokens_per_pass",
            "buffer_size",
            "steps_per_checkpoint",
        ),
        (1, math.inf),
    ),
    **dict.fromkeys(
        (
            "warmup_share",
            "final_share",
            "sgd_from",
            "dropout",
            "first_dropout",
            "averaging",
        ),
        (0, 1),
    ),
    **dict.fromkeys(
        ("learning_rate", "weight_decay", "sgd_scale", "max_gradient_norm", "peak_tflops", "seed"),
        (0, math.inf),
    ),
}


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
        precision: ``bf16`` multiplies in bf16; weights, hidden states between layers, head and
            loss stay in fp32.
        fp8: multiply in FP8 in the forward pass of the decoder's linear layers; needs a GPU that
            can, and does not pay for small models.
        gradient_checkpointing: layers keep their input only and are computed again for their
            gradients: less memory, a third more work.
        sharding: what several processes do with the weights: ``none`` holds them in each (DDP),
            ``fsdp`` cuts them among all (FSDP2).
        peak_tflops: of one device in this precision, for the FLOP utilisation; known for some.
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
    precision: Precision = "fp32"
    fp8: bool = False
    gradient_checkpointing: bool = False
    sharding: Sharding = "none"
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        choices = {"schedule": Schedule, "precision": Precision, "sharding": Sharding}
        for name, known in choices.items():
            if (value := getattr(self, name)) not in get_args(known):
                raise TrainingError(
                    f"{name}: should be one of {', '.join(get_args(known))}, is {value!r}"
                )
        for name, (least, most) in _BOUNDS.items():
            number = getattr(self, name)
            if number is not None and not least <= number <= most:
                raise TrainingError(f"{name}: should be from {least:g} to {most:g}, is {number:g}")
        # All of it would be left as it was, the last of a run's weights never kept.
        for name in ("dropout", "first_dropout", "averaging", "warmup_share"):
            if getattr(self, name) == 1:
                raise TrainingError(f"{name}: should be below 1")


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
    passes and over processes. A run that finds checkpoints in ``out`` goes on from the newest.

    Args:
        network: a transformers causal language model in fp32; its layers are changed.
        name: of the stage, for people.
        record: what else the run record should say, as which data these are; a resumed run must
            say the same.

    Raises:
        TrainingError: ``out`` holds another run, a stream comes without ``max_steps``, or the
            processes or the device cannot do what the configuration asks.
        NumericsError: the loss is NaN or infinite.
    """
    if data.is_stream and config.max_steps is None:
        raise TrainingError("max_steps: should be given, since the length of a stream is not known")
    processes = Processes()
    if config.fp8:
        check_fp8(processes.device)
    write_run_record(
        out,
        {"config": asdict(config), "objective": repr(data.objective), **(record or {})},
        writes=processes.is_first,
    )
    state = _set_up(network, data.objective, processes, config)
    learner, position = state.learner, state.position
    if newest := latest_checkpoint(out):
        state.load(newest[1] / "state")
    if processes.is_first:
        cut_metrics(out, position.step)
    peak_tflops = config.peak_tflops or known_peak_tflops(processes.device, config.precision)
    with open_report(
        out, name=name, last_step=position.step, is_silent=not processes.is_first
    ) as report:
        for units, progress in _plan_steps(data, config, position):
            started = time.perf_counter()
            is_sgd = progress > config.sgd_from
            optimizer = state.optimizers[is_sgd]
            rate = config.learning_rate * rate_factor(
                progress,
                schedule=config.schedule,
                warmup_share=config.warmup_share,
                final_share=config.final_share,
            )
            for group in optimizer.param_groups:
                group["lr"] = rate * (config.sgd_scale if is_sgd else 1.0)
            sums, norm = _optimize(learner, optimizer, units, config)
            if state.average:
                state.average.update()
            seconds = time.perf_counter() - started
            position.seconds += seconds
            report(
                step=position.step,
                progress=progress,
                epoch=position.epoch,
                loss=sums.loss,
                gradient_norm=norm,
                learning_rate=rate,
                targets=sum(unit.num_targets for unit in units),
                tokens_per_s=sums.num_tokens / seconds,
                **throughput(sums.flop / seconds, processes.count, peak_tflops),
            )
            if progress >= 1 or position.place == 0:
                valid = list(data.valid())
                if valid:
                    with state.average.applied() if state.average else nullcontext():
                        valid_loss = learner.mean_loss(valid)
                    report(
                        step=position.step,
                        progress=progress,
                        epoch=position.epoch,
                        valid_loss=valid_loss,
                    )
            # After the epoch's validation: a run that goes on from here does not come to it again.
            if position.step % config.steps_per_checkpoint == 0:
                save_checkpoint(out, position.step, state=state, tokenizer=tokenizer)
    save_kept(out, state, tokenizer)
    if processes.is_first:
        finish_run(out, steps=position.step, seconds=position.seconds)
    processes.wait()


def _set_up(
    network: Any, objective: Objective[Any], processes: Processes, config: TrainConfig
) -> RunState:
    """Make a model ready to be trained: its layers, its processes, its optimisers."""
    from accelerate.utils import set_seed

    # Every process drops other outputs; the first one's are those of a process alone.
    set_seed(config.seed, device_specific=True)
    use_segment_attention(network)
    accelerate_model(network, trainable=True)
    num_layers = network.config.get_text_config().num_hidden_layers
    add_dropout(network, layer_dropout(num_layers, last=config.dropout, first=config.first_dropout))
    if config.fp8:
        train_in_fp8(network)
    network.train()
    learner = ParallelLearner(
        Learner(network, objective),
        processes,
        sharding=config.sharding,
        precision=config.precision,
        max_tokens_per_pass=config.max_tokens_per_pass,
    )
    if config.gradient_checkpointing:
        recompute_layers(network)
    optimizers = build_optimizers(
        learner.learner, weight_decay=config.weight_decay, with_sgd=config.sgd_from < 1
    )
    trained = [parameter for parameter in learner.learner.parameters() if parameter.requires_grad]
    average = WeightAverage(trained, kept=config.averaging) if config.averaging else None
    return RunState(learner=learner, optimizers=optimizers, average=average, position=Position())


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
            held = list(units)
            if held and not any(unit.num_targets for unit in held):
                raise TrainingError("labels: should be known of one candidate at least")
            order = iter(shuffle_units(held, seed=seed))
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


def _optimize(
    learner: ParallelLearner,
    optimizer: torch.optim.Optimizer,
    units: Sequence[Unit],
    config: TrainConfig,
) -> tuple[StepSums, float]:
    optimizer.zero_grad()
    sums = learner.accumulate_gradients(units)
    norm = learner.clip_gradients(config.max_gradient_norm)
    optimizer.step()
    return sums, norm
