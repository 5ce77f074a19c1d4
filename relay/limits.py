"""How many requests a minute a key may send. Counted by this process alone: with several, each lets as many through."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from relay import errors
from relay.accounts import User
from relay.store import Clock

MOST_KEPT = 10_000  # keys; those that have rested longest go first, and a rested key has all its requests anyway


@dataclass
class _Bucket:
    """https://en.wikipedia.org/wiki/Token_bucket"""

    left: float
    at: float


class Limits:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}  # by key id, the one used last at the end

    def take(self, user: User) -> Mapping[str, str]:
        """One request; the headers that say what is left. Raises RateLimited, which costs nothing."""
        limit = user.rules.requests_per_minute
        if limit is None:
            return {}
        now, a_second = self._clock(), limit / 60
        bucket = self._buckets.pop(user.key_id, None) or _Bucket(limit, now)
        bucket.left = min(limit, bucket.left + max(0.0, now - bucket.at) * a_second)
        bucket.at = now
        self._buckets[user.key_id] = bucket
        if len(self._buckets) > MOST_KEPT:
            del self._buckets[next(iter(self._buckets))]
        taken = bucket.left >= 1
        bucket.left -= taken
        headers = {
            "x-ratelimit-limit-requests": str(limit),
            "x-ratelimit-remaining-requests": str(int(bucket.left)),
            "x-ratelimit-reset-requests": f"{math.ceil((limit - bucket.left) / a_second)}s",
        }
        if not taken:
            wait_s = math.ceil((1 - bucket.left) / a_second)
            message = f"this key may send {limit} requests a minute: try again in {wait_s} s"
            raise errors.RateLimited(message, {**headers, "retry-after": str(wait_s)})
        return headers
