"""A ladder: rung after rung a smaller ranker, each taught by the first one or the one before.

OUT/ladder.json          the table: parameters and held-out metrics of every rung
OUT/rungs/1-large/       a rung's run folder, as of ``run_stages``; rung.json says of what
OUT/rungs/2-small/pruned/    the pruned start of a rung that has one
"""

import json
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from safetensors import safe_open

from rankonce.distillation.objective import DistillConfig
from rankonce.distillation.pruning import PruneConfig, prune_checkpoint, step_of
from rankonce.distillation.stages import Distillation
from rankonce.distillation.store import ScoreStore
from rankonce.distillation.teachers import find_teacher
from rankonce.environment import describe_environment
from rankonce.errors import ModelError, TrainingError
from rankonce.evaluation.held_out import measure_held_out
from rankonce.model.sizes import SIZES
from rankonce.model.sources import names_folder
from rankonce.prompts.tasks import Task, library_tasks, load_task
from rankonce.records import TrainingExample, describe_faults
from rankonce.training.checkpoint import is_finished
from rankonce.training.loop import TrainConfig
from rankonce.training.recipes import RECIPES, find_recipe
from rankonce.training.runs import run_stages
from rankonce.training.stages import (
    Stage,
    StageSource,
    Tasks,
    finetune_source,
    fingerprint_files,
    first_examples,
)

_STRICT = ConfigDict(extra="forbid")
Place = Literal["first", "previous"]


@with_config(_STRICT)
@dataclass(frozen=True, kw_only=True)
class Rung:
    """One step down.

    Attributes:
        name: once in a ladder.
        teacher: the first model of the ladder, the one before, a checkpoint or a URL; ``None``
            learns labels alone.
        init: ``scratch``, ``pruned``, or a checkpoint to start from.
        size: what is built from scratch.
        prune: fields of the pruning configuration.
        pruned_from: the model that is pruned.
        steps: go to ``prune.keep`` in so many rungs, each pruned from the one before and trained
            with the budget of ``train``: NAME-1, NAME-2 …
        step: which of them a rung is; the ladder says so, the file does not.
        target, losses, temperature, teacher_share, skew: see ``DistillConfig``; without a teacher
            the target is ``hard``.
        train: the budget, as settings of ``TrainConfig``, over those of the ladder.
    """

    name: str
    teacher: str | None = None
    init: str = "scratch"
    size: str | None = None
    prune: Mapping[str, Any] = field(default_factory=dict)
    pruned_from: Place = "previous"
    steps: int = 1
    step: int = 1
    target: str | None = None
    losses: Mapping[str, float] = field(default_factory=lambda: {"forward-kl": 1.0})
    temperature: float = 1.0
    teacher_share: float = 0.5
    skew: float = 0.1
    train: Mapping[str, Any] = field(default_factory=dict)

    @property
    def distill_config(self) -> DistillConfig:
        """What it learns, and how."""
        return DistillConfig(
            losses=self.losses,
            target=self.target or ("hard" if self.teacher is None else "soft"),
            temperature=self.temperature,
            teacher_share=self.teacher_share,
            skew=self.skew,
        )


@with_config(_STRICT)
@dataclass(frozen=True, kw_only=True)
class Ladder:
    """A ladder as its file says it; paths are from the file's folder.

    Attributes:
        data: labelled requests, or the folder of a recipe.
        recipe: whose last stage gives data and settings.
        unlabelled: requests for teachers to label.
        valid: labelled requests, held out; every rung is measured on them.
        store: of teachers' scores.
        teacher: the first model, a checkpoint; without one the first rung is.
        task_files: tasks beside those of the library.
        train: settings of every rung.
    """

    data: tuple[Path, ...]
    rungs: tuple[Rung, ...]
    store: Path
    recipe: str | None = None
    unlabelled: tuple[Path, ...] = ()
    valid: tuple[Path, ...] = ()
    teacher: str | None = None
    task_files: tuple[Path, ...] = ()
    seed: int = 0
    train: Mapping[str, Any] = field(default_factory=dict)


_LADDER = TypeAdapter(Ladder)
# Teachers that are models of the ladder.
_PLACES = {"first": 0, "previous": -1}


