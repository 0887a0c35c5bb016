"""Training at score rows: many candidates of a member in one sequence, or a prompt for each.

All arms take the gradients of the same loss over the same candidates. The members, their films and
the tokenizer are those of the embedded ranker's demonstration; labels are drawn.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankonce.benchmarks.records import write_record
from rankonce.environment import describe_environment
from rankonce.errors import DataError
from rankonce.model.acceleration import accelerate_model
from rankonce.model.loading import use_segment_attention
from rankonce.model.sizes import build_model
from rankonce.prompts.encoding import TextEncoder
from rankonce.prompts.rendering import Renderer
from rankonce.prompts.tasks import library_tasks
from rankonce.ranker import EMBEDDED_MODEL
from rankonce.records import ScoreRequest, TrainingExample, read_request
from rankonce.training.data import TokenizedExample, tokenize_examples
from rankonce.training.objectives import LabelObjective

PACKED, SEPARATE, PADDED = "packed", "one candidate a sequence, packed", "padded batch, plain"
_CONTEXT = 4096


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What is measured.

    Attributes:
        size: of the model, with random weights.
        num_candidates: of a member, up to the demonstration's 100.
        rounds: every arm is timed once a round, in turns.
        device: cpu or cuda.
        output: JSON.
    """

    size: str = "3m"
    num_candidates: int = 20
    rounds: int = 5
    device: str = "cpu"
    output: Path = Path("results/training-packed.json")


@dataclass(kw_only=True)
class _Arm:
    """One way to the gradients: its model, its tokens, and a call that takes them."""

    network: Any
    num_tokens: int
    take_gradients: Callable[[], Tensor]


