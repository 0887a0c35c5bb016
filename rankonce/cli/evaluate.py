"""``rankonce evaluate``: metrics of a ranker beside baselines, on files of likes and dislikes."""

import json
from pathlib import Path
from typing import Annotated

import typer

from rankonce.cli.options import (
    AdapterOption,
    DeviceOption,
    KeepOption,
    MaxTokensPerPassOption,
    ModelOption,
    PrecisionOption,
    TrustRemoteCodeOption,
    load_ranker,
    read_adapters,
)


def evaluate(
    train: Annotated[
        Path,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Parquet rows whose labels may be used: user_id, item_id, label, timestamp, "
            "history_ids.",
        ),
    ],
    items: Annotated[
        Path,
        typer.Option(exists=True, dir_okay=False, help="Parquet: item_id, title, genres."),
    ],
    data: Annotated[
        Path,
        typer.Option(exists=True, dir_okay=False, help="Parquet rows to score; columns as train."),
    ],
    model: ModelOption = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER|ID", help="Another run of the recipe; their mean is added. Repeatable."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON with full precision.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Also draw calibration and AUC by history length."),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="Also write every row of --data as Parquet: user_id, label, score (P(liked)).",
        ),
    ] = None,
    markdown: Annotated[bool, typer.Option(help="Tables in Markdown.")] = False,
    num_resamples: Annotated[
        int, typer.Option(min=2, help="Bootstrap samples of members for the standard errors.")
    ] = 200,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    keep: KeepOption = None,
    max_tokens_per_pass: MaxTokensPerPassOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    adapter: AdapterOption = None,
) -> None:
    """Measure a ranker on rows of likes and dislikes, side by side with baselines.

    rankonce evaluate --model DIR --train train.parquet --items items.parquet --data valid.parquet
    """
    from rich.console import Console

    from rankonce.datasets.movielens import read_rows
    from rankonce.environment import describe_environment
    from rankonce.errors import DataError
    from rankonce.evaluation.plots import check_plot, plot_evaluation
    from rankonce.evaluation.protocols import evaluate_movies
    from rankonce.evaluation.report import render_table, to_json, to_markdown

    if plot is not None:
        check_plot(plot)
    adapters = read_adapters(adapter)
    rankers = {
        _name(one): load_ranker(
            one,
            device=device,
            precision=precision,
            keep=keep,
            max_tokens_per_pass=max_tokens_per_pass,
            trust_remote_code=trust_remote_code,
            adapters=adapters,
            # One adapter is meant for all rows; among several the task chooses.
            adapter=next(iter(adapters)) if adapters and len(adapters) == 1 else None,
        )
        for one in (model, *(also or ()))
    }
    if len(rankers) < 1 + len(also or ()):
        raise DataError(f"also: should hold folders of other names than {', '.join(rankers)}")
    rows = read_rows(data)
    evaluation = evaluate_movies(
        rankers,
        train=read_rows(train),
        items=read_rows(items),
        data=rows,
        num_resamples=num_resamples,
    )
    if scores is not None:
        from polars import Series

        # Those of --model; --also has runs of its own.
        score = Series("score", next(iter(evaluation.scores.values())))
        rows.select("user_id", "label").with_columns(score).write_parquet(scores)
    if plot is not None:
        plot_evaluation(plot, evaluation.labels, evaluation.scores, evaluation.cold)
    tables = {
        "metrics": evaluation.rows,
        "cold": evaluation.cold,
        "differences": evaluation.differences,
    }
    if as_json:
        parts = {name: json.loads(to_json(table)) for name, table in tables.items()}
        record = {**parts, "tokens": evaluation.tokens, "environment": describe_environment()}
        typer.echo(json.dumps(record, indent=2))
        return
    console = Console(width=160)
    for table in tables.values():
        if markdown:
            typer.echo(to_markdown(table))
        else:
            console.print(render_table(table))
    saved = evaluation.tokens["separate_tokens"] / max(1, evaluation.tokens["computed_tokens"])
    typer.echo(
        f"{evaluation.tokens['computed_tokens']:,} tokens computed; one prompt per row would have "
        f"been {evaluation.tokens['separate_tokens']:,}, {saved:.1f} times as many"
    )


def _name(model: str | None) -> str:
    return "embedded ranker" if model is None else Path(model).name
