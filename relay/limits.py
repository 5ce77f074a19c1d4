"""How much a minute: requests of a key, attempts to sign in. Each process counts for itself."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from relay import errors
from relay.accounts import User
from relay.store import Clock

MOST_KEPT = 10_000  # names; those that have rested longest go first


@dataclass
class Bucket:
    """https://en.wikipedia.org/wiki/Token_bucket"""

    limit: int  # a minute
    left: float
    at: float

    def seconds_until(self, left: float) -> int:
        return max(0, math.ceil((left - self.left) * 60 / self.limit))


class Buckets:
    """One a name, in bounded memory."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._buckets: dict[str, Bucket] = {}  # the one used last at the end

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, name: str, limit: int) -> tuple[bool, Bucket]:
        """Whether one was left; asking in vain costs nothing."""
        now = self._clock()
        bucket = self._buckets.pop(name, None) or Bucket(limit, limit, now)
        bucket.left = min(limit, bucket.left + max(0.0, now - bucket.at) * limit / 60)
        bucket.at = now
        self._buckets[name] = bucket
        if len(self._buckets) > MOST_KEPT:
            del self._buckets[next(iter(self._buckets))]
        taken = bucket.left >= 1
        bucket.left -= taken
        return taken, bucket


class Limits:
    def __init__(self, clock: Clock) -> None:
        self.kept = Buckets(clock)

    def take(self, user: User) -> Mapping[str, str]:
        """One request; the headers that say what is left. Raises RateLimited, which costs nothing."""
        limit = user.rules.requests_per_minute
        if limit is None:
            return {}
        taken, bucket = self.kept.take(user.key_id, limit)
        headers = {
            "x-ratelimit-limit-requests": str(limit),
            "x-ratelimit-remaining-requests": str(int(bucket.left)),
            "x-ratelimit-reset-requests": f"{bucket.seconds_until(limit)}s",
        }
        if not taken:
            wait_s = bucket.seconds_until(1)
            message = f"this key may send {limit} requests a minute: try again in {wait_s} s"
            raise errors.RateLimited(message, {**headers, "retry-after": str(wait_s)})
        return headers
