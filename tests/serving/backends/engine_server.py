"""A small engine with vLLM's and SGLang's wire forms, whose scores are those of plain transformers.

It computes every prompt by itself, so that what it says is what an engine should say; nothing of
RankOnce takes part in it. A proxy in front of it can break connections in mid-request.
"""

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from typing import Any

import torch
from fastapi import FastAPI
from fastapi.responses import JSONResponse

BLOCK_TOKENS = 16


class Plain:
    """Plain transformers on token ids; prompts of one length go through it together, once."""

    def __init__(self, network: Any) -> None:
        self.network = network
        self._rows: dict[tuple[int, ...], torch.Tensor] = {}
        self._turn = threading.Lock()

    @torch.inference_mode()
    def logprobs(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return log-probabilities of the next token of every prompt, by vocabulary."""
        asked = [tuple(prompt) for prompt in prompts]
        with self._turn:
            new = sorted({prompt for prompt in asked if prompt not in self._rows}, key=len)
            for _, alike in groupby(new, key=len):
                part = list(alike)
                logits = self.network(torch.tensor(part), logits_to_keep=1, use_cache=False).logits[
                    :, -1
                ]
                self._rows.update(zip(part, logits.float().log_softmax(dim=-1), strict=True))
            return torch.stack([self._rows[prompt] for prompt in asked])


def create_engine_app(
    plain: Plain,
    tokenizer: Any,
    *,
    name: str = "tiny",
    max_model_len: int = 4096,
    packs_items: bool = False,
) -> FastAPI:
    """Build the application.

    Args:
        packs_items: count tokens as SGLang does with ``--enable-mis``.
    """
    app = FastAPI()
    app.state.asked = asked = []
    app.state.known = known = set()

    def refuse(message: str, status: int = 400) -> JSONResponse:
        return JSONResponse({"error": {"message": message, "code": status}}, status)

    def take(path: str, body: dict[str, Any], prompts: Sequence[Sequence[int]]) -> Any:
        asked.append((path, body))
        if body["model"] != name:
            return refuse(f"The model `{body['model']}` does not exist.", 404)
        if any(len(prompt) >= max_model_len for prompt in prompts):
            return refuse(f"This model's maximum context length is {max_model_len} tokens.")
        return None

    @app.get("/health")
    def health() -> dict[str, str]:
        return {}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "max_model_len": max_model_len}]}

    @app.post("/tokenize")
    def tokenize(body: dict[str, Any]) -> dict[str, Any]:
        ids = tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])
        return {"tokens": ids, "count": len(ids), "max_model_len": max_model_len}

    @app.post("/v1/completions")
    def complete(body: dict[str, Any]) -> Any:
        prompts = body["prompt"]
        if (refusal := take("/v1/completions", body, prompts)) is not None:
            return refusal
        assert body["max_tokens"] == 1
        assert body["return_tokens_as_token_ids"] is True
        choices = []
        for index, row in enumerate(plain.logprobs(prompts)):
            best = int(row.argmax())
            ids = body.get("logprob_token_ids") or row.topk(body["logprobs"]).indices.tolist()
            assert len(ids) <= 128
            top = {f"token_id:{token}": float(row[token]) for token in [best, *ids]}
            choices.append({"index": index, "text": "", "logprobs": {"top_logprobs": [top]}})
        # Blocks that some prompt had before, of the last prompt alone, as vLLM tells it.
        cached = 0
        for prompt in prompts:
            ends = range(BLOCK_TOKENS, len(prompt), BLOCK_TOKENS)
            blocks = [(body.get("cache_salt"), *prompt[:end]) for end in ends]
            cached = BLOCK_TOKENS * sum(block in known for block in blocks)
            known.update(blocks)
        num_tokens = sum(map(len, prompts))
        # In an order of its own: only the index says whose a choice is.
        return {
            "choices": choices[::-1],
            "usage": {
                "prompt_tokens": num_tokens,
                "completion_tokens": len(prompts),
                "prompt_tokens_details": {"cached_tokens": cached},
            },
        }

    @app.post("/v1/score")
    def score(body: dict[str, Any]) -> Any:
        query, items, labels = body["query"], body["items"], body["label_token_ids"]
        prompts = [query + item for item in items]
        packed = len(query) + 1 + sum(len(item) + 1 for item in items)
        if (refusal := take("/v1/score", body, prompts)) is not None:
            return refusal
        if packed > max_model_len:
            return refuse(f"The input ({packed} tokens) is longer than the context length.")
        assert body["item_first"] is False
        assert body["apply_softmax"] is False
        assert len(set(labels)) == len(labels)
        rows = plain.logprobs(prompts)[:, labels]
        return {
            "object": "scoring",
            "scores": rows.exp().tolist(),
            "token_logprobs": rows.tolist() if body["return_token_logprobs"] else None,
            "model": name,
            "usage": {"prompt_tokens": packed if packs_items else sum(map(len, prompts))},
        }

    return app


class BreakingProxy:
    """Hands connections on to a server, and breaks those that it is told to.

    Attributes:
        num_to_pass, num_to_break: questions to ``/v1/…`` that are handed on, and those after them
            that are taken and never answered.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.num_to_pass = 0
        self.num_to_break = 0
        self.num_broken = 0
        self._start(self._accept)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def die(self) -> None:
        """Break all connections and take no more."""
        # A thread that waits in accept keeps a listener that is only closed.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for one in self._open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for one in (self._listener, *self._open):
            one.close()

    def _start(self, target: Any, *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._port))
                self._open += [client, server]
                self._start(self._hand, client, server)
                self._start(self._hand, server, client)

    def _hand(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                if data.startswith(b"POST /v1/"):
                    if self.num_to_pass > 0:
                        self.num_to_pass -= 1
                    elif self.num_to_break > 0:
                        self.num_to_break -= 1
                        self.num_broken += 1
                        break
                target.sendall(data)
        for one in (source, target):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


@contextmanager
def breaking_proxy(url: str) -> Iterator[BreakingProxy]:
    proxy = BreakingProxy(int(url.rpartition(":")[2]))
    try:
        yield proxy
    finally:
        proxy.die()
