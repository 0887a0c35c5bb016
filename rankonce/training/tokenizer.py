"""A byte-level BPE tokenizer trained on the prompts that the model will read."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rankonce.errors import TrainingError
from rankonce.model.sizes import CONTEXT_TOKENS, VOCABULARY_SIZE
from rankonce.prompts.tasks import Task

_SPECIAL = ("<s>", "</s>", "<pad>")


def train_tokenizer(texts: Iterable[str], tasks: Iterable[Task]) -> PreTrainedTokenizerFast:
    """Train a tokenizer in which every label of the tasks is one token.

    Args:
        texts: rendered prompts, a sample of what will be read.
        tasks: whose labels become tokens of their own.

    Returns:
        A fast tokenizer of at most ``VOCABULARY_SIZE`` tokens that puts ``<s>`` before a text.
    """
    labels = sorted({f" {label}" for task in tasks for label in task.label_names})
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    corpus = list(texts)
    if not corpus:
        raise TrainingError("texts: should hold at least one prompt to train a tokenizer on")
    # Labels stand in no prompt: enough of each that their letters are merged.
    corpus += [label for label in labels for _ in range(len(corpus) // 10 + 100)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=CONTEXT_TOKENS,
    )
