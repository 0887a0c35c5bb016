"""``rankonce serve --ray``: replicas of the server on Ray Serve, a member's questions to one.

A replica is the application of one machine. Ray's proxies take the questions; those with one
``x-session-id`` go to one replica as long as it lives and has room, so that a member's history
stays in its prefix cache. When replicas come or go only their own members move.
"""

import asyncio
import logging
import re
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastapi import FastAPI

from rankonce.cli.cluster.connection import connected, count_gpus, whole_paths, whole_source
from rankonce.cli.cluster.options import Scale
from rankonce.cli.options import load_ranker
from rankonce.errors import ClusterError, OperationsError
from rankonce.serving.app import create_app, open_listener
from rankonce.serving.engine import ServerConfig
from rankonce.serving.lifecycle import Lifecycle, Phase
from rankonce.serving.logs import LogFormat, configure_logs
from rankonce.serving.operations import OperationsConfig

logger = logging.getLogger(__name__)

_APPLICATION = "rankonce"
_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
# A replica that fails so often at its start will not do better.
_MAX_STARTS = 3
# How Ray Serve names the actor that there is one of where it runs.
_CONTROLLER = {"name": "SERVE_CONTROLLER_ACTOR", "namespace": "serve"}


@dataclass(frozen=True, kw_only=True)
class ReplicaPlan:
    """What every replica is made of.

    Attributes:
        models: where each model is, by its name; the only one may have none.
        loading: other arguments of ``load_ranker``.
    """

    models: Mapping[str, str | None]
    loading: Mapping[str, Any]
    config: ServerConfig
    operations: OperationsConfig
    log_format: LogFormat


class Replica:
    """What an actor of Ray Serve holds; ``serve.ingress`` gives it its ``app``."""

    app: FastAPI

    def __init__(self, plan: ReplicaPlan) -> None:
        self._plan = plan

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Load the models and build the application around them."""
        plan = self._plan
        configure_logs(plan.log_format, log_bodies=plan.operations.log_bodies)
        rankers = {name: load_ranker(one, **plan.loading) for name, one in plan.models.items()}
        return create_app(rankers.get("", rankers), plan.config, plan.operations)

    async def check_health(self) -> None:
        """Let no question come before the warm-up is over, and none after it failed."""
        lifecycle: Lifecycle = self.app.state.lifecycle
        while lifecycle.phase is Phase.WARMING_UP:
            await asyncio.sleep(0.1)
        if lifecycle.phase is Phase.FAILED:
            raise ClusterError("the warm-up of a replica failed; its log says why")


def serve_on_ray(plan: ReplicaPlan, scale: Scale) -> None:
    """Serve on a cluster until the process is told to stop.

    Raises:
        ClusterError: the cluster cannot be reached or serves already, or no replica starts.
        OperationsError: keys have limits, which each replica would count by itself.
        OSError: the port is taken.
    """
    plan = replace(
        plan,
        models={name: whole_source(one) for name, one in plan.models.items()},
        loading=whole_paths(plan.loading),
    )
    _check_limits(plan.operations)
    if not plan.config.port:
        raise OperationsError("--port: every proxy of --ray has the same one, so name it")
    if scale.address is None:
        # Ray would go on looking for a port that is taken.
        open_listener(plan.config).close()
    with connected(scale.address, "serve") as ray:
        _check_free(ray, scale.address)
        ray.serve.start(http_options={"host": plan.config.host, "port": plan.config.port})
        try:
            _deploy(ray, plan, scale)
            _wait_until_told()
            logger.info("stopping: replicas finish what they answer")
        finally:
            ray.serve.shutdown()


def _check_limits(operations: OperationsConfig) -> None:
    keys = operations.keys.keys if operations.keys else ()
    limits = [(one.requests_per_minute, one.tokens_per_minute) for one in keys]
    limits.append((operations.requests_per_minute, operations.tokens_per_minute))
    if any(limit is not None for pair in limits for limit in pair):
        raise OperationsError(
            "--api-keys: requests and tokens per minute do not go with --ray, since each replica "
            "would count by itself: limit them in front of the cluster"
        )


def _check_free(ray: Any, address: str | None) -> None:
    try:
        ray.get_actor(**_CONTROLLER)
    except ValueError:
        return
    raise ClusterError(
        f"--ray-address: Ray Serve runs at {address} already, on a port of its own: `serve "
        "shutdown` stops it"
    )


def _deploy(ray: Any, plan: ReplicaPlan, scale: Scale) -> None:
    """Start the replicas and wait until they answer."""
    serve = ray.serve
    questions = plan.config.batching.max_questions
    replicas: dict[str, Any] = {"num_replicas": scale.replicas}
    if scale.max_replicas is not None:
        replicas = {
            "autoscaling_config": {
                "min_replicas": scale.replicas,
                "max_replicas": scale.max_replicas,
                "target_ongoing_requests": scale.target_questions,
            }
        }
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name=_APPLICATION,
        **replicas,
        ray_actor_options={
            "num_cpus": 1,
            "num_gpus": 1 if count_gpus(ray, plan.loading["device"]) else 0,
        },
        # A pass is filled with questions that wait in the replica, not in a proxy.
        max_ongoing_requests=questions,
        max_queued_requests=questions,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        graceful_shutdown_timeout_s=plan.operations.drain_timeout_s,
        max_constructor_retry_count=_MAX_STARTS,
        request_router_config={"request_router_class": _ROUTER},
    )
    try:
        serve.run(deployment.bind(plan), name=_APPLICATION, route_prefix="/")
    except (RuntimeError, ray.exceptions.RayError) as error:
        deployments = serve.status().applications[_APPLICATION].deployments.values()
        told = "\n".join(one.message for one in deployments)
        raise ClusterError(f"no replica starts: {_cause(told or str(error))}") from error
    host, port = plan.config.host, plan.config.port
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    logger.info("%d replicas serve on %s of every machine that has one", scale.replicas, address)


def _cause(text: str) -> str:
    """Find what our own code says in the trace that Ray gives."""
    own = re.findall(r"rankonce\.errors\.\w+: (.+)", text)
    return str(own[-1]) if own else " ".join(text.split())[-500:]


def _wait_until_told() -> None:
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    told.wait()
