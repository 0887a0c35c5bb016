"""Accelerated layers give what the plain ones give, and leave the model as it was."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM

from rankonce.errors import ModelError
from rankonce.layout import PassPart, TokenizedRequest
from rankonce.model import acceleration
from rankonce.model.acceleration import accelerate_model
from rankonce.model.head import head_of
from rankonce.model.loading import LoadedModel, prepare_model, use_segment_attention
from rankonce.model.packing import PackedBatch, forward_pass, pack_pass
from rankonce.ranker import Ranker, RankerConfig
from tests.conftest import ARCHITECTURES, build_network, build_tokenizer

TOLERANCE = 1e-5  # in fp32; of log-probabilities, and of the largest entry of a tensor
# FP8: where fp32 sums differ in their last bit, a value may round to the next step.
MEDIAN_FP8, LARGEST_FP8 = 1e-5, 0.05

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


def build_requests(*shapes: tuple[int, Sequence[int]]) -> list[TokenizedRequest]:
    """Make requests of random tokens: the length of a prefix, and those of its candidates."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, 600, (length,), generator=generator).tolist())

    return [
        TokenizedRequest(
            prefix_ids=ids(prefix), segment_ids=tuple(map(ids, lengths)), label_ids=((5,), (9,))
        )
        for prefix, lengths in shapes
    ]


REQUESTS = build_requests((30, [1, 7, 12, 5]), (17, [3, 1]), (0, [9, 8]), (41, [5] * 13))


def build_random(architecture: str, **shape: Any) -> Any:
    """Build a network whose biases and norms are random too, on segment attention."""
    network = build_network(architecture, **shape)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    use_segment_attention(network)
    return network


def prepare(network: Any, **options: Any) -> LoadedModel:
    network.set_attn_implementation("eager")
    return prepare_model(network, build_tokenizer(), name="random", **options)


def pack(requests: Sequence[TokenizedRequest] = REQUESTS) -> PackedBatch:
    parts = [
        PassPart(request=index, first=0, last=len(request.segment_ids), cached=False)
        for index, request in enumerate(requests)
    ]
    return pack_pass(parts, requests, {}, keep_prefixes=False)


def rows_of(network: Any) -> Tensor:
    """Return the score rows of one pass without gradients."""
    with torch.no_grad():
        return forward_pass(network, pack())


def scores_of(
    model: LoadedModel, requests: Sequence[TokenizedRequest] = REQUESTS, **config: Any
) -> Tensor:
    ranker = Ranker(model, config=RankerConfig(**{"prefix_cache_mb": 0, **config}))
    return torch.cat([raw.labels_CL for raw in ranker.forward(requests)])


