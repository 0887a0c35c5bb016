"""Conversations become units: the answers are learnt, each with the token that ends it."""

import logging
from collections.abc import Iterable, Iterator
from typing import Literal

from rankonce.errors import DataError, PromptTooLongError, RankOnceError
from rankonce.prompts.conversations import Conversation
from rankonce.prompts.rendering import Renderer
from rankonce.training.sequences import TokenSequence

logger = logging.getLogger(__name__)

TooLong = Literal["refuse", "cut"]


def tokenize_conversation(conversation: Conversation, renderer: Renderer) -> TokenSequence:
    """Encode a conversation by the model's chat template, or as plain prompts with answers.

    Learnt are the tokens of the answers and those that end them; questions, the system's words and
    the names of the roles are not.

    Raises:
        RequestError: the chat template does not take the conversation.
        PromptTooLongError: it does not fit the model's context.
        DataError: nothing in it would be learnt.
    """
    turns = [(turn.role, turn.content) for turn in conversation.turns]
    token_ids, answers = renderer.encoder.encode_conversation(turns)
    if len(token_ids) > renderer.max_prompt_tokens:
        raise PromptTooLongError(
            f"turns: the conversation has {len(token_ids)} tokens, the model takes "
            f"{renderer.max_prompt_tokens}"
        )
    learnt = tuple(place is not None and conversation.turns[place].is_learnt for place in answers)
    if not any(learnt):
        raise DataError("turns: the answers have no token that could be learnt")
    return TokenSequence(token_ids=token_ids, learnt=learnt)


def tokenize_conversations(
    conversations: Iterable[Conversation], renderer: Renderer, *, too_long: TooLong = "refuse"
) -> Iterator[TokenSequence]:
    """Encode conversations one after the other.

    Args:
        too_long: ``refuse`` those that do not fit the model's context, or ``cut`` them behind the
            last answer that fits; how many were cut is logged.

    Raises:
        DataError: says which conversation cannot be used, and why.
    """
    num_cut = 0
    for conversation in conversations:
        try:
            kept, unit = _fit(conversation, renderer, too_long)
        except RankOnceError as error:
            raise DataError(f"{conversation.source or 'conversation'}: {error}") from error
        num_cut += kept < conversation.num_questions
        yield unit
    if num_cut:
        logger.warning(
            "%d conversations were cut behind an answer to fit %d tokens",
            num_cut,
            renderer.max_prompt_tokens,
        )


def _fit(
    conversation: Conversation, renderer: Renderer, too_long: TooLong
) -> tuple[int, TokenSequence]:
    """Encode all questions, or as many as fit; returns how many."""
    count = conversation.num_questions
    while True:
        try:
            return count, tokenize_conversation(conversation.first_questions(count), renderer)
        except PromptTooLongError:
            if too_long == "refuse" or count == 1:
                raise
            count -= 1
