"""Text to token ids, with text from outside kept apart from special tokens."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import Encoding, Tokenizer

from rankonce.errors import ModelError, RequestError
from rankonce.prompts.token_cache import TokenCache

# Of plain conversations; the tasks' own by default.
_ANSWER_SLOT = "Answer:"
_CONTENT_MARK = "\x02content\x02"
_INSTRUCTION_MARK = "\x02instruction\x02"
# The mark of a turn stands between em spaces: a template that trims its contents takes them off.
_TURN_MARK = "\u2003\x02{}\x02\u2003"
_TURN_MARKS = re.compile("(\u2003?)\x02([0-9]+)\x02(\u2003?)")


class TextEncoder:
    """A tokenizer seen from the prompt: what frames a request, and how its text is encoded.

    The frame comes from the model (its chat template, or the token that begins a text) and may hold
    special tokens. Everything else is encoded by a copy of the tokenizer that knows no added token,
    so that ``<|im_end|>`` in a title is letters like any other.

    Args:
        tokenizer: a fast transformers tokenizer.
        chat: use the chat template; ``None`` uses it where there is one.
        cache: keeps the ids of candidates and events; by default there is none.

    Attributes:
        chat: whether the chat template is used.
        head, middle, tail: frame before the instruction, between it and the rest of the prefix,
            and after a segment, up to the answer.
        label_lead: what stands between the answer slot and a label.
    """

    def __init__(
        self, tokenizer: Any, *, chat: bool | None = None, cache: TokenCache | None = None
    ) -> None:
        self.cache = cache or TokenCache(0)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ModelError(f"tokenizer: {type(tokenizer).__name__} is not a fast tokenizer")
        if chat and not tokenizer.chat_template:
            raise ModelError("chat: the tokenizer has no chat template")
        self.chat = bool(tokenizer.chat_template) if chat is None else chat
        self._framing = Tokenizer.from_str(backend.to_str())
        self._tokenizer = tokenizer
        plain = json.loads(backend.to_str())
        self._added_ids = {token["id"] for token in plain["added_tokens"]}
        self._special_ids = {token["id"] for token in plain["added_tokens"] if token["special"]}
        self._special_ids |= set(tokenizer.all_special_ids)
        plain["added_tokens"] = []
        plain["post_processor"] = None
        plain["truncation"] = plain["padding"] = None
        self._plain = Tokenizer.from_str(json.dumps(plain))
        self.head, self.middle, self.tail = _chat_frame(tokenizer) if self.chat else ("", "", "")
        self.label_lead = "" if self.chat else " "
        self._head_ids: tuple[int, ...] = ()
        puts_begin = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
        self._begin_id: int | None = tokenizer.bos_token_id if puts_begin else None
        if not self.chat and puts_begin:
            self.head, self._head_ids = tokenizer.bos_token, (tokenizer.bos_token_id,)
        self._line_ids = self._plain.encode("\n", add_special_tokens=False).ids
        self._opens_afresh = self._text_opens_afresh()
        # What stands before the tail's first special token is encoded together with a segment.
        (self._tail_start, *runs), special_ids = self._split([(self.tail, True)])
        self._tail_ids = self._join(special_ids, runs)

    def encode_prefix(self, instruction: str, body: str) -> tuple[int, ...]:
        """Encode the prefix of a request: the frame's head, the instruction and the rest."""
        if not self.chat:
            return (*self._head_ids, *self._encode_all([f"{instruction}\n{body}"])[0])
        between = (self.middle, True) if self.middle else ("\n", False)
        return self._encode_pieces(
            [(self.head, True), (instruction, False), between, (body, False)]
        )

    def encode_segments(
        self, texts: Sequence[str], *, cache_salt: str | None = None
    ) -> list[tuple[int, ...]]:
        """Encode segments as they stand after the prefix's last line, with the frame's tail."""
        encoded = self.cache.encode(
            [text + self._tail_start for text in texts],
            self._encode_behind_line,
            cache_salt=cache_salt,
        )
        return [(*ids, *self._tail_ids) for ids in encoded]

    def count_tokens(self, texts: Sequence[str], *, cache_salt: str | None = None) -> list[int]:
        """Count the tokens of texts that stand on lines of their own."""
        lines = [f"{text}\n" for text in texts]
        encoded = self.cache.encode(lines, self._encode_all, cache_salt=cache_salt)
        return [len(ids) for ids in encoded]

    def encode_answer(self, slot: str, answer: str) -> list[int]:
        """Return the ids that ``answer``, taken to the letter, adds after the answer slot.

        Args:
            slot: the last words of a plain prompt; a chat prompt ends with its frame instead.
        """
        before = self.tail if self.chat else slot
        encode = self._frame_ids if self.chat else lambda text: list(self._encode_all([text])[0])
        known, ids = encode(before), encode(before + answer)
        if ids[: len(known)] != known:
            return ids
        return ids[len(known) :]

    def encode_chat(self, turns: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        """Encode a conversation by the model's chat template, up to where the answer begins.

        The ids are those of the whole text, except that special tokens come from the template
        only: in a turn's content they are letters.

        Args:
            turns: role and content of each turn.

        Raises:
            RequestError: there is no template, or it does not take these turns.
        """
        if not self._tokenizer.chat_template:
            raise RequestError("messages: the model has no chat template")
        pieces = _chat_pieces(self._tokenizer, turns, up_to_answer=True)
        return self._encode_pieces([(text, place is None) for text, place in pieces])

    def encode_conversation(
        self, turns: Sequence[tuple[str, str]]
    ) -> tuple[tuple[int, ...], tuple[int | None, ...]]:
        """Encode a whole conversation and find its answers.

        The ids are those of the whole text, as in ``encode_chat``. An answer ends with the next
        special token that the template writes, or, where that writes none behind the last answer,
        with the token that ends a text, which is added. A plain conversation is written as a plain
        prompt is: question, ``Answer:``, answer, and the token that ends a text. What the system
        says opens the first question where there is no turn for it.

        Args:
            turns: role and content of each turn; user and assistant alternate.

        Returns:
            The ids, and for each the place of the turn that it answers for, ``None`` if none.

        Raises:
            RequestError: the template does not take these turns.
            ModelError: no token ends a text, and one is needed.
        """
        shift = int(turns[0][0] == "system" and not (self.chat and self.middle))
        if shift:
            (_, system), (role, content), *rest = turns
            turns = [(role, f"{system}\n{content}"), *rest]
        if self.chat:
            pieces = _chat_pieces(self._tokenizer, turns, up_to_answer=False)
        else:
            pieces = self._plain_pieces(turns)
        answers = {place for place, (role, _) in enumerate(turns) if role == "assistant"}
        runs, special_ids, spans, ends = self._find_answers(pieces, answers)
        ids: list[int] = [] if self.chat else list(self._head_ids)
        owners: list[int | None] = [None] * len(ids)
        for number, (run_ids, offsets) in enumerate(self._encode_runs(runs)):
            if number:
                ids.append(special_ids[number - 1])
                owners.append(ends.get(number - 1))
            ids += run_ids
            here = [span[1:] for span in spans if span[0] == number]
            owners += [
                next((owner for low, high, owner in here if start < high and end > low), None)
                for start, end in offsets
            ]
        return tuple(ids), tuple(None if one is None else one + shift for one in owners)

    def encode_documents(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Encode whole texts: a token that begins each, its own tokens, the end-of-text token.

        The first is the tokenizer's begin token if it puts one before a text, else the end-of-text
        token, as if another text stood before: a token of the text is predicted in every place.

        Raises:
            ModelError: the tokenizer has no end-of-text token.
            RequestError: a text would become a special token.
        """
        end = self._tokenizer.eos_token_id
        if end is None:
            raise ModelError("tokenizer: has no end-of-text token, which ends a text")
        begin = self._begin_id if self._begin_id is not None else end
        return [(begin, *ids, end) for ids in self._encode_all(texts)]

    def whole_text_ids(self, text: str) -> list[int]:
        """Encode a rendered prompt in one go, special tokens recognised: for comparison only."""
        return [
            *self._head_ids,
            *self._frame_ids(text.removeprefix("" if self.chat else self.head)),
        ]

    def token(self, token_id: int) -> str:
        """Return the text of one token, for people."""
        return str(self._framing.decode([token_id], skip_special_tokens=False))

    def _text_opens_afresh(self) -> bool:
        """Whether text after a special token is encoded as text at the beginning is."""
        for token in self._tokenizer.added_tokens_decoder.values():
            if not (token.normalized or token.rstrip):
                behind = self._frame_ids(f"{token.content}a")[1:]
                return behind == self._plain.encode("a", add_special_tokens=False).ids
        return True

    def _encode_pieces(self, pieces: Sequence[tuple[str, bool]]) -> tuple[int, ...]:
        runs, special_ids = self._split(pieces)
        return (*self._encode_all(runs[:1])[0], *self._join(special_ids, runs[1:]))

    def _plain_pieces(self, turns: Sequence[tuple[str, str]]) -> list[tuple[str, int | None]]:
        """Write turns as plain prompts with their answers."""
        pieces: list[tuple[str, int | None]] = []
        for place, (role, content) in enumerate(turns):
            if role == "assistant":
                pieces += [(self.label_lead + content, place), (self._end_token(), None)]
            else:
                line = "\n" if pieces else ""
                pieces.append((f"{line}{content}\n{_ANSWER_SLOT}", place))
        return pieces

    def _end_token(self) -> str:
        if self._tokenizer.eos_token is None:
            raise ModelError("tokenizer: should have a token that ends a text (eos_token)")
        return str(self._tokenizer.eos_token)

    def _find_answers(
        self, pieces: Sequence[tuple[str, int | None]], answers: set[int]
    ) -> tuple[list[str], list[int], list[tuple[int, int, int, int]], dict[int, int]]:
        """Cut pieces at the special tokens of the frame, as ``_split`` does, and find the answers.

        Returns:
            The runs of text, the special tokens between them, stretches of answers as ``(run, first
            character, end, place)``, and the places of the answers that a special token ends.
        """
        runs, special_ids, ends = [""], list[int](), dict[int, int]()
        spans: list[tuple[int, int, int, int]] = []
        is_open = False
        for text, is_frame, owner in self._own_pieces(pieces, answers):
            (first, *rest), ids = self._split([(text, is_frame)])
            run, start = len(runs) - 1, len(runs[-1])
            runs[-1] += first
            if owner is not None:
                spans.append((run, start, len(runs[-1]), owner))
                is_open = True
            elif not is_frame:
                is_open = False
            elif is_open and ids:
                # The model writes what the template has before the token that ends the answer.
                run, start, _, place = spans[-1]
                spans[-1] = (run, start, len(runs[-1]), place)
                ends[len(special_ids)] = place
                is_open = False
            runs += rest
            special_ids += ids
        if is_open:
            run, start, _, place = spans[-1]
            spans[-1] = (run, start, len(runs[-1]), place)
            ends[len(special_ids)] = place
            (_, *rest), ids = self._split([(self._end_token(), True)])
            runs, special_ids = runs + rest, special_ids + ids
        return runs, special_ids, spans, ends

    def _own_pieces(
        self, pieces: Sequence[tuple[str, int | None]], answers: set[int]
    ) -> Iterator[tuple[str, bool, int | None]]:
        """Give pieces with whether the template wrote them and the answer that they belong to."""
        places = [place for _, place in pieces]
        for (text, place), after in zip(pieces, [*places[1:], None], strict=True):
            if place is not None:
                yield text, False, place if place in answers else None
            elif after in answers and text.removeprefix(self.tail).isspace():
                # A space that the prompt for the answer does not have belongs to the answer.
                lead = text.removeprefix(self.tail)
                yield text.removesuffix(lead), True, None
                yield lead, False, after
            else:
                yield text, True, None

    def _encode_runs(
        self, runs: Sequence[str]
    ) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        """Encode what stands before, between and after special tokens, with character offsets."""
        for number, run in enumerate(runs):
            if number and not self._opens_afresh:
                (encoding,) = self._encodings_behind_line([run], has_offsets=True)
                count, shift = len(self._line_ids), len("\n")
            else:
                (encoding,) = self._encodings([run], has_offsets=True)
                count, shift = 0, 0
            offsets = [(start - shift, end - shift) for start, end in encoding.offsets[count:]]
            yield encoding.ids[count:], offsets

    def _split(self, pieces: Sequence[tuple[str, bool]]) -> tuple[list[str], list[int]]:
        """Cut text at the special tokens of its frame.

        Text between special tokens is encoded in one piece, whether frame or content: only then are
        its ids those of the whole text.

        Args:
            pieces: text and whether it belongs to the frame.
        """
        runs, special_ids = [""], []
        for text, is_frame in pieces:
            done = 0
            if is_frame:
                encoding = self._framing.encode(text, add_special_tokens=False)
                for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
                    if token_id in self._added_ids:
                        runs[-1] += text[done:start]
                        runs.append("")
                        special_ids.append(token_id)
                        done = end
            runs[-1] += text[done:]
        return runs, special_ids

    def _join(self, special_ids: Sequence[int], runs: Sequence[str]) -> tuple[int, ...]:
        """Encode special tokens, each with the run of text that follows it."""
        encode = self._encode_all if self._opens_afresh else self._encode_behind_line
        pairs = zip(special_ids, encode(runs), strict=True)
        return tuple(i for special_id, ids in pairs for i in (special_id, *ids))

    def _encode_behind_line(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Encode texts as they stand within a longer one."""
        count = len(self._line_ids)
        return [tuple(encoding.ids[count:]) for encoding in self._encodings_behind_line(texts)]

    def _encode_all(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        return [tuple(encoding.ids) for encoding in self._encodings(texts)]

    def _encodings_behind_line(
        self, texts: Sequence[str], *, has_offsets: bool = False
    ) -> list[Encoding]:
        # Encoding a text behind a line break and taking that off again gives the ids that it has
        # there: a tokenizer may put a space before a text's first word.
        count = len(self._line_ids)
        encoded = self._encodings([f"\n{text}" for text in texts], has_offsets=has_offsets)
        if any(list(encoding.ids[:count]) != self._line_ids for encoding in encoded):
            raise ModelError("tokenizer: joins a line break with the word after it")
        return encoded

    def _encodings(self, texts: Sequence[str], *, has_offsets: bool = False) -> list[Encoding]:
        # A third of the time goes into offsets.
        encode = self._plain.encode_batch if has_offsets else self._plain.encode_batch_fast
        encoded = encode(list(texts), add_special_tokens=False)
        for text, encoding in zip(texts, encoded, strict=True):
            # A vocabulary may hold a special token as an ordinary word as well.
            found = self._special_ids.intersection(encoding.ids)
            if found:
                tokens = ", ".join(repr(self.token(token_id)) for token_id in sorted(found))
                raise RequestError(f"text: {text[:80]!r} would become the special token {tokens}")
        return list(encoded)

    def _frame_ids(self, text: str) -> list[int]:
        return list(self._framing.encode(text, add_special_tokens=False).ids)


def _chat_frame(tokenizer: Any) -> tuple[str, str, str]:
    """Cut the chat template at the places where instruction and content stand."""
    system, user = ("system", _INSTRUCTION_MARK), ("user", _CONTENT_MARK)
    try:
        text = _render_chat(tokenizer, [system, user])
    except Exception as error:  # templates raise what they like
        if "system" not in str(error).lower():
            raise ModelError(f"chat template: cannot be applied: {error}") from error
        text = ""
    if _INSTRUCTION_MARK not in text:
        # No system turn in this template: the instruction opens the member's own turn.
        try:
            text = _render_chat(tokenizer, [user])
        except Exception as error:  # templates raise what they like
            raise ModelError(f"chat template: cannot be applied: {error}") from error
        head, tail = _cut(text, _CONTENT_MARK, "the member's turn")
        return head, "", tail
    head, rest = _cut(text, _INSTRUCTION_MARK, "the system turn")
    middle, tail = _cut(rest, _CONTENT_MARK, "the member's turn after that of the system")
    return head, middle, tail


def _cut(text: str, mark: str, turn: str) -> tuple[str, str]:
    count = text.count(mark)
    if not count:
        raise ModelError(f"chat template: drops the content of {turn}")
    if count > 1:
        raise ModelError(f"chat template: writes the content of {turn} {count} times")
    before, _, after = text.partition(mark)
    return before, after


def _chat_pieces(
    tokenizer: Any, turns: Sequence[tuple[str, str]], *, up_to_answer: bool
) -> list[tuple[str, int | None]]:
    """Apply the template to turns; returns text and the turn it is the content of, if any."""
    marked = [(role, _TURN_MARK.format(place)) for place, (role, _) in enumerate(turns)]
    try:
        text = _render_chat(tokenizer, marked, up_to_answer=up_to_answer)
    except Exception as error:  # templates raise what they like
        raise RequestError(f"messages: the chat template refuses them: {error}") from error
    pieces: list[tuple[str, int | None]] = []
    done, places = 0, set[int]()
    for mark in _TURN_MARKS.finditer(text):
        place = int(mark[2])
        content = turns[place][1]
        content = content if mark[1] else content.lstrip()
        content = content if mark[3] else content.rstrip()
        pieces += [(text[done : mark.start()], None), (content, place)]
        done = mark.end()
        places.add(place)
    for place in sorted(set(range(len(turns))) - places):
        raise RequestError(f"messages[{place}]: the chat template leaves its content out")
    return [*pieces, (text[done:], None)]


def _render_chat(
    tokenizer: Any, turns: Sequence[tuple[str, str]], *, up_to_answer: bool = True
) -> str:
    # Reasoning models answer at once where their template has the switch.
    text = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns],
        tokenize=False,
        add_generation_prompt=up_to_answer,
        enable_thinking=False,
    )
    return str(text)
