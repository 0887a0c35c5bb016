"""``rankonce merge``: an adapter and its backbone as one checkpoint."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from rankonce.cli.options import quiet_transformers


class Dtype(StrEnum):
    """The names of ``rankonce.training.merging.DTYPES``, which imports torch."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


def merge(
    adapter: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Folder of the adapter.")
    ],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder of the merged checkpoint.")],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|ID",
            help="Float checkpoint under the adapter.",
            show_default="the one that the adapter names",
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="To save in; the sum is made in FP32.", show_default="the checkpoint's"),
    ] = None,
) -> None:
    """Merge an adapter into its backbone, in FP32, so that it loads as an ordinary checkpoint.

    rankonce merge --model BASE --adapter runs/films --out merged/films
    """
    from rankonce.model.adapters import read_adapter
    from rankonce.training.merging import merge_adapter

    quiet_transformers()
    base = model or read_adapter(adapter, name="merged").find_base()
    saved = merge_adapter(base, adapter, out, dtype=dtype)
    typer.echo(f"model: {out}, in {saved}", err=True)
