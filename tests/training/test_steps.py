"""Order and cuts: every unit comes once, in an order that a seed decides."""

from dataclasses import dataclass, replace
from typing import Any

import pytest

from rankonce.errors import DataError, TrainingError
from rankonce.records import TrainingExample
from rankonce.training.data import mix_tasks
from rankonce.training.loop import Position, TrainConfig, TrainingData, _plan_steps
from rankonce.training.objectives import TokenObjective
from rankonce.training.optimization import layer_dropout, rate_factor
from rankonce.training.steps import shuffle_stream
from tests.conftest import build_request


@dataclass(frozen=True)
class Number:
    value: int
    num_tokens: int = 5
    num_targets: int = 2


def numbers(count: int) -> list[Number]:
    return [Number(value) for value in range(count)]


@pytest.mark.parametrize("buffer_size", [1, 63, 1000])
def test_a_shuffled_stream_gives_everything_once(buffer_size: int) -> None:
    stream = list(shuffle_stream(iter(numbers(500)), buffer_size=buffer_size, seed=3))
    assert sorted(one.value for one in stream) == list(range(500))
    assert stream == list(shuffle_stream(iter(numbers(500)), buffer_size=buffer_size, seed=3))
    if buffer_size > 1:
        assert stream != numbers(500)
        assert stream != list(shuffle_stream(iter(numbers(500)), buffer_size=buffer_size, seed=4))


@pytest.mark.parametrize("is_stream", [False, True])
def test_steps_go_on_from_a_position(is_stream: bool) -> None:
    data = TrainingData(
        units=lambda epoch: numbers(21 + 2 * epoch), objective=TokenObjective(), is_stream=is_stream
    )
    config = TrainConfig(max_steps=17, targets_per_step=6, buffer_size=8)
    position = Position()
    steps, states = [], []
    for units, progress in _plan_steps(data, config, position):
        steps.append(([one.value for one in units], progress))
        states.append(position.state_dict())
    assert len(steps) == 17
    assert steps[-1][1] == 1.0
    for done in (1, 6, 7, 13, 16):
        later = Position()
        later.load_state_dict(states[done - 1])
        rest = [([u.value for u in units], p) for units, p in _plan_steps(data, config, later)]
        assert rest == steps[done:]


def test_epochs_end_a_run_without_a_number_of_steps() -> None:
    data = TrainingData(units=lambda epoch: numbers(10), objective=TokenObjective())
    config = TrainConfig(epochs=2, targets_per_step=6)
    steps = list(_plan_steps(data, config, Position()))
    assert [len(units) for units, _ in steps] == [3, 3, 3, 1] * 2
    assert [progress for _, progress in steps] == pytest.approx([i / 8 for i in range(1, 9)])


def test_no_data_are_an_error() -> None:
    data = TrainingData(units=lambda epoch: [], objective=TokenObjective())
    with pytest.raises(TrainingError, match="at least one example or text"):
        list(_plan_steps(data, TrainConfig(max_steps=3), Position()))


def build_mixture() -> list[TrainingExample]:
    request = build_request(1)
    return [
        TrainingExample(request=replace(request, task=task, id=f"{task} {i}"), labels=(None,))
        for task, count in (("large", 90), ("small", 9), ("one", 1))
        for i in range(count)
    ]


def counts_of(examples: list[TrainingExample]) -> dict[str, int]:
    names = [example.request.task for example in examples]
    return {name: names.count(name) for name in ("large", "small", "one")}


def test_temperature_evens_out_tasks() -> None:
    rows = build_mixture()
    assert counts_of(mix_tasks(rows, temperature=1, seed=0)) == {"large": 90, "small": 9, "one": 1}
    warm = counts_of(mix_tasks(rows, temperature=2, seed=0))
    # sqrt(90), 3 and 1 parts of a hundred, rounded down.
    assert warm == {"large": 70, "small": 22, "one": 7}
    hot = mix_tasks(rows, temperature=1e9, seed=0)
    assert set(counts_of(hot).values()) == {33}
    # Nothing comes a second time before everything of its task has come.
    small: list[Any] = [e.request.id for e in hot if e.request.task == "small"]
    assert len(set(small[:9])) == len(set(small[9:18])) == 9


def test_a_temperature_below_one_is_refused() -> None:
    with pytest.raises(DataError, match="temperature"):
        mix_tasks(build_mixture(), temperature=0.5, seed=0)


def test_a_stable_rate_decays_in_the_last_fifth() -> None:
    def factor(progress: float) -> float:
        return rate_factor(
            progress, schedule="warmup-stable-decay", warmup_share=0.1, final_share=0.1
        )

    assert factor(0.05) == pytest.approx(0.5)
    assert factor(0.1) == factor(0.5) == factor(0.8) == 1.0
    assert factor(0.85) == pytest.approx(0.1 + 0.9 * 0.5)
    assert factor(1.0) == pytest.approx(0.1)


def test_dropout_goes_from_the_lowest_layer_to_the_highest() -> None:
    assert layer_dropout(3, last=0.1, first=0.3) == pytest.approx([0.3, 0.2, 0.1])
    assert layer_dropout(4, last=0.0, first=0.2)[-1] == 0.0
    assert layer_dropout(1, last=0.1, first=0.3) == [0.3]
    assert layer_dropout(3, last=0.1, first=None) == [0.1] * 3
