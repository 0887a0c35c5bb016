"""Stages that learn from a teacher: another stage's examples with its scores beside them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rankonce.distillation.asking import add_scores, fill_store
from rankonce.distillation.objective import DistillConfig, DistillObjective
from rankonce.distillation.store import Cost, ScoreStore
from rankonce.distillation.teachers import LocalTeacher, Teacher
from rankonce.errors import DataError, TrainingError
from rankonce.prompts.rendering import Renderer
from rankonce.records import TrainingExample
from rankonce.training.loop import TrainConfig, TrainingData
from rankonce.training.stages import Stage, StageSource, Tasks, label_source


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

        The teacher is asked before the run for every epoch whose examples are known, and let go.

        Raises:
            RankOnceError: the source learns no labels, an example has no label and the target
                needs one, or the teacher has no answer.
        """
        examples = source.examples
        if examples is None:
            raise TrainingError("stage: should learn labels at score rows to be distilled")

        def epoch(number: int) -> Iterable[TrainingExample]:
            return self._taught(list(examples(number)), tasks)

        if self.config.rule.takes_teacher and config.max_steps is None:
            for number in range(config.epochs):
                self._ask(list(examples(number)), tasks)
        taught = label_source(
            epoch,
            tasks=tasks,
            valid=source.valid,
            objective=DistillObjective(config=self.config),
            fingerprint={**source.fingerprint, "teacher": self._fingerprint()},
            split=source.split,
            style_seed=source.style_seed,
        )
        opens = self._open_with(taught)
        if self.teacher is not None:
            self.teacher.close()
        return replace(taught, open=opens)

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

    def _open_with(self, source: StageSource) -> Callable[[Renderer], TrainingData]:
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
            return replace(source.open(renderer), objective=objective)

        return open_with

    def _taught(self, examples: list[TrainingExample], tasks: Tasks) -> list[TrainingExample]:
        rule = self.config.rule
        if rule.needs_labels:
            for number, example in enumerate(examples, start=1):
                if all(label is None for label in example.labels):
                    raise DataError(
                        f"labels: target {self.config.target!r} needs known labels, "
                        f"{example.place(number)} has none; choose soft, mixture or two-logits"
                    )
        if not rule.takes_teacher or self.teacher is None or self.store is None:
            return examples
        self._ask(examples, tasks)
        taught = list(add_scores(self.store, self.teacher.fingerprint, examples, tasks))
        if not rule.needs_labels:
            return taught
        # As where nobody teaches, candidates without a label are passed over.
        return [
            replace(
                one,
                teacher=tuple(
                    None if label is None else said
                    for label, said in zip(one.labels, one.teacher or (), strict=True)
                ),
            )
            for one in taught
        ]

    def _ask(self, examples: list[TrainingExample], tasks: Tasks) -> None:
        if self.teacher is not None and self.store is not None:
            self.cost += fill_store(self.store, self.teacher, examples, tasks)

    def _fingerprint(self) -> Mapping[str, Any] | None:
        if self.teacher is None or not self.config.rule.takes_teacher:
            return None
        return {"name": self.teacher.name, "fingerprint": self.teacher.fingerprint}
