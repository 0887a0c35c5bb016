"""What a load asks for: members with a prefix and candidates of exact lengths, as both forms.

Every request is another member, so no server finds a prefix of an earlier one in its cache; what
the candidates of one request share, it may find. Texts are made of words that are one token each,
so that lengths are exact and every server's tokenizer finds the same tokens.
"""

import random
from dataclasses import dataclass, replace
from typing import Any

from rankonce.errors import ModelError
from rankonce.layout import TokenizedRequest
from rankonce.ranker import Ranker
from rankonce.records import Event, Item, ScoreRequest

_TASK = "job-apply"
_NOW = 1_700_000_000
_MONTH = 40 * 86_400
_TITLE_WORDS = 8
_PART_WORDS = 2
_FEW_WORDS = 100


@dataclass(frozen=True, kw_only=True)
class LoadWorkload:
    """The shape of a load's requests.

    Attributes:
        prefix_tokens: that all candidates of a request share.
        candidate_tokens: of each, the answer slot included.
        has_task: requests are members of a task, which our own form knows; else texts alone.
    """

    name: str
    prefix_tokens: int
    num_candidates: int
    candidate_tokens: int
    has_task: bool

    def __str__(self) -> str:
        return (
            f"{self.name}: prefix {self.prefix_tokens}, {self.num_candidates} candidates of "
            f"{self.candidate_tokens} tokens"
        )


# Query, item and number of items of SGLang's benchmark of its score endpoint.
BENCH_SCORE = LoadWorkload(
    name="bench_score", prefix_tokens=120, num_candidates=10, candidate_tokens=180, has_task=False
)
MEMBER = LoadWorkload(
    name="member", prefix_tokens=2048, num_candidates=100, candidate_tokens=64, has_task=True
)
# The shorter a candidate, the more of a server's work is by the request and not by the token.
MEMBER_SHORT = replace(MEMBER, name="member_short", candidate_tokens=20)
LOAD_WORKLOADS = {workload.name: workload for workload in (MEMBER, MEMBER_SHORT, BENCH_SCORE)}


@dataclass(frozen=True, kw_only=True)
class LoadRequest:
    """One request in every form that a server may take.

    Attributes:
        request: of our own form, where the workload has a task.
        query, items: the same as texts; ``query + item`` is a whole prompt, to which a tokenizer
            adds what begins a text.
        tokens: the same as token ids.
        label_names: of the task.
    """

    request: ScoreRequest | None
    query: str
    items: tuple[str, ...]
    tokens: TokenizedRequest
    label_names: tuple[str, ...]

    @property
    def label_ids(self) -> list[int]:
        """The token of each label."""
        return [ids[0] for ids in self.tokens.label_ids]


