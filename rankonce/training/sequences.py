"""Texts whose next tokens are learnt: documents in pretraining, conversations in instruction."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankonce.errors import DataError
from rankonce.model.packing import PackedBatch, pack_texts


@dataclass(frozen=True, kw_only=True)
class TokenSequence:
    """One text that sees nothing but itself.

    Attributes:
        token_ids: at least two.
        learnt: for each token whether it is predicted from those before it; never the first.
    """

    token_ids: tuple[int, ...]
    learnt: tuple[bool, ...]

    def __post_init__(self) -> None:
        if len(self.token_ids) < 2 or len(self.learnt) != len(self.token_ids) or self.learnt[0]:
            raise DataError(
                "sequence: should hold two tokens or more and say of each whether it is learnt, "
                f"the first is not; holds {len(self.token_ids)}"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model."""
        return len(self.token_ids)

    @property
    def num_targets(self) -> int:
        """Tokens that are learnt."""
        return sum(self.learnt)


@dataclass(frozen=True, kw_only=True)
class SequenceBatch:
    """Sequences of one forward pass.

    Attributes:
        rows_R: the tokens before those that are learnt, in 0..T.
        target_ids_R: the tokens that are learnt.
    """

    batch: PackedBatch
    rows_R: Tensor
    target_ids_R: Tensor


def pack_sequences(
    sequences: Sequence[TokenSequence], device: torch.device | str = "cpu"
) -> SequenceBatch:
    """Pack sequences into one pass in which none sees another."""
    ids = torch.tensor([i for one in sequences for i in one.token_ids], device=device)
    learnt = torch.tensor([flag for one in sequences for flag in one.learnt], device=device)
    places = learnt.nonzero()[:, 0]
    return SequenceBatch(
        batch=pack_texts([one.token_ids for one in sequences], device=device),
        rows_R=places - 1,
        target_ids_R=ids[places],
    )
