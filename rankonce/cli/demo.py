"""``rankonce demo``: a hundred films, ranked for two members of opposite taste."""

import math
import time
from typing import TYPE_CHECKING, Annotated

import typer

from rankonce.cli.options import load_ranker

if TYPE_CHECKING:
    from rankonce.ranker import Ranker
    from rankonce.records import ScoreRequest, ScoreResult

_NUM_SHOWN = 10


def demo(
    num_repeats: Annotated[
        int, typer.Option(min=1, help="Runs of each timing; the fastest counts.")
    ] = 3,
) -> None:
    """Rank a hundred films for two members and measure what one shared prefix saves."""
    import json

    from rich.console import Console
    from rich.table import Table

    from rankonce.ranker import EMBEDDED_MODEL
    from rankonce.records import read_request

    console = Console(width=118, highlight=False)
    ranker = load_ranker(prefix_cache_mb=0)
    lines = (EMBEDDED_MODEL / "demo.jsonl").read_text(encoding="utf-8").splitlines()
    requests = [read_request(json.loads(line)) for line in lines]
    results = [ranker.score(request) for request in requests]
    for request, result, other in zip(requests, results, reversed(results), strict=True):
        console.print(_ranking(request, result, other))
    table = Table(title="One pass against one prompt per film, measured now", title_justify="left")
    for column in ("member", "films", "tokens in one pass", "one prompt per film", "fewer tokens"):
        table.add_column(column, justify="left" if column == "member" else "right")
    for column in ("one pass", "one prompt per film", "faster"):
        table.add_column(column, justify="right")
    for request, result in zip(requests, results, strict=True):
        packed_ms = min(_time_ms(ranker, [request]) for _ in range(num_repeats))
        alone = _one_by_one(request)
        with console.status("scoring one prompt per film"):
            separate_ms = min(_time_ms(ranker, alone) for _ in range(num_repeats))
        usage = result.usage
        table.add_row(
            str(request.id).split(",")[0],
            str(len(request.candidates)),
            f"{usage.prompt_tokens:,}",
            f"{usage.separate_tokens:,}",
            f"{usage.separate_tokens / usage.prompt_tokens:.1f}×",
            f"{packed_ms:,.0f} ms",
            f"{separate_ms:,.0f} ms",
            f"{separate_ms / packed_ms:.1f}×",
        )
    console.print(table)
    worst = max(
        _difference(ranker, request, result)
        for request, result in zip(requests, results, strict=True)
    )
    console.print(f"Largest difference between a film's two log-probabilities: {worst:.1e}")


def _ranking(request: "ScoreRequest", result: "ScoreResult", other: "ScoreResult") -> object:
    from rich.table import Table

    liked = [str(e.item.fields["title"]) for e in request.history if e.action == "liked"]
    disliked = [str(e.item.fields["title"]) for e in request.history if e.action == "disliked"]
    table = Table(
        title=f"{request.id}\nliked {', '.join(liked)}\ndisliked {', '.join(disliked)}",
        title_justify="left",
    )
    table.add_column("rank", justify="right")
    table.add_column("film")
    table.add_column("genres")
    table.add_column("P(Yes)", justify="right")
    table.add_column("rank for the other", justify="right")
    ranked = result.ranked()
    films = {candidate.id: candidate for candidate in request.candidates}
    elsewhere = {candidate.id: candidate.rank for candidate in other.candidates}
    for candidate in ranked[:_NUM_SHOWN] + ranked[-_NUM_SHOWN // 2 :]:
        fields = films[candidate.id].fields
        table.add_row(
            str(candidate.rank),
            str(fields["title"]),
            ", ".join(fields["genres"]),
            f"{math.exp(candidate.log_probs['Yes']):.3f}",
            str(elsewhere[candidate.id]),
            end_section=candidate.rank == _NUM_SHOWN,
        )
    return table


def _one_by_one(request: "ScoreRequest") -> "list[ScoreRequest]":
    from dataclasses import replace

    return [replace(request, candidates=(candidate,)) for candidate in request.candidates]


def _time_ms(ranker: "Ranker", requests: "list[ScoreRequest]") -> float:
    started = time.perf_counter()
    for request in requests:
        ranker.score(request)
    return 1000 * (time.perf_counter() - started)


def _difference(ranker: "Ranker", request: "ScoreRequest", result: "ScoreResult") -> float:
    alone = [ranker.score(one).candidates[0] for one in _one_by_one(request)]
    return max(
        abs(packed.log_probs[label] - single.log_probs[label])
        for packed, single in zip(result.candidates, alone, strict=True)
        for label in packed.log_probs
    )
