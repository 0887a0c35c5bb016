"""Runs that one process and two make alike: started by ``test_parallel`` with ``torchrun``.

python -m torch.distributed.run --nproc-per-node 2 tests/training/parallel_runs.py FOLDER
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rankonce.errors import NumericsError
from rankonce.prompts.encoding import TextEncoder
from rankonce.prompts.rendering import Renderer
from rankonce.prompts.tasks import library_tasks
from rankonce.records import ScoreRequest, TrainingExample
from rankonce.training import loop
from rankonce.training.data import tokenize_examples
from rankonce.training.loop import TrainConfig, TrainingData, train
from rankonce.training.objectives import LabelObjective, TokenObjective
from rankonce.training.sequences import TokenSequence
from tests.conftest import build_network, build_request, build_tokenizer

CONFIG = TrainConfig(
    max_steps=5,
    targets_per_step=14,
    max_tokens_per_pass=1100,
    learning_rate=3e-3,
    averaging=0.5,
    steps_per_checkpoint=2,
    peak_tflops=0.5,
)
SHARDINGS = ("none", "fsdp")
STAGES = ("labels", "tokens")
# The last step of a run that is stopped; the checkpoint before it is of step 2.
STOPPED_AT = 3


def label_units() -> list[Any]:
    """Requests of two tasks with 1 to 8 candidates; some labels are not known."""
    renderer = Renderer(TextEncoder(build_tokenizer()), max_prompt_tokens=4096)
    names = {
        "movie-like": ["Yes", {"Yes": 0.3, "No": 0.7}, None],
        "movie-rating": ["5", None, {"1": 0.5, "4": 0.5}],
    }
    examples = [
        TrainingExample(
            request=_plain(build_request(count, task=task, seed=seed)),
            labels=tuple(labels[(i + seed) % 3] for i in range(count)),
        )
        for seed, count in enumerate((5, 1, 8, 6))
        for task, labels in names.items()
    ]
    return list(tokenize_examples(examples, renderer, library_tasks()))


def _plain(request: ScoreRequest) -> ScoreRequest:
    """Leave out the profile and events of a task that words them otherwise."""
    if request.task == "movie-like":
        return request
    return replace(request, history=(), profile={})


def token_units() -> list[TokenSequence]:
    """Texts of odd lengths, the longest of which makes a step by itself."""
    generator = torch.Generator().manual_seed(3)
    units = []
    for length in (63, 2, 17, 200, 5, 31):
        ids = torch.randint(2, 640, (length,), generator=generator).tolist()
        learnt = [place > 0 and place % 3 != 1 for place in range(length)]
        learnt[-1] = True
        units.append(TokenSequence(token_ids=tuple(ids), learnt=tuple(learnt)))
    return units


def run(out: Path, stage: str, config: TrainConfig, *, poisoned: bool = False) -> None:
    """Train a small model whose head is its embedding."""
    network = build_network("qwen3", tie_word_embeddings=True)
    if poisoned:
        torch.nn.init.constant_(network.model.norm.weight, torch.nan)
    units: list[Any] = label_units() if stage == "labels" else token_units()
    objective: Any = (
        LabelObjective(losses={"softmax": 1.0, "listwise": 0.5})
        if stage == "labels"
        else TokenObjective()
    )
    data = TrainingData(
        units=lambda _: units, objective=objective, valid=lambda: units[:3], is_stream=True
    )
    train(network, build_tokenizer(), data, out, config=config)


def run_stopped(out: Path, stage: str, config: TrainConfig) -> None:
    """Stop a run in the middle, in every process after the same step, and go on with it."""
    optimize, steps = loop._optimize, []

    def stop(*arguments: Any) -> Any:
        if len(steps) == STOPPED_AT:
            raise KeyboardInterrupt
        steps.append(1)
        return optimize(*arguments)

    loop._optimize = stop
    try:
        run(out, stage, config)
    except KeyboardInterrupt:
        loop._optimize = optimize
    run(out, stage, config)


def main(folder: Path) -> None:
    """Run every stage with every sharding, once straight and once stopped."""
    for sharding in SHARDINGS:
        for stage in STAGES:
            config = replace(CONFIG, sharding=sharding)
            run(folder / f"{stage}-{sharding}", stage, config)
        # Dropout: a process's own random numbers go on, too.
        config = replace(config, dropout=0.1, gradient_checkpointing=True)
        run(folder / f"dropout-{sharding}", "labels", config)
        run_stopped(folder / f"stopped-{sharding}", "labels", config)
        config = replace(config, max_steps=2, dropout=0.0, precision="bf16")
        run(folder / f"bf16-{sharding}", "labels", config)
    try:
        run(folder / "poisoned", "labels", CONFIG, poisoned=True)
    except NumericsError as error:
        (folder / f"error-{torch.distributed.get_rank()}.txt").write_text(str(error))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
