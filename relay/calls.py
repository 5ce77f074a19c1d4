"""Live requests under way, and the end of those that wait for a gpu that went silent.

A tunnel may swallow everything without a word, and then neither end of it ever sees a connection break. So what a
request waits for is broken off once the gpu has sent neither a heartbeat nor a byte of the answer for long enough.
Does not know what a heartbeat is.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

from relay import errors
from relay.store import Clock
from relay.transport import Endpoint

T = TypeVar("T")


class Call:
    """One live request to one gpu. Waits for one thing at a time."""

    def __init__(self, to: Endpoint, clock: Clock) -> None:
        self.to = to
        self._clock = clock
        self._waiting_since = clock()
        self._wait: asyncio.Timeout | None = None
        self.worked: bool | None = None  # whether the gpu did its part; None: not known, for the caller left first

    async def wait(self, step: Awaitable[T]) -> T:
        """Raises GpuUnreachable when it is broken off."""
        self._waiting_since = self._clock()
        try:
            async with asyncio.timeout(None) as self._wait:
                return await step
        except TimeoutError as exc:
            message = f"gpu {self.to.name!r} can't be reached: it has gone silent. Try again in a moment."
            self.worked = False
            raise errors.GpuUnreachable(message) from exc
        except errors.GpuUnreachable:
            self.worked = False
            raise
        finally:
            self._wait = None

    async def chunks(self, source: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """As `source` has them. Raises what it raises, and GpuUnreachable."""
        while chunk := await self.wait(_next(source)):
            yield chunk
        if self.worked is None:
            self.worked = True

    def break_off(self, *, waiting_since: float) -> None:
        """If it has waited for one thing since then."""
        if self._wait and self._wait.when() is None and self._waiting_since <= waiting_since:
            self._wait.reschedule(asyncio.get_running_loop().time())


async def _next(source: AsyncIterator[bytes]) -> bytes:
    return await anext(source, b"")
