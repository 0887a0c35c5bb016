"""A connection to a Ray cluster."""

import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeAlias

from rankonce.errors import ClusterError, MissingDependencyError

_PATIENCE_S = 10
Library: TypeAlias = Literal["data", "serve"]


def import_ray(library: Library) -> Any:
    """Import Ray and one of its libraries.

    Raises:
        MissingDependencyError: it is not installed.
    """
    # Nothing is told to Ray's makers unless the operator says so; read at import.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import_module(f"ray.{library}")
        return import_module("ray")
    except ImportError as error:
        raise MissingDependencyError("ray", extra="ray") from error


@contextmanager
def connected(address: str | None, library: Library) -> Iterator[Any]:
    """Give Ray, connected to a cluster for as long as the context lasts.

    Args:
        address: of a running one; ``None`` starts one of this machine alone, which ends with it.
        library: of Ray's that is used.

    Raises:
        ClusterError: there is none.
    """
    ray = import_ray(library)
    # Its progress is told by ours, and what workers print stays in their logs.
    for name in ("ray", "ray.data", "ray.serve"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        if address is not None and address != "auto":
            _knock(address)
        ray.init(
            address="local" if address is None else address,
            include_dashboard=False if address is None else None,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ClusterError(
            f"--ray-address: there is no Ray cluster at {address}: {reason}"
            if address
            else f"--ray: no Ray cluster can be started here: {reason}"
        ) from error
    # Ray prints what happens to nodes and workers, from a thread of its own.
    with redirect_stdout(sys.stderr):
        try:
            yield ray
        finally:
            ray.shutdown()


def _knock(address: str) -> None:
    # Ray would ask for some minutes whether anybody is there.
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE_S).close()


def count_gpus(ray: Any, device: str | None) -> int:
    """Count the GPUs that models may be on.

    Args:
        device: as ``load_ranker`` takes it.
    """
    wanted = device is None or device.startswith("cuda")
    return int(ray.cluster_resources().get("GPU", 0)) if wanted else 0


def whole_paths(loading: Mapping[str, Any]) -> dict[str, Any]:
    """Make arguments of ``load_ranker`` ready for workers, whose current folder is another one."""
    adapters = loading["adapters"]
    return {
        **loading,
        "task_files": [path.resolve() for path in loading["task_files"] or ()],
        "adapters": adapters and {name: path.resolve() for name, path in adapters.items()},
    }


def whole_source(model: str | None) -> str | None:
    """Do the same for a model, which may be the id of a repository."""
    return str(Path(model).resolve()) if model and Path(model).exists() else model
