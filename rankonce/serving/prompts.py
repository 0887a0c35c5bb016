"""Prompts that the caller wrote, to token ids, and tokens back to text.

The caller owns the whole prompt here, so special tokens in its text are special tokens, as with
every server that takes OpenAI's completions.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer

from rankonce.errors import LabelError, PromptTooLongError, RequestError
from rankonce.model.loading import LoadedModel
from rankonce.prompts.encoding import TextEncoder

# Stands before what is encoded or decoded in the middle of a text: tokenizers treat a beginning
# in their own way.
_BEFORE = ":"


class PromptReader:
    """Text to token ids and back for one model.

    Args:
        model: whose tokenizer and bounds count.
        encoder: finds the token of a label.
    """

    def __init__(self, model: LoadedModel, encoder: TextEncoder) -> None:
        # A copy: transformers sets truncation and padding on its own one, and threads share it.
        self._backend = Tokenizer.from_str(model.tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._encoder = encoder
        self._before_ids = self._backend.encode(_BEFORE, add_special_tokens=False).ids
        self._before = self._decode(self._before_ids)
        self.num_vocabulary = model.head.weight_VD.shape[0]
        self.max_prompt_tokens = model.max_prompt_tokens

    def encode_all(
        self, prompts: Sequence[str] | Sequence[tuple[int, ...]]
    ) -> list[tuple[int, ...]]:
        """Encode texts as the tokenizer's own call does, special tokens recognised.

        Prompts that are token ids already stay as they are.
        """
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        encoded = iter(self._backend.encode_batch(texts))
        return [
            tuple(next(encoded).ids) if isinstance(prompt, str) else prompt for prompt in prompts
        ]

    def encode_joined(
        self,
        query: str | tuple[int, ...],
        items: Sequence[str] | Sequence[tuple[int, ...]],
        *,
        item_first: bool,
        add_special_tokens: bool,
    ) -> list[tuple[int, ...]]:
        """Encode query and items apart and join their ids, as vLLM does.

        Args:
            add_special_tokens: those that the tokenizer puts around a text, around the query alone.
        """
        if isinstance(query, str):
            encoded = self._backend.encode(query, add_special_tokens=add_special_tokens)
            query = tuple(encoded.ids)
        texts = [item for item in items if isinstance(item, str)]
        ids = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        parts = [tuple(next(ids).ids) if isinstance(item, str) else item for item in items]
        return [part + query if item_first else query + part for part in parts]

    def cut(self, text: str, max_tokens: int) -> str:
        """Return the part of a text that has at most so many tokens."""
        encoded = self._backend.encode(text, add_special_tokens=False)
        if len(encoded.ids) <= max_tokens:
            return text
        return text[: encoded.offsets[max_tokens][0]].rstrip()

    def check(self, prompts: Sequence[tuple[int, ...]], field: str) -> None:
        """Refuse prompts that the model cannot read.

        Args:
            field: names the prompts in the message.
        """
        for index, ids in enumerate(prompts):
            path = field if len(prompts) == 1 else f"{field}[{index}]"
            if not ids:
                raise RequestError(f"{path}: should hold at least one token")
            self.check_ids(ids, path)
            if len(ids) > self.max_prompt_tokens:
                raise PromptTooLongError(
                    f"{path}: the prompt has {len(ids)} tokens, the model takes "
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