def read_ladder(path: Path, settings: Sequence[str] = ()) -> Ladder:
    """Read a ladder from YAML, or TOML by its suffix.

    Args:
        settings: changes of what the file says, each ``KEY=VALUE`` with the value in YAML; a key
            goes down by dots, to a rung by its name: ``rungs.small.train.epochs=2``.

    Raises:
        TrainingError: names the field that is wrong, missing or unknown.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
        _change(data, settings)
        ladder = _LADDER.validate_python(data)
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path}: cannot be read: {error}") from error
    except (yaml.YAMLError, tomllib.TOMLDecodeError) as error:
        raise TrainingError(f"{path}: is neither YAML nor TOML: {error}") from error
    except ValidationError as error:
        raise TrainingError(f"{path}: {describe_faults(error.errors())}") from error
    _check(ladder, path)
    return _in_steps(_from_folder(ladder, path.parent))


def _change(data: Any, settings: Sequence[str]) -> None:
    done: set[str] = set()
    for setting in settings:
        key, is_given, text = setting.partition("=")
        if not is_given:
            raise TrainingError(f"set: should be KEY=VALUE, is {setting!r}")
        if key in done:
            raise TrainingError(f"set: should name {key} once")
        done.add(key)
        *parents, last = key.split(".")
        place = data
        for part in parents:
            place = _inside(place, part, key)
        if not isinstance(place, dict):
            raise TrainingError(f"set: {key}: should name a field, like rungs.small.size")
        place[last] = _read_value(text)


def _inside(place: Any, name: str, key: str) -> Any:
    if isinstance(place, dict):
        return place.setdefault(name, {})
    named = {one["name"]: one for one in place if "name" in one} if isinstance(place, list) else {}
    if name not in named:
        there = f"one of {', '.join(named)}" if named else "left out"
        raise TrainingError(f"set: {key}: {name!r} should be {there}")
    return named[name]


def _read_value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise TrainingError(f"set: should be KEY=VALUE with a value in YAML: {error}") from error


def run_ladder(ladder: Ladder, out: Path) -> list[dict[str, Any]]:
    """Run the rungs that are not finished, and measure all.

    Returns:
        The table, one row a model: name, parameters, metrics by task, steps, minutes, teacher.

    Raises:
        RankOnceError: a rung cannot be run; those before it are kept.
        ModelError: a teacher is not there.
        TrainingError: a rung that has begun is described otherwise now.
    """
    tasks = [load_task(path) for path in ladder.task_files]
    _check_checkpoints(ladder, out)
    evaluate = partial(measure_held_out, tasks=tasks)
    models: list[str] = [] if ladder.teacher is None else [ladder.teacher]
    with ScoreStore(ladder.store) as store:
        for number, rung in enumerate(ladder.rungs, start=1):
            folder = _folder(out, number, rung)
            _note(folder, ladder, rung)
            if not is_finished(folder):
                source = _teacher_of(rung, models)
                teacher = source and find_teacher(source, tasks=tasks)
                stage = _stage(ladder, rung)
                run_stages(
                    [
                        Distillation(
                            config=rung.distill_config, teacher=teacher or None, store=store
                        ).wrap(stage)
                    ],
                    ladder.data[0],
                    folder,
                    name=f"rung {rung.name}",
                    size=rung.size or "3m",
                    seed=ladder.seed,
                    model=_start(ladder, rung, folder, models, tasks, stage),
                    tasks=tasks,
                    evaluate=evaluate,
                )
            models.append(str(folder))
    climbed = models[-len(ladder.rungs) :]
    rows = [_row(rung, Path(model)) for rung, model in zip(ladder.rungs, climbed, strict=True)]
    if ladder.teacher is not None:
        rows.insert(0, _teacher_row(ladder, Path(ladder.teacher), tasks))
    record = {"rungs": rows, "environment": describe_environment()}
    (out / "ladder.json").write_text(json.dumps(record, indent=2) + "\n")
    return rows


def held_out_examples(ladder: Ladder, tasks: Sequence[Task]) -> Sequence[TrainingExample]:
    """Read the labelled requests that every rung is measured on; there may be none."""
    stage = _stage(ladder, ladder.rungs[0])
    known = {**library_tasks(), **{task.name: task for task in tasks}}
    source = stage.load(ladder.data[0], stage.config, known)
    return source.valid if source is not None else ()


def count_parameters(folder: Path) -> int:
    """Count the numbers in a checkpoint's safetensors."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  a file is no mapping
                size = 1
                for length in file.get_slice(name).get_shape():
                    size *= length
                total += size
    return total


