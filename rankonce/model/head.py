"""The head of a causal language model, applied to score rows only, in FP32."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rankonce.errors import ModelError
from rankonce.kernels.label_logprobs import (
    VocabularyLogprobs,
    label_logprobs,
    vocabulary_logprobs,
)


@dataclass(frozen=True, kw_only=True)
class Head:
    """The weights of the head, shared with the model they belong to.

    Attributes:
        softcap: bound of the logits (Gemma 2 and 3 name it ``final_logit_softcapping``).
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None

    def label_logprobs(self, hidden_CD: Tensor, label_ids: Sequence[Sequence[int]]) -> Tensor:
        """Return log P(label) among the labels, C x L in FP32."""
        return label_logprobs(
            hidden_CD, self.weight_VD, label_ids, bias_V=self.bias_V, softcap=self.softcap
        )

    def vocabulary_logprobs(
        self, hidden_CD: Tensor, label_ids: Sequence[Sequence[int]], *, num_top: int = 0
    ) -> VocabularyLogprobs:
        """Return log P(label) in the whole vocabulary and the most probable tokens, in FP32."""
        return vocabulary_logprobs(
            hidden_CD,
            self.weight_VD,
            label_ids,
            num_top=num_top,
            bias_V=self.bias_V,
            softcap=self.softcap,
        )


def head_of(network: Any) -> Head:
    """Find the head of a transformers model.

    Raises:
        ModelError: the model has none.
    """
    output = network.get_output_embeddings()
    if output is None or not hasattr(output, "weight"):
        raise ModelError(f"{type(network).__name__}: has no language-model head")
    return Head(
        weight_VD=output.weight,
        bias_V=getattr(output, "bias", None),
        softcap=getattr(network.config, "final_logit_softcapping", None),
    )
