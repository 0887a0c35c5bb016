"""Hidden states of student and teacher at the score rows of the same pass.

For a student that has the teacher's width and fewer layers: what a pruned depth left behind.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rankonce.errors import TrainingError
from rankonce.model.packing import PackedBatch, forward_pass


def match_layers(num_layers: int, num_teacher_layers: int) -> list[int]:
    """Say for each of a student's layers which of the teacher's layers it should end like.

    They are spread evenly and both last layers meet.

    Raises:
        TrainingError: the student has more layers.
    """
    if num_layers > num_teacher_layers:
        raise TrainingError(
            f"losses: hidden-states needs a student of at most {num_teacher_layers} layers, as its "
            f"teacher has; it has {num_layers}"
        )
    return [(i + 1) * num_teacher_layers // num_layers - 1 for i in range(num_layers)]


@contextmanager
def recorded_layers(network: Any, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Record what leaves decoder layers at the score rows, in every pass inside this context.

    Yields:
        Filled by a pass: for each layer its hidden states, C x D.
    """
    recorded: dict[int, Tensor] = {}

    def record(number: int, output: Any, segment_pass: Any) -> None:
        hidden_TD = (output[0] if isinstance(output, tuple) else output)[0]
        if segment_pass.residual_TD is not None:
            # An accelerated layer leaves the residual for the next one to add.
            hidden_TD = hidden_TD + segment_pass.residual_TD
        if not segment_pass.trimmed:
            hidden_TD = hidden_TD.index_select(0, segment_pass.score_rows_C)
        recorded[number] = hidden_TD.float()

    def hook_of(number: int) -> Any:
        return lambda _, __, options, output: record(number, output, options["segment_pass"])

    handles = [
        network.base_model.layers[number].register_forward_hook(hook_of(number), with_kwargs=True)
        for number in layers
    ]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


class LiveTeacher:
    """A teacher that runs the student's own passes.

    Args:
        network: a transformers model whose attention is segment attention.
        encoder: fingerprint of how its tokenizer encodes; the student's has to be the same.
        name: for messages.
    """

    def __init__(self, network: Any, *, encoder: str, name: str) -> None:
        self.network, self.encoder, self.name = network, encoder, name

    def check_student(self, network: Any) -> None:
        """Refuse a student whose hidden states cannot be compared.

        Raises:
            TrainingError: names the width or the number of layers.
        """
        width, own = network.config.hidden_size, self.network.config.hidden_size
        if width != own:
            raise TrainingError(
                f"losses: hidden-states needs a student of the width of its teacher {self.name}, "
                f"{own}; it has {width}"
            )
        match_layers(network.config.num_hidden_layers, self.network.config.num_hidden_layers)

    @torch.no_grad()
    def hidden_states(self, batch: PackedBatch, layers: Sequence[int]) -> list[Tensor]:
        """Run a pass and return the hidden states after layers, each C x D in FP32.

        Args:
            batch: one that no model has run yet.
        """
        self.network.to(batch.token_ids_T.device)
        own = replace(batch, segment_pass=copy(batch.segment_pass))
        with recorded_layers(self.network, layers) as recorded:
            forward_pass(self.network, own)
        return [recorded[number] for number in layers]
