"""Where a text can be cut so that its two parts, encoded apart, have the ids of the whole.

Many prompts of one question begin alike, and encoding what they share once spares most of the work.
But a tokenizer may join what stands on both sides of a cut. A seam is a place where it provably
does not, whatever follows: a space behind a character that is none. No pattern of ``_PATTERNS``
matches across it, since each takes a space only as its first character or within a run of
whitespace, and none looks back; NFC joins nothing to a space before it; and byte-level models merge
within the pieces of a pattern only. For every other tokenizer there are no seams.
"""

import json
from typing import Any

from tokenizers import Tokenizer

# Of GPT-4 and Llama 3, and of Qwen 2 and 3; GPT-2's is part of the byte-level step.
_PATTERNS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
# What a post-processor may do: put tokens around a text, and correct offsets.
_POST_PROCESSORS = (None, "ByteLevel", "TemplateProcessing")


def has_seams(backend: Tokenizer) -> bool:
    """Whether a tokenizer keeps the parts of a text apart at its seams."""
    parts = json.loads(backend.to_str())
    model, normalizer = parts["model"], parts["normalizer"]
    steps = _steps(parts["pre_tokenizer"], "pretokenizers")
    return (
        model["type"] == "BPE"
        and not model.get("dropout")
        and (normalizer is None or normalizer["type"] == "NFC")
        and all(_is_local(step) for step in steps)
        and any(_parts_at_spaces(step) for step in steps)
        and all(
            step["type"] in _POST_PROCESSORS
            for step in _steps(parts["post_processor"], "processors")
        )
        and all(_keeps_to_itself(token) for token in parts["added_tokens"])
    )


def find_seam(text: str) -> int:
    """Find the last seam of a text; 0 where there is none.

    A space at the very end counts: what follows begins with it then.
    """
    place = len(text)
    while (place := text.rfind(" ", 0, place)) > 0:
        if not text[place - 1].isspace():
            return place
    return 0


def _steps(step: Any, name: str) -> list[Any]:
    if step is None:
        return []
    return [one for part in step[name] for one in _steps(part, name)] if name in step else [step]


def _is_local(step: Any) -> bool:
    """Whether a step does the same on each side of a seam, be the other there or not."""
    if step["type"] == "ByteLevel":
        return not step["add_prefix_space"]
    return step["type"] in ("Digits", "Punctuation") or _parts_at_spaces(step)


def _parts_at_spaces(step: Any) -> bool:
    if step["type"] == "ByteLevel":
        return bool(step.get("use_regex", True))
    return (
        step["type"] == "Split"
        and step["pattern"].get("Regex") in _PATTERNS
        and step["behavior"] == "Isolated"
        and not step["invert"]
    )


def _keeps_to_itself(token: Any) -> bool:
    """Whether an added token is found wherever it stands, takes nothing else, and spans no seam."""
    return not (
        token["single_word"] or token["lstrip"] or token["rstrip"] or " " in token["content"]
    )
