"""How much each owner of a key may ask: token buckets for requests and for tokens."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from rankonce.serving.keys import ApiKey

Clock = Callable[[], float]


class TokenBucket:
    """Refills steadily, holds at most a minute's worth, and may be overdrawn.

    Args:
        per_minute: what flows in within a minute, and what it holds when it is full.
        clock: seconds that only grow.
    """

    def __init__(self, per_minute: float, *, clock: Clock = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._balance = per_minute
        self._seen = clock()

    @property
    def balance(self) -> float:
        """What it holds now; negative when it is overdrawn."""
        now = self._clock()
        self._balance = min(
            self._per_minute, self._balance + (now - self._seen) * self._per_minute / 60
        )
        self._seen = now
        return self._balance

    def take(self, amount: float) -> None:
        """Take out, or put back what is negative."""
        self._balance = min(self._per_minute, self.balance - amount)

    def seconds_until(self, amount: float) -> float:
        """How long until it holds this much; 0 if it does."""
        return max(0.0, amount - self.balance) * 60 / self._per_minute


@dataclass(frozen=True, kw_only=True)
class Grant:
    """Leave to ask one question.

    Attributes:
        reserved: tokens taken before anybody counted them.
    """

    owner: str
    reserved: float


class RateLimits:
    """The buckets of every owner.

    A question is taken when its owner has one request left and any token at all. Its tokens are
    not known before it is tokenised: what its bytes may be worth is taken at once and made good
    when it is answered, so that many questions at the same time cannot all pass on one balance.

    Args:
        requests_per_minute, tokens_per_minute: of an owner whose key names none; ``None`` does
            not limit.
    """

    def __init__(
        self,
        *,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._requests_per_minute = requests_per_minute
        self._tokens_per_minute = tokens_per_minute
        self._clock = clock
        self._requests: dict[str, TokenBucket | None] = {}
        self._tokens: dict[str, TokenBucket | None] = {}

    def admit(self, key: ApiKey, *, num_bytes: int) -> Grant | float:
        """Take a question.

        Args:
            num_bytes: of its body, 0 where that is not known yet.

        Returns:
            Leave to go on, or the seconds after which to ask again.
        """
        requests, tokens = self._buckets(key)
        wait_s = max(
            requests.seconds_until(1) if requests else 0.0,
            # The last tokens may be overdrawn, or a large question would never get its turn.
            tokens.seconds_until(1) if tokens else 0.0,
        )
        if wait_s > 0:
            return wait_s
        reserved = num_bytes / _BYTES_PER_TOKEN if tokens else 0.0
        if requests:
            requests.take(1)
        if tokens:
            tokens.take(reserved)
        return Grant(owner=key.name, reserved=reserved)

    def settle(self, grant: Grant, num_tokens: int) -> None:
        """Charge what a question was worth in place of what was reserved."""
        bucket = self._tokens.get(grant.owner)
        if bucket:
            bucket.take(num_tokens - grant.reserved)

    def _buckets(self, key: ApiKey) -> tuple[TokenBucket | None, TokenBucket | None]:
        if key.name not in self._requests:
            self._requests[key.name] = self._bucket(
                key.requests_per_minute or self._requests_per_minute
            )
            self._tokens[key.name] = self._bucket(key.tokens_per_minute or self._tokens_per_minute)
        return self._requests[key.name], self._tokens[key.name]

    def _bucket(self, per_minute: int | None) -> TokenBucket | None:
        return TokenBucket(per_minute, clock=self._clock) if per_minute else None


# Of English text in JSON; the true count takes its place.
_BYTES_PER_TOKEN = 4
