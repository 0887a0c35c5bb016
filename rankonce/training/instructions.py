"""The instruct stage: questions about records, mixed with plain chat data."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

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

    def conversations(epoch: int) -> Iterator[Conversation]:
        return mix_conversations(config, tasks, epoch=epoch, instructions=known)

    def open_with(renderer: Renderer) -> TrainingData:
        def tokenize(read: Iterable[Conversation]) -> Iterator[TokenSequence]:
            return tokenize_conversations(read, renderer, too_long=config.too_long)

        return TrainingData(
            units=lambda epoch: tokenize(conversations(epoch)),
            objective=TokenObjective(),
            valid=lambda: tokenize(read_conversations(valid)),
            is_stream=training.max_steps is not None,
        )

    def texts(renderer: Renderer) -> Iterator[str]:
        for conversation in islice(conversations(0), _NUM_TOKENIZER_TEXTS):
            for turn in conversation.turns:
                yield f" {turn.content}" if turn.role == "assistant" else f"{turn.content}\nAnswer:"

    names = sorted({example.request.task for _, example in _read_all(config.examples)})
    wording = "".join(one.model_dump_json() for one in known).encode()
    settings = {
        "chat_share": config.chat_share if config.chat and config.examples else None,
        "questions": asdict(config.questions),
        "too_long": config.too_long,
        "seed": config.seed,
        "wording": hashlib.sha256(wording).hexdigest(),
    }
    return StageSource(
        open=open_with,
        texts=texts,
        tasks=[find_task(name, tasks) for name in names],
        fingerprint={
            **fingerprint_files([*config.examples, *config.chat, *valid]),
            "instruct": settings,
        },
    )


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
    asked = ask_about_all(config, tasks, epoch=epoch, instructions=instructions)
    for num_asked, conversation in enumerate(asked, start=1):
        yield conversation
        for answer in islice(chat, int(num_asked * per_record) - num_chat):
            yield answer
            num_chat += 1


def ask_about_all(
    config: InstructConfig,
    tasks: Mapping[str, Task],
    *,
    epoch: int,
    instructions: Sequence[Instruction],
) -> Iterator[Conversation]:
    """Ask about every record that holds facts.

    Raises:
        DataError: names the file and the record; or no record holds facts.
    """
    is_empty = True
    for number, (source, example) in enumerate(_read_all(config.examples)):
        try:
            conversation = ask_about(
                example,
                find_task(example.request.task, tasks),
                # Of its own for each record: what stands before it in the file changes nothing.
                np.random.default_rng([config.seed, epoch, number]),
                instructions=instructions,
                config=config.questions,
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
