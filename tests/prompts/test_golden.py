"""The text, tokens and layout of every library task, held in ``golden/<task>.txt``.

``REGENERATE_GOLDENS=1 pytest tests/prompts/test_golden.py`` writes the files anew; read the diff.
"""

import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rankonce.cli.explain_prompt import explain, write_explanation
from rankonce.cli.tasks import example_request
from rankonce.prompts.encoding import TextEncoder
from rankonce.prompts.rendering import Renderer
from rankonce.prompts.tasks import Task, library_tasks
from rankonce.records import read_request
from tests.conftest import CHAT_TEMPLATE

GOLDEN = Path(__file__).parent / "golden"


def letter_tokenizer(task: Task) -> PreTrainedTokenizerFast:
    """Build a tokenizer of single bytes and the task's labels: no other task changes its counts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    merges = []
    for name in task.label_names:
        pairs = [(name[:place], name[place]) for place in range(1, len(name))] + [("Ġ", name)]
        for left, right in pairs:
            if left + right not in vocabulary:
                vocabulary[left + right] = len(vocabulary)
                merges.append((left, right))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATE,
    )


def describe(task: Task) -> str:
    tokenizer = letter_tokenizer(task)
    data = example_request(task)
    sections = [json.dumps(data, ensure_ascii=False, indent=1) + "\n"]
    for chat in (False, True):
        renderer = Renderer(TextEncoder(tokenizer, chat=chat), max_prompt_tokens=4096)
        sections.append(write_explanation(explain(renderer, task, read_request(data))))
    return f"\n{'=' * 100}\n".join(sections)


@pytest.mark.parametrize("name", sorted(library_tasks()))
def test_rendered_prompt_equals_its_golden_file(name: str) -> None:
    path = GOLDEN / f"{name}.txt"
    text = describe(library_tasks()[name])
    if os.environ.get("REGENERATE_GOLDENS"):
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"{path} is missing; see the head of this file"
    assert text == path.read_text(encoding="utf-8")


def test_every_golden_file_belongs_to_a_task() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(library_tasks())