def assert_near(actual: Tensor, expected: Tensor) -> None:
    assert float((actual - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


def own_forwards(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if "forward" in vars(module)]


VARIANTS = [(name, {}) for name in ARCHITECTURES] + [
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"hidden_act": "gelu"}),  # an MLP that is not known
    ("llama", {"num_key_value_heads": 4, "num_hidden_layers": 1}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    ("mistral", {"sliding_window": 9}),
    ("mixtral", {"sliding_window": 9}),
    ("gemma2", {"sliding_window": 9, "final_logit_softcapping": None}),
    ("gemma3_text", {"sliding_window": 9}),
]


@pytest.mark.parametrize(("architecture", "shape"), VARIANTS)
def test_accelerated_layers_score_as_plain_ones(architecture: str, shape: dict[str, Any]) -> None:
    model = prepare(build_random(architecture, **shape))
    assert len(own_forwards(model.network)) == model.network.config.num_hidden_layers
    cached = Ranker(model, config=RankerConfig(prefix_cache_mb=1))
    passes = [
        scores_of(model),
        scores_of(model, max_tokens_per_pass=64),
        torch.cat([raw.labels_CL for raw in cached.forward(REQUESTS)]),
        torch.cat([raw.labels_CL for raw in cached.forward(REQUESTS)]),
    ]
    assert cached.scorer.cache.counts.hits
    model.acceleration.undo()
    expected = scores_of(model)
    for scores in passes:
        torch.testing.assert_close(scores, expected, atol=TOLERANCE, rtol=0)


@architectures
def test_the_last_layer_computes_the_score_rows_only(architecture: str) -> None:
    network = build_random(architecture)
    plain = rows_of(network)
    accelerate_model(network)
    shapes = []
    network.base_model.norm.register_forward_hook(lambda *given: shapes.append(given[2].shape))
    batch = pack()
    with torch.no_grad():
        rows_CD = forward_pass(network, batch)
    assert batch.segment_pass.trimmed
    assert shapes == [(1, *plain.shape)]
    assert_near(rows_CD, plain)


@architectures
def test_undo_gives_the_very_same_model_back(architecture: str) -> None:
    network = build_random(architecture)
    before = rows_of(network)
    modules = [(name, id(module)) for name, module in network.named_modules()]
    done = accelerate_model(network)
    assert own_forwards(network)
    assert [(name, id(module)) for name, module in network.named_modules()] == modules
    done.undo()
    done.undo()  # which is nothing more
    assert own_forwards(network) == []
    assert torch.equal(rows_of(network), before)


@architectures
@pytest.mark.parametrize("precision", [None, "fp8"])
def test_parameters_stay_the_same_objects_with_the_same_values(
    architecture: str, precision: str | None
) -> None:
    network = build_random(architecture)
    before = {name: (id(one), one.detach().clone()) for name, one in network.named_parameters()}
    done = accelerate_model(network, precision)
    rows_of(network)
    for _ in range(2):
        for name, one in network.named_parameters():
            assert (id(one), one.requires_grad) == (before[name][0], True), name
            assert torch.equal(one, before[name][1]), name
        done.undo()


@architectures
def test_an_accelerated_model_is_saved_as_a_plain_one(architecture: str, tmp_path: Path) -> None:
    network = build_random(architecture)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    accelerate_model(network)
    network.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    after = loaded.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    loaded.eval()
    use_segment_attention(loaded)
    assert_near(rows_of(loaded), rows_of(network))


def gradients_of(network: Any) -> dict[str, Tensor | None]:
    network.zero_grad()
    head = head_of(network)
    log_probs_CV = (forward_pass(network, pack()) @ head.weight_VD.T).log_softmax(-1)
    log_probs_CV[:, [5, 9]].sum().backward()
    return {name: one.grad for name, one in network.named_parameters()}


@pytest.mark.parametrize(
    ("architecture", "shape"),
    [*VARIANTS[: len(ARCHITECTURES)], ("llama", {"attention_bias": True, "mlp_bias": True})],
)
@pytest.mark.parametrize("trainable", [True, False])
def test_gradients_are_those_of_the_plain_packed_model(
    architecture: str, shape: dict[str, Any], trainable: bool
) -> None:
    network = build_random(architecture, **shape)
    expected = gradients_of(network)
    biased = "model.layers.0.self_attn.q_proj.bias" in expected
    assert biased == (architecture == "qwen2" or bool(shape))
    accelerate_model(network, trainable=trainable)
    actual = gradients_of(network)
    for name, wanted in expected.items():
        given = actual[name]
        assert (given is None) == (wanted is None), name
        if given is not None and wanted is not None:
            difference = float((given - wanted).abs().max())
            assert difference <= TOLERANCE * float(wanted.abs().max()), name


def test_weights_that_train_have_their_own_memory() -> None:
    network = build_random("llama")
    accelerate_model(network, trainable=True)
    storages = [one.untyped_storage().data_ptr() for one in network.parameters()]
    assert len(set(storages)) == len(storages)


def test_weights_that_are_joined_are_held_once() -> None:
    network = build_random("qwen2")
    accelerate_model(network)
    for layer in network.base_model.layers:
        for product in layer.forward.projections:
            for part in ("weight", "bias"):
                held = [
                    getattr(one, part)
                    for one in (*product.linears, product.product)
                    if getattr(one, part, None) is not None
                ]
                assert len({one.untyped_storage().data_ptr() for one in held}) <= 1


def test_attention_dropout_is_refused_as_by_plain_layers() -> None:
    network = build_random("llama", attention_dropout=0.1)
    plain = rows_of(network)
    for accelerates in (False, True):
        if accelerates:
            accelerate_model(network, trainable=True)
        network.train()
        with pytest.raises(ModelError, match=r"LlamaAttention: attention_dropout .* is 0\.1"):
            forward_pass(network, pack())
        network.eval()
        assert_near(rows_of(network), plain)


@architectures
@pytest.mark.parametrize("trainable", [True, False])
def test_hooks_on_products_run_with_gradients(architecture: str, trainable: bool) -> None:
    network = build_random(architecture)
    accelerate_model(network, trainable=trainable)
    called: list[str] = []

    def note(name: str) -> Callable[..., Tensor]:
        return lambda module, _, output: called.append(name) or output * 0

    for index, layer in enumerate(network.base_model.layers):
        layer.self_attn.o_proj.register_forward_hook(note(f"{index} attention"))
        getattr(layer.mlp, "down_proj", layer.mlp).register_forward_hook(note(f"{index} mlp"))
    final: list[Tensor] = []
    network.base_model.norm.register_forward_pre_hook(lambda _, given: final.append(given[0][0]))
    batch = pack()
    forward_pass(network, batch)
    assert called == [f"{i} {part}" for i in range(3) for part in ("attention", "mlp")]
    # Every output was set to 0, so that the hidden states are still the embeddings; Gemma's are
    # scaled.
    rows_C = batch.segment_pass.score_rows_C
    expected_CD = network.get_input_embeddings()(batch.token_ids_T)[rows_C]
    torch.testing.assert_close(normalize(final[0]), normalize(expected_CD))


def test_an_unknown_architecture_is_left_and_said() -> None:
    network = build_random("granite")
    plain = rows_of(network)
    done = accelerate_model(network)
    (line,) = done.report
    assert line.startswith("GraniteForCausalLM: left as it is; known are llama, ")
    assert own_forwards(network) == []
    assert torch.equal(rows_of(network), plain)
    with pytest.raises(ModelError, match=r"fp8 is known for llama, .*; GraniteForCausalLM is gran"):
        accelerate_model(network, "fp8")
    with pytest.raises(ModelError, match="fp8 is known for"):
        prepare(network, fp8=True)


def test_what_was_done_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    acceleration._log_line.cache_clear()
    with caplog.at_level("INFO", "rankonce.model.acceleration"):
        for _ in range(2):
            done = prepare(build_random("llama"), fp8=True).acceleration
    logged = [record.getMessage() for record in caplog.records]
    assert logged == [f"LlamaForCausalLM: {line}" for line in done.report]
    assert len(logged) == 2


def count_fp8(report: Sequence[str]) -> str:
    (line,) = (line for line in report if "products in FP8" in line)
    return line


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        ((), "13 of 13 products in FP8, kept by name: none"),
        (("*.down_proj",), "10 of 13 products in FP8"),
        # Joined with keys and values; the last layer's queries are a product of their own.
        (("*.q_proj",), "10 of 13 products in FP8"),
        (
            ("model.layers.1.*",),
            "9 of 13 products in FP8, kept by name: model.layers.1.mlp.down_proj, ",
        ),
        (("*layers.0.self_attn.o_proj", "*layers.2.mlp.up_proj"), "11 of 13 products in FP8"),
        (("*",), "0 of 13 products in FP8"),
    ],
)
def test_the_report_counts_products_and_names_what_is_kept(
    keep: tuple[str, ...], said: str
) -> None:
    done = accelerate_model(build_random("llama"), "fp8", keep=keep)
    assert count_fp8(done.report).startswith(said)


