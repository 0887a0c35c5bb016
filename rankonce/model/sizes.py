"""A ladder of model sizes with one vocabulary, for training from scratch and distillation.

All rungs are Qwen3 models (normalised queries and keys train well at high learning rates) with
tied embeddings, and share one tokenizer and one padded vocabulary, so that any can teach another.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

from rankonce.errors import ModelError

VOCABULARY_SIZE = 4096
CONTEXT_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """The shape of a decoder; the fields are those of the Qwen3 configuration."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int


def _size(hidden: int, layers: int, heads: int, groups: int, head: int, mlp: int) -> ModelSize:
    return ModelSize(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head,
        intermediate_size=mlp,
    )


# Named by their parameters.
SIZES: dict[str, ModelSize] = {
    "0.07m": _size(16, 2, 1, 1, 16, 48),
    "0.16m": _size(32, 2, 2, 1, 16, 96),
    "0.4m": _size(64, 3, 2, 1, 32, 192),
    "1m": _size(128, 4, 4, 2, 32, 384),
    "3m": _size(192, 6, 6, 2, 32, 512),
    "10m": _size(320, 8, 10, 2, 32, 896),
    "25m": _size(512, 8, 8, 2, 64, 1408),
    "60m": _size(640, 12, 10, 2, 64, 1920),
    "150m": _size(1024, 12, 16, 4, 64, 3072),
}


def build_model(size: str, *, seed: int, vocabulary_size: int = VOCABULARY_SIZE) -> Any:
    """Build a model with random weights.

    Args:
        size: a name of ``SIZES``.
        vocabulary_size: padded, the same for every rung of a ladder.

    Raises:
        ModelError: no size has this name.
    """
    if size not in SIZES:
        raise ModelError(
            f"size: should be one of {', '.join(SIZES)}, or a checkpoint's folder, is {size!r}"
        )
    config = Qwen3Config(
        **SIZES[size].__dict__,
        vocab_size=vocabulary_size,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return _build(config, seed)


def build_like(folder: Path, *, seed: int) -> Any:
    """Build a model with random weights in the shape of a checkpoint.

    Raises:
        ModelError: the folder holds no checkpoint.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"size: should be one of {', '.join(SIZES)}, or a checkpoint's folder, is {folder}: "
            f"{error}"
        ) from error
    return _build(config, seed)


def _build(config: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")
