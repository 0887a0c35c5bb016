"""SGLang by its score endpoint: a query, items behind it, and the labels' tokens.

With ``--enable-mis`` SGLang packs query and items into one sequence as RankOnce does, with a
delimiter in front of each item and behind the last; without it every item is a prompt of its own.
The same question does for both. Packed, it must fit the model's context, and SGLang's metadata is
16 bits wide: a longer one would be scored wrongly, so questions are cut before that.
"""

import math
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np

from rankonce.errors import RequestError
from rankonce.serving.backends.base import GroupScores, PromptGroup
from rankonce.serving.backends.remote import Question, RemoteEngine

_PATH = "/v1/score"
_MAX_PACKED_TOKENS = 65_535


class SglangServer(RemoteEngine):
    """An SGLang server."""

    engine = "sglang"
    # A packed item has a delimiter before it and one behind.
    num_extra_tokens = 3

    def questions(self, group: PromptGroup) -> list[list[Question]]:
        """Cut the prompts into questions that fit even when they are packed."""
        if group.num_top:
            raise RequestError(
                "logprobs: the engine sglang gives those of labels alone; ask /v1/rank, "
                "/v1/rerank, /v1/score or /generative_scoring"
            )
        most = min(self.max_prompt_tokens, _MAX_PACKED_TOKENS)
        # A delimiter for each item; the one before the first is counted in already.
        room = most - len(group.prefix_ids)
        ends = list(accumulate((len(ids) + 1 for ids in group.segment_ids), initial=0))
        asked: list[Question] = []
        first = 0
        while first < len(group.segment_ids):
            last = int(np.searchsorted(ends, ends[first] + room, side="right")) - 1
            # An item that is as long as a prompt may be goes by itself.
            last = max(last, first + 1)
            asked.append(self._question(group, first, last))
            first = last
        return [asked]

    def _question(self, group: PromptGroup, first: int, last: int) -> Question:
        body = {
            "model": self.config.model,
            "query": list(group.prefix_ids),
            "items": [list(ids) for ids in group.segment_ids[first:last]],
            "label_token_ids": list(group.label_ids),
            "apply_softmax": False,
            "item_first": False,
            "return_token_logprobs": True,
        }
        return Question(path=_PATH, body=body, read=partial(self._read_answer, group, last - first))

    def _read_answer(self, group: PromptGroup, num_items: int, answer: Any) -> GroupScores:
        rows = answer.get("token_logprobs")
        if rows is None:
            # Versions before return_token_logprobs tell probabilities alone.
            rows = [[math.log(value) for value in row] for row in answer["scores"]]
        if [len(row) for row in rows] != [len(group.label_ids)] * num_items:
            raise ValueError(f"scores should be {num_items} rows of {len(group.label_ids)} labels")
        return GroupScores(
            label_logprobs=[[float(value) for value in row] for row in rows],
            # What the radix cache spared is not told.
            prompt_tokens=answer["usage"]["prompt_tokens"],
        )
