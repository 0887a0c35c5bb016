"""vLLM in this process, where it is installed beside RankOnce."""

import os
import threading
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from rankonce.errors import EngineError
from rankonce.serving.backends.base import Backend, GroupScores, PromptGroup
from rankonce.serving.backends.vllm import MAX_LABELS

_MAX_TOP = 20


class VllmInProcess(Backend):
    """vLLM's own offline interface.

    Args:
        model: folder of a checkpoint, or the id of a repository.
        options: more of vLLM's own, by their names in Python.

    Raises:
        EngineError: vLLM cannot load the checkpoint.
    """

    engine = "vllm"

    def __init__(self, model: str, *, dtype: str, options: Mapping[str, Any]) -> None:
        # Its log goes to stdout otherwise, where data goes.
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        import vllm

        self._vllm = vllm
        self._turn = threading.Lock()
        try:
            self._llm: Any = vllm.LLM(
                model=model,
                dtype=dtype,
                enable_prefix_caching=True,
                disable_log_stats=True,
                **options,
            )
        except Exception as error:  # whatever vLLM raises: it cannot be used
            raise EngineError(f"engine: vllm cannot load {model}: {error}") from error
        # The token that it answers needs a place.
        self.max_prompt_tokens = self._llm.model_config.max_model_len - 1

    def score(self, groups: Sequence[PromptGroup]) -> list[GroupScores]:
        """Score all prompts, the first of every group before the others, which find its prefix."""
        scores = [GroupScores() for _ in groups]
        with self._turn:
            for bounds in ((0, 1), (1, None)):
                self._score(groups, slice(*bounds), scores)
        return scores

    def check(self) -> None:
        """Do nothing: what runs in this process answers, or raises."""

    def tokenize(self, text: str) -> list[int] | None:
        """Encode a text with the tokenizer that vLLM loaded."""
        ids: list[int] = self._llm.get_tokenizer().encode(text, add_special_tokens=False)
        return ids

    def close(self) -> None:
        """Let go of the engine, whose processes end with it."""
        del self._llm

    def _score(
        self, groups: Sequence[PromptGroup], part: slice, scores: Sequence[GroupScores]
    ) -> None:
        asked = [list(group.segment_ids[part]) for group in groups]
        prompts = [
            self._prompt(group, segment)
            for group, segments in zip(groups, asked, strict=True)
            for segment in segments
        ]
        if not prompts:
            return
        longest = max(len(group.label_ids) for group in groups)
        rows: list[dict[int, float]] = [{} for _ in prompts]
        for first in range(0, longest, MAX_LABELS):
            parameters = [
                self._parameters(
                    # One that has no labels left asks for its last one again.
                    logprob_token_ids=list(
                        group.label_ids[first : first + MAX_LABELS] or group.label_ids[-1:]
                    )
                )
                for group, segments in zip(groups, asked, strict=True)
                for _ in segments
            ]
            outputs = self._generate(prompts, parameters)
            for row, output in zip(rows, outputs, strict=True):
                row.update(_logprobs(output))
            if first == 0:
                counted = outputs
        num_top = max(group.num_top for group in groups)
        tops: list[dict[int, float]] = [{} for _ in prompts]
        if num_top:
            parameters = [self._parameters(logprobs=min(num_top, _MAX_TOP)) for _ in prompts]
            tops = [_logprobs(output) for output in self._generate(prompts, parameters)]
        owners = list(chain.from_iterable([i] * len(own) for i, own in enumerate(asked)))
        for owner, row, top, output in zip(owners, rows, tops, counted, strict=True):
            group = groups[owner]
            scores[owner].extend(
                GroupScores(
                    label_logprobs=[[row[token] for token in group.label_ids]],
                    top=[_best(top, group.num_top)] if group.num_top else [],
                    prompt_tokens=len(output.prompt_token_ids),
                    cached_tokens=output.num_cached_tokens or 0,
                )
            )

    def _prompt(self, group: PromptGroup, segment: tuple[int, ...]) -> dict[str, Any]:
        prompt: dict[str, Any] = {"prompt_token_ids": [*group.prefix_ids, *segment]}
        if group.cache_salt is not None:
            prompt["cache_salt"] = group.cache_salt
        return prompt

    def _parameters(self, **asked: Any) -> Any:
        return self._vllm.SamplingParams(max_tokens=1, temperature=0, detokenize=False, **asked)

    def _generate(self, prompts: Sequence[Any], parameters: Sequence[Any]) -> list[Any]:
        try:
            outputs: list[Any] = self._llm.generate(prompts, parameters, use_tqdm=False)
        except Exception as error:  # its processes died, or it found the question wanting
            raise EngineError(f"engine: vllm failed: {error or type(error).__name__}") from error
        return outputs


def _logprobs(output: Any) -> dict[int, float]:
    """Read the log-probabilities after one prompt."""
    return {token: entry.logprob for token, entry in output.outputs[0].logprobs[0].items()}


def _best(top: Mapping[int, float], num_top: int) -> list[tuple[int, float]]:
    return sorted(top.items(), key=lambda pair: -pair[1])[:num_top]
