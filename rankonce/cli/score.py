"""``rankonce score``: score every request of a file, as many in a pass as fit."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rankonce.cli.options import (
    AdapterOption,
    ChatOption,
    DeviceOption,
    Engine,
    EngineArgsOption,
    EngineKeyOption,
    EngineModelOption,
    EngineOption,
    EnginePythonOption,
    EngineUrlOption,
    KeepOption,
    LabelMassOption,
    MaxTokensPerPassOption,
    ModelOption,
    PrecisionOption,
    PrefixCacheOption,
    RequestsArgument,
    TaskFileOption,
    TrustRemoteCodeOption,
    end_in_order,
    open_ranker,
    read_adapters,
    read_engine,
)
from rankonce.errors import DataError, NumericsError, RankOnceError, RequestError, TaskError

if TYPE_CHECKING:
    from rankonce.cli.request_files import RequestLine
    from rankonce.ranker import PreparedRequest, Ranker
    from rankonce.records import ScoreResult

# Lines that wait for their pass: short requests should not pile up under a large token budget.
_MAX_WAITING = 1024


def score(
    requests: RequestsArgument,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            dir_okay=False,
            help="Results: .jsonl or .parquet.",
            show_default="JSON lines on stdout",
        ),
    ] = None,
    rejects: Annotated[
        Path | None,
        typer.Option(
            "--rejects",
            dir_okay=False,
            help="Lines that cannot be scored, with their reasons.",
            show_default="OUT.rejects.jsonl; without --out the first such line stops the run",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the last result that --out holds.")
    ] = False,
    model: ModelOption = None,
    task_file: TaskFileOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    keep: KeepOption = None,
    max_tokens_per_pass: MaxTokensPerPassOption = None,
    prefix_cache_mb: PrefixCacheOption = None,
    label_mass: LabelMassOption = False,
    trust_remote_code: TrustRemoteCodeOption = False,
    chat: ChatOption = None,
    adapter: AdapterOption = None,
    engine: EngineOption = Engine.NATIVE,
    engine_url: EngineUrlOption = None,
    engine_python: EnginePythonOption = None,
    engine_model: EngineModelOption = None,
    engine_args: EngineArgsOption = None,
    engine_api_key: EngineKeyOption = None,
) -> None:
    """Score the candidates of every request.

    rankonce score requests.jsonl > scores.jsonl

    A line that cannot be scored goes to the rejects and the run goes on; stderr says how many there
    were. The exit code is 0 then, and 1 if no request at all could be scored.
    """
    if rejects is None and out is not None:
        rejects = out.with_name(out.name + ".rejects.jsonl")
    _check_usage(requests, out, rejects, resume)
    other_engine = read_engine(
        engine,
        url=engine_url,
        python=engine_python,
        model=engine_model,
        args=engine_args,
        api_key=engine_api_key,
        precision=precision,
        unused={
            "--device": device,
            "--keep": keep,
            "--prefix-cache-mb": prefix_cache_mb,
            "--adapter": adapter,
        },
    )
    if other_engine is not None:
        end_in_order()
    with open_ranker(
        other_engine,
        model,
        task_files=task_file,
        device=device,
        precision=precision,
        keep=keep,
        max_tokens_per_pass=max_tokens_per_pass,
        prefix_cache_mb=prefix_cache_mb,
        label_mass=label_mass,
        trust_remote_code=trust_remote_code,
        chat=chat,
        adapters=read_adapters(adapter),
    ) as ranker:
        summary = score_file(ranker, requests, out=out, rejects=rejects, resume=resume)
    typer.echo(summary.describe(), err=True)
    if summary.num_rejected and not summary.num_scored + summary.num_before:
        raise RequestError(
            f"{requests}: none of the {summary.num_rejected} requests could be scored; the first "
            f"one, line {summary.first_reject}"
        )


def _check_usage(requests: Path, out: Path | None, rejects: Path | None, resume: bool) -> None:
    if resume and out is None:
        raise typer.BadParameter("goes on in a file: give --out as well", param_hint="--resume")
    if out is not None and out.suffix.lower() not in (".jsonl", ".parquet"):
        raise typer.BadParameter(f"should end in .jsonl or .parquet, is {out}", param_hint="--out")
    files = [path.resolve() for path in (requests, out, rejects) if path is not None]
    if len(set(files)) < len(files):
        raise typer.BadParameter(
            "requests, results and rejects should be three files", param_hint="--out"
        )


@dataclass(kw_only=True)
class Summary:
    """What a run did.

    Attributes:
        num_before: results that a resumed run found done.
        lowest_ratio: the lowest distinct-score ratio of a request, and its line.
        first_reject: line and reason of the first reject.
    """

    rejects: Path | None
    num_before: int = 0
    num_scored: int = 0
    num_rejected: int = 0
    num_candidates: int = 0
    num_warned: int = 0
    computed_tokens: int = 0
    cached_tokens: int = 0
    separate_tokens: int = 0
    ratio_sum: float = 0.0
    lowest_ratio: tuple[float, int] = (1.0, 0)
    first_reject: str = ""
    started: float = field(default_factory=time.perf_counter)

    def count(self, line: int, result: "ScoreResult") -> None:
        """Take a result in."""
        self.num_scored += 1
        self.num_candidates += len(result.candidates)
        self.num_warned += bool(result.warnings)
        self.computed_tokens += result.usage.computed_tokens
        self.cached_tokens += result.usage.cached_tokens
        self.separate_tokens += result.usage.separate_tokens
        self.ratio_sum += result.distinct_score_ratio
        if result.distinct_score_ratio < self.lowest_ratio[0]:
            self.lowest_ratio = (result.distinct_score_ratio, line)

    def describe(self) -> str:
        """Say it in a few lines."""
        seconds = time.perf_counter() - self.started
        lines = [
            f"scored {self.num_scored:,} requests with {self.num_candidates:,} candidates in "
            f"{seconds:.1f} s, {self.num_candidates / seconds:,.0f} candidates/s"
        ]
        if self.num_before:
            lines.append(f"resumed after {self.num_before:,} requests that were done")
        if self.num_rejected:
            lines.append(f"rejected {self.num_rejected:,} requests, see {self.rejects}")
        if self.num_scored:
            saved = 1 - self.computed_tokens / self.separate_tokens
            ratio, line = self.lowest_ratio
            lowest = f", {ratio:.3f} at the lowest, in line {line}" if line else ""
            lines += [
                f"computed {self.computed_tokens:,} tokens, {self.cached_tokens:,} more came from "
                f"the prefix cache; one prompt a candidate has {self.separate_tokens:,}: "
                f"{saved:.0%} saved",
                f"distinct-score ratio {self.ratio_sum / self.num_scored:.3f}{lowest}",
            ]
        if self.num_warned:
            lines.append(f"warnings stand in the results of {self.num_warned:,} requests")
        return "\n".join(lines)


def score_file(
    ranker: "Ranker",
    requests: Path,
    *,
    out: Path | None,
    rejects: Path | None,
    resume: bool = False,
) -> Summary:
    """Score a file of requests into a file of results.

    Results and rejects are written in the order of the lines, so that what follows the last result
    is all that a resumed run has to do.

    Args:
        out: stdout if ``None``.
        rejects: takes the lines that cannot be scored; ``None`` stops at the first of them.

    Raises:
        RankOnceError: the first line that cannot be scored, where ``rejects`` is ``None``.
    """
    from rich.console import Console
    from rich.progress import Progress

    from rankonce.cli.request_files import measure, read_lines, size_of
    from rankonce.cli.result_files import RejectFile, open_results, result_record

    total = measure(requests)
    console = Console(stderr=True)
    summary = Summary(rejects=rejects)
    with (
        closing(open_results(out, resume=resume)) as results,
        Progress(console=console, disable=not console.is_terminal, transient=True) as progress,
    ):
        reject_file = None if rejects is None else RejectFile(rejects, last=results.last_line)
        bar = progress.add_task("scoring", total=total)

        def advancing() -> Iterator["RequestLine"]:
            for line in read_lines(requests):
                yield line
                progress.advance(bar, size_of(line))

        lines = advancing()
        num_done = results.num_results + (reject_file.num_before if reject_file else 0)
        lines = _skip_done(lines, results.last_line, num_done, out)
        summary.num_before = results.num_results
        summary.started = time.perf_counter()
        for outcomes in score_groups(ranker, lines):
            for line, outcome in outcomes:
                if not isinstance(outcome, RankOnceError):
                    results.write(result_record(line.number, outcome))
                    summary.count(line.number, outcome)
                    continue
                if reject_file is None:
                    results.flush()
                    hint = "--rejects FILE keeps such lines and goes on"
                    raise RequestError(f"line {line.number}: {outcome}; {hint}") from outcome
                reject_file.write(line.number, str(outcome), line.text)
                summary.num_rejected += 1
                summary.first_reject = summary.first_reject or f"{line.number}: {outcome}"
            results.flush()
        results.finish()
    return summary


def _skip_done(
    lines: Iterator["RequestLine"], last_line: int, num_done: int, out: Path | None
) -> Iterator["RequestLine"]:
    """Return the lines after ``last_line``, once those before it are seen to be done."""
    if not last_line:
        return lines
    num_before = 0
    for line in lines:
        if line.number > last_line:
            lines = chain([line], lines)
            break
        num_before += 1
    if num_before != num_done:
        raise DataError(
            f"{out}: holds, with its rejects, {num_done} of the {num_before} requests up to line "
            f"{last_line}; it is not the start of this run, so remove it"
        )
    return lines


def score_groups(
    ranker: "Ranker", lines: Iterable["RequestLine"]
) -> Iterator[list[tuple["RequestLine", "ScoreResult | RankOnceError"]]]:
    """Score lines in groups that fill a pass; what becomes of each line, in their order."""
    group: list[tuple[RequestLine, PreparedRequest | RankOnceError]] = []
    room = ranker.config.max_tokens_per_pass
    for line in lines:
        entry, num_tokens = _prepare(ranker, line)
        if group and (num_tokens > room or len(group) == _MAX_WAITING):
            yield _score_group(ranker, group)
            group, room = [], ranker.config.max_tokens_per_pass
        group.append((line, entry))
        room -= num_tokens
    if group:
        yield _score_group(ranker, group)


def _prepare(
    ranker: "Ranker", line: "RequestLine"
) -> tuple["PreparedRequest | RankOnceError", int]:
    try:
        prepared = ranker.prepare(line.read())
    except (RequestError, TaskError) as error:
        return error, 0
    tokens = prepared.rendered.tokens
    return prepared, len(tokens.prefix_ids) + sum(map(len, tokens.segment_ids))


def _score_group(
    ranker: "Ranker", group: Sequence[tuple["RequestLine", "PreparedRequest | RankOnceError"]]
) -> list[tuple["RequestLine", "ScoreResult | RankOnceError"]]:
    ready = [one for _, one in group if not isinstance(one, RankOnceError)]
    answers = iter(_finish(ranker, ready))
    return [(line, one if isinstance(one, RankOnceError) else next(answers)) for line, one in group]


def _finish(
    ranker: "Ranker", prepared: Sequence["PreparedRequest"]
) -> "list[ScoreResult | RankOnceError]":
    if not prepared:
        return []
    try:
        raws = ranker.forward([one.rendered.tokens for one in prepared])
        return [ranker.finish(one, raw) for one, raw in zip(prepared, raws, strict=True)]
    except (NumericsError, RequestError) as error:
        if len(prepared) == 1:
            return [error]
        # Each by itself, so that only those that fail are rejected.
        return [answer for one in prepared for answer in _finish(ranker, [one])]