def _check(ladder: Ladder, path: Path) -> None:
    names = [rung.name for rung in ladder.rungs]
    if not names or len(set(names)) < len(names):
        raise TrainingError(f"{path}: rungs: should be one or more, each name once")
    if not ladder.data:
        raise TrainingError(f"{path}: data: should name a file or a recipe's folder")
    if ladder.recipe is not None:
        if ladder.recipe not in RECIPES:
            raise TrainingError(f"{path}: recipe: should be one of {', '.join(RECIPES)}")
        if len(ladder.data) > 1 or ladder.valid or ladder.unlabelled:
            raise TrainingError(
                f"{path}: recipe: brings its own data; data should be its folder alone, without "
                "valid and unlabelled"
            )
    for place, rung in enumerate(ladder.rungs):
        where = f"{path}: rungs[{place}]"
        is_first = not place and ladder.teacher is None
        if is_first and (rung.teacher in ("first", "previous") or rung.init == "pruned"):
            raise TrainingError(f"{where}: is the first model, there is none before it")
        if (rung.size is not None) != (rung.init == "scratch"):
            raise TrainingError(f"{where}.size: belongs to init scratch, and to nothing else")
        if rung.size is not None and rung.size not in SIZES and not Path(rung.size).is_dir():
            raise TrainingError(
                f"{where}.size: should be one of {', '.join(SIZES)}, or a checkpoint's folder, is "
                f"{rung.size!r}"
            )
        if bool(rung.prune) != (rung.init == "pruned"):
            raise TrainingError(f"{where}.prune: belongs to init pruned, and to nothing else")
        if rung.step != 1:
            raise TrainingError(f"{where}.step: belongs to the ladder, steps to the file")
        if rung.steps < 1 or (rung.steps > 1 and "keep" not in rung.prune):
            raise TrainingError(f"{where}.steps: should be 1 or more, with a prune.keep to go to")
        try:
            needs = rung.distill_config.rule.takes_teacher
            if needs and rung.teacher is None:
                raise TrainingError(f"teacher: target {rung.target!r} needs one")
            TrainConfig(**{**ladder.train, **rung.train})
            if rung.prune:
                PruneConfig(**rung.prune)
        except (TrainingError, TypeError) as error:
            raise TrainingError(f"{where}: {error}") from error


def _from_folder(ladder: Ladder, folder: Path) -> Ladder:
    def place(text: str | None) -> str | None:
        known = text is None or text in ("first", "previous", "scratch", "pruned")
        is_path = not known and text is not None and (folder / text).exists()
        return str(folder / str(text)) if is_path else text

    rungs = tuple(
        replace(rung, teacher=place(rung.teacher), init=str(place(rung.init)))
        for rung in ladder.rungs
    )

    def places(paths: tuple[Path, ...]) -> tuple[Path, ...]:
        return tuple(folder / path for path in paths)

    return replace(
        ladder,
        rungs=rungs,
        store=folder / ladder.store,
        teacher=place(ladder.teacher),
        data=places(ladder.data),
        unlabelled=places(ladder.unlabelled),
        valid=places(ladder.valid),
        task_files=places(ladder.task_files),
    )


def _in_steps(ladder: Ladder) -> Ladder:
    """Make several rungs of one that is to be pruned in steps."""
    rungs = [
        replace(rung, name=f"{rung.name}-{step}" if rung.steps > 1 else rung.name, step=step)
        for rung in ladder.rungs
        for step in range(1, rung.steps + 1)
    ]
    return replace(ladder, rungs=tuple(rungs))


def _folder(out: Path, number: int, rung: Rung) -> Path:
    return out / "rungs" / f"{number}-{rung.name}"


def _check_checkpoints(ladder: Ladder, out: Path) -> None:
    """Refuse a teacher or start that is not there before the rungs above have cost their time."""

    def is_rung(source: str) -> bool:
        # A rung may be named by the folder that it will have.
        return out.resolve() in Path(source).resolve().parents

    for number, rung in enumerate(ladder.rungs, start=1):
        if is_finished(_folder(out, number, rung)):
            continue
        source = ladder.teacher if rung.teacher in _PLACES else rung.teacher
        if source is not None and not is_rung(source):
            find_teacher(source)
        is_path = rung.init not in ("scratch", "pruned") and names_folder(rung.init)
        if is_path and not is_rung(rung.init) and not Path(rung.init).is_dir():
            raise ModelError(f"rungs: {rung.name}: init: there is no folder {rung.init}")


