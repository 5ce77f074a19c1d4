"""One look for all who ask for the same thing at the same moment.

What is remembered for a second would otherwise be looked up by everybody at once when the second is over.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class Shared(Generic[K, T]):
    def __init__(self) -> None:
        self._under_way: dict[K, asyncio.Future[T]] = {}

    async def get(self, key: K, look: Callable[[], Awaitable[T]]) -> T:
        """What `look` finds or raises; it goes on when who began it leaves. It sees nothing later than its beginning:
        the key must tell those apart who may not be content with that.
        """
        looking = self._under_way.get(key)
        if looking is None:
            looking = self._under_way[key] = asyncio.ensure_future(look())
            looking.add_done_callback(lambda done: self._over(key, done))
        return await asyncio.shield(looking)

    def _over(self, key: K, done: "asyncio.Future[T]") -> None:
        del self._under_way[key]
        if not done.cancelled():
            done.exception()  # it was heard, also where nobody waits any more
