"""The record of a comparison as Markdown: where it comes from, one table, what its columns say."""

from collections.abc import Mapping
from typing import Any

# By the figure's name in the record: the column's title and meaning. What compares does so with
# the bf16 arm.
_COLUMNS = {
    "top_agreement": (
        "top agreement",
        "NDCG@1 agreement: share of requests whose first candidate is also the first in bf16, "
        "± its standard error; ties count in part",
    ),
    "kendall_tau": (
        "tau-b",
        "Kendall's rank correlation of a request's scores, mean over requests",
    ),
    "distinct_score_ratio": (
        "distinct",
        "different scores of a request over its candidates with different text",
    ),
    "ndcg_at_1": (
        "NDCG@1",
        "bf16's P(first label) of the arm's first candidate over the best one: what a disagreement "
        "costs",
    ),
    "mean_delta": ("mean Δ", "mean difference of log P(label), in nats"),
    "max_delta": ("max Δ", "largest of these differences"),
    "calibration_delta": ("mean ΔP", "mean difference of P(first label)"),
    "auc": ("AUC", "of the scores against the known labels, over all candidates"),
}


def render(record: Mapping[str, Any]) -> str:
    """Return the figures against bf16; those against fp32 stay in the record."""
    columns = [title for title, _ in _COLUMNS.values()]
    bars = ", ".join(f"{_COLUMNS[bar][0]} ≥ {target}" for bar, target in record["bars"].items())
    meanings = {
        "arm": "body, then head where it is not in fp32; `at-18` adds 18 to the labels' logits, "
        "`keeping` names layers that stay in bf16, `over-fp32` is FP8 as a CPU serves it",
        **dict(_COLUMNS.values()),
        "bars": f"whether the arm reaches {bars}",
    }
    lines = [
        *_sources(record),
        "",
        f"| arm | {' | '.join(columns)} | bars |",
        f"| --- |{' ---: |' * len(columns)} --- |",
        *(_row(arm) for arm in record["arms"]),
        "",
        *(f"- {title}: {meaning}" for title, meaning in meanings.items()),
    ]
    return "\n".join(lines)


def _sources(record: Mapping[str, Any]) -> list[str]:
    model, data, environment = record["model"], record["requests"], record["environment"]
    source = " ".join(data[name] for name in ("source", "split") if name in data)
    machine = environment.get("gpu") or f"{environment['processor']}, {environment['cores']} cores"
    return [
        f"- model: {model['name']} ({model['type']}, {model['num_parameters'] / 1e6:,.1f} M "
        f"parameters, {model['num_layers']} layers of {model['hidden_size']}), its largest label "
        f"logit {model['largest_label_logit']:.3g}",
        f"- data: {source}, {data['num_requests']:,} requests with {data['num_candidates']:,} "
        f"candidates, {data['num_tokens']:,} tokens",
        f"- machine: {machine}; torch {environment['torch']}",
        f"- commit: {environment['commit']}",
        f"- command: `{record['command']}`",
    ]


def _row(arm: Mapping[str, Any]) -> str:
    compared = arm["against"].get("bf16", {})
    figures = {**arm, **compared}
    cells = {name: _cell(figures.get(name)) for name in _COLUMNS}
    if compared:
        cells["top_agreement"] += f" ± {compared['top_agreement_error']:.4f}"
    missed = [_COLUMNS[bar][0] for bar, met in arm.get("bars_met", {}).items() if not met]
    verdict = (f"missed {', '.join(missed)}" if missed else "met") if compared else "–"
    return f"| `{arm['name']}` | {' | '.join(cells.values())} | {verdict} |"


def _cell(figure: float | None) -> str:
    return "–" if figure is None else f"{figure:.4f}"
