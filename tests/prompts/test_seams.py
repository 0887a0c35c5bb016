"""What is encoded on the two sides of a seam is what the whole text would be encoded to."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from rankonce.prompts import seams
from rankonce.prompts.seams import find_seam, has_seams
from rankonce.ranker import EMBEDDED_MODEL
from tests.conftest import build_tokenizer

_WORDS = [
    "Heat",
    "film's",
    "12345",
    "déjà",
    "e\u0301",
    "\u0301",
    "中文",
    "👩‍👧",
    "...",
    "?!\n",
    "<s>",
    "</s>",
    "<|im_",
    "start|>",
    "\u00a0",
    "\u2003",
    "\u0085",
    "\x1f",
    "\t",
    "\n",
    "\r\n",
    " ",
    "  ",
    "",
]
# Letters and marks, digits, spaces of every kind, and what tokenizers treat in their own way.
TEXTS = st.lists(st.sampled_from([*_WORDS, *[" "] * 12]) | st.text(max_size=3), max_size=12).map(
    "".join
)


def _train(pattern: str | None, *, nfc: bool = False, digits: bool = False) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    if nfc:
        backend.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Digits()] if digits else []
    if pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=["<s>", "</s>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [" ".join(_WORDS), "\n".join(_WORDS), "  Heat   heat \n\n  the film's end ... 123 456"]
    backend.train_from_iterator(texts * 20, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return backend


_LLAMA, _QWEN = sorted(seams._PATTERNS, key=lambda pattern: "{1,3}" not in pattern)
_BUILDERS: dict[str, Callable[[], Tokenizer]] = {
    "tests": lambda: build_tokenizer().backend_tokenizer,
    "embedded": lambda: Tokenizer.from_file(str(EMBEDDED_MODEL / "tokenizer.json")),
    "llama3": lambda: _train(_LLAMA),
    "qwen2": lambda: _train(_QWEN, nfc=True),
    "digits": lambda: _train(None, digits=True),
}


@pytest.fixture(scope="module", params=list(_BUILDERS))
def backend(request: pytest.FixtureRequest) -> Tokenizer:
    built = _BUILDERS[request.param]()
    assert has_seams(built)
    return built


def _ids(backend: Tokenizer, text: str) -> list[int]:
    return list(backend.encode(text, add_special_tokens=False).ids)


@given(text=TEXTS, rest=TEXTS)
def test_the_sides_of_a_seam_are_encoded_as_within_the_whole(
    backend: Tokenizer, text: str, rest: str
) -> None:
    seam = find_seam(text)
    parts = _ids(backend, text[:seam]) + _ids(backend, text[seam:] + rest)
    assert parts == _ids(backend, text + rest)


@pytest.mark.parametrize(
    ("text", "seam"),
    [("", 0), (" ", 0), ("Heat", 0), ("a b c", 3), ("a b ", 3), ("a  b", 1), ("a\n b", 0)],
)
def test_a_seam_is_the_last_space_behind_something_else(text: str, seam: int) -> None:
    assert find_seam(text) == seam


def _without_pattern(backend: Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _with_prefix_space(backend: Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def _with_unknown_pattern(backend: Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+ \w+"), behavior="isolated")


def _with_spaces_as_signs(backend: Tokenizer) -> None:
    backend.normalizer = normalizers.Replace(" ", "▁")


def _with_a_token_of_two_words(backend: Tokenizer) -> None:
    backend.add_tokens(["Heat film"])


@pytest.mark.parametrize(
    "change",
    [
        _without_pattern,
        _with_prefix_space,
        _with_unknown_pattern,
        _with_spaces_as_signs,
        _with_a_token_of_two_words,
    ],
)
def test_a_tokenizer_that_may_join_across_spaces_has_no_seams(
    change: Callable[[Tokenizer], None],
) -> None:
    backend = _train(None)
    assert has_seams(backend)
    change(backend)
    assert not has_seams(backend)
