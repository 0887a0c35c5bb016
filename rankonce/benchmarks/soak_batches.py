"""Batch files through outages: every line must come back once, with the right scores."""

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from rankonce.benchmarks.soak_traffic import KnownQuestion

_POLL_S = 1.0
_ENDED = ("completed", "failed", "expired", "cancelled")


@dataclass(kw_only=True)
class BatchCounts:
    """What became of the lines of all batches.

    Attributes:
        num_lost: lines without an answer in a batch that ended.
        num_twice: answers too many.
        num_wrong: answers with another status than 200, or with wrong scores.
        unfinished: batches that did not end in time.
    """

    num_batches: int = 0
    num_lines: int = 0
    num_lost: int = 0
    num_twice: int = 0
    num_wrong: int = 0
    unfinished: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether no line was lost, doubled or wrong."""
        return not (self.num_lost or self.num_twice or self.num_wrong or self.unfinished)


async def run_batch(
    client: httpx.AsyncClient,
    questions: Sequence[KnownQuestion],
    counts: BatchCounts,
    *,
    tolerance: float,
    timeout_s: float,
) -> None:
    """Send questions of one form as a batch, wait for its end, and check every line.

    Args:
        client: of the server; where it does not answer, it is asked again.
        timeout_s: after which the batch counts as unfinished.
    """
    counts.num_batches += 1
    counts.num_lines += len(questions)
    try:
        async with asyncio.timeout(timeout_s):
            batch, output = await _have_done(client, questions)
    except TimeoutError:
        counts.unfinished += 1
        return
    if batch["status"] != "completed":
        counts.faults.append(f"batch {batch['id']}: {batch['status']}: {batch.get('errors')}")
    answers = [json.loads(line) for line in output.splitlines() if line.strip()]
    seen = Counter(answer["custom_id"] for answer in answers)
    counts.num_lost += sum(str(place) not in seen for place in range(len(questions)))
    counts.num_twice += sum(number - 1 for number in seen.values())
    for answer in answers:
        response = answer["response"] or {}
        question = questions[int(answer["custom_id"])]
        right = response.get("status_code") == 200
        if not right or not question.difference(response["body"]) <= tolerance:
            counts.num_wrong += 1
            counts.faults.append(f"batch line {answer['custom_id']}: {str(answer)[:200]}")


async def _have_done(
    client: httpx.AsyncClient, questions: Sequence[KnownQuestion]
) -> tuple[dict[str, Any], str]:
    endpoint = questions[0].form
    lines = "\n".join(
        json.dumps(
            {
                "custom_id": str(place),
                "method": "POST",
                "url": endpoint,
                "body": json.loads(question.call.body),
            }
        )
        for place, question in enumerate(questions)
    )
    upload = {"file": ("soak.jsonl", lines.encode(), "application/jsonl")}
    file = await _insist(client, "POST", "/v1/files", data={"purpose": "batch"}, files=upload)
    body = {
        "input_file_id": file.json()["id"],
        "endpoint": endpoint,
        "completion_window": "24h",
    }
    batch = (await _insist(client, "POST", "/v1/batches", json=body)).json()
    while batch["status"] not in _ENDED:
        await asyncio.sleep(_POLL_S)
        batch = (await _insist(client, "GET", f"/v1/batches/{batch['id']}")).json()
    output = ""
    for name in ("output_file_id", "error_file_id"):
        if batch.get(name):
            path = f"/v1/files/{batch[name]}/content"
            output += (await _insist(client, "GET", path)).text + "\n"
    return batch, output


async def _insist(client: httpx.AsyncClient, method: str, path: str, **body: Any) -> httpx.Response:
    """Ask until there is an answer that is no refusal for now."""
    while True:
        try:
            answer = await client.request(method, path, **body)
        except httpx.HTTPError:
            answer = None
        if answer is not None and answer.status_code not in (429, 503):
            answer.raise_for_status()
            return answer
        await asyncio.sleep(_POLL_S)
