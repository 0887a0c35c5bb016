"""Questions about records are mixed with chat data by share, and a killed run goes on the same."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rankonce.errors import DataError, TrainingError
from rankonce.prompts.conversations import Conversation
from rankonce.prompts.encoding import TextEncoder
from rankonce.prompts.instructions import QuestionConfig, library_instructions
from rankonce.prompts.rendering import Renderer
from rankonce.prompts.tasks import library_tasks
from rankonce.training import loop
from rankonce.training.instructions import InstructConfig, instruct_source, mix_conversations
from rankonce.training.loop import TrainConfig
from rankonce.training.runs import run_stages
from rankonce.training.stages import Stage, StageSource, Tasks
from tests.cli.conftest import write_lines
from tests.conftest import build_request, build_tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write labelled requests and chat data."""
    folder = tmp_path_factory.mktemp("instruct")
    examples = []
    for seed in range(14):
        request = json.loads(json.dumps(asdict(build_request(4, seed=seed))))
        examples.append({**request, "labels": ["Yes", "No", "No", None]})
    chat = [{"instruction": f"Say {n}.", "output": f"Number {n}."} for n in range(5)]
    return write_lines(folder / "examples.jsonl", examples), write_lines(
        folder / "chat.jsonl", chat
    )


def mixed(config: InstructConfig, epoch: int = 0) -> list[Conversation]:
    return list(
        mix_conversations(config, library_tasks(), epoch=epoch, instructions=library_instructions())
    )


@pytest.mark.parametrize("share", [0.2, 0.5, 0.7])
def test_the_share_of_chat_data_holds_at_every_place(
    files: tuple[Path, Path], share: float
) -> None:
    config = InstructConfig(examples=files[:1], chat=files[1:], chat_share=share)
    is_chat = ["chat.jsonl" in one.source for one in mixed(config)]
    assert is_chat.count(False) == 14
    for count in range(1, len(is_chat) + 1):
        if not is_chat[count - 1]:
            continue
        num_chat = sum(is_chat[:count])
        assert num_chat / (count - num_chat) <= share / (1 - share) + 1e-9
    assert abs(sum(is_chat) - 14 * share / (1 - share)) <= 1


def test_every_epoch_asks_anew_and_the_same_seed_asks_the_same(files: tuple[Path, Path]) -> None:
    config = InstructConfig(examples=files[:1], chat=files[1:], chat_share=0.2, seed=3)
    epochs = [mixed(config, epoch) for epoch in range(6)]
    assert epochs == [mixed(config, epoch) for epoch in range(6)]
    assert len({str(epoch) for epoch in epochs}) == 6
    heard = {one.source for epoch in epochs for one in epoch if "chat.jsonl" in one.source}
    # Each epoch takes 3 of the 5 conversations, from another place on.
    assert len(heard) == 5


def test_chat_data_alone_come_once_an_epoch(files: tuple[Path, Path]) -> None:
    assert [one.turns[1].content for one in mixed(InstructConfig(chat=files[1:]))] == [
        f"Number {n}." for n in range(5)
    ]


def test_a_stream_needs_steps_and_is_not_held_in_memory(files: tuple[Path, Path]) -> None:
    config = InstructConfig(examples=files[:1])
    renderer = Renderer(TextEncoder(build_tokenizer()), max_prompt_tokens=4096)
    for max_steps in (None, 7):
        training = TrainConfig(max_steps=max_steps)
        data = instruct_source(config, training, library_tasks()).open(renderer)
        assert data.is_stream == (max_steps is not None)
        units: Any = data.units(0)
        assert iter(units) is units
        assert next(units).num_targets > 0


def test_records_without_facts_are_an_error_and_not_an_empty_run(tmp_path: Path) -> None:
    line = {"task": "movie-like", "candidates": [{"fields": {"title": "Up"}}], "labels": ["Yes"]}
    config = InstructConfig(examples=(write_lines(tmp_path / "bare.jsonl", [line]),))
    with pytest.raises(DataError, match="hold no facts"):
        mixed(config)


def run(config: InstructConfig, out: Path, training: TrainConfig) -> Path:
    def load(_: Path, training: TrainConfig, tasks: Tasks) -> StageSource:
        return instruct_source(config, training, tasks, valid=config.chat)

    stage = Stage(name="instruct", load=load, config=training)
    run_stages([stage], out, out, name="test", size="1m", seed=0)
    return out


def losses(out: Path, name: str = "loss") -> list[float]:
    lines = (out / "stages" / "1-instruct" / "metrics.jsonl").read_text().splitlines()
    return [step[name] for step in map(json.loads, lines) if name in step]


@pytest.mark.parametrize("max_steps", [None, 5])
def test_a_run_learns_and_resumes_with_the_same_bits(
    files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    max_steps: int | None,
) -> None:
    config = InstructConfig(
        examples=files[:1],
        chat=files[1:],
        questions=QuestionConfig(max_events=2, max_candidates=2, max_questions=2),
    )
    training = TrainConfig(
        epochs=2,
        max_steps=max_steps,
        buffer_size=5,
        targets_per_step=250,
        learning_rate=3e-3,
        steps_per_checkpoint=2,
    )
    straight = run(config, tmp_path / "straight", training)
    assert losses(straight)[-1] < losses(straight)[0] - 0.3
    assert len(losses(straight, "valid_loss")) >= 1

    optimize, calls = loop._optimize, []

    def stop_after_three(*arguments: Any) -> tuple[float, float]:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return optimize(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_optimize", stop_after_three)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "stopped", training)
    stopped = run(config, tmp_path / "stopped", training)
    expected = load_file(straight / "model.safetensors")
    actual = load_file(stopped / "model.safetensors")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert losses(stopped) == losses(straight)
    with pytest.raises(TrainingError, match="another data"):
        run(replace(config, chat_share=0.5), stopped, training)
