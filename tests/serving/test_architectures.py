"""Law 3 on every architecture: served = Python = plain transformers on the rendered text."""

import json
from dataclasses import asdict
from typing import Any

import pytest
import torch

from rankonce.model.loading import prepare_model
from rankonce.ranker import Ranker
from tests.conftest import ARCHITECTURES, build_network, build_request
from tests.serving.conftest import serving

TOLERANCE = 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rank_and_completions_equal_python_and_transformers(
    architecture: str, tokenizer: Any
) -> None:
    model = prepare_model(build_network(architecture), tokenizer, name=architecture)
    in_python = Ranker(prepare_model(build_network(architecture), tokenizer, name=architecture))
    question = build_request(7)
    rendered = in_python.prepare(question).rendered
    prompts = [rendered.prefix + segment for segment in rendered.segments]
    label_ids = [ids[0] for ids in rendered.tokens.label_ids]
    plain = build_network(architecture)
    with serving(Ranker(model)) as http:
        ranked = http.post("/v1/rank", json=json.loads(json.dumps(asdict(question)))).json()
        body = {
            "model": architecture,
            # The prompt's own first token is in the text; the tokenizer adds none.
            "prompt": [tokenizer(text, add_special_tokens=False).input_ids for text in prompts],
            "max_tokens": 1,
            "logprobs": 1,
            "label_token_ids": label_ids,
        }
        completed = http.post("/v1/completions", json=body).json()
    scores = in_python.score(question).candidates
    for prompt, row, score, choice in zip(
        body["prompt"], ranked["results"], scores, completed["choices"], strict=True
    ):
        with torch.no_grad():
            logits = plain(torch.tensor([prompt])).logits[0, -1].double()
        expected = logits[label_ids].log_softmax(0).tolist()
        assert list(row["log_probs"].values()) == pytest.approx(expected, abs=TOLERANCE)
        assert list(score.log_probs.values()) == pytest.approx(expected, abs=TOLERANCE)
        whole = logits.log_softmax(0)
        tops = choice["logprobs"]["top_logprobs"][0]
        for token_id in label_ids:
            served = tops[tokenizer.decode([token_id])]
            assert served == pytest.approx(float(whole[token_id]), abs=TOLERANCE)
