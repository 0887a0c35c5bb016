"""Small random models of every supported architecture, a tokenizer, and requests."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Read when Triton is first imported, which some versions of transformers do: its kernels then
    # run on CPU tensors, slowly.
    os.environ["TRITON_INTERPRET"] = "1"

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from rankonce.model.loading import LoadedModel
    from rankonce.records import ScoreRequest

# What follows imports RankOnce where it needs it: the kernels' tests run where the libraries of
# prompts and serving are not installed.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

# How long an example takes says what else the machine does, not whether it is right.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SHAPE: dict[str, Any] = {
    "vocab_size": 640,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {"sliding_window": 4096, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 4096, "query_pre_attn_scalar": 16},
}

_TOKENIZER_TASKS = ("job-apply", "movie-like", "movie-rating", "search-relevance", "similar-item")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def data_folder(name: str) -> Path:
    """Return a folder of the real data, or skip the test where it is absent."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("RANKONCE_DATA", default)) / name
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}: set RANKONCE_DATA to the folder that holds {name}")
    return folder


def build_tokenizer(*, chat: bool = False) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the words of the library's tasks."""
    from rankonce.prompts.tasks import library_tasks

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    # Words of five tasks: another task in the library changes no model of the tests.
    tasks = [library_tasks()[name] for name in _TOKENIZER_TASKS]
    texts = [
        text for task in tasks for text in (task.instruction, task.question, *task.candidate.lines)
    ]
    labels = [name for task in tasks for name in task.label_names]
    labels += sorted(
        {name for task in library_tasks().values() for name in task.label_names} - set(labels)
    )
    texts += [text for name in labels for text in (f" {name}", name) for _ in range(20)]
    trainer = trainers.BpeTrainer(
        # One less than the networks have rows: the last is a token without a text.
        vocab_size=639,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_network(architecture: str, *, seed: int = 0, **overrides: Any) -> Any:
    """Build a small random model of an architecture in fp32."""
    config = AutoConfig.for_model(
        architecture, **{**_SHAPE, **ARCHITECTURES.get(architecture, {}), **overrides}
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def build_request(
    num_candidates: int, *, task: str = "movie-like", seed: int = 0
) -> "ScoreRequest":
    """Make a request with a history and candidates of many lengths."""
    from rankonce.records import Event, Item, ScoreRequest

    generator = torch.Generator().manual_seed(seed)

    def number(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    def title() -> str:
        words = ["Heat", "Alien", "Up", "Solaris", "Fargo", "Brazil", "Casablanca", "M"]
        return " ".join(words[number(8)] for _ in range(1 + number(6))) + f" ({1920 + number(100)})"

    genres = ["Action", "Drama", "Comedy"]
    return ScoreRequest(
        id=f"request-{seed}",
        task=task,
        time=1_000_000_000,
        profile={"num_ratings": number(200), "like_share": number(100) / 100},
        history=tuple(
            Event(
                item=Item(fields={"title": title(), "genres": genres[: 1 + number(3)]}),
                action=["liked", "disliked"][number(2)],
                time=900_000_000 + 1000 * i,
            )
            for i in range(6)
        ),
        candidates=tuple(
            Item(id=str(i), fields={"title": f"{title()} {i}", "genres": genres[: 1 + number(3)]})
            for i in range(num_candidates)
        ),
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def load_random(tokenizer: PreTrainedTokenizerFast) -> Callable[..., "LoadedModel"]:
    """Give small random models, each built once a session."""
    from rankonce.model.loading import prepare_model

    built: dict[str, LoadedModel] = {}

    def load(architecture: str) -> "LoadedModel":
        if architecture not in built:
            built[architecture] = prepare_model(
                build_network(architecture), tokenizer, name=architecture
            )
        return built[architecture]

    return load
