"""Score on the endpoint = score in Python = score by plain transformers on the text."""

from dataclasses import asdict
from typing import Any

import pytest
import torch

from rankonce.records import ScoreRequest
from tests.conftest import build_request
from tests.serving.conftest import Served

TOLERANCE = 1e-5
PROMPTS = [
    "Film: Heat (1995)\nWill the member like the film? Answer:",
    "Film: Big (1988)\nWill the member like the film? Answer:",
    "Film: M\nAnswer:",
    "<|im_start|>user\nM<|im_end|>\n<|im_start|>assistant\n",
    "Something else",
]


@pytest.mark.parametrize("kind", ["plain", "chatty"])
@pytest.mark.parametrize("num_candidates", [1, 63])
def test_rank_equals_python_equals_transformers(
    kind: str, num_candidates: int, request: pytest.FixtureRequest
) -> None:
    served: Served = request.getfixturevalue(kind)
    question = build_request(num_candidates)
    answer = _rank(served, question)
    in_python = served.ranker.score(question)
    rendered = served.ranker.prepare(question).rendered
    label_ids = [ids[0] for ids in rendered.tokens.label_ids]
    for index, (result, candidate) in enumerate(
        zip(answer["results"], in_python.candidates, strict=True)
    ):
        text = rendered.prefix + rendered.segments[index]
        ids = served.tokenizer(text, add_special_tokens=False).input_ids
        whole = served.plain_logprobs(ids)[label_ids]
        expected = whole.log_softmax(dim=0)
        assert result["index"] == index
        assert result["rank"] == candidate.rank
        assert list(result["log_probs"].values()) == pytest.approx(expected.tolist(), abs=TOLERANCE)
        assert result["log_probs"] == pytest.approx(candidate.log_probs, abs=TOLERANCE)
        assert list(result["probabilities"].values()) == pytest.approx(
            expected.exp().tolist(), abs=TOLERANCE
        )
        assert result["value"] == pytest.approx(candidate.value, abs=2 * TOLERANCE)
        assert result["label_mass"] == pytest.approx(float(whole.exp().sum()), rel=1e-3)


def test_completions_equal_transformers_on_the_text(plain: Served) -> None:
    answer = plain.openai.completions.create(
        model="tiny", prompt=PROMPTS, max_tokens=1, logprobs=5, extra_body={"labels": [" Yes", "0"]}
    )
    for prompt, choice in zip(PROMPTS, answer.choices, strict=True):
        expected = plain.plain_logprobs(plain.tokenizer(prompt).input_ids)
        _check_tops(plain, choice.logprobs.top_logprobs[0], expected, 5, [" Yes", "0"])
        assert choice.logprobs.token_logprobs == pytest.approx(
            [float(expected.max())], abs=TOLERANCE
        )
        assert choice.text == plain.tokenizer.decode([int(expected.argmax())])


def test_prompts_as_token_ids_equal_prompts_as_text(plain: Served) -> None:
    ids = [plain.tokenizer(prompt).input_ids for prompt in PROMPTS]
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 1, "logprobs": 3}
    by_text = plain.openai.completions.create(prompt=PROMPTS, **options)
    by_ids = plain.openai.completions.create(prompt=ids, **options)
    alone = plain.openai.completions.create(prompt=ids[1], **options)
    assert [choice.text for choice in by_ids.choices] == [choice.text for choice in by_text.choices]
    first, second = by_text.choices[1].logprobs, alone.choices[0].logprobs
    assert second.top_logprobs[0] == pytest.approx(first.top_logprobs[0], abs=TOLERANCE)


