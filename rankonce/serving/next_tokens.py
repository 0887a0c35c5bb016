"""The token after each prompt of a question: encode and pack, forward, read in their order."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from rankonce.model.scoring import RawScores
from rankonce.serving.answers import CachedTokens, Usage
from rankonce.serving.batcher import Batcher, Terms
from rankonce.serving.logprobs import NextToken, next_tokens
from rankonce.serving.observations import Stage
from rankonce.serving.packing import EncodedPrompts, PackedPrompts, pack_prompts
from rankonce.serving.passes import Passes
from rankonce.serving.prompts import PromptReader
from rankonce.serving.schemas import WithLabels


class NextTokenReader:
    """Reads the next token of prompts that the caller wrote whole.

    Args:
        prompts: text to token ids and back.
        batcher: whose text threads encode prompts and read scores.
        passes: run what was encoded.
    """

    def __init__(self, prompts: PromptReader, batcher: Batcher, passes: Passes) -> None:
        self._prompts = prompts
        self._batcher = batcher
        self._passes = passes

    async def read(
        self,
        encode: Callable[[], EncodedPrompts],
        field: str,
        question: WithLabels,
        terms: Terms,
        *,
        adapter: str | None,
        num_top: int = 0,
        whole: bool = True,
    ) -> tuple[list[NextToken], Usage]:
        """Read the next token of every prompt, in their order.

        Args:
            field: names the prompts in messages.
            whole: probabilities in the whole vocabulary, instead of among the labels.
        """
        label_ids, packed = await self._batcher.run_text(
            self._pack, encode, field, question, adapter
        )
        requests = [replace(one, cache_salt=terms.cache_salt) for one in packed.requests]
        raws = await self._passes.forward(requests, terms, label_mass=whole, num_top=num_top)
        tokens = await self._batcher.run_text(
            _unpack, packed, raws, label_ids, whole, stage=Stage.ANSWER
        )
        computed_tokens = sum(raw.computed_tokens for raw in raws)
        usage = Usage(
            prompt_tokens=packed.num_tokens,
            total_tokens=packed.num_tokens,
            prompt_tokens_details=CachedTokens(cached_tokens=packed.num_tokens - computed_tokens),
        )
        return tokens, usage

    def _pack(
        self,
        encode: Callable[[], EncodedPrompts],
        field: str,
        question: WithLabels,
        adapter: str | None,
    ) -> tuple[list[int], PackedPrompts]:
        label_ids = list(question.label_token_ids or [])
        if question.labels is not None:
            label_ids = self._prompts.label_ids(question.labels)
        elif label_ids:
            self._prompts.check_ids(label_ids, "label_token_ids")
        encoded = encode()
        self._prompts.check(encoded, field)
        # The head reads at least one label.
        return label_ids, pack_prompts(encoded, label_ids or [0], adapter=adapter)


def _unpack(
    packed: PackedPrompts, raws: Sequence[RawScores], label_ids: Sequence[int], whole: bool
) -> list[NextToken]:
    tokens: dict[int, NextToken] = {}
    for raw, places in zip(raws, packed.places, strict=True):
        tokens.update(zip(places, next_tokens(raw, label_ids, whole=whole), strict=True))
    return [tokens[place] for place in range(len(tokens))]
