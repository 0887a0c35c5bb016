"""``rankonce finetune``: supervised fine-tuning on labelled requests of any tasks."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rankonce.cli.options import TaskFileOption, quiet_transformers
from rankonce.cli.training_options import (
    BalanceOption,
    LearningRateOption,
    PassTokensOption,
    RunFolderOption,
    SeedOption,
    SetOption,
    StartModelOption,
    StylesOption,
    change_config,
    check_start,
    read_loss,
    size_option,
    takes_adapter,
    tell_model,
)

if TYPE_CHECKING:
    from rankonce.training.adapters import AdapterConfig


@takes_adapter
def finetune(
    data: Annotated[
        list[Path],
        typer.Option(exists=True, dir_okay=False, help="JSON lines of requests with labels."),
    ],
    out: RunFolderOption,
    valid: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help="The same, held out: loss every epoch."),
    ] = None,
    model: StartModelOption = None,
    size: Annotated[str | None, size_option(default="3m")] = None,
    loss: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=WEIGHT]",
            help="softmax, pairwise or listwise; may be repeated.",
            show_default="softmax",
        ),
    ] = None,
    temperature: BalanceOption = 1.0,
    styles: StylesOption = False,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = 3,
    learning_rate: LearningRateOption = 1e-3,
    targets_per_step: Annotated[int, typer.Option(min=1, help="Labels of a step.")] = 256,
    max_tokens_per_pass: PassTokensOption = 16_384,
    seed: SeedOption = 0,
    precision: Annotated[str, typer.Option(help="fp32, or bf16 with weights in fp32.")] = "fp32",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more work.")
    ] = False,
    sharding: Annotated[
        str, typer.Option(help="With several processes: none (DDP) or fsdp (FSDP2).")
    ] = "none",
    peak_tflops: Annotated[
        float | None,
        typer.Option(help="Of one device, for the FLOP utilisation.", show_default="if known"),
    ] = None,
    settings: SetOption = None,
    task_file: TaskFileOption = None,
    adapter: "AdapterConfig | None" = None,
) -> None:
    """Fine-tune a ranker at its score rows, many candidates of a member in one sequence.

    rankonce finetune --data examples.jsonl --out runs/mine
    """
    from functools import partial

    from rankonce.evaluation.held_out import measure_held_out
    from rankonce.prompts.tasks import load_task
    from rankonce.training.loop import TrainConfig
    from rankonce.training.runs import run_stages
    from rankonce.training.stages import Stage, StageSource, Tasks, finetune_source

    check_start(model, size)
    quiet_transformers()
    losses = dict(read_loss(text) for text in loss or ["softmax"])

    def load(_: Path, config: TrainConfig, tasks: Tasks) -> StageSource:
        read = partial(finetune_source, valid_paths=valid or (), temperature=temperature)
        return read(data, config, tasks, losses=losses, styles=styles)

    config = change_config(
        TrainConfig(),
        settings,
        epochs=epochs,
        learning_rate=learning_rate,
        targets_per_step=targets_per_step,
        max_tokens_per_pass=max_tokens_per_pass,
        seed=seed,
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        sharding=sharding,
        peak_tflops=peak_tflops,
    )
    own_tasks = [load_task(path) for path in task_file or ()]
    run_stages(
        [Stage(name="finetune", load=load, config=config)],
        data[0],
        out,
        name="finetune",
        size=size or "3m",
        seed=seed,
        model=model,
        tasks=own_tasks,
        adapter=adapter,
        evaluate=partial(measure_held_out, tasks=own_tasks),
    )
    tell_model(out)
