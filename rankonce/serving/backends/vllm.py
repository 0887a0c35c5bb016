"""vLLM by its completions: one token after each prompt, and the log-probabilities of the labels.

The first prompt of a group goes alone: it leaves the keys and values of the prefix for the others,
and vLLM tells of a question with several prompts only how much of the last one it had cached.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from rankonce.serving.backends.base import GroupScores, PromptGroup
from rankonce.serving.backends.remote import Question, RemoteEngine

_PATH = "/v1/completions"
# Prompts of one question.
_MAX_PROMPTS = 64
# vLLM's own bound on logprob_token_ids.
MAX_LABELS = 128
_ID = "token_id:"


class VllmServer(RemoteEngine):
    """A vLLM server; it needs ``logprob_token_ids``, which 0.32 has."""

    engine = "vllm"

    def questions(self, group: PromptGroup) -> list[list[Question]]:
        """Ask about the first prompt, and then about all others."""
        ends = [0, 1, *range(1 + _MAX_PROMPTS, len(group.segment_ids), _MAX_PROMPTS)]
        parts = list(zip(ends, [*ends[1:], len(group.segment_ids)], strict=True))
        asked = [self._question(group, first, last) for first, last in parts if first < last]
        return [asked[:1], asked[1:]]

    def _question(self, group: PromptGroup, first: int, last: int) -> Question:
        prompts = group.prompts(first, last)
        body: dict[str, Any] = {
            "model": self.config.model,
            "prompt": prompts,
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": 1,
            "logprob_token_ids": list(group.label_ids[:MAX_LABELS]),
            "return_tokens_as_token_ids": True,
        }
        if group.cache_salt is not None:
            body["cache_salt"] = group.cache_salt
        return Question(path=_PATH, body=body, read=partial(self._read_answer, group, body))

    def _read_answer(self, group: PromptGroup, body: dict[str, Any], answer: Any) -> GroupScores:
        prompts, usage = body["prompt"], answer["usage"]
        details = usage.get("prompt_tokens_details") or {}
        cached = details.get("cached_tokens") or 0
        tops = self._read_tops(answer, len(prompts))
        for first in range(MAX_LABELS, len(group.label_ids), MAX_LABELS):
            ids = list(group.label_ids[first : first + MAX_LABELS])
            more = self.ask(_PATH, {**body, "logprob_token_ids": ids})
            others = self._read_tops(more, len(prompts))
            tops = [one | other for one, other in zip(tops, others, strict=True)]
        scores = GroupScores(
            label_logprobs=[_pick(top, group.label_ids) for top in tops],
            prompt_tokens=usage["prompt_tokens"],
            # The last prompt's; the others have of the prefix in common what it has.
            cached_tokens=min(cached, len(group.prefix_ids)) * (len(prompts) - 1) + cached,
        )
        if group.num_top:
            # Beside tokens that are named vLLM gives no others.
            plain = {name: value for name, value in body.items() if name != "logprob_token_ids"}
            answer = self.ask(_PATH, {**plain, "logprobs": group.num_top})
            scores.top = [
                sorted(top.items(), key=lambda pair: -pair[1])[: group.num_top]
                for top in self._read_tops(answer, len(prompts))
            ]
        return scores

    def _read_tops(self, answer: Any, num_prompts: int) -> list[dict[int, float]]:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if len(choices) != num_prompts:
            raise self.broken(f"{len(choices)} of {num_prompts} prompts")
        return [
            {int(name.removeprefix(_ID)): float(value) for name, value in top.items()}
            for top in (choice["logprobs"]["top_logprobs"][0] for choice in choices)
        ]


def _pick(top: dict[int, float], label_ids: Sequence[int]) -> list[float]:
    missing = [token for token in label_ids if token not in top]
    if missing:
        raise ValueError(f"logprob_token_ids: tokens {missing} are missing")
    return [top[token] for token in label_ids]
