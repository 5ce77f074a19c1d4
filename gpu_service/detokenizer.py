"""Tokens -> text as it may be shown: whole characters, and nothing that could become a stop string."""

from collections.abc import Callable

Decode = Callable[[list[int]], str]


class Detokenizer:
    """Of one answer."""

    def __init__(self, decode: Decode, stop: tuple[str, ...]) -> None:
        self._decode, self._stop = decode, stop
        self._ids: list[int] = []
        self._context, self._shown = 0, 0  # tokens from `_context` are decoded together; those before `_shown` are out
        self._held = ""  # text that may be the beginning of a stop string

    def add(self, token: int) -> tuple[str, bool]:
        """Text that is now certain, and whether a stop string was met (it and what follows are not part of it)."""
        self._ids.append(token)
        new = self._decode(self._ids[self._context :])[len(self._decode(self._ids[self._context : self._shown])) :]
        # A replacement character at the end is a character of which only some bytes have come.
        if not new or new.endswith("\N{REPLACEMENT CHARACTER}"):
            return "", False
        self._context, self._shown = self._shown, len(self._ids)
        return self._release(new)

    def rest(self) -> str:
        """What was held back, at the end of the answer."""
        new = self._decode(self._ids[self._context :])[len(self._decode(self._ids[self._context : self._shown])) :]
        self._context = self._shown = len(self._ids)
        text, _ = self._release(new)
        text, self._held = text + self._held, ""
        return text

    def _release(self, new: str) -> tuple[str, bool]:
        text = self._held + new
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stop if stop in text]
        if found:
            self._held = ""
            return text[: min(found)[1]], True  # the one that was complete first, however the text came in pieces
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
