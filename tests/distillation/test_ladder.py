"""Ladders: rung by rung, resumed at any, and a table at the end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rankonce.distillation import ladder as ladders
from rankonce.distillation.ladder import count_parameters, read_ladder, run_ladder
from rankonce.errors import ModelError, TrainingError
from rankonce.model.sizes import build_model

_LADDER = """
data: [examples.jsonl]
valid: [examples.jsonl]
store: scores.sqlite
train: {epochs: 1, targets_per_step: 24, learning_rate: 3.0e-3, steps_per_checkpoint: 2}
rungs:
  - {name: large, size: 0.4m, train: {epochs: 2}}
  - {name: middle, size: 0.16m, teacher: previous}
  - {name: small, size: 0.07m, teacher: first, target: two-logits, losses: {reverse-kl: 0.5}}
"""


def write_ladder(folder: Path, place: Path, text: str = _LADDER) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    (place / "examples.jsonl").write_text((folder / "examples.jsonl").read_text())
    (place / "ladder.yaml").write_text(text)
    return place / "ladder.yaml"


@pytest.fixture(scope="module")
def climbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ladder")
    run_ladder(read_ladder(write_ladder(folder, place)), place / "out")
    return place


def test_a_ladder_ends_in_a_table_of_size_and_quality(climbed: Path) -> None:
    rows = json.loads((climbed / "out" / "ladder.json").read_text())["rungs"]
    assert [(row["name"], row["teacher"]) for row in rows] == [
        ("large", None), ("middle", "previous"), ("small", "first"),
    ]  # fmt: skip
    for row, size in zip(rows, ("0.4m", "0.16m", "0.07m"), strict=True):
        network = build_model(size, seed=0)
        assert row["parameters"] == sum(p.numel() for p in network.parameters())
        assert row["metrics"]["movie-like"]["labels"] == 144
        assert row["steps"] > 0


def test_every_rung_has_the_teacher_that_it_names(climbed: Path) -> None:
    from rankonce.distillation.teachers import LocalTeacher

    rungs = climbed / "out" / "rungs"
    large = LocalTeacher(rungs / "1-large").fingerprint
    for name in ("2-middle", "3-small"):
        record = json.loads((rungs / name / "run.json").read_text())
        assert record["data"]["teacher"] == large


def test_previous_is_the_rung_before_and_first_is_not(climbed: Path, tmp_path: Path) -> None:
    from rankonce.distillation.teachers import LocalTeacher

    place = tmp_path / "longer"
    shutil.copytree(climbed, place)
    more = "  - {name: last, size: 0.07m, teacher: previous}\n"
    (place / "ladder.yaml").write_text(_LADDER.rstrip() + "\n" + more)
    run_ladder(read_ladder(place / "ladder.yaml"), place / "out")
    rungs = place / "out" / "rungs"
    record = json.loads((rungs / "4-last" / "run.json").read_text())
    assert record["data"]["teacher"] == LocalTeacher(rungs / "3-small").fingerprint
    assert record["data"]["teacher"] != LocalTeacher(rungs / "1-large").fingerprint


def test_finished_rungs_are_not_run_again(climbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads((climbed / "out" / "ladder.json").read_text())["rungs"]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a rung was run again")

    monkeypatch.setattr(ladders, "run_stages", refuse)
    assert run_ladder(read_ladder(climbed / "ladder.yaml"), climbed / "out") == before


def test_a_rung_that_is_described_otherwise_is_refused(folder: Path, climbed: Path) -> None:
    path = climbed / "other.yaml"
    path.write_text(_LADDER.replace("0.16m", "0.4m"))
    fault = "2-middle holds a rung that was described otherwise: size; choose a new folder"
    with pytest.raises(TrainingError, match=fault):
        run_ladder(read_ladder(path), climbed / "out")


def test_settings_change_what_the_file_says(folder: Path, tmp_path: Path) -> None:
    path = write_ladder(folder, tmp_path)
    changed = read_ladder(
        path,
        [
            *("seed=3", "train.learning_rate=1e-3", "data=[other.jsonl, /more.jsonl]"),
            *("rungs.small.size=0.16m", "rungs.small.train.epochs=5"),
        ],
    )
    assert changed.seed == 3
    assert changed.train["learning_rate"] == 1e-3
    assert changed.data == (tmp_path / "other.jsonl", Path("/more.jsonl"))
    plain = read_ladder(path)
    assert changed.rungs[:2] == plain.rungs[:2]
    assert changed.rungs[2] == replace(plain.rungs[2], size="0.16m", train={"epochs": 5})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["seed"], "set: should be KEY=VALUE, is 'seed'"),
        (["seed=1", "seed=2"], "set: should name seed once"),
        (["rungs.tiny.size=1m"], "'tiny' should be one of large, middle, small"),
        (["rungs.small=1m"], "set: rungs.small: should name a field"),
        (["store.place=x"], "should"),
        (["data=[x"], "with a value in YAML"),
        (["colour=red"], "colour: unknown field"),
        (["rungs.small.size=7b"], "size: should be one of"),
    ],
)
def test_settings_that_do_not_fit_are_named(
    folder: Path, tmp_path: Path, settings: list[str], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        read_ladder(write_ladder(folder, tmp_path), settings)


def test_a_rung_that_never_began_may_be_mended(
    climbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "mended"
    shutil.copytree(climbed, place)
    shutil.rmtree(place / "out" / "rungs" / "3-small")
    whole = ladders.run_stages

    def fail(*_: object, **__: object) -> None:
        raise TrainingError("keep: too little")

    monkeypatch.setattr(ladders, "run_stages", fail)
    with pytest.raises(TrainingError, match="too little"):
        run_ladder(read_ladder(place / "ladder.yaml"), place / "out")
    monkeypatch.setattr(ladders, "run_stages", whole)
    (place / "ladder.yaml").write_text(_LADDER.replace("two-logits", "soft"))
    assert len(run_ladder(read_ladder(place / "ladder.yaml"), place / "out")) == 3


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("size: 0.07m", "size: 9z", r"rungs\[2\].size: should be one of 0.07m, .*, is '9z'"),
        ("valid:", "recipe: ml1m\nvalid:", "recipe: brings its own data"),
    ],
)
def test_what_would_fail_after_hours_is_refused_when_read(
    folder: Path, tmp_path: Path, old: str, new: str, fault: str
) -> None:
    path = write_ladder(folder, tmp_path, _LADDER.replace(old, new))
    with pytest.raises(TrainingError, match=fault):
        read_ladder(path)


def test_a_rung_of_other_data_is_refused(climbed: Path, tmp_path: Path) -> None:
    place = tmp_path / "copy"
    shutil.copytree(climbed, place)
    # Where the files lie does not count, what they hold does.
    run_ladder(read_ladder(place / "ladder.yaml"), place / "out")
    lines = (place / "examples.jsonl").read_text().splitlines()
    (place / "examples.jsonl").write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(TrainingError, match="1-large holds a rung that was described otherwise"):
        run_ladder(read_ladder(place / "ladder.yaml"), place / "out")


def test_a_start_that_is_not_there_is_refused_before_anything_runs(
    folder: Path, tmp_path: Path
) -> None:
    path = write_ladder(folder, tmp_path, _LADDER.replace("size: 0.16m", "init: ./none"))
    with pytest.raises(ModelError, match="rungs: middle: init: there is no folder"):
        run_ladder(read_ladder(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_killed_ladder_goes_on_with_the_same_bits(
    folder: Path, climbed: Path, tmp_path: Path
) -> None:
    path = write_ladder(folder, tmp_path)
    code = (
        "import sys; from pathlib import Path;"
        "from rankonce.distillation.ladder import read_ladder, run_ladder;"
        "run_ladder(read_ladder(Path(sys.argv[1])), Path(sys.argv[2]))"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path), str(tmp_path / "out")],
        cwd=root,
        env={
            **os.environ,
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "PYTHONPATH": str(root),
        },
        stderr=subprocess.DEVNULL,
    )
    stage = tmp_path / "out" / "rungs" / "2-middle" / "stages" / "1-distill"
    deadline = time.monotonic() + 120
    while not (stage / "checkpoints" / "2").is_dir() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = tmp_path / "out" / "rungs" / "1-large" / "run.json"
    written = first.stat().st_mtime_ns
    run_ladder(read_ladder(path), tmp_path / "out")
    assert first.stat().st_mtime_ns == written
    for name in ("2-middle", "3-small"):
        expected = load_file(climbed / "out" / "rungs" / name / "model.safetensors")
        actual = load_file(tmp_path / "out" / "rungs" / name / "model.safetensors")
        assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_a_ladder_may_begin_with_a_teacher_and_be_toml(folder: Path, tmp_path: Path) -> None:
    write_ladder(folder, tmp_path)
    path = tmp_path / "ladder.toml"
    path.write_text(
        f'data = ["examples.jsonl"]\nstore = "scores.sqlite"\nteacher = "{folder / "teacher"}"\n'
        '[[rungs]]\nname = "small"\nsize = "0.07m"\nteacher = "first"\n'
        "train = {max_steps = 2, targets_per_step = 24}\n"
    )
    rows = run_ladder(read_ladder(path), tmp_path / "out")
    assert [row["name"] for row in rows] == ["teacher", "small"]
    assert rows[0]["parameters"] == count_parameters(folder / "teacher") > rows[1]["parameters"]
    assert rows[1]["steps"] == 2


def test_a_rung_goes_down_in_pruned_steps(folder: Path, climbed: Path, tmp_path: Path) -> None:
    text = _LADDER[: _LADDER.index("rungs:")] + (
        f"teacher: {climbed / 'out' / 'rungs' / '1-large'}\n"
        "rungs:\n"
        "  - {name: half, init: pruned, prune: {keep: 0.5}, steps: 2, teacher: first,"
        " train: {max_steps: 2}}\n"
        "  - {name: once, init: pruned, prune: {keep: 0.5}, pruned_from: first, teacher: previous,"
        " train: {max_steps: 2}}\n"
    )
    path = write_ladder(folder, tmp_path, text)
    rows = run_ladder(read_ladder(path), tmp_path / "out")
    assert [row["name"] for row in rows] == ["1-large", "half-1", "half-2", "once"]
    # The first model is measured as it was when it was a rung itself.
    (large, *_) = json.loads((climbed / "out" / "ladder.json").read_text())["rungs"]
    assert rows[0]["metrics"] == large["metrics"]
    counts = [row["parameters"] for row in rows]
    # Both ways end in one shape, and each step keeps about the same share.
    assert counts[2] == counts[3] <= 0.5 * counts[0]
    assert 0.65 * counts[0] < counts[1] < 0.75 * counts[0]
    rungs = tmp_path / "out" / "rungs"
    record = json.loads((rungs / "2-half-2" / "pruned" / "pruning.json").read_text())
    assert record["before"]["parameters"] == counts[1]
    start = load_file(rungs / "2-half-2" / "pruned" / "model.safetensors")
    end = load_file(rungs / "2-half-2" / "model.safetensors")
    assert {name: weight.shape for name, weight in end.items()} == {
        name: weight.shape for name, weight in start.items()
    }
    assert any(not torch.equal(end[name], start[name]) for name in start)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rungs:", "steps:", "steps: unknown field"),
        ("size: 0.4m,", "", r"rungs\[0\].size: belongs to init scratch"),
        ("teacher: previous}", "teacher: previous, init: pruned}", "size: belongs to init scratch"),
        ("size: 0.16m,", "init: pruned,", r"rungs\[1\].prune: belongs to init pruned"),
        ("size: 0.4m,", "size: 0.4m, teacher: first,", "there is none before it"),
        ("size: 0.16m,", "size: 0.16m, steps: 2,", r"rungs\[1\].steps: should be 1 or more"),
        ("size: 0.16m,", "size: 0.16m, step: 2,", r"rungs\[1\].step: belongs to the ladder"),
        ("name: middle", "name: large", "each name once"),
        ("size: 0.16m,", "init: pruned, prune: {keep: 2},", r"rungs\[1\]: keep: should be above 0"),
        ("size: 0.16m,", "init: pruned, prune: {kep: 1},", r"rungs\[1\]: .*kep"),
        ("two-logits", "three-logits", r"rungs\[2\]: target: should be one of"),
        ("epochs: 2}", "epoch: 2}", r"rungs\[0\]: .*epoch"),
        ("teacher: previous}", "target: soft}", "target 'soft' needs one"),
    ],
)
def test_a_fault_in_a_ladder_is_named(
    folder: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in _LADDER
    path = write_ladder(folder, tmp_path, _LADDER.replace(old, new))
    with pytest.raises(TrainingError, match=message):
        read_ladder(path)
