"""Plain transformers behind FastAPI: what a team writes before it looks for a server.

One padded batch of whole prompts, one prompt a candidate, logits of the last token alone, no
packing and no cache; questions run one after the other on a thread beside the event loop. It
takes SGLang's score form.
"""

import argparse
import asyncio
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import BaseModel


class ScoreQuestion(BaseModel):
    """The fields of SGLang's score question that the benchmark sends."""

    query: str
    items: list[str]
    label_token_ids: list[int]
    apply_softmax: bool


def create_transformers_app(folder: str, *, max_prompts: int) -> Any:
    """Build the application.

    Args:
        folder: a checkpoint.
        max_prompts: that go through the model at once, which bounds its memory.
    """
    from fastapi import FastAPI
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    # Padding is masked, so any token will do.
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    network = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    app = FastAPI()
    turn = asyncio.Lock()

    @torch.inference_mode()
    def score(question: ScoreQuestion) -> list[list[float]]:
        prompts = [question.query + item for item in question.items]
        rows: list[list[float]] = []
        for first in range(0, len(prompts), max_prompts):
            batch = tokenizer(
                prompts[first : first + max_prompts], padding=True, return_tensors="pt"
            )
            logits_BV = network(**batch, logits_to_keep=1, use_cache=False).logits[:, -1].float()
            if question.apply_softmax:
                logits_BV = logits_BV[:, question.label_token_ids]
                rows += logits_BV.softmax(dim=-1).tolist()
            else:
                rows += logits_BV.softmax(dim=-1)[:, question.label_token_ids].tolist()
        return rows

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/score")
    async def answer(question: ScoreQuestion) -> dict[str, Any]:
        async with turn:
            return {"object": "scoring", "scores": await asyncio.to_thread(score, question)}

    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve a checkpoint until the process is told to stop."""
    import uvicorn

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--max-prompts", type=int, default=16)
    parsed = parser.parse_args(arguments)
    app = create_transformers_app(parsed.model, max_prompts=parsed.max_prompts)
    uvicorn.run(app, host="127.0.0.1", port=parsed.port, log_level="warning")


if __name__ == "__main__":
    main()
