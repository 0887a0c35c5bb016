"""Whole prompts are encoded as transformers does, and tokens keep their spaces on the way back."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rankonce.errors import LabelError, PromptTooLongError
from rankonce.model.loading import prepare_model
from rankonce.prompts.encoding import TextEncoder
from rankonce.serving.prompts import PromptReader
from tests.conftest import build_network, build_tokenizer

TEXTS = ["Is Heat a film? Yes", " Yes", "No", "<s>No</s> Yes", "Yés \n Yes", ""]


def build_sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Train a tokenizer as Llama 2 has it: spaces are signs, and a text begins with a token."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=100, special_tokens=special, show_progress=False)
    backend.train_from_iterator(["Is Heat a film? : Yes No Yes No " * 50], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    # Characters outside the vocabulary are spelled in bytes.
    content = json.loads(backend.to_str())
    vocabulary = content["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    backend = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def read_with(tokenizer: PreTrainedTokenizerFast) -> PromptReader:
    model = prepare_model(build_network("llama"), tokenizer, name="llama")
    return PromptReader(model, TextEncoder(tokenizer))


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    return build_sentencepiece_tokenizer()


@pytest.mark.parametrize("build", [build_sentencepiece_tokenizer, build_tokenizer])
def test_prompts_are_encoded_as_the_tokenizer_does(build: object) -> None:
    assert callable(build)
    tokenizer = build()
    reader = read_with(tokenizer)
    expected = [tuple(tokenizer(text).input_ids) for text in TEXTS]
    assert reader.encode_all(TEXTS, "prompt").whole == expected
    assert reader.encode_all(expected, "prompt").whole == expected


def test_truncation_in_the_tokenizer_file_cuts_nothing(
    sentencepiece: PreTrainedTokenizerFast,
) -> None:
    model = prepare_model(build_network("llama"), sentencepiece, name="llama")
    encoder = TextEncoder(sentencepiece)
    expected = tuple(sentencepiece("Is Heat a film?").input_ids)
    sentencepiece.backend_tokenizer.enable_truncation(2)
    sentencepiece.backend_tokenizer.enable_padding(length=99)
    try:
        reader = PromptReader(model, encoder)
    finally:
        sentencepiece.backend_tokenizer.no_truncation()
        sentencepiece.backend_tokenizer.no_padding()
    assert reader.encode_all(["Is Heat a film?"], "prompt").whole == [expected]


def test_a_token_keeps_the_space_before_it(sentencepiece: PreTrainedTokenizerFast) -> None:
    reader = read_with(sentencepiece)
    spaced = sentencepiece.convert_tokens_to_ids("▁Yes")
    assert reader.token_text(spaced) == reader.token_name(spaced) == " Yes"
    assert reader.label_ids([" Yes", " No"]) == [
        spaced,
        sentencepiece.convert_tokens_to_ids("▁No"),
    ]


def test_a_part_of_a_character_goes_by_its_id(sentencepiece: PreTrainedTokenizerFast) -> None:
    reader = read_with(sentencepiece)
    part = sentencepiece.convert_tokens_to_ids("<0xC3>")
    assert reader.token_name(part) == f"token_id:{part}"


@pytest.mark.parametrize("label", ["", "Yes No", "Maybe"])
def test_a_label_that_is_not_one_token_is_refused(
    label: str, sentencepiece: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(LabelError, match="should be one token"):
        read_with(sentencepiece).label_ids([label])


_QUERIES = ["", "Is Heat", "Is Heat a ", "Is Heat\na film?\n", "Yés <s> No Yes ", " Yes"]
_ITEMS = ["", " ", "film? Yes", "Yes", "</s> No", "\n Yes"]


@pytest.mark.parametrize("item_first", [False, True])
@pytest.mark.parametrize("build", [build_sentencepiece_tokenizer, build_tokenizer])
def test_texts_that_begin_alike_have_the_ids_of_whole_texts(
    build: object, item_first: bool
) -> None:
    assert callable(build)
    tokenizer = build()
    reader = read_with(tokenizer)
    for query in _QUERIES:
        texts = [item + query if item_first else query + item for item in _ITEMS]
        expected = [tuple(tokenizer(text).input_ids) for text in texts]
        found = reader.encode_concatenated(query, _ITEMS, "items", item_first=item_first)
        assert found.whole == expected
        assert reader.encode_all(texts, "prompt").whole == expected


def test_what_texts_begin_with_is_encoded_once() -> None:
    reader = read_with(build_tokenizer())
    query = "Is Heat a film? Is Up? " * 5
    texts = [f"{query}{number} Yes" for number in range(9)]
    num_shared = len(reader.encode_all([query.rstrip()], "prompt").whole[0])
    for found in (
        reader.encode_all(texts, "prompt"),
        reader.encode_concatenated(query, texts, "items", item_first=False),
    ):
        assert len(found.head) == num_shared


@pytest.mark.parametrize("item_first", [False, True])
def test_a_query_that_is_too_long_is_refused_for_the_first_item(item_first: bool) -> None:
    reader = read_with(build_tokenizer())
    query = "Is Heat a film? " * reader.max_prompt_tokens
    text = f"No{query}" if item_first else f"{query}No"
    number = len(reader.encode_all([text], "items").whole[0])
    with pytest.raises(PromptTooLongError, match=rf"items\[0\]: the prompt has {number} tokens"):
        reader.encode_concatenated(query, ["No"] * 9, "items", item_first=item_first)
