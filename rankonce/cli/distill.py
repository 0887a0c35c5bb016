"""``rankonce distill``: a student learns what a teacher says of requests."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankonce.cli.options import (
    Precision,
    TaskFileOption,
    is_first_process,
    quiet_transformers,
)
from rankonce.cli.training_options import (
    BalanceOption,
    RunFolderOption,
    SetOption,
    StartModelOption,
    StylesOption,
    check_start,
    read_loss,
    size_option,
    takes_adapter,
    tell_model,
)

if TYPE_CHECKING:
    from rankonce.training.adapters import AdapterConfig
    from rankonce.training.loop import TrainConfig
    from rankonce.training.stages import Stage


@takes_adapter
def distill(
    data: Annotated[
        list[Path],
        typer.Option(exists=True, help="JSON lines of requests with labels; a recipe's folder."),
    ],
    out: RunFolderOption,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="FOLDER|ID|URL", help="A checkpoint, or a server of ours."),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="SQLite file of teachers' scores; what is there is not asked again.",
        ),
    ] = None,
    unlabelled: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="JSON lines of requests that the teacher labels; labels there are not looked at.",
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Take data and settings of a recipe's last stage.")
    ] = None,
    valid: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help="Requests with labels, held out."),
    ] = None,
    model: StartModelOption = None,
    size: Annotated[str | None, size_option(default="3m, or the recipe's")] = None,
    loss: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=WEIGHT]",
            help="forward-kl, reverse-kl, jensen-shannon, skewed-kl, log-odds-mse, "
            "pairwise-margin or hidden-states; may be repeated.",
            show_default="forward-kl",
        ),
    ] = None,
    target: Annotated[
        str, typer.Option(help="hard, soft, mixture, two-logits, max or self-auxiliary.")
    ] = "soft",
    temperature: Annotated[float, typer.Option(help="Of the divergences.")] = 1.0,
    teacher_share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="The teacher's part of a mixture.")
    ] = 0.5,
    skew: Annotated[float, typer.Option(help="The teacher's part in skewed-kl.")] = 0.1,
    settings: SetOption = None,
    task_temperature: BalanceOption = 1.0,
    styles: StylesOption = False,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of everything.", show_default="0, or the recipe's")
    ] = None,
    task_file: TaskFileOption = None,
    teacher_precision: Annotated[
        Precision | None,
        typer.Option(help="Of a teacher's weights.", show_default="bf16 on a GPU, fp32 on a CPU"),
    ] = None,
    teacher_model: Annotated[
        str | None,
        typer.Option(help="Which of a server's models to ask.", show_default="its first"),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="RANKONCE_API_KEY", help="Of the teacher's server.")
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Requests under way at once at a server.")
    ] = 16,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="For one answer of a server.")] = 60.0,
    adapter: "AdapterConfig | None" = None,
) -> None:
    """Distil a teacher's scores into a student; the teacher is asked once, whoever learns of it.

    rankonce distill --teacher runs/big --data examples.jsonl --store scores.sqlite --out runs/small
    """
    from functools import partial

    check_start(model, size)
    if (teacher is None) != (store is None):
        raise typer.BadParameter("belongs to --teacher", param_hint="--store")
    if recipe is not None and (unlabelled or valid or styles or task_temperature != 1):
        raise typer.BadParameter(
            "brings its own data: leave out --unlabelled, --valid, --styles, --task-temperature",
            param_hint="--recipe",
        )
    if recipe is not None and len(data) > 1:
        raise typer.BadParameter("should be the recipe's folder alone", param_hint="--data")
    if recipe is None and (folders := [path for path in data if path.is_dir()]):
        raise typer.BadParameter(f"{folders[0]} is a folder, for --recipe", param_hint="--data")

    is_served = teacher is not None and teacher.startswith(("http://", "https://"))
    if not is_served and (teacher_model is not None or concurrency != 16 or timeout_s != 60):
        raise typer.BadParameter(
            "should be a server's URL where --teacher-model, --concurrency or --timeout-s is given",
            param_hint="--teacher",
        )

    from rankonce.client import ClientConfig
    from rankonce.distillation.objective import DistillConfig
    from rankonce.distillation.stages import Distillation
    from rankonce.distillation.store import ScoreStore
    from rankonce.distillation.teachers import find_teacher
    from rankonce.evaluation.held_out import measure_held_out
    from rankonce.prompts.tasks import load_task
    from rankonce.training.runs import run_stages

    quiet_transformers()
    config = DistillConfig(
        losses=dict(read_loss(text) for text in loss or ["forward-kl"]),
        target=target,
        temperature=temperature,
        teacher_share=teacher_share,
        skew=skew,
    )
    tasks = [load_task(path) for path in task_file or ()]
    if recipe is None:
        stage = _file_stage(
            data,
            valid_paths=valid or (),
            unlabelled_paths=unlabelled or (),
            temperature=task_temperature,
            styles=styles,
        )
        name, size, start = "distill", size or "3m", seed or 0
    else:
        chosen, stage = _recipe_stage(recipe)
        name, size = f"distill {recipe}", size or chosen.size
        start = chosen.seed if seed is None else seed
    stage = _set(stage, settings or (), seed=start if recipe is None else seed)
    asked = None
    if teacher is not None:
        asked = find_teacher(
            teacher,
            tasks=tasks,
            precision=teacher_precision,
            served=ClientConfig(api_key=api_key, model=teacher_model, timeout_s=timeout_s),
            concurrency=concurrency,
        )
    distillation = Distillation(
        config=config, teacher=asked, store=None if store is None else ScoreStore(store)
    )
    run_stages(
        [distillation.wrap(stage)],
        data[0],
        out,
        name=name,
        size=size,
        seed=start,
        model=model,
        tasks=tasks,
        adapter=adapter,
        evaluate=partial(measure_held_out, tasks=tasks),
    )
    if is_first_process():
        for line in distillation.describe_cost():
            typer.echo(line, err=True)
    tell_model(out)


def _file_stage(data: list[Path], **options: Any) -> "Stage":
    from rankonce.training.stages import Stage, StageSource, Tasks, finetune_source

    def load(_: Path, config: "TrainConfig", tasks: Tasks) -> StageSource:
        return finetune_source(data, config, tasks, **options)

    return Stage(name="distill", load=load)


def _recipe_stage(name: str) -> tuple[Any, "Stage"]:
    from dataclasses import replace

    from rankonce.training.recipes import find_recipe

    recipe = find_recipe(name)
    return recipe, replace(recipe.stages[-1], name="distill")


def _set(stage: "Stage", settings: Any, *, seed: int | None) -> "Stage":
    from dataclasses import replace

    from rankonce.training.recipes import read_settings

    changes = read_settings(settings)
    if seed is not None:
        changes.setdefault("seed", seed)
    return replace(stage, config=replace(stage.config, **changes))