@architectures
def test_kept_layers_compute_as_plain_ones_bit_for_bit(architecture: str) -> None:
    network = build_random(architecture)
    done = accelerate_model(network)
    plain = rows_of(network)
    done.undo()
    done = accelerate_model(network, "fp8", keep=["model.layers.*"])
    assert torch.equal(rows_of(network), plain)
    done.undo()
    accelerate_model(network, "fp8", keep=["*layers.0.*", "*layers.2.self_attn.?_proj"])
    assert not torch.equal(rows_of(network), plain)
    first, second, last = (layer.forward for layer in network.base_model.layers)
    assert not any(product.fp8 for product in first.projections)
    assert all(product.fp8 for product in second.projections)
    assert [product.fp8 for product in last.projections][:3] == [False] * 3
    x_TD = torch.randn(5, network.config.hidden_size)
    with torch.no_grad():
        expected = network.base_model.layers[0].self_attn.q_proj(x_TD)
        assert_near(first.query_key_value(x_TD)[0], expected)
        last_query = network.base_model.layers[2].self_attn.q_proj
        assert torch.equal(last.query(x_TD), last_query(x_TD))


@pytest.mark.parametrize("pattern", ["*.dawn_proj", "lm_head", "model.embed_tokens", "*norm*", ""])
def test_a_pattern_that_names_no_layer_is_refused(pattern: str) -> None:
    network = build_random("llama")
    fault = f"keep: {pattern!r} names no linear layer; they are ['model.layers.0.self_attn.q_proj',"
    with pytest.raises(ModelError, match=re.escape(fault)):
        accelerate_model(network, "fp8", keep=["*.down_proj", pattern])
    assert own_forwards(network) == []


def test_layers_can_be_kept_from_fp8_only() -> None:
    network = build_random("llama")
    with pytest.raises(ModelError, match=r"keep: .* precision should be fp8"):
        prepare(network, keep=["*.down_proj"])


