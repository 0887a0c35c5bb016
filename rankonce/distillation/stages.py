"""Stages that learn from a teacher: another stage's examples with its scores beside them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

from rankonce.distillation.asking import add_scores, fill_store
from rankonce.distillation.objective import DistillConfig, DistillObjective
from rankonce.distillation.store import Cost, ScoreStore
from rankonce.distillation.teachers import LocalTeacher, Teacher
from rankonce.errors import DataError, TrainingError
from rankonce.prompts.rendering import Renderer
from rankonce.records import TrainingExample
from rankonce.training.loop import TrainConfig, TrainingData
from rankonce.training.stages import Stage, StageSource, Tasks, label_units

# Examples that a teacher is asked of at once; a run that ends early asks of no more than it needs.
_PART = 1024


@dataclass(kw_only=True)
class Distillation:
    """A teacher, its store, and what a student learns of it.

    Attributes:
        config: what and how.
        teacher, store: left out where the target takes no teacher.
        cost: what was asked so far.
    """

    config: DistillConfig
    teacher: Teacher | None = None
    store: ScoreStore | None = None
    cost: Cost = field(default_factory=Cost)

    def __post_init__(self) -> None:
        if self.config.rule.takes_teacher and (self.teacher is None or self.store is None):
            raise TrainingError(
                f"teacher: target {self.config.target!r} needs one, and a store for its scores"
            )

    def wrap(self, stage: Stage) -> Stage:
        """Return a stage of the same data that learns what the teacher says of them."""

        def load(data: Path, config: TrainConfig, tasks: Tasks) -> StageSource | None:
            source = stage.load(data, config, tasks)
            return source and self.teach(source, config, tasks)

        return replace(stage, load=load)

    def teach(self, source: StageSource, config: TrainConfig, tasks: Tasks) -> StageSource:
        """Put the teacher's scores beside the examples of a source.

        Without ``max_steps`` the teacher is asked before the run for every epoch whose examples are
        known, and let go; else as the run comes to them.

        Raises:
            RankOnceError: the source learns no labels, an example has no label and the target
                needs one, or the teacher has no answer.
        """
        examples = source.examples
        if examples is None:
            raise TrainingError("stage: should learn labels at score rows to be distilled")
        if self.config.rule.needs_labels:
            self._check_labels(examples(0))

        def epoch(number: int) -> Iterable[TrainingExample]:
            return self._taught(examples(number), tasks)

        if self.config.rule.takes_teacher and config.max_steps is None:
            for number in range(config.epochs):
                for part in _parts(examples(number)):
                    self._ask(part, tasks)
        opens = self._open_with(replace(source, examples=epoch), tasks)
        if self.teacher is not None:
            self.teacher.close()
        return replace(
            source,
            open=opens,
            examples=epoch,
            fingerprint={**source.fingerprint, "teacher": self._fingerprint()},
            objective=asdict(self.config),
        )

    def describe_cost(self) -> list[str]:
        """Say what the teacher's scores took, in this run and in all."""
        if self.teacher is None or self.store is None or not self.config.rule.takes_teacher:
            return []
        whole = self.store.cost(self.teacher.fingerprint)
        return [
            f"teacher: {cost.num_calls:,} calls for {cost.num_candidates:,} candidates, "
            f"{cost.num_tokens:,} tokens, {cost.seconds:,.0f} s {when}"
            for cost, when in ((self.cost, "in this run"), (whole, "for all that is stored"))
        ]

    def _open_with(self, source: StageSource, tasks: Tasks) -> Callable[[Renderer], TrainingData]:
        """Complete the objective when the student's tokenizer is known."""

        def open_with(renderer: Renderer) -> TrainingData:
            live = None
            if self.config.needs_live_teacher:
                if not isinstance(self.teacher, LocalTeacher):
                    raise TrainingError(
                        "losses: hidden-states needs a teacher that is loaded here, not a server's"
                    )
                live = self.teacher.live()
                if live.encoder != renderer.encoder.fingerprint:
                    raise TrainingError(
                        "losses: hidden-states needs one tokenizer for both; the student's is not "
                        f"that of its teacher {live.name}: start from a checkpoint that has it"
                    )
            ids = {i for task in source.tasks for form in renderer.label_ids(task) for i in form}
            objective = DistillObjective(
                config=self.config, label_ids=tuple(sorted(ids)), teacher=live
            )
            assert source.examples is not None
            units = label_units(source.examples, renderer, tasks, style_seed=source.style_seed)
            return replace(source.open(renderer), units=units, objective=objective)

        return open_with

    def _check_labels(self, examples: Iterable[TrainingExample]) -> None:
        for number, example in enumerate(examples, start=1):
            if all(label is None for label in example.labels):
                raise DataError(
                    f"labels: target {self.config.target!r} needs known labels, "
                    f"{example.place(number)} has none; choose soft, mixture or two-logits"
                )

    def _taught(
        self, examples: Iterable[TrainingExample], tasks: Tasks
    ) -> Iterator[TrainingExample]:
        rule = self.config.rule
        if not rule.takes_teacher or self.teacher is None or self.store is None:
            yield from examples
            return
        for part in _parts(examples):
            taught = list(add_scores(self.store, self.teacher.fingerprint, part, tasks))
            if any(None in (one.teacher or ()) for one in taught):
                self._ask(part, tasks)
                taught = list(add_scores(self.store, self.teacher.fingerprint, part, tasks))
            yield from map(_without_unknown, taught) if rule.needs_labels else taught

    def _ask(self, examples: Sequence[TrainingExample], tasks: Tasks) -> None:
        if self.teacher is not None and self.store is not None:
            self.cost += fill_store(self.store, self.teacher, examples, tasks)

    def _fingerprint(self) -> str | None:
        if self.teacher is None or not self.config.rule.takes_teacher:
            return None
        # Not its name, which may be another path to the same weights.
        return self.teacher.fingerprint


def _parts(examples: Iterable[TrainingExample]) -> Iterator[Sequence[TrainingExample]]:
    """Cut a stream into parts that a teacher is asked of together, each example with its place."""
    placed = (
        replace(example, source=example.place(number))
        for number, example in enumerate(examples, start=1)
    )
    while part := list(islice(placed, _PART)):
        yield part


def _without_unknown(example: TrainingExample) -> TrainingExample:
    """Pass over candidates without a label, as where nobody teaches."""
    said = tuple(
        None if label is None else one
        for label, one in zip(example.labels, example.teacher or (), strict=True)
    )
    return replace(example, teacher=said)
