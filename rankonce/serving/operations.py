"""How a server is operated: who may ask, what is logged and measured, how it starts and ends."""

from dataclasses import dataclass, field

from rankonce.serving.keys import KeyRing


@dataclass(frozen=True, kw_only=True)
class OperationsConfig:
    """What surrounds the engine.

    Attributes:
        keys: who may ask; ``None`` lets everybody.
        requests_per_minute, tokens_per_minute: of each owner whose key names no other; ``None``
            does not limit.
        open_metrics: let everybody read ``/metrics`` although there are keys.
        log_bodies: show questions, and the messages of crashes, in the log.
        otlp_endpoint: OpenTelemetry collector that takes traces; ``None`` makes none.
        header_timeout_s: how long a client may take to send the head of a question.
        body_timeout_s: how long it may take for the body.
        write_timeout_s: how long it may leave an answer unread.
        max_open_body_mb: bound of all bodies together that are held at one time, in MB.
        warm_up: ask questions of every kind before ``/ready`` says so.
        drain_delay_s: how long to go on accepting once told to stop, for load balancers to notice.
        drain_timeout_s: how long running questions may take after that.
    """

    keys: KeyRing | None = field(default=None, repr=False)
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    open_metrics: bool = False
    log_bodies: bool = False
    otlp_endpoint: str | None = None
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    write_timeout_s: float = 30.0
    max_open_body_mb: int = 512
    warm_up: bool = True
    drain_delay_s: float = 0.0
    drain_timeout_s: float = 30.0
