"""What a student learns: lessons of labels and teacher at the score rows of packed passes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rankonce.distillation.hidden_states import LiveTeacher, match_layers, recorded_layers
from rankonce.distillation.losses import LOSSES, SOFTENED, TaughtRows
from rankonce.distillation.targets import TARGETS, KnownRows, Lesson, TargetRule
from rankonce.errors import TrainingError
from rankonce.model.head import Head, head_of
from rankonce.model.packing import forward_pass
from rankonce.training.data import LabelGroup, TokenizedExample, TrainingBatch, pack_examples
from rankonce.training.objectives import full_precision

_HIDDEN = "hidden-states"
_LOSS, _TEACHER_SHARE, _SKEW = "forward-kl", 0.5, 0.1


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What of the teacher a student learns, and how.

    Attributes:
        losses: weights of losses of the table ``LOSSES``, for what is learnt of the teacher.
        target: a name of ``TARGETS``.
        temperature: of the divergences, above 0.
        teacher_share: the teacher's part of the target ``mixture``, in 0..1.
        skew: the teacher's part of what ``skewed-kl`` compares with, between 0 and 1.
    """

    losses: Mapping[str, float] = field(default_factory=lambda: {_LOSS: 1.0})
    target: str = "soft"
    temperature: float = 1.0
    teacher_share: float = _TEACHER_SHARE
    skew: float = _SKEW

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise TrainingError(
                f"target: should be one of {', '.join(TARGETS)}, is {self.target!r}"
            )
        if not self.losses:
            raise TrainingError(f"losses: should hold at least one of {', '.join(LOSSES)}")
        for name, weight in self.losses.items():
            if name not in LOSSES:
                raise TrainingError(f"losses: should be of {', '.join(LOSSES)}, hold {name!r}")
            if not 0 < weight < float("inf"):
                raise TrainingError(f"losses.{name}: should weigh more than 0, weighs {weight}")
        if not 0 < self.temperature < float("inf"):
            raise TrainingError(f"temperature: should be above 0, is {self.temperature}")
        if self.temperature != 1 and not set(self.losses) & set(SOFTENED):
            raise TrainingError(
                f"temperature: should be 1, since none of the losses takes one; {self.temperature} "
                f"changes {', '.join(SOFTENED)}"
            )
        if not 0 <= self.teacher_share <= 1:
            raise TrainingError(f"teacher_share: should be in 0..1, is {self.teacher_share}")
        if self.teacher_share != _TEACHER_SHARE and self.target != "mixture":
            raise TrainingError(
                f"teacher_share: is of the target mixture; target {self.target} takes none"
            )
        if not 0 < self.skew < 1:
            raise TrainingError(f"skew: should be between 0 and 1, is {self.skew}")
        if self.skew != _SKEW and "skewed-kl" not in self.losses:
            raise TrainingError("skew: is of the loss skewed-kl, which is none of the losses")
        if not self.rule.takes_teacher and dict(self.losses) != {_LOSS: 1.0}:
            raise TrainingError(
                f"losses: are of what is learnt from a teacher; target {self.target} has none"
            )

    @property
    def rule(self) -> TargetRule:
        """The target and what it takes."""
        return TARGETS[self.target]

    @property
    def needs_live_teacher(self) -> bool:
        """Whether the teacher has to run beside the student."""
        return _HIDDEN in self.losses


class AuxiliaryReadout(nn.Module):
    """A second head over the labels' tokens, which starts as a copy of the model's own.

    Args:
        head: the model's.
        label_ids: of all labels that will be learnt, their token ids.
    """

    def __init__(self, head: Head, label_ids: Sequence[int]) -> None:
        super().__init__()
        rows = torch.tensor(sorted(set(label_ids)))
        self.places = {int(row): place for place, row in enumerate(rows)}
        self.softcap = head.softcap

        def copy(tensor: Tensor) -> nn.Parameter:
            return nn.Parameter(tensor.detach()[rows.to(tensor.device)].float().clone())

        self.weight_VD = copy(head.weight_VD)
        self.bias_V = None if head.bias_V is None else copy(head.bias_V)

    def label_logprobs(self, hidden_CD: Tensor, label_ids: Sequence[Sequence[int]]) -> Tensor:
        """Return log P(label) among the labels, C x L in FP32."""
        head = Head(weight_VD=self.weight_VD, bias_V=self.bias_V, softcap=self.softcap)
        places = [[self.places[token] for token in ids] for ids in label_ids]
        return head.label_logprobs(hidden_CD, places)


