"""``rankonce crossvalidate``: what search rankers learn from judged queries, fold by fold."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rankonce.cli.options import quiet_transformers

if TYPE_CHECKING:
    from rankonce.datasets.search_index import SearchIndex
    from rankonce.evaluation.search_baselines import FoldRanker
    from rankonce.training.search_recipe import SearchConfig

# By name: whether a ranker is pretrained on the collection and whether it learns from judgements,
# and what its candidates say.
_MODELS = {
    "self-supervised ranker": (True, False, "evidence"),
    "ranker": (True, True, "evidence"),
    "ranker, not pretrained": (False, True, "evidence"),
    "ranker, with passages": (True, True, "passage"),
    "ranker, text alone": (True, True, "text"),
}
_DEFAULT = ("BM25", "ranker")


def crossvalidate(
    dataset: Annotated[str, typer.Argument(help="cranfield, or another set of judged queries.")],
    data: Annotated[
        Path,
        typer.Option(exists=True, help="Files of the source, or a folder of rankonce datasets."),
    ],
    out: Annotated[
        Path,
        typer.Option(file_okay=False, help="Folder of the folds; finished ones are kept."),
    ],
    ranker: Annotated[
        list[str] | None,
        typer.Option(
            help="What is compared, may be given several times; all for every one.",
            show_default=", ".join(_DEFAULT),
        ),
    ] = None,
    num_folds: Annotated[int, typer.Option(min=2, help="Parts of the queries.")] = 5,
    num_candidates: Annotated[int, typer.Option(min=10, help="BM25's best, to be ranked.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of the cut into folds.")] = 0,
    size: Annotated[
        str | None, typer.Option(help="Of the model: 0.07m to 150m.", show_default="the recipe's")
    ] = None,
    num_resamples: Annotated[
        int, typer.Option(min=2, help="Bootstrap samples of queries for the standard errors.")
    ] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="JSON with full precision.")] = False,
    markdown: Annotated[bool, typer.Option(help="Tables in Markdown.")] = False,
) -> None:
    """Train on all folds of the queries but one, rank that one's, and compare with BM25.

    rankonce crossvalidate cranfield --data cranfield/ --out runs/cranfield
    """
    from dataclasses import asdict

    from rich.console import Console

    from rankonce.datasets.common_form import MANIFEST, open_dataset
    from rankonce.datasets.search_index import SearchIndex
    from rankonce.datasets.search_sets import read_search_set
    from rankonce.datasets.sources import find_adapter, prepare_dataset
    from rankonce.environment import describe_environment
    from rankonce.evaluation.report import render_table, to_json, to_markdown
    from rankonce.evaluation.search_protocols import (
        FoldConfig,
        compare_rankers,
        crossvalidate,
        measure_rankers,
    )
    from rankonce.training.search_recipe import SearchConfig

    quiet_transformers()
    adapter = find_adapter(dataset)
    if (data / MANIFEST).exists():
        prepared = open_dataset(data)
    else:
        prepared = prepare_dataset(adapter, out / "dataset", given=data)
    search_set = read_search_set(prepared)
    index = SearchIndex(search_set.documents)
    config = SearchConfig() if size is None else SearchConfig(size=size)
    validation = crossvalidate(
        search_set,
        _choose_rankers(ranker or list(_DEFAULT), index, out, config),
        out,
        config=FoldConfig(num_folds=num_folds, num_candidates=num_candidates, seed=seed),
        index=index,
        learning=asdict(config),
    )
    tables = {
        "metrics": measure_rankers(validation, search_set, num_resamples=num_resamples),
        "differences": compare_rankers(validation, search_set, num_resamples=num_resamples),
    }
    if as_json:
        record = {
            **{name: json.loads(to_json(rows)) for name, rows in tables.items()},
            "bm25": [{"k1": k1, "b": b} for k1, b in validation.bm25],
            "seconds": validation.seconds,
            "environment": describe_environment(),
        }
        typer.echo(json.dumps(record, indent=2))
        return
    for rows in tables.values():
        if markdown:
            typer.echo(to_markdown(rows))
        else:
            Console(width=160).print(render_table(rows))


def _choose_rankers(
    names: list[str], index: "SearchIndex", out: Path, config: "SearchConfig"
) -> "Mapping[str, FoldRanker]":
    """Find rankers by name; BM25, which the others are compared with, comes first."""
    from rankonce.evaluation.search_baselines import SEARCH_BASELINES

    known = [*SEARCH_BASELINES, *_MODELS]
    if unknown := [name for name in names if name not in (*known, "all")]:
        raise typer.BadParameter(
            f"should be all or one of {'; '.join(known)}, is {unknown[0]!r}", param_hint="--ranker"
        )
    chosen = known if "all" in names else [name for name in known if name in {"BM25", *names}]
    return {
        name: SEARCH_BASELINES[name]
        if name in SEARCH_BASELINES
        else _model_ranker(name, index, out, config)
        for name in chosen
    }


def _model_ranker(
    name: str, index: "SearchIndex", out: Path, config: "SearchConfig"
) -> "FoldRanker":
    from dataclasses import replace

    from rankonce.datasets.search_evidence import View
    from rankonce.datasets.search_index import Floats
    from rankonce.datasets.search_sets import SearchFold
    from rankonce.training.search_recipe import pretrain, score_fold, score_requests

    is_pretrained, is_finetuned, view = _MODELS[name]
    config = replace(config, view=View(view))

    def rank(fold: SearchFold) -> list[Floats]:
        start = pretrain(index, out / f"pretrained-{view}", config) if is_pretrained else None
        if not is_finetuned and start is not None:
            return score_requests(start, fold.test, view=config.view)
        folder = out / f"fold-{fold.number}" / name.replace(", ", "-").replace(" ", "-")
        return score_fold(fold, folder, config, pretrained=start)

    return rank