def test_sizes_that_fp8_does_not_take_stay_as_they_are() -> None:
    network = build_random("llama", intermediate_size=88)
    done = accelerate_model(network, "fp8")
    assert count_fp8(done.report).startswith("7 of 13 products in FP8")
    assert "products whose sizes are no multiples of 16 stay as they are" in done.report


@architectures
def test_fp8_is_close_to_fp32(architecture: str) -> None:
    network = build_random(architecture, initializer_range=0.1)
    plain = rows_of(network)
    accelerate_model(network, "fp8")
    rows_CD = rows_of(network)
    # Three layers of values with three mantissa bits.
    assert float((rows_CD - plain).norm() / plain.norm()) <= 0.15
    assert not torch.equal(rows_CD, plain)


@architectures
def test_fp8_scores_do_not_depend_on_the_other_candidates(architecture: str) -> None:
    model = prepare(build_random(architecture), fp8=True)
    (request,) = build_requests((30, [1 + i % 13 for i in range(40)]))

    def with_segments(chosen: slice) -> TokenizedRequest:
        return TokenizedRequest(
            prefix_ids=request.prefix_ids,
            segment_ids=request.segment_ids[chosen],
            label_ids=request.label_ids,
        )

    scores = scores_of(model, [request])
    alone, reverse = with_segments(slice(3, 4)), with_segments(slice(None, None, -1))
    cached = Ranker(model, config=RankerConfig(prefix_cache_mb=1))
    cached.forward([request])
    pairs = [
        (scores_of(model, [with_segments(slice(None, None, 3))]), scores[::3]),
        (scores_of(model, [alone]), scores[3:4]),
        (scores_of(model, [reverse]).flip(0), scores),
        (scores_of(model, [*REQUESTS, request])[-40:], scores),
        (scores_of(model, [request], max_tokens_per_pass=64), scores),
        (cached.forward([request])[0].labels_CL, scores),
    ]
    differences = torch.cat([(actual - expected).abs().amax(1) for actual, expected in pairs])
    assert float(differences.median()) <= MEDIAN_FP8
    assert float(differences.max()) <= LARGEST_FP8


class Adapter(nn.Module):
    """What PEFT makes of a linear layer: the layer, and a product of two small ones beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.lora_A = nn.Linear(base.in_features, 4, bias=False)
        self.lora_B = nn.Linear(4, base.out_features, bias=False)
        self.calls = 0

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.base_layer(x) + self.lora_B(self.lora_A(x))
        return out


def add_adapters(network: Any, *names: str) -> list[Adapter]:
    torch.manual_seed(2)
    for path, module in list(network.named_modules()):
        if path.rpartition(".")[2] in names:
            network.set_submodule(path, Adapter(module))
    return [module for module in network.modules() if isinstance(module, Adapter)]


@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        ("llama", ("q_proj", "v_proj")),
        ("llama", ("o_proj", "gate_proj", "down_proj")),
        ("qwen2", ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
        ("gemma2", ("up_proj", "down_proj")),
        ("mixtral", ("q_proj", "o_proj")),
    ],
)
@pytest.mark.parametrize("precision", [None, "fp8"])
def test_adapters_are_not_bypassed(
    architecture: str, names: tuple[str, ...], precision: str | None
) -> None:
    network = build_random(architecture)
    without = rows_of(network)
    adapters = add_adapters(network, *names)
    plain = rows_of(network)
    expected = gradients_of(network)
    for adapter in adapters:
        adapter.calls = 0
    done = accelerate_model(network, precision)
    rows_CD = rows_of(network)
    assert [adapter.calls for adapter in adapters] == [1] * len(adapters)
    assert done.report[-1].startswith("layers that are not plain linears (adapters, ")
    assert float((plain - without).abs().max()) > 0.01
    if precision == "fp8":
        products = [one for layer in network.base_model.layers for one in layer.forward.projections]
        for product in products:
            adapted = any(isinstance(linear, Adapter) for linear in product.linears)
            assert product.fp8 != adapted
        return
    assert_near(rows_CD, plain)
    actual = gradients_of(network)
    for name, wanted in expected.items():
        if "lora" in name and wanted is not None:
            given = actual[name]
            assert given is not None, name
            assert_near(given, wanted)


def test_adapters_can_be_put_on_an_accelerated_model_after_undo() -> None:
    network = build_random("llama")
    accelerate_model(network).undo()
    (first, *_) = add_adapters(network, "q_proj")
    plain = rows_of(network)
    accelerate_model(network)
    first.calls = 0
    assert_near(rows_of(network), plain)
    assert first.calls == 1
