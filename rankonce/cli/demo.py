"""``rankonce demo``: a hundred films, ranked for two members of opposite taste."""

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

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
    as_json: Annotated[bool, typer.Option("--json", help="The measurements as JSON.")] = False,
) -> None:
    """Rank a hundred films for two members and measure what one shared prefix saves."""
    import json

    from rich.console import Console

    from rankonce.environment import describe_environment
    from rankonce.ranker import EMBEDDED_MODEL
    from rankonce.records import read_request

    console = Console(width=110, highlight=False)
    progress = Console(stderr=True)
    # Without the prefix cache: both sides of the comparison read the history themselves.
    ranker = load_ranker(prefix_cache_mb=0)
    lines = (EMBEDDED_MODEL / "demo.jsonl").read_text(encoding="utf-8").splitlines()
    requests = [read_request(json.loads(line)) for line in lines]
    results = [ranker.score(request) for request in requests]
    if not as_json:
        for request, result, other in zip(requests, results, reversed(results), strict=True):
            console.print(_ranking(request, result, other))
    savings = []
    for request, result in zip(requests, results, strict=True):
        with progress.status(f"scoring {len(request.candidates)} films one by one"):
            savings.append(_measure(ranker, request, result, num_repeats))
    if as_json:
        record = {"savings": savings, "environment": describe_environment()}
        typer.echo(json.dumps(record, indent=2))
        return
    console.print(_savings(savings))
    console.print(
        "Largest difference between a film's two log-probabilities: "
        f"{max(saving['largest_difference'] for saving in savings):.1e}"
    )


def _measure(
    ranker: "Ranker", request: "ScoreRequest", result: "ScoreResult", num_repeats: int
) -> dict[str, Any]:
    """Score all films in one pass and each in a prompt of its own."""
    alone = [replace(request, candidates=(film,)) for film in request.candidates]
    packed_ms, separate_ms = [], []
    # In turns, so that a busy moment of the machine meets both.
    for _ in range(num_repeats):
        packed_ms.append(_time_ms(ranker, [request])[0])
        milliseconds, singles = _time_ms(ranker, alone)
        separate_ms.append(milliseconds)
    return {
        "member": str(request.id).partition(",")[0],
        "num_films": len(request.candidates),
        "packed_tokens": result.usage.prompt_tokens,
        "separate_tokens": result.usage.separate_tokens,
        "packed_ms": min(packed_ms),
        "separate_ms": min(separate_ms),
        "largest_difference": max(
            abs(packed.log_probs[label] - single.candidates[0].log_probs[label])
            for packed, single in zip(result.candidates, singles, strict=True)
            for label in packed.log_probs
        ),
    }


def _savings(savings: list[dict[str, Any]]) -> object:
    from rich.table import Table

    table = Table(
        title="One pass against one prompt per film, measured just now", title_justify="left"
    )
    for column in ("", "films", "tokens: one pass", "one by one", "saving"):
        table.add_column(column, justify="right" if column else "left")
    for column in ("time: one pass", "one by one", "saving"):
        table.add_column(column, justify="right")
    for saving in savings:
        table.add_row(
            saving["member"],
            str(saving["num_films"]),
            f"{saving['packed_tokens']:,}",
            f"{saving['separate_tokens']:,}",
            f"{saving['separate_tokens'] / saving['packed_tokens']:.1f}×",
            f"{saving['packed_ms']:,.0f} ms",
            f"{saving['separate_ms']:,.0f} ms",
            f"{saving['separate_ms'] / saving['packed_ms']:.1f}×",
        )
    return table


def _ranking(request: "ScoreRequest", result: "ScoreResult", other: "ScoreResult") -> object:
    from rich.table import Table

    liked = [str(event.item.fields["title"]) for event in request.history]
    table = Table(title=f"{request.id}\nliked {', '.join(liked)}", title_justify="left")
    table.add_column("rank", justify="right")
    table.add_column("film", no_wrap=True, max_width=44)
    table.add_column("genres", no_wrap=True, max_width=30)
    table.add_column("P(Yes)", justify="right", min_width=6)
    table.add_column("other's", justify="right", min_width=7)
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


def _time_ms(ranker: "Ranker", requests: "list[ScoreRequest]") -> "tuple[float, list[ScoreResult]]":
    started = time.perf_counter()
    results = [ranker.score(request) for request in requests]
    return 1000 * (time.perf_counter() - started), results