class LoadWriter:
    """Writes the requests of a workload, another one for every number.

    Args:
        ranker: of the checkpoint that the servers serve, without a chat template.

    Raises:
        ModelError: the tokenizer has too few words of one token.
    """

    def __init__(self, ranker: Ranker, workload: LoadWorkload, *, seed: int = 0) -> None:
        self.ranker = ranker
        self.workload = workload
        self._seed = seed
        self._task = ranker.tasks[_TASK]
        self._begin = ranker.renderer.encoder.head
        self._words = single_token_words(ranker.model.tokenizer.backend_tokenizer)

    def write(self, number: int) -> LoadRequest:
        """Write the request with this number.

        Raises:
            ModelError: the workload's lengths do not suffice for its task.
        """
        draw = random.Random(f"{self._seed} {number}")
        if self.workload.has_task:
            return self._write_member(draw, number)
        shape = self.workload
        query = self._say(draw, shape.prefix_tokens - bool(self._begin))
        items = tuple(self._say(draw, shape.candidate_tokens) for _ in range(shape.num_candidates))
        return self._give(None, query, items)

    def score_offline(self, request: LoadRequest) -> list[list[float]]:
        """Log-probabilities of the labels among themselves, by the ranker of this process."""
        (raw,) = self.ranker.forward([request.tokens])
        rows: list[list[float]] = raw.labels_CL.tolist()
        return rows

    def _write_member(self, draw: random.Random, number: int) -> LoadRequest:
        """Lengthen the oldest event and every candidate until they have the tokens asked for."""
        shape = self.workload
        candidate = Item(fields={"title": self._title(draw, 1)})
        member = ScoreRequest(
            task=_TASK,
            id=str(number),
            time=_NOW,
            profile={"headline": self._title(draw, _TITLE_WORDS), "years_of_experience": 7},
            candidates=(candidate,),
        )

        def tokens_of(num_events: int) -> TokenizedRequest:
            asked = replace(member, history=tuple(reversed(events[:num_events])))
            return self.ranker.prepare(asked).rendered.tokens

        events = [self._event(draw, place) for place in range(2 + shape.prefix_tokens // 8)]
        one, two = (len(tokens_of(count).prefix_ids) for count in (1, 2))
        num_events = max(1, 1 + (shape.prefix_tokens - one) // (two - one))
        missing = shape.prefix_tokens - len(tokens_of(num_events).prefix_ids)
        while missing < 0 and num_events > 1:
            num_events = max(1, num_events + missing // (two - one))
            missing = shape.prefix_tokens - len(tokens_of(num_events).prefix_ids)
        room = shape.candidate_tokens - len(tokens_of(1).segment_ids[0])
        if missing < 0 or room < 0:
            raise ModelError(f"{shape}: is too little for a request of {_TASK}")
        oldest = events[num_events - 1]
        fields = dict(oldest.item.fields)
        fields["title"] = f"{fields['title']}{self._say(draw, missing)}"
        events[num_events - 1] = replace(oldest, item=Item(fields=fields))
        request = replace(
            member,
            history=tuple(reversed(events[:num_events])),
            candidates=tuple(
                Item(id=str(place), fields={"title": self._title(draw, 1 + room)})
                for place in range(shape.num_candidates)
            ),
        )
        rendered = self.ranker.prepare(request).rendered
        return self._give(request, rendered.prefix.removeprefix(self._begin), rendered.segments)

    def _event(self, draw: random.Random, place: int) -> Event:
        fields = {
            "title": self._title(draw, _TITLE_WORDS),
            "company": self._title(draw, _PART_WORDS),
            "location": self._title(draw, _PART_WORDS),
        }
        action = draw.choice(("applied", "viewed", "dismissed"))
        # Within a month of each other, so that their lines say alike how long ago they were.
        return Event(item=Item(fields=fields), action=action, time=_NOW - _MONTH - 60 * place)

    def _title(self, draw: random.Random, count: int) -> str:
        return self._say(draw, count)[1:]

    def _say(self, draw: random.Random, count: int) -> str:
        """Say words that are a token each, with a space before each."""
        return "".join(draw.choices(self._words, k=count))

    def _give(
        self, request: ScoreRequest | None, query: str, items: tuple[str, ...]
    ) -> LoadRequest:
        """Encode whole prompts, as every server does, and make sure of their lengths."""
        tokenizer = self.ranker.model.tokenizer.backend_tokenizer
        shape, prefix_tokens = self.workload, self.workload.prefix_tokens
        prefix_ids = tuple(tokenizer.encode(query).ids)
        segment_ids = tuple(
            tuple(encoding.ids)
            for encoding in tokenizer.encode_batch(items, add_special_tokens=False)
        )
        whole = tokenizer.encode(query + items[-1]).ids
        lengths = {len(prefix_ids)} | {len(ids) + prefix_tokens for ids in segment_ids}
        exact = {prefix_tokens, prefix_tokens + shape.candidate_tokens}
        if tuple(whole) != prefix_ids + segment_ids[-1] or lengths != exact:
            raise ModelError(f"{shape}: the tokenizer does not give these lengths")
        return LoadRequest(
            request=request,
            query=query,
            items=items,
            tokens=TokenizedRequest(
                prefix_ids=prefix_ids,
                segment_ids=segment_ids,
                label_ids=self.ranker.renderer.label_ids(self._task),
            ),
            label_names=self._task.label_names,
        )


def single_token_words(tokenizer: Any) -> list[str]:
    """List words with a space before them that are one token wherever they stand.

    Raises:
        ModelError: there are fewer than a hundred.
    """
    texts = {tokenizer.decode([token]) for token in range(tokenizer.get_vocab_size())}
    words = sorted(text for text in texts if text[:1] == " " and text[1:].isalpha())
    behind = tokenizer.encode_batch([f"a{word} a" for word in words], add_special_tokens=False)
    found = [word for word, ids in zip(words, behind, strict=True) if len(ids.ids) == 3]
    if len(found) < _FEW_WORDS:
        raise ModelError(
            f"tokenizer: has only {len(found)} words of one token, {_FEW_WORDS} needed"
        )
    return found
