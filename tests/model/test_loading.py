"""What a checkpoint is asked before it scores: windows, rotary factors, own code, its tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rankonce.errors import ModelError
from rankonce.layout import TokenizedRequest
from rankonce.model.loading import load_model, prepare_model
from rankonce.ranker import Ranker, RankerConfig
from rankonce.records import Item, ScoreRequest
from tests.conftest import build_network, build_tokenizer

EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
}
SLIDING = {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 0}


@pytest.mark.parametrize(
    ("architecture", "shape", "limit"),
    [
        ("phimoe", {"sliding_window": 32, "num_local_experts": 4}, 32),
        ("phimoe", {"sliding_window": None, "num_local_experts": 4}, 4096),
        ("qwen2_moe", {**SLIDING, **EXPERTS, "max_window_layers": 3}, 32),
        ("qwen2_moe", {**SLIDING, **EXPERTS, "use_sliding_window": False}, 4096),
        ("qwen2", SLIDING, 4096),
        ("qwen2", {**SLIDING, "use_sliding_window": False}, 4096),
        ("qwen3", {**SLIDING, "use_sliding_window": False}, 4096),
        ("qwen3", {**SLIDING, "max_window_layers": 3}, 4096),
        ("mistral", {"sliding_window": 32}, 4096),
        ("mistral", {"sliding_window": None}, 4096),
        ("gemma2", {"sliding_window": 32}, 4096),
        ("llama", {"attention_chunk_size": 32}, 32),
        ("llama", {"max_position_embeddings": 256, "rope_parameters": LONG_ROPE}, 64),
    ],
)
def test_the_longest_prompt_is_the_shortest_limit_of_the_model(
    architecture: str, shape: dict[str, Any], limit: int
) -> None:
    network = build_network(architecture, **shape)
    assert prepare_model(network, build_tokenizer(), name="x").max_prompt_tokens == limit


@pytest.mark.parametrize(
    ("architecture", "shape", "num_tokens"),
    [
        ("phimoe", {"sliding_window": 32, "num_local_experts": 4}, 32),
        ("qwen2", SLIDING, 75),
        ("mistral", {"sliding_window": 32}, 75),
        ("gemma2", {"sliding_window": 32}, 75),
        ("gemma3_text", {"sliding_window": 32}, 75),
    ],
)
def test_prompts_with_a_window_score_as_without_packing(
    architecture: str, shape: dict[str, Any], num_tokens: int
) -> None:
    network = build_network(architecture, **shape)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 600, (num_tokens,), generator=generator).tolist()
    # The first candidate reaches further than the window where it can, the second is one token.
    segments = (tuple(ids[20:]), (ids[20],))
    with torch.no_grad():
        separate = torch.stack(
            [
                network(torch.tensor([[*ids[:20], *own]])).logits[0, -1, [5, 9]].log_softmax(-1)
                for own in segments
            ]
        )
    model = prepare_model(network, build_tokenizer(), name=architecture)
    request = TokenizedRequest(
        prefix_ids=tuple(ids[:20]), segment_ids=segments, label_ids=((5,), (9,))
    )
    ranker = Ranker(model, config=RankerConfig(prefix_cache_mb=1))
    (first,), (cached,) = ranker.forward([request]), ranker.forward([request])
    assert cached.cached_tokens == 20
    for raw in (first, cached):
        torch.testing.assert_close(raw.labels_CL, separate, atol=1e-5, rtol=0)


def test_a_model_whose_values_are_shaped_unlike_its_keys_is_refused_by_name() -> None:
    network = build_network(
        "deepseek_v3", head_dim=8, num_key_value_heads=4, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, moe_intermediate_size=32,
        first_k_dense_replace=3,
    )  # fmt: skip
    with pytest.raises(ModelError, match="DeepseekV3ForCausalLM: cannot take a packed pass: v: "):
        prepare_model(network, build_tokenizer(), name="x")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    build_network("llama").save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def change_config(checkpoint: Path, **values: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "values", [{"hidden_size": "abc"}, {"num_attention_heads": 5}, {"vocab_size": None}]
)
def test_a_config_with_values_that_make_no_sense_is_refused(
    checkpoint: Path, values: dict[str, Any]
) -> None:
    change_config(checkpoint, **values)
    with pytest.raises(ModelError, match=f"model: {checkpoint} cannot be loaded: ..."):
        load_model(checkpoint)


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_the_checkpoint_runs_where_it_is_trusted(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import dynamic_module_utils

    modules = tmp_path_factory.mktemp("modules")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
    (checkpoint / "modeling_own.py").write_text(REMOTE)
    classes = {
        "AutoConfig": "modeling_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    change_config(
        checkpoint, model_type="own_llama", architectures=["OwnForCausalLM"], auto_map=classes
    )
    loaded = load_model(checkpoint, trust_remote_code=True)
    assert type(loaded.network).__name__ == "OwnForCausalLM"
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(checkpoint, trust_remote_code=False)


def test_a_tokenizer_with_more_tokens_than_the_checkpoint_is_refused_by_name() -> None:
    tokenizer = build_tokenizer(chat=True)
    first = len(tokenizer)
    network = build_network("llama", vocab_size=first)
    ranker = Ranker(prepare_model(network, tokenizer, name="x"))
    request = ScoreRequest(task="movie-like", candidates=(Item(fields={"title": "Heat"}),))
    assert ranker.score(request).candidates[0].rank == 1
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|turn|>")
    ranker = Ranker(prepare_model(build_network("llama", vocab_size=first), tokenizer, name="x"))
    with pytest.raises(ModelError, match=rf"has token {first}, '<\|turn\|>', but .* {first} tok"):
        ranker.score(request)
