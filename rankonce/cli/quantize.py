"""``rankonce quantize``: a smaller checkpoint, accepted by how it ranks."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from rankonce.cli.options import quiet_transformers


class Scheme(StrEnum):
    """The names of ``rankonce.model.quantized.SCHEMES``, which imports torch."""

    FP8 = "fp8"
    INT8 = "int8"
    NF4 = "nf4"
    CPU_INT8 = "cpu-int8"


def quantize(
    model: Annotated[str, typer.Argument(metavar="FOLDER|ID", help="Float checkpoint.")],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder of the quantised checkpoint.")],
    to: Annotated[Scheme, typer.Option(help="How weights are held.")],
    data: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Requests, with labels beside if known, on which the ranking is accepted.",
        ),
    ] = None,
    accept: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Another bar of the acceptance, such as kendall_tau=0.95; give several.",
        ),
    ] = None,
    keep_refused: Annotated[
        bool,
        typer.Option(
            "--keep-refused",
            help="End well though the ranking is refused, as where an experiment goes on with it.",
        ),
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, ...", show_default="the GPU if there is one"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Quantise a checkpoint and compare its ranking with the float one's.

    rankonce quantize runs/films --to cpu-int8 --out runs/films-int8 --data valid.jsonl
    """
    from rich.console import Console
    from rich.progress import Progress

    from rankonce.distillation.quantization import QuantizationOptions, quantize_model

    bars = _read_bars(accept or [])
    quiet_transformers()
    options = QuantizationOptions(
        model=model, out=out, scheme=to.value, data=data, accept=bars, device=device
    )
    with Progress(console=Console(stderr=True)) as progress:
        lines: dict[str, Any] = {}

        def on_step(name: str, done: int, of: int) -> None:
            if name not in lines:
                lines[name] = progress.add_task(f"scoring {name}", total=of)
            progress.update(lines[name], completed=done)

        record = quantize_model(options, on_step)
    typer.echo(json.dumps(record, indent=1) if as_json else _table(record))
    if record["verdict"] == "unchecked":
        typer.echo("unchecked: without --data nothing says that it still ranks as before", err=True)
    if record["verdict"] == "refused":
        fault = "" if keep_refused else "error: "
        typer.echo(f"{fault}refused: {'; '.join(record['failures'])}", err=True)
        raise typer.Exit(0 if keep_refused else 1)


def _read_bars(texts: list[str]) -> dict[str, float]:
    bars = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            bars[name.strip()] = float(value)
        except ValueError as error:
            raise typer.BadParameter(f"accept: should be NAME=VALUE, is {text!r}") from error
    return bars


def _table(record: dict[str, Any]) -> str:
    before, after = record["bytes"]["before"], record["bytes"]["after"]
    size = f"{after / 1e6:,.1f} MB" + (f", {before / 1e6:,.1f} MB before" if before else "")
    lines = [f"{record['scheme']}: {record['verdict']}; {size}"]
    if "arms" not in record:
        return lines[0]
    unquantised, quantised = (record["arms"][name] for name in ("unquantised", "quantised"))
    compared = quantised["against"]["unquantised"]
    lines += ["", "| figure | unquantised | quantised | bar |", "| --- | ---: | ---: | ---: |"]
    named = {**compared, **quantised, **record["reached"]}
    for name in (
        *("top_agreement", "kendall_tau", "distinct_score_ratio", "mean_delta", "max_delta"),
        *("auc", "auc_loss", "calibration_error", "calibration_error_rise"),
    ):
        if named.get(name) is not None:
            own = unquantised.get(name)
            bar = record["bars"].get(name)
            cells = ("–" if value is None else f"{value:.4f}" for value in (own, named[name], bar))
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
