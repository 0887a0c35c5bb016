"""``rankonce instruct``: learn to answer questions about records, and plain chat data."""

import json
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rankonce.cli.options import TaskFileOption, quiet_transformers
from rankonce.cli.training_options import (
    LearningRateOption,
    MaybeRunFolderOption,
    PassTokensOption,
    SeedOption,
    SetOption,
    StartModelOption,
    change_config,
    check_start,
    size_option,
    tell_model,
)

if TYPE_CHECKING:
    from rankonce.prompts.conversations import Conversation


class LongConversations(StrEnum):
    """What becomes of conversations that do not fit the model."""

    REFUSE = "refuse"
    CUT = "cut"


def instruct(
    examples: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True, dir_okay=False, help="JSON lines of labelled requests to ask about."
        ),
    ] = None,
    chat: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="JSON lines of conversations: messages, conversations or instruction.",
        ),
    ] = None,
    out: MaybeRunFolderOption = None,
    show: Annotated[
        int | None, typer.Option(min=1, help="Print so many conversations instead of training.")
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False, help="Write an epoch's conversations as JSON lines instead of training."
        ),
    ] = None,
    valid: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help="Conversations held out: loss every epoch."),
    ] = None,
    chat_share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Part of the conversations that is chat data.")
    ] = 0.3,
    instruction_file: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Instruction (YAML) instead of the library's; may be repeated.",
            show_default="the library's",
        ),
    ] = None,
    max_questions: Annotated[
        int, typer.Option(min=1, help="Questions of a conversation about a record.")
    ] = 4,
    max_events: Annotated[int, typer.Option(min=0, help="Events told of a record.")] = 12,
    max_candidates: Annotated[int, typer.Option(min=0, help="Candidates told of a record.")] = 5,
    too_long: Annotated[
        LongConversations,
        typer.Option(help="Conversations that do not fit: refuse, or cut behind an answer."),
    ] = LongConversations.REFUSE,
    model: StartModelOption = None,
    size: Annotated[str | None, size_option(default="3m")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the examples.")] = 2,
    max_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps, in place of epochs: the files are never held in memory."),
    ] = None,
    learning_rate: LearningRateOption = 1e-3,
    targets_per_step: Annotated[int, typer.Option(min=1, help="Learnt tokens of a step.")] = 4096,
    max_tokens_per_pass: PassTokensOption = 16_384,
    seed: SeedOption = 0,
    settings: SetOption = None,
    task_file: TaskFileOption = None,
) -> None:
    """Train on questions about records, mixed with chat data; only answers are learnt.

    rankonce instruct --examples train.jsonl --show 3
    rankonce instruct --examples train.jsonl --chat chat.jsonl --model runs/base --out runs/mine
    """
    from rankonce.prompts.instructions import (
        QuestionConfig,
        library_instructions,
        load_instruction,
    )
    from rankonce.prompts.tasks import library_tasks, load_task

    if not examples and not chat:
        raise typer.BadParameter("is needed, or --chat", param_hint="--examples")
    if sum(choice is not None for choice in (out, show, write)) != 1:
        raise typer.BadParameter("is needed, or --show or --write, one of them", param_hint="--out")
    check_start(model, size)
    quiet_transformers()
    own_tasks = [load_task(path) for path in task_file or ()]
    instructions = tuple(map(load_instruction, instruction_file or ())) or library_instructions()

    from rankonce.training.instructions import InstructConfig, instruct_source, mix_conversations
    from rankonce.training.loop import TrainConfig

    config = InstructConfig(
        examples=tuple(examples or ()),
        chat=tuple(chat or ()),
        chat_share=chat_share,
        questions=QuestionConfig(
            max_questions=max_questions, max_events=max_events, max_candidates=max_candidates
        ),
        too_long=too_long.value,
        seed=seed,
    )
    if out is None:
        tasks = {**library_tasks(), **{task.name: task for task in own_tasks}}
        mixed = mix_conversations(config, tasks, epoch=0, instructions=instructions)
        if write is not None:
            _write(mixed, write)
        else:
            _show(mixed, show or 1)
        return

    from rankonce.training.runs import run_stages
    from rankonce.training.stages import Stage, StageSource, Tasks

    def load(_: Path, training: TrainConfig, tasks: Tasks) -> StageSource:
        return instruct_source(
            config, training, tasks, valid=valid or (), instructions=instructions
        )

    training = change_config(
        TrainConfig(),
        settings,
        epochs=epochs,
        max_steps=max_steps,
        learning_rate=learning_rate,
        targets_per_step=targets_per_step,
        max_tokens_per_pass=max_tokens_per_pass,
        seed=seed,
    )
    run_stages(
        [Stage(name="instruct", load=load, config=training)],
        (*config.examples, *config.chat)[0],
        out,
        name="instruct",
        size=size or "3m",
        seed=seed,
        model=model,
        tasks=own_tasks,
    )
    tell_model(out)


def _show(conversations: "Iterator[Conversation]", count: int) -> None:
    from itertools import islice

    for number, conversation in enumerate(islice(conversations, count), start=1):
        typer.echo(f"── conversation {number} · {conversation.source}")
        for turn in conversation.turns:
            typer.echo(f"[{turn.role}] {turn.content}")


def _write(conversations: "Iterator[Conversation]", path: Path) -> None:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    shown = track(
        conversations,
        description="conversations",
        console=console,
        disable=not console.is_terminal,
    )
    with path.open("w", encoding="utf-8") as file:
        for conversation in shown:
            file.write(json.dumps(conversation.as_json(), ensure_ascii=False) + "\n")