def _note(folder: Path, ladder: Ladder, rung: Rung) -> None:
    """Write what a rung is made of, or check that it is what was begun."""
    path = folder / "rung.json"
    made_of = json.loads(
        json.dumps(
            {
                **asdict(rung),
                "train": {**ladder.train, **rung.train},
                "seed": ladder.seed,
                "recipe": ladder.recipe,
                "ladder_teacher": ladder.teacher,
                **{
                    name: _fingerprint(getattr(ladder, name))
                    for name in ("data", "unlabelled", "valid", "task_files")
                },
            }
        )
    )
    has_begun = (folder / "run.json").exists() or (folder / "pruned").exists()
    if path.exists() and has_begun:
        before = json.loads(path.read_text())
        if changed := [name for name in made_of if before.get(name) != made_of[name]]:
            raise TrainingError(
                f"out: {folder} holds a rung that was described otherwise: {', '.join(changed)}; "
                "choose a new folder, or delete this one and those after it"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(made_of, indent=2) + "\n")
    draft.replace(path)


def _fingerprint(paths: Sequence[Path]) -> dict[str, str]:
    """Say what files hold; the folder of a recipe is known by the files right in it."""
    return fingerprint_files(
        file
        for path in paths
        for file in (
            sorted(one for one in path.iterdir() if one.is_file()) if path.is_dir() else [path]
        )
    )


def _teacher_of(rung: Rung, models: Sequence[str]) -> str | None:
    return models[_PLACES[rung.teacher]] if rung.teacher in _PLACES else rung.teacher


def _stage(ladder: Ladder, rung: Rung) -> Stage:
    changes = {"seed": ladder.seed, **ladder.train, **rung.train}
    if ladder.recipe is not None:
        stage = find_recipe(ladder.recipe).stages[-1]
        return replace(stage, name="distill", config=replace(stage.config, **changes))
    takes_teacher = rung.distill_config.rule.takes_teacher

    def load(_: Path, config: TrainConfig, tasks: Tasks) -> StageSource:
        return finetune_source(
            ladder.data,
            config,
            tasks,
            valid_paths=ladder.valid,
            unlabelled_paths=ladder.unlabelled if takes_teacher else (),
        )

    return Stage(name="distill", load=load, config=TrainConfig(**changes))


def _start(
    ladder: Ladder,
    rung: Rung,
    folder: Path,
    models: Sequence[str],
    tasks: Sequence[Task],
    stage: Stage,
) -> str | None:
    """Return the checkpoint that a rung starts from, pruned where it says so."""
    if rung.init == "scratch":
        return None
    if rung.init != "pruned":
        return rung.init
    pruned = folder / "pruned"
    if not pruned.is_dir():
        _prune(rung, pruned, models, tasks, first_examples(stage, ladder.data[0], tasks))
    return str(pruned)


def _prune(
    rung: Rung,
    out: Path,
    models: Sequence[str],
    tasks: Sequence[Task],
    examples: Sequence[TrainingExample],
) -> None:
    whole = models[0 if rung.pruned_from == "first" else -rung.step]
    source = whole if rung.step == 1 else models[-1]
    try:
        config = PruneConfig(**rung.prune)
    except TypeError as error:
        raise TrainingError(f"rungs: {rung.name}: prune: {error}") from error
    if rung.steps > 1:
        config = step_of(whole, config, step=rung.step, steps=rung.steps)
    unfinished = out.with_name(".pruned")
    shutil.rmtree(unfinished, ignore_errors=True)
    prune_checkpoint(source, unfinished, config, examples, tasks=tasks)
    unfinished.rename(out)


def _row(rung: Rung, folder: Path) -> dict[str, Any]:
    (stage,) = (folder / "stages").iterdir()
    measured = stage / "evaluation.json"
    return {
        "name": rung.name,
        "model": str(folder),
        "parameters": count_parameters(folder),
        "teacher": rung.teacher,
        "metrics": json.loads(measured.read_text()) if measured.exists() else {},
        **json.loads((folder / "run.json").read_text())["finished"],
    }


def _teacher_row(ladder: Ladder, folder: Path, tasks: Sequence[Task]) -> dict[str, Any]:
    """Measure the first model on what the rungs are measured on."""
    valid = held_out_examples(ladder, tasks)
    return {
        "name": folder.name,
        "model": str(folder),
        "parameters": count_parameters(folder),
        "teacher": None,
        "metrics": measure_held_out(folder, valid, tasks=tasks) if valid else {},
    }
