"""Labels are single tokens, or refused."""

from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rankonce.errors import LabelError
from rankonce.prompts.encoding import TextEncoder
from rankonce.prompts.labels import resolve_labels
from rankonce.prompts.tasks import Label, Task, library_tasks
from tests.conftest import build_tokenizer


def task_with(*labels: Label) -> Task:
    data = library_tasks()["movie-like"].model_dump()
    ranking = {"kind": "log_odds", "label": labels[0].name}
    return Task.model_validate({**data, "labels": labels, "ranking": ranking})


def resolve(*labels: Label, chat: bool = False) -> tuple[tuple[int, ...], ...]:
    return resolve_labels(task_with(*labels), TextEncoder(build_tokenizer(chat=chat), chat=chat))


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("name", sorted(library_tasks()))
def test_a_label_is_the_token_that_follows_the_prompt(name: str, chat: bool) -> None:
    tokenizer = build_tokenizer(chat=True)
    task = library_tasks()[name]
    resolved = resolve_labels(task, TextEncoder(tokenizer, chat=chat))
    lead = "" if chat else " "
    before = "<|im_start|>assistant\n" if chat else task.answer_slot
    for label, (token_id,) in zip(task.label_names, resolved, strict=True):
        assert tokenizer(before + lead + label).input_ids[-1] == token_id
        assert tokenizer.decode([token_id]) == lead + label


@pytest.mark.parametrize("chat", [False, True])
def test_a_label_that_the_tokenizer_splits_is_refused_with_its_ids(chat: bool) -> None:
    lead = "" if chat else " "
    ids = build_tokenizer()(lead + "Perhaps").input_ids
    with pytest.raises(LabelError) as caught:
        resolve(Label(name="Yes"), Label(name="Perhaps"), chat=chat)
    assert str(caught.value) == (
        f"labels: {lead + 'Perhaps'!r} of task 'movie-like' should be one token, but the tokenizer "
        f"splits it into {ids}"
    )


def test_a_surface_form_that_the_tokenizer_splits_is_refused_by_name() -> None:
    with pytest.raises(LabelError, match="' yes' of task 'movie-like' should be one token"):
        resolve(Label(name="Yes", surface_forms=(" yes",)), Label(name="No"))


def test_surface_forms_count_as_their_label() -> None:
    tokenizer = build_tokenizer()
    yes, no = resolve(Label(name="Yes", surface_forms=("Yes", " apply")), Label(name="No"))
    assert yes == tuple(tokenizer(text).input_ids[0] for text in (" Yes", "Yes", " apply"))
    assert no == (tokenizer(" No").input_ids[0],)


def test_a_surface_form_with_the_same_token_is_counted_once() -> None:
    yes, _ = resolve(Label(name="Yes", surface_forms=(" Yes", "Yes", "Yes")), Label(name="No"))
    assert len(yes) == 2


def test_two_labels_that_share_a_token_are_refused() -> None:
    token_id = build_tokenizer()(" No").input_ids[0]
    with pytest.raises(LabelError, match=rf"'Yes' and 'No' .* are the same token {token_id}"):
        resolve(Label(name="Yes", surface_forms=(" No",)), Label(name="No"))


def test_labels_that_a_tokenizer_cannot_tell_apart_are_refused() -> None:
    words = ["<unk>", "\n", "answer:", "yes", "no"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(LabelError, match=r"'Yes' and 'YES' .* are the same token 3"):
        resolve_labels(task_with(Label(name="Yes"), Label(name="YES")), TextEncoder(tokenizer))
