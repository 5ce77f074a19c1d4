"""When to stop asking a gpu that only fails: a circuit breaker, one for each gpu and epoch. Policy alone, no clock.

closed: asked as ever. open: after FAILURES in a row it is not asked for a while, twice as long each time. half-open:
that while is over, and one request at a time may find out whether it works again.

A failure is a broken connection, a tunnel's own page, or a 5xx other than "busy". The caller's own errors, their
leaving and their timeouts say nothing about the gpu, and count as nothing.
"""

from typing import Literal

FAILURES = 3
FIRST_OPEN_S, LONGEST_OPEN_S = 1.0, 60.0

State = Literal["closed", "open", "half-open"]


class Breaker:
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self._failures = 0  # in a row
        self._openings = 0  # in a row
        self._open_until: float | None = None
        self._probes = 0  # under way

    def state(self, now: float) -> State:
        if self._open_until is None:
            return "closed"
        return "open" if now < self._open_until else "half-open"

    def lets_through(self, now: float) -> bool:
        state = self.state(now)
        return state == "closed" or (state == "half-open" and not self._probes)

    def began(self) -> None:
        """A request is on its way there. `ended` must follow."""
        self._probes += 1

    def ended(self) -> None:
        self._probes -= 1

    def failed(self, now: float) -> None:
        self._failures += 1
        if self._open_until is not None and now < self._open_until:
            return  # of a request that was on its way before it opened: that is no news
        if self._open_until is not None or self._failures >= FAILURES:
            open_s = min(FIRST_OPEN_S * 2.0**self._openings, LONGEST_OPEN_S)
            self._open_until = now + open_s
            self._openings = min(self._openings + 1, 16)
