"""What the model says of the token after a prompt, and how OpenAI's clients read it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rankonce.errors import NumericsError
from rankonce.model.scoring import RawScores
from rankonce.serving.answers import (
    ChatLogprobs,
    CompletionChoice,
    CompletionLogprobs,
    TokenLogprob,
    TopLogprob,
)
from rankonce.serving.prompts import PromptReader
from rankonce.serving.schemas import CompletionBody


@dataclass(frozen=True, kw_only=True)
class NextToken:
    """Token ids with their log-probabilities, for the place after one prompt.

    Attributes:
        labels: those that were asked for, in that order.
        top: the most probable ones, best first.
    """

    labels: list[tuple[int, float]]
    top: list[tuple[int, float]]

    def listed(self, num_top: int) -> list[tuple[int, float]]:
        """Return the ``num_top`` most probable tokens and every label, best first."""
        chosen = dict([*self.top[:num_top], *self.labels])
        return sorted(chosen.items(), key=lambda pair: -pair[1])


def next_tokens(raw: RawScores, label_ids: Sequence[int], *, whole: bool) -> list[NextToken]:
    """Read the scores of one request's prompts.

    Args:
        whole: probabilities in the whole vocabulary, instead of among the labels.

    Raises:
        NumericsError: one of them is NaN or infinite.
    """
    labels_CL = raw.labels_CL
    if whole:
        assert raw.mass_C is not None, "asked for together with the scores"
        labels_CL = labels_CL + raw.mass_C[:, None]
    tops: list[list[tuple[int, float]]] = [[] for _ in labels_CL]
    if raw.top_ids_CN is not None and raw.top_logprobs_CN is not None:
        rows = zip(raw.top_ids_CN.tolist(), raw.top_logprobs_CN.tolist(), strict=True)
        tops = [list(zip(*row, strict=True)) for row in rows]
    if not torch.isfinite(labels_CL).all():
        raise NumericsError("the model gave NaN or infinity; its weights or precision are at fault")
    return [
        NextToken(labels=list(zip(label_ids, row, strict=False)), top=top)
        for row, top in zip(labels_CL.tolist(), tops, strict=True)
    ]


def write_choices(
    tokens: Sequence[NextToken], body: CompletionBody, reader: PromptReader
) -> list[CompletionChoice]:
    """Write the token after each prompt of a completions question."""
    wanted = body.logprobs is not None or body.has_labels
    num_top = body.logprobs or 0
    return [
        CompletionChoice(
            index=index,
            text=reader.token_text(token.top[0][0]),
            logprobs=write_completion(token, num_top, reader) if wanted else None,
        )
        for index, token in enumerate(tokens)
    ]


def write_completion(token: NextToken, num_top: int, reader: PromptReader) -> CompletionLogprobs:
    """Write log-probabilities as OpenAI's completions do.

    Every label stands there under its own text, so two tokens with one text never share an entry:
    the second goes by its id.
    """
    # The token of the choice is always listed, as OpenAI does.
    num_top = max(1, num_top)
    names: dict[str, int] = {}
    for token_id, _ in [*token.labels, *token.top[:num_top]]:
        name = reader.token_name(token_id)
        if names.setdefault(name, token_id) != token_id:
            names[f"token_id:{token_id}"] = token_id
    name_of = {token_id: name for name, token_id in names.items()}
    best_id, best_logprob = token.top[0]
    return CompletionLogprobs(
        tokens=[name_of[best_id]],
        token_logprobs=[best_logprob],
        top_logprobs=[{name_of[i]: logprob for i, logprob in token.listed(num_top)}],
        text_offset=[0],
    )


def write_chat(token: NextToken, num_top: int, reader: PromptReader) -> ChatLogprobs:
    """Write log-probabilities as OpenAI's chat does."""

    def write(token_id: int, logprob: float) -> TopLogprob:
        name = reader.token_name(token_id)
        text = reader.token_text(token_id)
        return TopLogprob(
            token=name, logprob=logprob, bytes=list(text.encode()) if name == text else None
        )

    best = write(*token.top[0])
    listed = [write(*pair) for pair in token.listed(num_top)]
    return ChatLogprobs(content=[TokenLogprob(**best.model_dump(), top_logprobs=listed)])
