"""The house law in training: packed gradients are separate gradients."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from rankonce.model.head import head_of
from rankonce.model.loading import use_segment_attention
from rankonce.prompts.encoding import TextEncoder
from rankonce.prompts.rendering import Renderer
from rankonce.prompts.tasks import library_tasks
from rankonce.records import TrainingExample
from rankonce.training.data import TokenizedExample, tokenize_examples
from rankonce.training.objectives import LabelObjective
from tests.conftest import ARCHITECTURES, build_network, build_request


def build_examples(tokenizer: Any) -> list[TokenizedExample]:
    examples = [
        TrainingExample(
            request=build_request(count, seed=seed),
            labels=tuple(
                ["Yes", {"Yes": 0.3, "No": 0.7}, None][(i + seed) % 3] for i in range(count)
            ),
        )
        for seed, count in enumerate((5, 1, 8))
    ]
    renderer = Renderer(TextEncoder(tokenizer), max_prompt_tokens=4096)
    return list(tokenize_examples(examples, renderer, library_tasks()))


def separate_loss(network: Any, examples: list[TokenizedExample]) -> torch.Tensor:
    """Cross-entropy with plain transformers, one prompt per candidate."""
    total = torch.zeros(())
    for example in examples:
        tokens = example.tokens
        for segment, target in zip(tokens.segment_ids, example.targets, strict=True):
            if target is not None:
                logits = network(torch.tensor([[*tokens.prefix_ids, *segment]])).logits[0, -1]
                log_probs = logits[[ids[0] for ids in tokens.label_ids]].log_softmax(0)
                total = total - (torch.tensor(target) * log_probs).sum()
    return total


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_gradients_equal_separate_gradients(tokenizer: Any, architecture: str) -> None:
    examples = build_examples(tokenizer)
    packed, plain = build_network(architecture), build_network(architecture)
    use_segment_attention(packed)
    objective = LabelObjective()
    loss = objective.loss(packed, objective.pack(examples))
    expected = separate_loss(plain, examples)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward(), expected.backward()
    scale = max(float(p.grad.abs().max()) for p in plain.parameters() if p.grad is not None)
    for (name, actual), wanted in zip(packed.named_parameters(), plain.parameters(), strict=True):
        assert (actual.grad is None) == (wanted.grad is None), name
        if wanted.grad is not None:
            difference = float((actual.grad - wanted.grad).abs().max())
            assert difference <= 1e-5 * scale, name


def test_candidates_without_a_label_do_not_train(tokenizer: Any) -> None:
    network = build_network("llama")
    use_segment_attention(network)
    (example, *_) = build_examples(tokenizer)
    unknown = replace(example, targets=(None,) * len(example.targets))
    objective = LabelObjective()
    assert objective.loss(network, objective.pack([unknown])).item() == 0.0
    assert head_of(network).weight_VD.grad is None