@dataclass(frozen=True, kw_only=True)
class DistillObjective:
    """Learns labels and a teacher's scores at the score rows.

    Attributes:
        config: what and how.
        label_ids: token ids of all labels that a second read-out needs.
        teacher: runs beside the student, where a loss looks inside of it.
    """

    config: DistillConfig
    label_ids: tuple[int, ...] = ()
    teacher: LiveTeacher | None = field(default=None, repr=False)

    def pack(
        self, units: Sequence[TokenizedExample], device: torch.device | str = "cpu"
    ) -> TrainingBatch:
        """Put examples into one pass, each prefix computed once."""
        return pack_examples(units, device)

    def build_extra(self, network: Any) -> AuxiliaryReadout | None:
        """Make the second read-out, where the target has one.

        Raises:
            TrainingError: the student's hidden states cannot be compared with the teacher's.
        """
        if self.teacher is not None:
            self.teacher.check_student(network)
        if not self.config.rule.has_auxiliary:
            return None
        return AuxiliaryReadout(head_of(network), self.label_ids)

    def loss(
        self, network: Any, batch: TrainingBatch, extra: AuxiliaryReadout | None = None
    ) -> Tensor:
        """Sum the weighted losses over a pass."""
        hidden_CD, states = self._run(network, batch)
        head = head_of(network)
        total = hidden_CD.new_zeros((), dtype=torch.float32)
        with full_precision(hidden_CD):
            for group in batch.groups:
                hidden_RD = hidden_CD[group.rows_R]
                readouts = {"served": head.label_logprobs(hidden_RD, group.label_ids)}
                if extra is not None:
                    readouts["auxiliary"] = extra.label_logprobs(hidden_RD, group.label_ids)
                known = _known_rows(group, readouts["served"], self.config.teacher_share)
                for lesson in self.config.rule.lessons(known):
                    log_probs_RL = readouts[lesson.readout]
                    total = total - lesson.labels_R @ (known.labels_RL * log_probs_RL).sum(1)
                    total = total + self._teach(lesson, log_probs_RL, group, states)
        return total

    def num_logits(self, batch: TrainingBatch, vocabulary: int) -> int:
        """Count the labels' forms at the score rows, for each read-out."""
        num_readouts = 2 if self.config.rule.has_auxiliary else 1
        return num_readouts * sum(
            len(group.rows_R) * sum(map(len, group.label_ids)) for group in batch.groups
        )

    def _run(self, network: Any, batch: TrainingBatch) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run student and, where it is live, teacher: final states, and both models' C x M x D."""
        if self.teacher is None:
            return forward_pass(network, batch.batch), ()
        num_layers = network.config.num_hidden_layers
        own = range(num_layers)
        theirs = match_layers(num_layers, self.teacher.network.config.num_hidden_layers)
        taught = self.teacher.hidden_states(batch.batch, theirs)
        with recorded_layers(network, own) as recorded:
            hidden_CD = forward_pass(network, batch.batch)
        return hidden_CD, (torch.stack([recorded[i] for i in own], 1), torch.stack(taught, 1))

    def _teach(
        self, lesson: Lesson, log_probs_RL: Tensor, group: LabelGroup, states: tuple[Tensor, ...]
    ) -> Tensor:
        hidden, theirs = (x[group.rows_R] for x in states) if states else (None, None)
        rows = TaughtRows(
            log_probs_RL=log_probs_RL,
            teacher_RL=lesson.teacher_RL,
            weights_R=lesson.teacher_R,
            slates_R=group.slates_R,
            grades_L=group.grades_L,
            ranking=group.ranking,
            temperature=self.config.temperature,
            skew=self.config.skew,
            hidden_RMD=hidden,
            teacher_hidden_RMD=theirs,
        )
        total = log_probs_RL.new_zeros(())
        for name, weight in self.config.losses.items():
            total = total + weight * LOSSES[name](rows)
        return total


def _known_rows(group: LabelGroup, served_RL: Tensor, teacher_share: float) -> KnownRows:
    is_labelled_R, is_taught_R = (~x.isnan().any(1) for x in (group.targets_RL, group.teacher_RL))
    uniform = float(torch.tensor(1 / served_RL.shape[1]).log())
    return KnownRows(
        labels_RL=group.targets_RL.nan_to_num(0.0),
        is_labelled_R=is_labelled_R,
        teacher_RL=group.teacher_RL.nan_to_num(uniform),
        is_taught_R=is_taught_R,
        own_RL=served_RL.detach(),
        grades_L=group.grades_L,
        teacher_share=teacher_share,
    )
