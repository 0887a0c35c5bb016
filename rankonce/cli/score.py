"""``rankonce score``: score every request of a file, as many in a pass as fit."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankonce.cli.cluster.options import (
    RayAddressOption,
    RayOption,
    ShardRowsOption,
    WorkersOption,
    check_ray_usage,
)
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
from rankonce.cli.summary import Summary
from rankonce.errors import DataError, NumericsError, RankOnceError, RequestError, TaskError

if TYPE_CHECKING:
    from rankonce.cli.request_files import RequestLine
    from rankonce.cli.result_files import RejectFile, ResultFile
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
            help="Results: .jsonl or .parquet; with --ray a folder for shards.",
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
    ray: RayOption = False,
    ray_address: RayAddressOption = None,
    workers: WorkersOption = None,
    shard_rows: ShardRowsOption = None,
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
    check_ray_usage(
        ray,
        {"--ray-address": ray_address, "--workers": workers, "--shard-rows": shard_rows},
        engine=engine.value,
    )
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
    loading: dict[str, Any] = {
        "model": model,
        "task_files": task_file,
        "device": device,
        "precision": precision,
        "keep": keep,
        "max_tokens_per_pass": max_tokens_per_pass,
        "prefix_cache_mb": prefix_cache_mb,
        "label_mass": label_mass,
        "trust_remote_code": trust_remote_code,
        "chat": chat,
        "adapters": read_adapters(adapter),
    }
    if ray:
        _check_ray_files(requests, out, rejects)
        from rankonce.cli.cluster.scoring import RayScoring, score_on_ray

        assert out is not None, "checked"
        score_on_ray(
            RayScoring(
                requests=requests,
                out=out,
                resume=resume,
                shard_rows=shard_rows or 1000,
                workers=workers,
                address=ray_address,
                loading=loading,
            )
        )
        return
    if rejects is None and out is not None:
        rejects = out.with_name(out.name + ".rejects.jsonl")
    _check_usage(requests, out, rejects, resume)
    if other_engine is not None:
        end_in_order()
    with open_ranker(other_engine, **loading) as ranker:
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
    if out is not None and out.is_dir():
        raise typer.BadParameter(
            f"should be a file, {out} is a folder: --ray writes to one", param_hint="--out"
        )
    if out is not None and out.suffix.lower() not in (".jsonl", ".parquet"):
        raise typer.BadParameter(f"should end in .jsonl or .parquet, is {out}", param_hint="--out")
    files = [path.resolve() for path in (requests, out, rejects) if path is not None]
    if len(set(files)) < len(files):
        raise typer.BadParameter(
            "requests, results and rejects should be three files", param_hint="--out"
        )


def _check_ray_files(requests: Path, out: Path | None, rejects: Path | None) -> None:
    if out is None or out.is_file():
        raise typer.BadParameter("--ray needs a folder for its shards", param_hint="--out")
    if rejects is not None:
        raise typer.BadParameter(
            "does not go with --ray: rejects lie beside each shard", param_hint="--rejects"
        )
    if not requests.is_file():
        raise typer.BadParameter(
            f"--ray reads a file where each shard begins, not {requests}", param_hint="REQUESTS"
        )


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
    from rankonce.cli.result_files import RejectFile, open_results

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
        summary.start()
        write_scores(ranker, lines, results, reject_file, summary)
    return summary


def write_scores(
    ranker: "Ranker",
    lines: Iterable["RequestLine"],
    results: "ResultFile",
    reject_file: "RejectFile | None",
    summary: Summary,
) -> None:
    """Score lines into files that are open, and complete the results.

    Raises:
        RequestError: the first line that cannot be scored, where nothing takes rejects.
    """
    from rankonce.cli.result_files import result_record

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
