"""What a stage learns: labels at score rows, or the next tokens of texts.

An objective packs units, the things that a stage learns from, and sums the loss over their
targets; the loop knows neither labels nor texts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from rankonce.model.head import head_of
from rankonce.model.packing import forward_pass
from rankonce.training.data import TokenizedExample, TrainingBatch, pack_examples
from rankonce.training.losses import LOSSES, LabelRows, check_losses, token_loss
from rankonce.training.sequences import SequenceBatch, TokenSequence, pack_sequences


class Unit(Protocol):
    """What is learnt from as a whole: an example with its candidates, or a text."""

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model."""

    @property
    def num_targets(self) -> int:
        """What the loss is divided by: known labels, or learnt tokens."""


U = TypeVar("U", bound=Unit, contravariant=True)


class Objective(Protocol[U]):
    """How units become a loss."""

    def pack(self, units: Sequence[U], device: torch.device | str) -> Any:
        """Put units into one pass."""

    def build_extra(self, network: Any) -> nn.Module | None:
        """Make what is learnt beside the network and dropped when the run has ended."""

    def loss(self, network: Any, batch: Any, extra: Any = None) -> Tensor:
        """Sum the loss over a pass's targets; ``extra`` is what ``build_extra`` made."""

    def num_logits(self, batch: Any, vocabulary: int) -> int:
        """Count the logits that a pass takes; the vocabulary is that of the head."""


@dataclass(frozen=True, kw_only=True)
class LabelObjective:
    """Losses over the labels at the score rows; no logits over the vocabulary are computed.

    Attributes:
        losses: weights of losses of the table ``LOSSES``.
    """

    losses: Mapping[str, float] = field(default_factory=lambda: {"softmax": 1.0})

    def __post_init__(self) -> None:
        check_losses(self.losses)

    def pack(
        self, units: Sequence[TokenizedExample], device: torch.device | str = "cpu"
    ) -> TrainingBatch:
        """Put examples into one pass, each prefix computed once."""
        return pack_examples(units, device)

    def build_extra(self, network: Any) -> None:
        """Nothing is learnt beside the network."""

    def loss(self, network: Any, batch: TrainingBatch, extra: None = None) -> Tensor:
        """Sum the weighted losses over a pass."""
        hidden_CD = forward_pass(network, batch.batch)
        head = head_of(network)
        total = hidden_CD.new_zeros((), dtype=torch.float32)
        with full_precision(hidden_CD):
            for group in batch.groups:
                rows = LabelRows(
                    log_probs_RL=head.label_logprobs(hidden_CD[group.rows_R], group.label_ids),
                    targets_RL=group.targets_RL,
                    slates_R=group.slates_R,
                    grades_L=group.grades_L,
                    ranking=group.ranking,
                )
                for name, weight in self.losses.items():
                    total = total + weight * LOSSES[name](rows)
        return total

    def num_logits(self, batch: TrainingBatch, vocabulary: int) -> int:
        """Count the labels' forms at the score rows."""
        return sum(len(group.rows_R) * sum(map(len, group.label_ids)) for group in batch.groups)


@dataclass(frozen=True, kw_only=True)
class TokenObjective:
    """Cross-entropy of the next token at the learnt tokens."""

    def pack(
        self, units: Sequence[TokenSequence], device: torch.device | str = "cpu"
    ) -> SequenceBatch:
        """Put texts into one pass in which none sees another."""
        return pack_sequences(units, device)

    def build_extra(self, network: Any) -> None:
        """Nothing is learnt beside the network."""

    def loss(self, network: Any, batch: SequenceBatch, extra: None = None) -> Tensor:
        """Sum the cross-entropy over a pass's learnt tokens."""
        hidden_TD = forward_pass(network, batch.batch)
        with full_precision(hidden_TD):
            return token_loss(head_of(network), hidden_TD[batch.rows_R], batch.target_ids_R)

    def num_logits(self, batch: SequenceBatch, vocabulary: int) -> int:
        """Count the whole vocabulary at every learnt token."""
        return len(batch.rows_R) * vocabulary


def full_precision(hidden: Tensor) -> torch.autocast:
    """Keep head and loss out of an autocast around the pass, which would round their products."""
    return torch.autocast(hidden.device.type, enabled=False)


class Learner(nn.Module):
    """A model and what it learns, as one module whose forward is the loss of a pass.

    Parallel training shards and synchronises modules around their forward, so that the head must
    be read inside of it.

    Attributes:
        extra: weights of the objective's own; they travel with checkpoints, not with the model.
    """

    def __init__(self, network: nn.Module, objective: Objective[Any]) -> None:
        super().__init__()
        self.network = network
        self.objective = objective
        self.extra = objective.build_extra(network)

    def forward(self, batch: Any) -> Tensor:
        """Sum the loss over a pass's targets."""
        return self.objective.loss(self.network, batch, self.extra)
