"""``rankonce explain-prompt``: what a model reads for a request, to the token."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from rankonce.cli.options import (
    ChatOption,
    DeviceOption,
    KeepOption,
    ModelOption,
    PrecisionOption,
    RequestsArgument,
    TaskFileOption,
    TrustRemoteCodeOption,
    load_ranker,
)
from rankonce.errors import RequestError

if TYPE_CHECKING:
    from rankonce.cli.request_files import RequestLine
    from rankonce.layout import TokenizedRequest
    from rankonce.prompts.encoding import TextEncoder
    from rankonce.prompts.rendering import Renderer
    from rankonce.prompts.tasks import Task
    from rankonce.records import ScoreRequest


def explain_prompt(
    requests: RequestsArgument,
    line: Annotated[
        int | None,
        typer.Option(
            "--line", min=1, help="Line or row of the request.", show_default="the first request"
        ),
    ] = None,
    candidate: Annotated[
        int | None,
        typer.Option("--candidate", min=0, help="Show this candidate only, counted from 0."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with all token ids.")
    ] = False,
    style: Annotated[
        str | None,
        typer.Option(
            "--style",
            metavar="NAME",
            help="Show another wording of the task, which training may use.",
            show_default="the task's own, as in scoring",
        ),
    ] = None,
    model: ModelOption = None,
    task_file: TaskFileOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    keep: KeepOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    chat: ChatOption = None,
) -> None:
    """Show the exact prompt of a request.

    The file may also be one JSON object on many lines.
    """
    from rankonce.prompts.tasks import find_task

    request = read_one(requests, line)
    if candidate is not None and candidate >= len(request.candidates):
        raise RequestError(
            f"candidate: should be less than {len(request.candidates)}, is {candidate}"
        )
    ranker = load_ranker(
        model,
        task_files=task_file,
        device=device,
        precision=precision,
        keep=keep,
        trust_remote_code=trust_remote_code,
        chat=chat,
    )
    task = find_task(request.task, ranker.tasks)
    if style is not None:
        task = task.in_style(style)
    explanation = {
        "model": ranker.model.name,
        **explain(ranker.renderer, task, request, candidate=candidate),
    }
    if as_json:
        typer.echo(json.dumps(explanation, ensure_ascii=False, indent=2))
    else:
        typer.echo(write_explanation(explanation), nl=False)


def read_one(path: Path, line: int | None = None) -> "ScoreRequest":
    """Read one request from a file of them, or from a file that is one JSON object.

    Raises:
        RequestError: there is no such line, or it is not a request.
    """
    from rankonce.cli.request_files import (
        STDIN,
        is_parquet,
        parse_json,
        read_json_lines,
        read_lines,
    )
    from rankonce.records import read_request

    if is_parquet(path):
        return _pick(path, read_lines(path), line)
    with BytesIO(sys.stdin.buffer.read()) if path == STDIN else path.open("rb") as file:
        whole = None if line else _whole_object(file)
        if whole is not None:
            return read_request(parse_json(whole))
        return _pick(path, read_json_lines(file), line)


def _whole_object(file: BinaryIO) -> bytes | None:
    """Return the text of a file that is one JSON value on many lines."""
    from rankonce.cli.request_files import read_json_lines

    first = next(read_json_lines(file), None)
    file.seek(0)
    if first is None or _is_json(first.text.encode()):
        return None
    text = file.read()
    file.seek(0)
    return text if _is_json(text) else None


def _is_json(text: bytes) -> bool:
    from rankonce.cli.request_files import parse_json

    try:
        parse_json(text)
    except RequestError:
        return False
    return True


def _pick(path: Path, lines: "Iterator[RequestLine]", line: int | None) -> "ScoreRequest":
    for entry in lines:
        if line is None or entry.number == line:
            return entry.read()
    raise RequestError(f"{path}: has no request" + (f" in line {line}" if line else ""))


def explain(
    renderer: "Renderer", task: "Task", request: "ScoreRequest", *, candidate: int | None = None
) -> dict[str, Any]:
    """Describe what the model reads for a request as plain data.

    Args:
        candidate: index of the only candidate to show; all by default.
    """
    encoder = renderer.encoder
    rendered = renderer.render(task, request)
    tokens = rendered.tokens
    shown = range(len(request.candidates)) if candidate is None else [candidate]
    events = range(len(request.history))
    return {
        "id": request.id,
        "task": task.name,
        "version": task.version,
        "chat": encoder.chat,
        "max_prompt_tokens": renderer.max_prompt_tokens,
        "prefix": {
            "pieces": _prefix_pieces(
                encoder, request.instruction or task.instruction, rendered.prefix
            ),
            "num_tokens": len(tokens.prefix_ids),
            "token_ids": list(tokens.prefix_ids),
        },
        "candidates": [
            {
                "index": index,
                "id": request.candidates[index].id,
                "pieces": _pieces(
                    (rendered.segments[index].removesuffix(encoder.tail), False),
                    (encoder.tail, True),
                ),
                "num_tokens": len(tokens.segment_ids[index]),
                "token_ids": list(tokens.segment_ids[index]),
                "difference_in_one_go": _difference(
                    encoder,
                    [*tokens.prefix_ids, *tokens.segment_ids[index]],
                    encoder.whole_text_ids(rendered.prefix + rendered.segments[index]),
                ),
            }
            for index in shown
        ],
        "labels": [
            {"name": name, "token_ids": list(ids), "tokens": [encoder.token(i) for i in ids]}
            for name, ids in zip(task.label_names, tokens.label_ids, strict=True)
        ],
        "history": {
            "policy": rendered.history.policy,
            "num_tokens": len(tokens.prefix_ids)
            - _prefix_tokens(renderer, task, replace(request, history=())),
            "kept": [index for index in events if index not in rendered.history.dropped],
            "dropped": [
                {"event": index, "reason": reason}
                for index, reason in rendered.history.dropped.items()
            ],
        },
        "examples": {
            "num_examples": len(request.examples),
            "num_tokens": len(tokens.prefix_ids)
            - _prefix_tokens(renderer, task, replace(request, examples=())),
        },
        "layout": _layout(tokens, shown),
        "packed_tokens": len(tokens.prefix_ids) + sum(map(len, tokens.segment_ids)),
        "separate_tokens": tokens.separate_tokens,
    }


def _prefix_tokens(renderer: "Renderer", task: "Task", request: "ScoreRequest") -> int:
    return len(renderer.render(task, request).tokens.prefix_ids)


def _prefix_pieces(encoder: "TextEncoder", instruction: str, prefix: str) -> list[dict[str, Any]]:
    rest = prefix.removeprefix(encoder.head)
    if not encoder.middle:
        return _pieces((encoder.head, True), (rest, False))
    rest = rest.removeprefix(instruction + encoder.middle)
    return _pieces(
        (encoder.head, True), (instruction, False), (encoder.middle, True), (rest, False)
    )


def _pieces(*pieces: tuple[str, bool]) -> list[dict[str, Any]]:
    return [{"text": text, "frame": frame} for text, frame in pieces if text]


def _layout(tokens: "TokenizedRequest", shown: Sequence[int]) -> list[dict[str, Any]]:
    from rankonce.layout import PassPart, lay_out_pass

    part = PassPart(request=0, first=0, last=len(tokens.segment_ids), cached=False)
    layout = lay_out_pass([part], [len(tokens.prefix_ids)], [list(map(len, tokens.segment_ids))])
    num_prefixes = len(layout.query_start) - len(tokens.segment_ids)

    def span(place: int) -> dict[str, Any]:
        start, end = int(layout.query_start[place]), int(layout.query_end[place])
        positions = layout.positions_T[start:end]
        sees = [[int(layout.prefix_start[place]), int(layout.prefix_end[place])], [start, end]]
        return {
            "tokens": [start, end],
            "positions": [int(positions[0]), int(positions[-1]) + 1],
            "sees": [keys for keys in sees if keys[0] < keys[1]],
        }

    return [
        *({"span": "prefix", **span(place)} for place in range(num_prefixes)),
        *(
            {
                "span": f"candidate {index}",
                **span(num_prefixes + index),
                "score_row": int(layout.score_rows_C[index]),
            }
            for index in shown
        ),
    ]


def _difference(
    encoder: "TextEncoder", pieces: Sequence[int], whole: Sequence[int]
) -> dict[str, Any] | None:
    """Find the first token at which encoding in pieces and in one go part, if they do."""
    if list(pieces) == list(whole):
        return None
    pairs = zip_longest(pieces, whole)
    place = next(index for index, (left, right) in enumerate(pairs) if left != right)

    def describe(ids: Sequence[int]) -> dict[str, Any] | None:
        return {"id": ids[place], "token": encoder.token(ids[place])} if place < len(ids) else None

    return {"token": place, "pieces": describe(pieces), "one_go": describe(whole)}


def write_explanation(explanation: Mapping[str, Any]) -> str:
    """Write an explanation for people; the frame of the model stands between ⟦ and ⟧."""
    history = explanation["history"]
    num_kept, num_dropped = len(history["kept"]), len(history["dropped"])
    packed, separate = explanation["packed_tokens"], explanation["separate_tokens"]
    model = f"model {explanation['model']}, " if "model" in explanation else ""
    lines = [
        f"{model}task {explanation['task']}, version {explanation['version']}",
        f"{'chat template' if explanation['chat'] else 'plain text'}; the model takes "
        f"{explanation['max_prompt_tokens']} tokens a prompt; ⟦…⟧ is its frame, the only place of "
        "special tokens",
        "",
        f"── prefix, {explanation['prefix']['num_tokens']} tokens, read once ──",
        _marked(explanation["prefix"]["pieces"]),
    ]
    for one in explanation["candidates"]:
        lines += [f"── {_title(one)}, {one['num_tokens']} tokens ──", _marked(one["pieces"])]
    lines.append("── labels ──")
    for label in explanation["labels"]:
        pairs = zip(label["token_ids"], label["tokens"], strict=True)
        tokens = ", ".join(f"{token_id} {token!r}" for token_id, token in pairs)
        lines.append(f"{label['name']}: {tokens}")
    lines += [
        f"── history, policy {history['policy']} ──",
        f"{num_kept} of {num_kept + num_dropped} events kept, which adds "
        f"{history['num_tokens']} tokens to the prefix",
        *(f"history[{one['event']}] dropped: {one['reason']}" for one in history["dropped"]),
        *_examples_part(explanation["examples"]),
        "── layout ──",
        *_layout_table(explanation["layout"]),
        "── cost ──",
        f"{packed} tokens packed; one prompt a candidate has {separate}, {separate / packed:.1f} "
        "times as many",
        "── the whole text tokenised in one go ──",
        *(f"{_title(one)}: {_compared(one)}" for one in explanation["candidates"]),
    ]
    return "\n".join(lines) + "\n"


def _examples_part(examples: Mapping[str, int]) -> list[str]:
    if not examples["num_examples"]:
        return []
    return [
        "── examples ──",
        f"{examples['num_examples']} solved candidates, which add {examples['num_tokens']} tokens "
        "to the prefix",
    ]


def _title(candidate: Mapping[str, Any]) -> str:
    name = "" if candidate["id"] is None else f" {json.dumps(candidate['id'], ensure_ascii=False)}"
    return f"candidate {candidate['index']}{name}"


def _marked(pieces: Sequence[Mapping[str, Any]]) -> str:
    text = "".join(f"⟦{one['text']}⟧" if one["frame"] else one["text"] for one in pieces)
    return text.removesuffix("\n")


def _layout_table(spans: Sequence[Mapping[str, Any]]) -> list[str]:
    def write(ends: Sequence[int]) -> str:
        return f"{ends[0]}–{ends[1] - 1}"

    rows = [("span", "tokens", "positions", "sees tokens", "score row")]
    for span in spans:
        sees = " and ".join(map(write, span["sees"]))
        score_row = str(span.get("score_row", ""))
        rows.append(
            (span["span"], write(span["tokens"]), write(span["positions"]), sees, score_row)
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _compared(candidate: Mapping[str, Any]) -> str:
    difference = candidate["difference_in_one_go"]
    if difference is None:
        return "the same tokens"
    pieces, one_go = (
        "no token" if side is None else f"{side['id']} {side['token']!r}"
        for side in (difference["pieces"], difference["one_go"])
    )
    return f"token {difference['token']} is {one_go}, here {pieces}"