def measure_training(options: TrainingOptions) -> dict[str, Any]:
    """Time forward and backward of every arm, compare their gradients and write the record.

    Raises:
        DataError: there are not so many candidates.
    """
    example = demonstration_example(options.num_candidates)
    arms = {
        PACKED: _packed_arm([example], options),
        SEPARATE: _packed_arm(_cut(example), options),
        PADDED: _padded_arm(_cut(example), options),
    }
    gradients = {name: _gradients(arm) for name, arm in arms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
        for name, arm in arms.items():
            started = time.perf_counter()
            _gradients(arm)
            seconds[name].append(time.perf_counter() - started)
    record = {
        "environment": {**describe_environment(), "threads": torch.get_num_threads()},
        "device": options.device,
        "size": options.size,
        "candidates": options.num_candidates,
        "prefix_tokens": len(example.tokens.prefix_ids),
        "events": _num_events(),
        "rounds": options.rounds,
        "arms": {
            name: {
                "tokens": arm.num_tokens,
                "median_s": statistics.median(seconds[name]),
                "all_s": seconds[name],
                "tokens_over_packed": arm.num_tokens / arms[PACKED].num_tokens,
                "time_over_packed": statistics.median(
                    slow / fast for slow, fast in zip(seconds[name], seconds[PACKED], strict=True)
                ),
                "max_gradient_difference": _difference(gradients[name], gradients[PACKED]),
            }
            for name, arm in arms.items()
        },
    }
    write_record(options.output, record)
    return record


def describe_training(record: dict[str, Any]) -> str:
    """Write the record as a table in Markdown."""
    lines = [
        "| arm | tokens | against packed | seconds | against packed | gradients differ by |",
        "|---|---|---|---|---|---|",
    ]
    for name, arm in record["arms"].items():
        lines.append(
            f"| {name} | {arm['tokens']:,} | {arm['tokens_over_packed']:.1f}× | "
            f"{arm['median_s']:.2f} | {arm['time_over_packed']:.1f}× | "
            f"{arm['max_gradient_difference']:.0e} |"
        )
    return "\n".join(lines)


def _requests() -> list[ScoreRequest]:
    lines = (Path(EMBEDDED_MODEL) / "demo.jsonl").read_text(encoding="utf-8").splitlines()
    return [read_request(json.loads(line)) for line in lines]


def _num_events() -> int:
    return len(_requests()[0].history)


def demonstration_example(num_candidates: int) -> TokenizedExample:
    """Tokenise the first member of the demonstration with the first films and drawn labels.

    Raises:
        DataError: there are not so many candidates.
    """
    from transformers import AutoTokenizer

    request = _requests()[0]
    if not 0 < num_candidates <= len(request.candidates):
        raise DataError(
            f"candidates: should be from 1 to {len(request.candidates)}, is {num_candidates}"
        )
    renderer = Renderer(
        TextEncoder(AutoTokenizer.from_pretrained(EMBEDDED_MODEL)), max_prompt_tokens=_CONTEXT
    )
    likes = np.random.default_rng(0).random(num_candidates) < 0.5
    example = TrainingExample(
        request=replace(request, candidates=request.candidates[:num_candidates]),
        labels=tuple("Yes" if like else "No" for like in likes.tolist()),
    )
    return next(iter(tokenize_examples([example], renderer, library_tasks())))


def _cut(example: TokenizedExample) -> list[TokenizedExample]:
    """Give every candidate an example of its own."""
    tokens = example.tokens
    return [
        replace(example, tokens=replace(tokens, segment_ids=(segment,)), targets=(target,))
        for segment, target in zip(tokens.segment_ids, example.targets, strict=True)
    ]


def _packed_arm(examples: Sequence[TokenizedExample], options: TrainingOptions) -> _Arm:
    """Take the gradients as training does."""
    network = build_model(options.size, seed=0).to(options.device)
    use_segment_attention(network)
    accelerate_model(network, trainable=True)
    objective = LabelObjective()
    return _Arm(
        network=network,
        num_tokens=sum(one.num_tokens for one in examples),
        take_gradients=lambda: objective.loss(network, objective.pack(examples, options.device)),
    )


def _padded_arm(examples: Sequence[TokenizedExample], options: TrainingOptions) -> _Arm:
    """Take the gradients with plain transformers: prompts padded on their right to the longest."""
    network = build_model(options.size, seed=0).to(options.device)
    network.set_attn_implementation("sdpa")
    prompts = [[*one.tokens.prefix_ids, *one.tokens.segment_ids[0]] for one in examples]
    longest = max(map(len, prompts))
    ids_CP = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids_CP[row, : len(prompt)] = torch.tensor(prompt)
    lengths_C = torch.tensor([len(prompt) for prompt in prompts])
    mask_CP = (torch.arange(longest) < lengths_C[:, None]).long().to(options.device)
    targets_CL = torch.tensor([one.targets[0] for one in examples], device=options.device)
    label_ids = examples[0].tokens.label_ids
    columns = [forms[0] for forms in label_ids]
    if any(len(forms) != 1 for forms in label_ids):
        raise DataError("labels: should have one form each to be compared with plain transformers")

    def loss() -> Tensor:
        hidden_CPD = network.base_model(
            input_ids=ids_CP.to(options.device), attention_mask=mask_CP, use_cache=False
        ).last_hidden_state
        # Logits of the last tokens and the labels alone: what is compared is the sequences.
        last_CD = hidden_CPD[torch.arange(len(prompts)), lengths_C - 1]
        log_probs_CL = (last_CD @ network.lm_head.weight[columns].T).log_softmax(1)
        total: Tensor = -(targets_CL * log_probs_CL).sum()
        return total

    return _Arm(network=network, num_tokens=ids_CP.numel(), take_gradients=loss)


def _gradients(arm: _Arm) -> list[Tensor]:
    arm.network.train()
    arm.network.zero_grad()
    arm.take_gradients().backward()
    found = [p.grad for p in arm.network.parameters() if p.grad is not None]
    if found[0].is_cuda:
        torch.cuda.synchronize()
    return found


def _difference(gradients: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference of any entry, relative to the largest entry of all."""
    largest = max(float(g.abs().max()) for g in expected)
    pairs = zip(gradients, expected, strict=True)
    return max(float((g - e).abs().max()) for g, e in pairs) / largest
