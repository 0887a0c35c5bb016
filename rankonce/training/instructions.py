"""The instruct stage: questions about records, mixed with plain chat data."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rankonce.errors import DataError, RankOnceError
from rankonce.prompts.conversations import (
    Conversation,
    count_conversations,
    read_conversations,
)
from rankonce.prompts.instructions import (
    Instruction,
    QuestionConfig,
    ask_about,
    library_instructions,
)
from rankonce.prompts.rendering import Renderer
from rankonce.prompts.tasks import Task, find_task
from rankonce.records import TrainingExample
from rankonce.training.conversations import TooLong, tokenize_conversations
from rankonce.training.data import stream_examples
from rankonce.training.loop import TrainConfig, TrainingData
from rankonce.training.objectives import TokenObjective
from rankonce.training.sequences import TokenSequence
from rankonce.training.stages import StageSource, fingerprint_files

# Conversations that a tokenizer is trained on.
_NUM_TOKENIZER_TEXTS = 2000


@dataclass(frozen=True, kw_only=True)
class InstructConfig:
    """What the stage learns from.

    Attributes:
        examples: JSON lines of labelled requests, which are asked about.
        chat: JSON lines of conversations in the usual forms.
        chat_share: part of all conversations that are of ``chat``, where there are both.
        questions: how conversations are made of records.
        too_long: what becomes of conversations that do not fit the model.
        seed: of what is asked and in which words; every epoch asks anew.
    """

    examples: tuple[Path, ...] = ()
    chat: tuple[Path, ...] = ()
    chat_share: float = 0.3
    questions: QuestionConfig = field(default_factory=QuestionConfig)
    too_long: TooLong = "refuse"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.examples and not self.chat:
            raise DataError("examples, chat: should hold at least one file")
        if self.examples and self.chat and not 0 < self.chat_share < 1:
            raise DataError(f"chat_share: should lie between 0 and 1, is {self.chat_share:g}")


def instruct_source(
    config: InstructConfig,
    training: TrainConfig,
    tasks: Mapping[str, Task],
    *,
    valid: Sequence[Path] = (),
    instructions: Sequence[Instruction] = (),
) -> StageSource:
    """Make the source of the stage; files are read anew, line by line, in every epoch.

    With ``max_steps`` the conversations are a stream that is never held in memory.

    Args:
        valid: conversations held out, in the usual forms.
        instructions: those of the library by default.
    """
    known = tuple(instructions) or library_instructions()
    names = {example.request.task for _, example in _read_all(config.examples)}
    return _conversation_source(
        lambda epoch: mix_conversations(config, tasks, epoch=epoch, instructions=known),
        tasks=[find_task(name, tasks) for name in sorted(names)],
        valid=lambda: read_conversations(valid),
        is_stream=training.max_steps is not None,
        too_long=config.too_long,
        fingerprint={
            **fingerprint_files([*config.examples, *config.chat, *valid]),
            "instruct": {
                "chat_share": config.chat_share if config.chat and config.examples else None,
                "questions": asdict(config.questions),
                "too_long": config.too_long,
                "seed": config.seed,
                "wording": _fingerprint_wording(known),
            },
        },
    )


def record_source(
    records: Sequence[TrainingExample],
    training: TrainConfig,
    tasks: Mapping[str, Task],
    *,
    fingerprint: Mapping[str, Any],
) -> StageSource:
    """Make the source of a stage that asks the library's questions about records alone.

    Conversations that do not fit the model are cut behind an answer.

    Args:
        fingerprint: says which records these are.
    """
    instructions, questions = library_instructions(), QuestionConfig()
    named = [(f"record {number}", record) for number, record in enumerate(records, start=1)]

    def ask(epoch: int) -> Iterator[Conversation]:
        return ask_about_all(
            named,
            tasks,
            questions,
            seed=[training.seed, epoch],
            instructions=instructions,
        )

    return _conversation_source(
        ask,
        tasks=[find_task(name, tasks) for name in sorted({one.request.task for one in records})],
        is_stream=training.max_steps is not None,
        too_long="cut",
        fingerprint={**fingerprint, "wording": _fingerprint_wording(instructions)},
    )


def _fingerprint_wording(instructions: Sequence[Instruction]) -> str:
    wording = "".join(one.model_dump_json() for one in instructions)
    return hashlib.sha256(wording.encode()).hexdigest()


def _conversation_source(
    conversations: Callable[[int], Iterator[Conversation]],
    *,
    tasks: Sequence[Task],
    valid: Callable[[], Iterable[Conversation]] = tuple,
    is_stream: bool,
    too_long: TooLong,
    fingerprint: Mapping[str, Any],
) -> StageSource:
    def open_with(renderer: Renderer) -> TrainingData:
        def tokenize(read: Iterable[Conversation]) -> Iterator[TokenSequence]:
            return tokenize_conversations(read, renderer, too_long=too_long)

        return TrainingData(
            units=lambda epoch: tokenize(conversations(epoch)),
            objective=TokenObjective(),
            valid=lambda: tokenize(valid()),
            is_stream=is_stream,
        )

    def texts(renderer: Renderer) -> Iterator[str]:
        for conversation in islice(conversations(0), _NUM_TOKENIZER_TEXTS):
            for turn in conversation.turns:
                yield f" {turn.content}" if turn.role == "assistant" else f"{turn.content}\nAnswer:"

    return StageSource(open=open_with, texts=texts, tasks=tasks, fingerprint=fingerprint)


def mix_conversations(
    config: InstructConfig,
    tasks: Mapping[str, Task],
    *,
    epoch: int,
    instructions: Sequence[Instruction],
) -> Iterator[Conversation]:
    """Give the conversations of an epoch: of every record one, with chat data between them.

    The share of chat data holds at every place, to one conversation. An epoch takes as many of the
    chat files as that needs, from a place on that its seed draws; they begin anew when they end.
    Without records an epoch is the chat files.

    Raises:
        DataError: names the file, the line and the field; or no record holds facts to ask about.
    """
    if not config.examples:
        yield from read_conversations(config.chat)
        return
    chat = _chat_from(config.chat, seed=[config.seed, epoch]) if config.chat else iter(())
    per_record = config.chat_share / (1 - config.chat_share) if config.chat else 0.0
    num_chat = 0
    asked = ask_about_all(
        _read_all(config.examples),
        tasks,
        config.questions,
        seed=[config.seed, epoch],
        instructions=instructions,
    )
    for num_asked, conversation in enumerate(asked, start=1):
        yield conversation
        for answer in islice(chat, int(num_asked * per_record) - num_chat):
            yield answer
            num_chat += 1


def ask_about_all(
    records: Iterable[tuple[str, TrainingExample]],
    tasks: Mapping[str, Task],
    questions: QuestionConfig,
    *,
    seed: Sequence[int],
    instructions: Sequence[Instruction],
) -> Iterator[Conversation]:
    """Ask about every record that holds facts.

    Args:
        records: each with what it is called.
        seed: of what is asked and in which words.

    Raises:
        DataError: names the record; or none holds facts.
    """
    is_empty = True
    for number, (source, example) in enumerate(records):
        try:
            conversation = ask_about(
                example,
                find_task(example.request.task, tasks),
                # Of its own for each record: what stands before it in the file changes nothing.
                np.random.default_rng([*seed, number]),
                instructions=instructions,
                config=questions,
                source=source,
            )
        except RankOnceError as error:
            raise DataError(f"{source}: {error}") from error
        if conversation is not None:
            is_empty = False
            yield conversation
    if is_empty:
        raise DataError("examples: hold no facts that an instruction could ask about")


def _read_all(paths: Iterable[Path]) -> Iterator[tuple[str, TrainingExample]]:
    for path in paths:
        for number, example in enumerate(stream_examples(path), start=1):
            yield f"{path}: example {number}", example


def _chat_from(paths: Sequence[Path], *, seed: Sequence[int]) -> Iterator[Conversation]:
    """Read chat files without end, from a place on that the seed draws."""
    count = count_conversations(paths)
    if not count:
        raise DataError(f"{', '.join(map(str, paths))}: should hold at least one conversation")
    yield from read_conversations(paths, skip=int(np.random.default_rng(seed).integers(count)))
    while True:
        yield from read_conversations(paths)
