"""``rankonce evaluate``: metrics of rankers, beside baselines where rows are likes and dislikes."""

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
    TaskFileOption,
    TrustRemoteCodeOption,
    load_ranker,
    read_adapters,
)


def evaluate(
    train: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Parquet rows whose labels may be used: user_id, item_id, label, timestamp, "
            "history_ids.",
        ),
    ] = None,
    items: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Parquet: item_id, title, genres."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Parquet rows to score; columns as train."),
    ] = None,
    examples: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="JSON lines of requests of any task with their labels, instead of --train, "
            "--items and --data; may be repeated.",
        ),
    ] = None,
    task_file: TaskFileOption = None,
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
            help="Also write user_id, label and score of every row or candidate as Parquet.",
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
    """Measure a ranker on rows of likes and dislikes beside baselines, or on requests of any task.

    rankonce evaluate --model DIR --train train.parquet --items items.parquet --data valid.parquet
    rankonce evaluate --model DIR --examples valid.jsonl
    """
    from polars import Series
    from rich.console import Console

    from rankonce.environment import describe_environment
    from rankonce.errors import DataError
    from rankonce.evaluation.plots import check_plot, plot_evaluation
    from rankonce.evaluation.report import render_table, to_json, to_markdown

    tables_given = [one for one in (train, items, data) if one is not None]
    if examples and (tables_given or plot is not None):
        raise typer.BadParameter("is instead of tables and their plot", param_hint="--examples")
    if not examples and len(tables_given) < 3:
        raise typer.BadParameter(
            "--train, --items and --data are needed together, or --examples",
            param_hint="--data",
        )
    if plot is not None:
        check_plot(plot)
    if scores is not None and not scores.absolute().parent.is_dir():
        raise DataError(f"scores: {scores.parent} should be a folder that is there")
    adapters = read_adapters(adapter)
    rankers = {
        _name(one): load_ranker(
            one,
            task_files=task_file,
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
    if examples:
        from rankonce.evaluation.labelled import evaluate_examples
        from rankonce.training.data import read_examples

        labelled = evaluate_examples(
            rankers,
            [one for path in examples for one in read_examples(path)],
            num_resamples=num_resamples,
        )
        tables = {"metrics": labelled.rows, "differences": labelled.differences}
        tokens, single = labelled.tokens, labelled.scores
        if labelled.left_out:
            typer.echo(
                f"{labelled.left_out:,} candidates without a hard label were left out", err=True
            )
    else:
        from rankonce.datasets.movielens import read_rows
        from rankonce.evaluation.protocols import evaluate_movies

        assert train is not None
        assert items is not None
        assert data is not None
        rows = read_rows(data)
        evaluation = evaluate_movies(
            rankers,
            train=read_rows(train),
            items=read_rows(items),
            data=rows,
            num_resamples=num_resamples,
        )
        tables = {
            "metrics": evaluation.rows,
            "cold": evaluation.cold,
            "differences": evaluation.differences,
        }
        tokens = evaluation.tokens
        # The scores of --model; --also has runs of its own.
        score = Series("score", next(iter(evaluation.scores.values())))
        single = rows.select("user_id", "label").with_columns(score)
        if plot is not None:
            plot_evaluation(plot, evaluation.labels, evaluation.scores, evaluation.cold)
    if scores is not None:
        single.write_parquet(scores)
    if as_json:
        parts = {name: json.loads(to_json(table)) for name, table in tables.items()}
        record = {**parts, "tokens": tokens, "environment": describe_environment()}
        typer.echo(json.dumps(record, indent=2))
        return
    console = Console(width=160)
    for table in filter(None, tables.values()):
        if markdown:
            typer.echo(to_markdown(table))
        else:
            console.print(render_table(table))
    saved = tokens["separate_tokens"] / max(1, tokens["computed_tokens"])
    typer.echo(
        f"{tokens['computed_tokens']:,} tokens computed; one prompt per candidate would have been "
        f"{tokens['separate_tokens']:,}, {saved:.1f} times as many"
    )


def _name(model: str | None) -> str:
    return "embedded ranker" if model is None else Path(model).name
