"""A program whose commands the tests run as steps: real processes, quick ones.

make TEXT --out DIR [--fail]     writes DIR/text, and a line to $COUNT for every call
measure DIR --scores FILE [--shift X]           prints JSON about DIR/text, writes rows
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl


def main(arguments: Sequence[str]) -> None:
    """Run a command as rankonce's ``main`` does."""
    parser = argparse.ArgumentParser()
    parser.add_argument("command")
    parser.add_argument("argument")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--fail", action="store_true")
    parser.add_argument("--sleep", type=float, default=0.0)
    parser.add_argument("--scores", type=Path)
    parser.add_argument("--shift", type=float, default=0.0)
    parser.add_argument("--rows", type=int, default=400)
    given = parser.parse_args(arguments)
    if given.command == "make":
        with open(os.environ["COUNT"], "a") as file:
            file.write(f"{given.argument}\n")
    time.sleep(given.sleep)
    if given.fail:
        print("error: the disk is full", file=sys.stderr)
        raise SystemExit(1)
    if given.command == "make":
        given.out.mkdir()
        (given.out / "text").write_text(given.argument)
    else:
        text = (Path(given.argument) / "text").read_text()
        random = np.random.default_rng(0)
        labels = random.integers(0, 2, given.rows)
        score = random.normal(size=given.rows) + given.shift * labels
        rows = pl.DataFrame(
            {"user_id": np.arange(given.rows) // 4, "label": labels, "score": score}
        )
        if given.scores is not None:
            rows.write_parquet(given.scores)
        print(json.dumps({"parts": [{"length": len(text), "text": text}]}))
