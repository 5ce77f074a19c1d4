"""One step for all text rows: prefill or decode, sampling, stopping, and text that is fit to be shown.

Runs on the device thread and knows nothing of threads or HTTP: a row is given a `send` and a `cancelled` to ask.
"""

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gpu_service.device import translate
from gpu_service.llama import KVCache, Llama
from gpu_service.rows import Rows

log = logging.getLogger(__name__)

FIRST_CAPACITY_TOKENS = 128  # room for the answer that a row's cache starts with; it doubles as needed


@dataclass(frozen=True, kw_only=True)
class Sampling:
    max_tokens: int
    temperature: float = 1.0  # 0 takes the likeliest token
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """Text to be shown. Whole characters only, and never part of a stop string."""

    text: str


@dataclass(frozen=True)
class Finish:
    reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int


class Row:
    """One sequence: what it has read, what it has written, and how it goes on."""

    def __init__(
        self,
        decoder: Llama,
        rows: Rows,
        prompt: list[int],
        sampling: Sampling,
        stop_ids: frozenset[int],
        tokenizer: Any,
        *,
        send: Callable[[Piece | Finish | BaseException], None],
        cancelled: Callable[[], bool],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        assert prompt
        assert sampling.max_tokens > 0
        self.send, self.cancelled = send, cancelled
        self._decoder, self._rows, self._sampling, self._stop_ids = decoder, rows, sampling, stop_ids
        self._pending = prompt  # tokens that the model has not seen yet
        self._prompt_tokens = len(prompt)
        self._written = 0
        self._cache = KVCache(decoder.shape, 1, len(prompt) + FIRST_CAPACITY_TOKENS, dtype, device)
        self._device = device
        # A row's own generator: seeded rows repeat, and nothing here touches the global random state of training.
        self._random = torch.Generator().manual_seed(secrets.randbits(62) if sampling.seed is None else sampling.seed)
        self._detokenizer = Detokenizer(tokenizer, sampling.stop)

    def step(self, prefill_chunk_tokens: int) -> bool:
        """Read a chunk of the prompt, or write one token. True when the row has ended."""
        chunk, self._pending = self._pending[:prefill_chunk_tokens], self._pending[prefill_chunk_tokens:]
        held = self._prompt_tokens + self._written - len(chunk) - len(self._pending)
        self._cache.reserve(held + len(chunk))
        ids = torch.tensor([chunk], device=self._device)
        h = self._decoder.layers(
            self._decoder.embed(ids, self._rows), 0, self._decoder.shape.n_layers, self._rows, cache=self._cache
        )
        self._cache.lengths += len(chunk)
        if self._pending:
            return False
        return self._write(sample(self._decoder.head(h[:, -1:], self._rows)[0, 0], self._sampling, self._random))

    def _write(self, token: int) -> bool:
        self._written += 1
        stopped = token in self._stop_ids
        text, stopped_by_text = ("", False) if stopped else self._detokenizer.add(token)
        if text:
            self.send(Piece(text))
        if not (stopped or stopped_by_text) and self._written < self._sampling.max_tokens:
            self._pending = [token]
            return False
        if not stopped_by_text and (rest := self._detokenizer.rest()):
            self.send(Piece(rest))
        reason: Literal["stop", "length"] = "stop" if stopped or stopped_by_text else "length"
        self.send(Finish(reason, self._prompt_tokens, self._written))
        return True


class Engine:
    """All rows that are under way."""

    def __init__(self, prefill_chunk_tokens: int) -> None:
        self._prefill_chunk_tokens = prefill_chunk_tokens
        self._rows: list[Row] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: Row) -> None:
        self._rows.append(row)

    @torch.inference_mode()
    def step(self) -> None:
        """Each row goes on by one token or one chunk. A row that fails tells its caller and leaves; others go on."""
        self._rows = [row for row in self._rows if not self._step(row)]

    def _step(self, row: Row) -> bool:
        if row.cancelled():
            return True
        try:
            return row.step(self._prefill_chunk_tokens)
        except Exception as exc:  # a row ends here, whatever it was
            log.exception("a text row failed")
            row.send(translate(exc))
            return True

    def fail_all(self, exc: BaseException) -> None:
        for row in self._rows:
            row.send(exc)
        self._rows = []


class Detokenizer:
    """Tokens -> text as it may be shown: whole characters, and nothing that could become a stop string."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
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

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""

    def _release(self, new: str) -> tuple[str, bool]:
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def sample(logits: Tensor, sampling: Sampling, random: torch.Generator) -> int:
    """One token from logits (V,). Drawn on the CPU, so that a seed gives the same draw on any device."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.float().cpu() / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        ordered, index = probabilities.sort(descending=True)
        before = ordered.cumsum(0) - ordered  # probability of all that are likelier
        probabilities = torch.zeros_like(probabilities).scatter(0, index, ordered * (before < sampling.top_p))
    return int(torch.multinomial(probabilities, 1, generator=random))
