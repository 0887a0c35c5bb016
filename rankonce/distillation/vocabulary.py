"""Cut the vocabulary of a byte-pair tokenizer to what texts need.

Kept are the tokens that are asked for, all added tokens, the bytes or letters that any text falls
back on, and every token on the way to a kept one by merges. A text whose tokens are all kept is
encoded as before: each merge that it took is still there and keeps its rank, and no merge is new.
Any other text falls into smaller tokens.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from rankonce.errors import ModelError

# What older tokenizers keep their vocabulary in beside tokenizer.json.
_OTHER_FILES = ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json")
_CONFIG_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, kw_only=True)
class CutVocabulary:
    """A smaller vocabulary.

    Attributes:
        tokens: the old ids of the kept tokens, ascending; their places are the new ids.
        new_ids: the new id of every kept old one.
        content: of tokenizer.json.
    """

    tokens: Tensor
    new_ids: Mapping[int, int]
    content: str


def cut_vocabulary(tokenizer: Any, used: Iterable[int]) -> CutVocabulary:
    """Choose what to keep and write the tokenizer anew.

    Args:
        tokenizer: a fast transformers tokenizer.
        used: ids of tokens that must stay.

    Raises:
        ModelError: it is no byte-pair tokenizer, or it has no token of a used id.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model.get("type") != "BPE" or model.get("continuing_subword_prefix"):
        raise ModelError(
            "drop_unused_vocabulary: the tokenizer should be one of byte pairs (BPE), is "
            f"{model.get('type')}"
        )
    ids: dict[str, int] = model["vocab"]
    texts = {number: text for text, number in ids.items()}
    added = {token["id"]: token["content"] for token in content["added_tokens"]}
    wanted = {*used, *added, *(one for one in tokenizer.all_special_ids if one is not None)}
    if unknown := wanted - texts.keys() - added.keys():
        raise ModelError(f"tokenizer: has no token {min(unknown)}, which the prompts use")
    wanted |= {number for text, number in ids.items() if _is_ground(text, model)}
    kept = _with_parts(wanted, ids, model["merges"])
    tokens = sorted(kept)
    new_ids = {old: new for new, old in enumerate(tokens)}
    model["vocab"] = {text: new_ids[number] for text, number in ids.items() if number in kept}
    model["merges"] = [
        [left, right]
        for left, right in model["merges"]
        if all(part in model["vocab"] for part in (left, right, left + right))
    ]
    for token in content["added_tokens"]:
        token["id"] = new_ids[token["id"]]
    if content.get("padding"):
        content["padding"]["pad_id"] = new_ids[content["padding"]["pad_id"]]
    content["post_processor"] = _renumber(content.get("post_processor"), new_ids)
    return CutVocabulary(
        tokens=torch.tensor(tokens),
        new_ids=new_ids,
        content=json.dumps(content, ensure_ascii=False),
    )


def _is_ground(text: str, model: Mapping[str, Any]) -> bool:
    """Whether texts may fall back on this token: a letter, as bytes are in most, or a byte."""
    is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return len(text) == 1 or is_byte or text == model.get("unk_token")


def _with_parts(
    wanted: Iterable[int], ids: Mapping[str, int], merges: Sequence[Sequence[str]]
) -> set[int]:
    """Add the parts of every merge that gives a kept token, and theirs."""
    parts: dict[int, list[int]] = {}
    for left, right in merges:
        parts.setdefault(ids[left + right], []).extend((ids[left], ids[right]))
    kept: set[int] = set()
    waiting = list(wanted)
    while waiting:
        token = waiting.pop()
        if token not in kept:
            kept.add(token)
            waiting += parts.get(token, ())
    return kept


def _renumber(part: Any, new_ids: Mapping[int, int]) -> Any:
    """Give the ids in a post-processor their new numbers, wherever they stand."""
    if isinstance(part, list):
        # RobertaProcessing and BertProcessing name a token and its id.
        if len(part) == 2 and isinstance(part[0], str) and type(part[1]) is int:
            return [part[0], new_ids[part[1]]]
        return [_renumber(one, new_ids) for one in part]
    if isinstance(part, dict):
        return {
            name: [new_ids[one] for one in value] if name == "ids" else _renumber(value, new_ids)
            for name, value in part.items()
        }
    return part


def renumber_config(config: Any, new_ids: Mapping[int, int]) -> None:
    """Give the special tokens that a configuration names their new numbers."""
    for name in _CONFIG_IDS:
        value = getattr(config, name, None)
        if isinstance(value, list | tuple):
            setattr(config, name, [new_ids[one] for one in value])
        elif value is not None:
            # A number without a row of its own has never been a token.
            setattr(config, name, new_ids.get(value))


def write_tokenizer(tokenizer: Any, cut: CutVocabulary, out: Path) -> None:
    """Save a tokenizer with the cut vocabulary in place of its own."""
    tokenizer.save_pretrained(out)
    for name in _OTHER_FILES:
        (out / name).unlink(missing_ok=True)
    (out / "tokenizer.json").write_text(cut.content, encoding="utf-8")
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    decoder = config.get("added_tokens_decoder")
    if decoder:
        config["added_tokens_decoder"] = {
            str(cut.new_ids[int(number)]): token for number, token in decoder.items()
        }
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_cut_tokenizer(out: Path, cut: CutVocabulary) -> Any:
    """Load what ``write_tokenizer`` wrote, as everybody will.

    Raises:
        ModelError: its class makes another vocabulary of the files.
    """
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(out)
    expected = Tokenizer.from_str(cut.content).get_vocab(with_added_tokens=True)
    if loaded.get_vocab() != expected:
        raise ModelError(
            f"drop_unused_vocabulary: {type(loaded).__name__} does not take a cut vocabulary"
        )
    return loaded
