"""What is measured: shapes of passes, heads of attention, and models with random weights."""

from dataclasses import dataclass, field
from typing import Any

import torch

from rankonce.layout import PassPart, SegmentLayout, TokenizedRequest, lay_out_pass


@dataclass(frozen=True, kw_only=True)
class PassShape:
    """One request: a prefix and candidates of one length.

    Attributes:
        prefix_tokens: P.
        num_candidates: N.
        candidate_tokens: L.
    """

    prefix_tokens: int
    num_candidates: int
    candidate_tokens: int

    @property
    def name(self) -> str:
        """How results name it."""
        return f"P={self.prefix_tokens} N={self.num_candidates} L={self.candidate_tokens}"

    @property
    def prompt_tokens(self) -> int:
        """Tokens of one candidate's whole prompt."""
        return self.prefix_tokens + self.candidate_tokens

    @property
    def num_tokens(self) -> int:
        """T of the packed pass."""
        return self.prefix_tokens + self.num_candidates * self.candidate_tokens

    def layout(self) -> SegmentLayout:
        """Place the pass."""
        part = PassPart(request=0, first=0, last=self.num_candidates, cached=False)
        lengths = [self.candidate_tokens] * self.num_candidates
        return lay_out_pass([part], [self.prefix_tokens], [lengths])

    def request(self, vocabulary: int, *, seed: int = 0) -> TokenizedRequest:
        """Draw the tokens of the pass; the two labels are tokens 1 and 2."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, vocabulary, (self.num_tokens,), generator=generator).tolist()
        candidates = range(self.prefix_tokens, self.num_tokens, self.candidate_tokens)
        return TokenizedRequest(
            prefix_ids=tuple(ids[: self.prefix_tokens]),
            segment_ids=tuple(tuple(ids[i : i + self.candidate_tokens]) for i in candidates),
            label_ids=((1,), (2,)),
        )


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """Heads of an attention layer: H query heads, G key/value heads of size K."""

    queries: int
    groups: int
    size: int

    @property
    def name(self) -> str:
        """How results name it."""
        return f"H={self.queries} G={self.groups} K={self.size}"


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder as its published configuration has it; the fields are those of transformers.

    Attributes:
        name: of the checkpoint.
        architecture: ``model_type`` of the configuration.
        rope: the rotary parameters.
    """

    name: str
    architecture: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    rope: dict[str, Any] = field(hash=False)

    @property
    def heads(self) -> HeadShape:
        """The heads of one layer."""
        return HeadShape(
            queries=self.num_attention_heads, groups=self.num_key_value_heads, size=self.head_dim
        )

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of a layer's matrices, those that share an input joined."""
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        return {
            "qkv": (queries + 2 * keys, self.hidden_size),
            "o": (self.hidden_size, queries),
            "gate_up": (2 * self.intermediate_size, self.hidden_size),
            "down": (self.hidden_size, self.intermediate_size),
        }


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _qwen3(name: str, hidden: int, layers: int, heads: int, mlp: int) -> ModelShape:
    return ModelShape(
        name=name,
        architecture="qwen3",
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=mlp,
        vocab_size=151_936,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        max_position_embeddings=40_960,
        rope={"rope_type": "default", "rope_theta": 1_000_000.0},
    )


def _llama(
    name: str, hidden: int, layers: int, head: int, mlp: int, *, factor: float, tied: bool
) -> ModelShape:
    return ModelShape(
        name=name,
        architecture="llama",
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=head,
        intermediate_size=mlp,
        vocab_size=128_256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        max_position_embeddings=131_072,
        rope=_llama3_rope(factor),
    )


QWEN3_06B = _qwen3("Qwen3-0.6B", 1024, 28, 16, 3072)
QWEN3_4B = _qwen3("Qwen3-4B", 2560, 36, 32, 9728)
LLAMA_1B = _llama("Llama-3.2-1B", 2048, 16, 64, 8192, factor=32.0, tied=True)
LLAMA_8B = _llama("Llama-3.1-8B", 4096, 32, 128, 14_336, factor=8.0, tied=False)
MODELS = (QWEN3_06B, LLAMA_8B, QWEN3_4B, LLAMA_1B)

MAIN_SHAPE = PassShape(prefix_tokens=2048, num_candidates=500, candidate_tokens=64)
SHORT_SHAPE = PassShape(prefix_tokens=512, num_candidates=50, candidate_tokens=20)
MANY_SHORT_SHAPE = PassShape(prefix_tokens=2048, num_candidates=500, candidate_tokens=20)
LONG_SHAPE = PassShape(prefix_tokens=8192, num_candidates=200, candidate_tokens=150)
SHAPES = (MAIN_SHAPE, MANY_SHORT_SHAPE, SHORT_SHAPE, LONG_SHAPE)
HEADS = (QWEN3_06B.heads, LLAMA_1B.heads, LLAMA_8B.heads)

# What a processor measures in seconds: the same code on toys.
SMALL_SHAPES = (
    PassShape(prefix_tokens=48, num_candidates=6, candidate_tokens=5),
    PassShape(prefix_tokens=7, num_candidates=3, candidate_tokens=13),
)
SMALL_HEADS = (HeadShape(queries=4, groups=2, size=16),)
SMALL_MODELS = (
    ModelShape(
        name="small Qwen3",
        architecture="qwen3",
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        vocab_size=512,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        rope={"rope_type": "default", "rope_theta": 10_000.0},
    ),
)


def build_network(model: ModelShape, *, device: str, dtype: torch.dtype, seed: int = 0) -> Any:
    """Build a transformers model with random weights where it will run.

    Weights are drawn on the device in their dtype: an 8B model never exists in fp32.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        model.architecture,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        intermediate_size=model.intermediate_size,
        vocab_size=model.vocab_size,
        rms_norm_eps=model.rms_norm_eps,
        tie_word_embeddings=model.tie_word_embeddings,
        max_position_embeddings=model.max_position_embeddings,
        rope_parameters=model.rope,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return network.eval()
