"""The record of a benchmark: on what machine, and its file."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankonce.environment import describe_environment


def describe_machine() -> dict[str, Any]:
    """Name what the client and the server of a load share."""
    import psutil

    return {
        **describe_environment(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "usable_cores": len(psutil.Process().cpu_affinity()),
        "client": "on the machine of the server, a process of its own",
    }


def write_record(path: Path, record: Mapping[str, Any], *, allow_nan: bool = True) -> None:
    """Write a record as JSON, so that a kill leaves the old file or the new one.

    Raises:
        ValueError: the record holds NaN or infinity, which are not allowed.
    """
    text = json.dumps(record, indent=1, allow_nan=allow_nan)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # /dev/stdout is not to be replaced
        path.write_text(f"{text}\n", encoding="utf-8")
        return
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(f"{text}\n", encoding="utf-8")
    os.replace(draft, path)