def test_chat_equals_transformers_on_the_template(chatty: Served) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "You rank films."},
        {"role": "user", "content": "\n\nIs Heat a film?\n"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": [{"type": "text", "text": "And M?"}]},
    ]
    answer = chatty.openai.chat.completions.create(
        model="tiny",
        messages=messages,
        max_completion_tokens=1,
        logprobs=True,
        top_logprobs=20,
        extra_body={"labels": ["Yes", "No"]},
    )
    plain_messages = [*messages[:3], {"role": "user", "content": "And M?"}]
    ids = chatty.tokenizer.apply_chat_template(
        plain_messages, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    expected = chatty.plain_logprobs(ids)
    (token,) = answer.choices[0].logprobs.content
    listed = {entry.token: entry.logprob for entry in token.top_logprobs}
    _check_tops(chatty, listed, expected, 20, ["Yes", "No"])
    assert token.logprob == pytest.approx(float(expected.max()), abs=TOLERANCE)
    assert answer.choices[0].message.content == chatty.tokenizer.decode([int(expected.argmax())])
    assert answer.usage.prompt_tokens == len(ids)
    for entry in token.top_logprobs:
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token


@pytest.mark.parametrize("apply_softmax", [False, True])
@pytest.mark.parametrize("item_first", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
def test_score_equals_transformers_on_the_concatenation(
    apply_softmax: bool, item_first: bool, as_ids: bool, plain: Served
) -> None:
    query, items = "Films for a member.\n", ["Heat. Answer:", "M. Answer:", "Heat. Answer:", " "]
    label_ids = [plain.tokenizer(label).input_ids[0] for label in (" Yes", " No", "0")]
    encode = plain.tokenizer
    question = {
        "model": "tiny",
        "query": encode(query).input_ids if as_ids else query,
        "items": [encode(item).input_ids if as_ids else item for item in items],
        "label_token_ids": label_ids,
        "apply_softmax": apply_softmax,
        "item_first": item_first,
    }
    answer = plain.http.post("/v1/score", json=question).json()
    assert answer["object"] == "scoring"
    for item, scores in zip(items, answer["scores"], strict=True):
        parts = [item, query] if item_first else [query, item]
        if as_ids:
            ids = [i for part in parts for i in encode(part).input_ids]
        else:
            ids = encode("".join(parts)).input_ids
        expected = plain.plain_logprobs(ids)[label_ids]
        if apply_softmax:
            expected = expected.log_softmax(dim=0)
        assert scores == pytest.approx(expected.exp().tolist(), abs=TOLERANCE)
        assert torch.tensor(scores).log().tolist() == pytest.approx(expected.tolist(), abs=1e-4)


def test_score_takes_labels_as_words(plain: Served) -> None:
    question = {"query": "Heat.", "items": [" Answer:"]}
    ids = [plain.tokenizer(label).input_ids[0] for label in (" Yes", "0")]
    by_ids = plain.http.post("/v1/score", json={**question, "label_token_ids": ids}).json()
    by_words = plain.http.post("/v1/score", json={**question, "labels": [" Yes", "0"]}).json()
    assert by_words["scores"][0] == pytest.approx(by_ids["scores"][0], abs=TOLERANCE)


def test_more_candidates_than_a_pass_holds_equal_python(plain: Served) -> None:
    question = build_request(700, seed=3)
    answer = _rank(plain, question)
    in_python = plain.ranker.score(question)
    values = [result["value"] for result in answer["results"]]
    assert values == pytest.approx([c.value for c in in_python.candidates], abs=2 * TOLERANCE)
    # Passes are cut elsewhere, and of 700 rounded values two may fall together by chance.
    assert answer["distinct_score_ratio"] == pytest.approx(
        in_python.distinct_score_ratio, abs=2 / 700
    )
    assert answer["usage"]["separate_tokens"] == in_python.usage.separate_tokens


def _rank(served: Served, question: ScoreRequest) -> dict[str, Any]:
    response = served.http.post("/v1/rank", json=asdict(question))
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def _check_tops(
    served: Served,
    listed: dict[str, float],
    expected: torch.Tensor,
    num_top: int,
    labels: list[str],
) -> None:
    """Compare listed tokens with the most probable ones and the labels of plain transformers."""
    wanted = expected.topk(num_top).indices.tolist()
    wanted += [served.tokenizer(label, add_special_tokens=False).input_ids[0] for label in labels]
    by_name = {}
    for token_id in wanted:
        text = served.tokenizer.decode([token_id])
        # The head has more rows than the tokenizer has tokens, as padded checkpoints do.
        name = f"token_id:{token_id}" if not text or "\ufffd" in text else text
        by_name[name] = float(expected[token_id])
    assert listed == pytest.approx(by_name, abs=TOLERANCE)
