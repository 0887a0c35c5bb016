"""Results as the lines of output files, in OpenAI's form."""

import time
import uuid
from dataclasses import dataclass
from typing import Any, Literal

from pydantic_core import to_json

from rankonce.serving.batches.batch_store import Batch, BatchStore, LineResult
from rankonce.serving.batches.dispatch import Reply
from rankonce.serving.batches.file_store import FileStore, StoredFile
from rankonce.serving.batches.folder import move_into_place
from rankonce.serving.batches.lines import Line

_EXPIRED = {
    "code": "batch_expired",
    "message": "This request could not be executed before the completion window expired.",
}


def write_result(batch_id: str, line: Line, reply: Reply) -> LineResult:
    """Write what a line was answered."""
    response = {
        "status_code": reply.status,
        "request_id": f"req_{uuid.uuid4().hex}",
        "body": reply.body,
    }
    usage = (reply.body.get("usage") if isinstance(reply.body, dict) else None) or {}
    # Our own forms count cached tokens beside the others, OpenAI's below them.
    details = usage.get("prompt_tokens_details") or usage
    return LineResult(
        batch_id=batch_id,
        number=line.number,
        failed=reply.status != 200,
        text=_text(batch_id, line, response=response, error=None),
        input_tokens=usage.get("prompt_tokens", 0),
        cached_tokens=details.get("cached_tokens", 0),
        output_tokens=usage.get("completion_tokens", 0),
    )


def write_expired(batch_id: str, line: Line) -> LineResult:
    """Write that a line's time is over."""
    return LineResult(
        batch_id=batch_id,
        number=line.number,
        failed=True,
        text=_text(batch_id, line, response=None, error=_EXPIRED),
    )


def _text(
    batch_id: str, line: Line, *, response: dict[str, Any] | None, error: dict[str, str] | None
) -> str:
    return to_json(
        {
            "id": f"batch_req_{batch_id.removeprefix('batch_')}_{line.number}",
            "custom_id": line.custom_id,
            "response": response,
            "error": error,
        }
    ).decode()


@dataclass(frozen=True, kw_only=True)
class _Written:
    file: StoredFile | None
    num_lines: int


def write_outputs(batch: Batch, batches: BatchStore, files: FileStore) -> None:
    """Write both files of a batch that has no line left to score, and end it.

    Killed anywhere, it can be called again: the files have names of their own, which the next call
    writes over.
    """
    output = _write_file(batch, batches, files, kind="output")
    error = _write_file(batch, batches, files, kind="error")
    batches.finish(
        batch.id,
        output=output.file,
        error=error.file,
        num_completed=output.num_lines,
        num_failed=error.num_lines,
    )


def _write_file(
    batch: Batch, batches: BatchStore, files: FileStore, *, kind: Literal["output", "error"]
) -> _Written:
    partial, num_lines = files.new_partial(), 0
    with partial.open("w", encoding="utf-8", newline="\n") as stream:
        for text in batches.results(batch.id, failed=kind == "error"):
            stream.write(f"{text}\n")
            num_lines += 1
    if not num_lines:
        partial.unlink()
        return _Written(file=None, num_lines=0)
    now = int(time.time())
    file = StoredFile(
        id=f"file-{batch.id.removeprefix('batch_')}-{kind}",
        owner=batch.owner,
        purpose="batch_output",
        filename=f"{batch.id}_{kind}.jsonl",
        num_bytes=partial.stat().st_size,
        created_at=now,
        expires_at=now + batch.keep_output_s,
    )
    move_into_place(partial, files.path(file.id))
    return _Written(file=file, num_lines=num_lines)
