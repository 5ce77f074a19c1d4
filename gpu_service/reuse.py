"""What an ended row leaves behind for the next turn of its conversation: its tokens with their keys and values.

Within a budget; the least recently used leave. An entry fits rows that compute the same: one model, adapter and dials.
"""

from collections import OrderedDict
from collections.abc import Hashable

from gpu_service.cache import Geometry, RowCache, class_tokens

WORTH_TOKENS = 16  # a shorter common beginning costs less to read again than to copy


class Reuse:
    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[Hashable, tuple[int, ...]], RowCache] = OrderedDict()
        self.n_bytes = 0

    def keep(self, key: Hashable, tokens: tuple[int, ...], cache: RowCache) -> None:
        """`cache` holds these tokens. What they begin with needs no entry of its own any more."""
        assert cache.length == len(tokens)
        for known_key, known in list(self._entries):
            if known_key == key and tokens[: len(known)] == known:
                self._drop((known_key, known))
        self._entries[key, tokens] = cache
        self.n_bytes += cache.n_bytes

    def find(self, key: Hashable, prompt: list[int], geometry: Geometry) -> RowCache | None:
        """A copy of the longest common beginning, with room for the prompt; never all of it: one token must be read."""
        best, common = None, WORTH_TOKENS - 1
        for known_key, known in self._entries:
            if known_key == key and (n := min(_common(known, prompt), len(prompt) - 1)) > common:
                best, common = (known_key, known), n
        if best is None:
            return None
        self._entries.move_to_end(best)
        return self._entries[best].copy(geometry, common, class_tokens(len(prompt)))

    def shrink(self, budget_bytes: int) -> None:
        while self.n_bytes > max(0, budget_bytes):
            self._drop(next(iter(self._entries)))

    def _drop(self, entry: tuple[Hashable, tuple[int, ...]]) -> None:
        self.n_bytes -= self._entries.pop(entry).n_bytes


def _common(known: tuple[int, ...], prompt: list[int]) -> int:
    shorter = min(len(known), len(prompt))
    return next((i for i in range(shorter) if known[i] != prompt[i]), shorter)
