"""Prompts that the caller wrote, to token ids, and tokens back to text.

The caller owns the whole prompt here, so special tokens in its text are special tokens, as with
every server that takes OpenAI's completions.
"""

from collections.abc import Sequence
from typing import cast

from tokenizers import Tokenizer

from rankonce.errors import LabelError, PromptTooLongError, RequestError
from rankonce.model.known import KnownModel
from rankonce.prompts.encoding import TextEncoder
from rankonce.prompts.seams import find_seam, has_seams
from rankonce.serving.packing import EncodedPrompts

_Ids = tuple[int, ...]

# Stands before what is encoded or decoded in the middle of a text: tokenizers treat a beginning
# in their own way.
_BEFORE = ":"


class PromptReader:
    """Text to token ids and back for one model.

    Args:
        model: whose tokenizer and bounds count.
        encoder: finds the token of a label.
    """

    def __init__(self, model: KnownModel, encoder: TextEncoder) -> None:
        # A copy: transformers sets truncation and padding on its own one, and threads share it.
        self._backend = Tokenizer.from_str(model.tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._has_seams = has_seams(self._backend)
        self._encoder = encoder
        self._before_ids = self._backend.encode(_BEFORE, add_special_tokens=False).ids
        self._before = self._decode(self._before_ids)
        self.num_vocabulary = model.num_vocabulary
        self.max_prompt_tokens = model.max_prompt_tokens

    def encode_all(
        self, prompts: Sequence[str] | Sequence[tuple[int, ...]], field: str
    ) -> EncodedPrompts:
        """Encode texts as the tokenizer's own call does, special tokens recognised.

        Prompts that are token ids already stay as they are.

        Args:
            field: names the prompts in messages.

        Raises:
            PromptTooLongError: the first is too long, so that the others are not looked at.
        """
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if len(texts) < 2:
            ids = iter(self._backend.encode_batch_fast(texts))
            return EncodedPrompts(
                head=(), tails=[tuple(next(ids).ids) if isinstance(p, str) else p for p in prompts]
            )
        seam = find_seam(_shared_beginning(texts)) if self._has_seams else 0
        return self._encode_behind(texts[0][:seam], [text[seam:] for text in texts], field)

    def encode_concatenated(
        self,
        query: str | tuple[int, ...],
        items: Sequence[str] | Sequence[tuple[int, ...]],
        field: str,
        *,
        item_first: bool,
    ) -> EncodedPrompts:
        """Encode each item with the query before or after it as one text, as SGLang does.

        Args:
            query, items: both texts, or both token ids.
            field: as in ``encode_all``.

        Raises:
            PromptTooLongError: as in ``encode_all``.
        """
        if not isinstance(query, str):
            return EncodedPrompts.join(query, cast(Sequence[_Ids], items), item_first=item_first)
        texts = cast(Sequence[str], items)
        if item_first:
            return self._encode_behind("", [text + query for text in texts], field)
        seam = find_seam(query) if self._has_seams else 0
        rest = query[seam:]
        return self._encode_behind(query[:seam], [rest + text for text in texts], field)

    def encode_joined(
        self,
        query: str | tuple[int, ...],
        items: Sequence[str] | Sequence[tuple[int, ...]],
        *,
        item_first: bool,
        add_special_tokens: bool,
    ) -> EncodedPrompts:
        """Encode query and items apart and join their ids, as vLLM does.

        Args:
            add_special_tokens: those that the tokenizer puts around a text, around the query alone.
        """
        if isinstance(query, str):
            encoded = self._backend.encode(query, add_special_tokens=add_special_tokens)
            query = tuple(encoded.ids)
        texts = [item for item in items if isinstance(item, str)]
        ids = iter(self._backend.encode_batch_fast(texts, add_special_tokens=False))
        parts = [tuple(next(ids).ids) if isinstance(item, str) else item for item in items]
        return EncodedPrompts.join(query, parts, item_first=item_first)

    def _encode_behind(self, head: str, tails: Sequence[str], field: str) -> EncodedPrompts:
        """Encode texts that have one beginning, which ends at a seam."""
        first = self._backend.encode(head + tails[0])
        self._check_length(len(first.ids), _place(field, 0, len(tails)))
        if not head:
            others = self._backend.encode_batch_fast(list(tails[1:]))
            return EncodedPrompts(
                head=(), tails=[tuple(first.ids), *(tuple(one.ids) for one in others)]
            )
        ids = [
            tuple(one.ids)
            for one in self._backend.encode_batch_fast(list(tails), add_special_tokens=False)
        ]
        # What the tokenizer puts around a text: what stands behind it comes behind every tail.
        end = len(first.ids)
        while end and first.special_tokens_mask[end - 1]:
            end -= 1
        behind = tuple(first.ids[end:])
        head_ids = tuple(first.ids[: end - len(ids[0])])
        assert (*head_ids, *ids[0]) == tuple(first.ids[:end]), "a seam keeps its sides apart"
        return EncodedPrompts(head=head_ids, tails=[one + behind for one in ids])

    def cut(self, text: str, max_tokens: int) -> str:
        """Return the part of a text that has at most so many tokens."""
        encoded = self._backend.encode(text, add_special_tokens=False)
        if len(encoded.ids) <= max_tokens:
            return text
        return text[: encoded.offsets[max_tokens][0]].rstrip()

    def check(self, prompts: EncodedPrompts, field: str) -> None:
        """Refuse prompts that the model cannot read.

        Args:
            field: names the prompts in the message.
        """
        head, tails = prompts.head, prompts.tails
        if head:
            self.check_ids(head, _place(field, 0, len(tails)))
        for index, ids in enumerate(tails):
            path = _place(field, index, len(tails))
            if not ids:
                raise RequestError(f"{path}: should hold at least one token")
            self.check_ids(ids, path)
            self._check_length(len(head) + len(ids), path)

    def _check_length(self, num_tokens: int, path: str) -> None:
        if num_tokens > self.max_prompt_tokens:
            raise PromptTooLongError(
                f"{path}: the prompt has {num_tokens} tokens, the model takes "
                f"{self.max_prompt_tokens}"
            )

    def check_ids(self, ids: Sequence[int], field: str) -> None:
        """Refuse token ids that the model does not have."""
        if min(ids) < 0 or max(ids) >= self.num_vocabulary:
            wrong = next(i for i in ids if not 0 <= i < self.num_vocabulary)
            raise RequestError(
                f"{field}: token ids should lie between 0 and {self.num_vocabulary - 1}, one is "
                f"{wrong}"
            )

    def label_ids(self, words: Sequence[str]) -> list[int]:
        """Find the token of each label, taken to the letter: a space before it counts."""
        found = []
        for word in words:
            ids = self._encoder.encode_answer(_BEFORE, word)
            # A label may also melt into what stands before it.
            if len(ids) != 1 or self.token_text(ids[0]) != word:
                raise LabelError(
                    f"labels: {word!r} should be one token, but the tokenizer makes {ids} of it"
                )
            found += ids
        return found

    def token_text(self, token_id: int) -> str:
        """Return what a token adds to a text."""
        return self._decode([*self._before_ids, token_id])[len(self._before) :]

    def token_name(self, token_id: int) -> str:
        """Return a token's text, or its id where it is none, such as a part of a character."""
        text = self.token_text(token_id)
        return f"token_id:{token_id}" if not text or "\ufffd" in text else text

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=False))


def _place(field: str, index: int, num_prompts: int) -> str:
    return field if num_prompts == 1 else f"{field}[{index}]"


def _shared_beginning(texts: Sequence[str]) -> str:
    # All texts share what the first and the last of them in sorted order share.
    first, last = min(texts), max(texts)
    low, high = 0, min(len(first), len(last))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == last[low:middle]:
            low = middle
        else:
            high = middle - 1
    return first[:low]
