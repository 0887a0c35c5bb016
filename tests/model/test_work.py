"""Work is counted exactly: what is executed by hand-written products is what is reported."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rankonce.benchmarks.roofline import work_of
from rankonce.benchmarks.workloads import SMALL_MODELS, SMALL_SHAPES, PassShape, build_network
from rankonce.layout import PassPart
from rankonce.model.acceleration import accelerate_model
from rankonce.model.loading import use_segment_attention
from rankonce.model.packing import forward_pass, pack_pass
from rankonce.model.work import DecoderWork, count_pairs
from tests import conftest

(MODEL,) = SMALL_MODELS


def pack(shape: PassShape) -> Any:
    part = PassPart(request=0, first=0, last=shape.num_candidates, cached=False)
    return pack_pass([part], [shape.request(512)], {}, keep_prefixes=False)


@pytest.mark.parametrize("shape", SMALL_SHAPES)
def test_the_work_of_a_plain_model_is_that_of_the_roofline(shape: PassShape) -> None:
    network = build_network(MODEL, device="cpu", dtype=torch.float32)
    work = DecoderWork.of(network)
    flop = work.flop(pack(shape).segment_pass, num_logits=shape.num_candidates * work.vocabulary)
    assert flop == work_of(MODEL, shape).flop


@pytest.mark.parametrize("accelerates", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_products_are_counted_as_they_are_executed(architecture: str, accelerates: bool) -> None:
    network = conftest.build_network(architecture)
    use_segment_attention(network)
    if accelerates:
        accelerate_model(network, trainable=True)
    batch = pack(SMALL_SHAPES[0])
    expected = DecoderWork.of(network)
    counter = FlopCounterMode(display=False)
    with counter:
        forward_pass(network, batch)
    executed = counter.get_flop_counts()["Global"]
    products = executed[torch.ops.aten.mm] + executed.get(torch.ops.aten.addmm, 0)
    # Without heads there is no attention, and without logits no head.
    tokens, rows = SMALL_SHAPES[0].num_tokens, SMALL_SHAPES[0].num_candidates
    counted = sum(
        2 * (layer.token_weights * tokens + layer.row_weights * rows) for layer in expected.layers
    )
    assert counted == products


def test_a_window_hides_pairs() -> None:
    spans = pack(
        PassShape(prefix_tokens=7, num_candidates=3, candidate_tokens=5)
    ).segment_pass.spans
    assert count_pairs(spans) == 28 + 3 * (5 * 7 + 15)
    # With a window of 2 only the very first token sees less than two.
    assert count_pairs(spans, window=2) == 1 + 2 * (7 + 15 - 1)


def test_of_experts_those_count_that_a_token_meets() -> None:
    dense = DecoderWork.of(conftest.build_network("mistral")).layers[0].token_weights
    sparse = DecoderWork.of(conftest.build_network("mixtral")).layers[0].token_weights
    # Two experts of the dense size, and the router's four rows.
    assert sparse == dense + 3 * 48 * 96 + 4 * 48
