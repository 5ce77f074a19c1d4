"""All text rows: they join and leave between steps, each with its own sampling, dials and adapter.

A step gives every decoding row its next token in one forward pass per group, and reads one chunk of one waiting prompt,
so that a long prompt does not hold the others up. Rows share a group when they share weights: one base model, and one
adapter where it replaces whole tensors; LoRA and dials differ by row within a group.

Runs on the device thread and knows nothing of threads or HTTP.
"""

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from gpu_service.artifacts import Adapter
from gpu_service.cache import Pool, RowCache, Slot, class_tokens
from gpu_service.decoder import Decoder
from gpu_service.detokenizer import Detokenizer
from gpu_service.device import give_back, quick_vectors, translate
from gpu_service.errors import GpuError, NotFinite, OutOfMemory
from gpu_service.kernels import TORCH, Arithmetic
from gpu_service.quantize import Quantized
from gpu_service.reuse import Reuse
from gpu_service.rows import Dials, Joined, Rows
from gpu_service.sampling import Drawn, Sampler, Sampling, told
from gpu_service.scheduler import Admission

log = logging.getLogger(__name__)

TOLD_TOKENS = 128  # of a prompt whose logits are held at once: (128, 49152) fp32 is 25 MB
SHORT_TOKENS = 64  # of an answer: a shorter one than this helps nobody who did not ask for it


@dataclass(frozen=True)
class Piece:
    """Text to be shown: whole characters only, never part of a stop string. `drawn`: the tokens behind it, if asked."""

    index: int  # of the answer, where several were asked for
    text: str
    drawn: tuple[Drawn, ...] = ()


@dataclass(frozen=True)
class Finish:
    index: int
    reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt: read in an earlier turn


@dataclass(frozen=True)
class PromptTold:
    """The prompt's own tokens, where they were asked for; before anything is written. The first follows nothing."""

    drawn: tuple[Drawn, ...]


Event = PromptTold | Piece | Finish


@dataclass(frozen=True)
class Served:
    """A base model as it is served."""

    model: str
    decoder: Decoder
    weights: Mapping[str, Tensor]
    tokenizer: Any
    stop_ids: frozenset[int]
    quantized: Mapping[str, Quantized] | None = None  # the matrices that `weights` lacks
    arithmetic: Arithmetic = TORCH
    joined: Mapping[tuple[str, ...], Joined] | None = None  # of `weights`

    def text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What one caller asks for: `n` answers to one prompt."""

    served: Served
    adapter: Adapter | None
    adapter_id: str | None  # by content
    dials: Dials | None
    prompt: list[int]
    sampling: Sampling
    n: int = 1
    tell_prompt: bool = False  # the log probabilities of its tokens; `sampling` says with how many others
    caller: str = ""  # requests of one caller wait for each other, not for everybody
    alone: bool = False  # not batched with anybody, so that a seed repeats in any precision
    send: Callable[[Event | BaseException], None]
    cancelled: Callable[[], bool]

    @property
    def group(self) -> Hashable:
        whole = self.adapter_id if self.adapter and self.adapter.full else None
        return self.served.model, whole, id(self) if self.alone else None

    @property
    def computes(self) -> Hashable:
        """Equal for two requests of which one may read what the other left: the same numbers, the same caller.

        The caller belongs to it, for the count of known tokens would tell one user what another has written.
        """
        return self.served.model, self.adapter_id, self.dials, self.caller

    def overflowed(self) -> NotFinite:
        return NotFinite(dialled=self.dials is not None, tuned=self.adapter is not None)


class _Row:
    """One answer under way."""

    def __init__(self, request: Request, index: int, cached_tokens: int) -> None:
        self.request, self.index = request, index
        self.tokens = list(request.prompt)  # the last one is not in the cache yet
        self.sampler = Sampler(request.sampling, request.prompt, index)
        self._cached_tokens = cached_tokens
        self._words = Detokenizer(request.served.text, request.sampling.stop)
        self._untold: list[Drawn] = []  # tokens whose text is held back
        self._written = 0

    def write(self, drawn: Drawn) -> bool:
        """Take a token in, and show what can be shown. True when the answer has ended."""
        s = self.request.sampling
        self.tokens.append(drawn.token)
        self._written += 1
        ended = drawn.token in self.request.served.stop_ids and not s.ignore_eos
        text, met_stop = ("", False) if ended else self._words.add(drawn.token)
        if s.top_logprobs is not None and not ended:
            self._untold.append(drawn)
        full = self._written == s.max_tokens
        if (ended or full) and not met_stop:
            text += self._words.rest()
        if text or (self._untold and (ended or full) and not met_stop):  # the last tokens may have no text
            self.request.send(Piece(self.index, text, tuple(self._untold)))
            self._untold = []
        if not (ended or met_stop or full):
            return False
        reason: Literal["stop", "length"] = "stop" if ended or met_stop else "length"
        n_prompt = len(self.request.prompt)
        self.request.send(Finish(self.index, reason, n_prompt, self._written, self._cached_tokens))
        return True


class _Reader:
    """A request whose prompt is being read, for all of its answers at once."""

    def __init__(self, request: Request, cache: RowCache) -> None:
        self.request, self.cache = request, cache
        self.cached_tokens = cache.length
        self.rows = _rows([request])
        self.told: list[Drawn] = [Drawn(request.prompt[0])]

    def read(self, chunk_tokens: int) -> Tensor | None:
        """Logits (V,) behind the prompt once it is all read."""
        served, prompt = self.request.served, self.request.prompt
        start = self.cache.length
        chunk = prompt[start : start + chunk_tokens]
        ids = torch.tensor([chunk], device=self.cache.keys[0].device)
        attention = self.cache.reading(len(chunk))
        h = served.decoder.embed(ids, self.rows, attention)
        h = served.decoder.layers(h, 0, served.decoder.n_layers, self.rows, attention)
        if self.request.tell_prompt:
            self._tell(h, prompt[start + 1 : start + 1 + len(chunk)])
        return self._logits(h[:, -1:])[0] if self.cache.length == len(prompt) else None

    def _tell(self, h: Tensor, following: list[int]) -> None:
        """h (1, T, D), and the tokens behind each: T, or one less at the prompt's end."""
        for at in range(0, len(following), TOLD_TOKENS):
            tokens = following[at : at + TOLD_TOKENS]
            logits = self._logits(h[:, at : at + len(tokens)])
            self.told += told(logits, tokens, self.request.sampling.top_logprobs or 0)

    def _logits(self, h: Tensor) -> Tensor:
        """(1, T, D) -> (T, V)"""
        decoder = self.request.served.decoder
        with quick_vectors(h.shape[1], h.dtype, h.device):
            return decoder.unembed(decoder.final_norm(h, self.rows), self.rows)[0]


class _Group:
    """Rows that decode in one forward pass."""

    def __init__(self, served: Served, pool: Pool) -> None:
        self._served, self.pool = served, pool
        self.rows: dict[Slot, _Row] = {}
        self._rows_of: tuple[list[Slot], Rows] | None = None  # the batch for which `Rows` was made

    def step(self) -> tuple[list[Slot], list[tuple[Slot, Exception]]]:
        """One token for every row. Those that have ended, and those that failed: no other row suffers for them."""
        attention = self.pool.decoding()
        slots = self.pool.order()
        if self._rows_of is None or self._rows_of[0] != slots:
            self._rows_of = slots, _rows([self.rows[slot].request for slot in slots])
        rows, decoder = self._rows_of[1], self._served.decoder
        ids = torch.tensor([[self.rows[slot].tokens[-1]] for slot in slots], device=attention.positions.device)
        with quick_vectors(len(slots), self.pool.geometry.dtype, self.pool.geometry.device):
            h = decoder.layers(decoder.embed(ids, rows, attention), 0, decoder.n_layers, rows, attention)
            logits = decoder.unembed(decoder.final_norm(h, rows), rows)[:, 0]  # (B, V)
        best = logits.max(-1)  # a NaN or an infinity anywhere in a row shows in its maximum
        likeliest, finite = best.indices.tolist(), best.values.isfinite().tolist()
        ended: list[Slot] = []
        failed: list[tuple[Slot, Exception]] = []
        for i, slot in enumerate(slots):
            row = self.rows[slot]
            plain = row.sampler.sampling.plain_greedy
            try:
                if not finite[i]:
                    raise row.request.overflowed()
                if row.write(Drawn(likeliest[i]) if plain else row.sampler.draw(logits[i])):
                    ended.append(slot)
            except Exception as exc:  # this row ends here, whatever it was
                failed.append((slot, exc))
        return ended, failed


@dataclass(frozen=True)
class Vitals:
    """How the engine stood after its last step; for other threads to read."""

    rows: int = 0  # answers under way
    waiting: int = 0  # requests that wait for memory
    held_bytes: int = 0


class Engine:
    def __init__(self, budget_bytes: int, chunk_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        """`budget_bytes` is for keys and values; a prompt is read `chunk_tokens` a step."""
        self._chunk_tokens, self._dtype, self._device = chunk_tokens, dtype, device
        self._admission: Admission[Request] = Admission(budget_bytes)
        self._reuse = Reuse()
        self._readers: list[_Reader] = []
        self._groups: dict[Hashable, _Group] = {}
        self.vitals = Vitals()
        self._n_read = self._n_written = 0  # tokens since they were taken

    def __len__(self) -> int:
        """Requests that wait, read or write."""
        writing = {id(row.request) for group in self._groups.values() for row in group.rows.values()}
        return len(self._admission) + len(self._readers) + len(writing)

    def uses(self, model: str) -> bool:
        """Whether anybody waits for this base model, or is being answered by it."""
        requests = [*self._admission.waiting(), *(reader.request for reader in self._readers)]
        requests += [row.request for group in self._groups.values() for row in group.rows.values()]
        return any(request.served.model == model for request in requests)

    def forget(self) -> None:
        """What is kept for later turns, of any model: somebody needs the memory more."""
        self._reuse.shrink(0)

    def needs_bytes(self, request: Request) -> int:
        """For all of its answers, at their longest."""
        geometry = request.served.decoder.geometry(self._dtype, self._device)
        return request.n * geometry.row_bytes(len(request.prompt) + request.sampling.max_tokens)

    def shortened(self, request: Request) -> Request:
        """With as many tokens as there is room for, if that is not less than a short answer."""
        fewer = request
        while self.needs_bytes(fewer) > self.budget_bytes:
            half = class_tokens(len(fewer.prompt) + fewer.sampling.max_tokens) // 2
            tokens = half - len(fewer.prompt)
            if not SHORT_TOKENS <= tokens < fewer.sampling.max_tokens:  # of rows in the smallest class, half is no less
                return request
            fewer = replace(fewer, sampling=replace(fewer.sampling, max_tokens=tokens))
        return fewer

    @property
    def budget_bytes(self) -> int:
        return self._admission.budget_bytes

    def add(self, request: Request) -> None:
        """It must fit the budget by itself."""
        self._admission.ask(request, request.caller, self.needs_bytes(request))

    def take_counts(self) -> tuple[int, int]:
        """Tokens read and written since the last time."""
        taken = self._n_read, self._n_written
        self._n_read = self._n_written = 0
        rows = sum(len(group.rows) for group in self._groups.values())
        self.vitals = Vitals(rows, len(self._admission), self._admission.held_bytes)
        return taken

    @torch.inference_mode()
    def step(self) -> None:
        """Rows that fail tell their callers and leave; others go on."""
        self._drop(lambda request: request.cancelled())
        while request := self._admission.next():
            self._begin(request)
        for key, group in list(self._groups.items()):
            self._decode(key, group)
        if self._readers:
            self._read(self._readers[0])

    def fail_all(self, exc: BaseException) -> None:
        requests = {id(r): r for r in self._admission.waiting()}
        requests |= {id(r.request): r.request for r in self._readers}
        requests |= {id(row.request): row.request for g in self._groups.values() for row in g.rows.values()}
        for request in requests.values():
            request.send(exc)
            self._admission.done(request)
        self._readers, self._groups = [], {}

    def _drop(self, unwanted: Callable[[Request], bool]) -> None:
        for request in [r for r in self._admission.waiting() if unwanted(r)]:
            self._admission.done(request)
        for reader in [r for r in self._readers if unwanted(r.request)]:
            self._readers.remove(reader)
            self._admission.done(reader.request)
        for key, group in list(self._groups.items()):
            for slot in [slot for slot, row in group.rows.items() if unwanted(row.request)]:
                self._leave(key, group, slot, keep=False)

    def _begin(self, request: Request) -> None:
        geometry = request.served.decoder.geometry(self._dtype, self._device)
        # What is kept for later turns gives way to who is here now.
        self._reuse.shrink(self._spare_bytes())
        try:
            anew = request.alone or request.tell_prompt  # what is not read tells nothing
            cache = None if anew else self._reuse.find(request.computes, request.prompt, geometry)
            cache = cache or RowCache(geometry, class_tokens(len(request.prompt)))
            self._readers.append(_Reader(request, cache))
        except Exception as exc:  # one request ends here, whatever it was
            self._fail([request], exc)

    def _read(self, reader: _Reader) -> None:
        request = reader.request
        try:
            before = reader.cache.length
            logits = reader.read(self._chunk_tokens)
            self._n_read += reader.cache.length - before
            if logits is None:
                self._readers.append(self._readers.pop(0))  # the next chunk is another's turn
                return
            self._readers.remove(reader)
            if not bool(logits.max().isfinite()):
                raise request.overflowed()
            if request.tell_prompt:
                request.send(PromptTold(tuple(reader.told)))
            if request.sampling.max_tokens == 0:
                self._end_unwritten(request, reader)
                return
            if request.group not in self._groups:
                geometry = request.served.decoder.geometry(self._dtype, self._device)
                self._groups[request.group] = _Group(request.served, Pool(geometry, request.served.arithmetic))
            group = self._groups[request.group]
            for index in range(request.n):
                group.rows[group.pool.join(reader.cache)] = _Row(request, index, reader.cached_tokens)
                self._n_written += 1
            joined = [slot for slot, row in group.rows.items() if row.request is request]
            ended = [slot for slot in joined if group.rows[slot].write(group.rows[slot].sampler.draw(logits))]
            for slot in ended:
                self._leave(request.group, group, slot, keep=True)
        except Exception as exc:  # one request ends here, whatever it was
            self._end(request, exc)

    def _end_unwritten(self, request: Request, reader: _Reader) -> None:
        """Only the prompt was asked about."""
        for index in range(request.n):
            request.send(Finish(index, "length", len(request.prompt), 0, reader.cached_tokens))
        self._admission.done(request)

    def _decode(self, key: Hashable, group: _Group) -> None:
        try:
            self._n_written += len(group.rows)
            ended, failed = group.step()
            for slot in ended:
                self._leave(key, group, slot, keep=True)
            for slot, why in failed:
                if slot in group.rows:  # not gone already with another answer to its prompt
                    self._end(group.rows[slot].request, why)
        except Exception as exc:  # the rows of this step end here, whatever it was; their memory goes with the group
            self._groups.pop(key, None)
            self._fail(list({id(row.request): row.request for row in group.rows.values()}.values()), exc)

    def _leave(self, key: Hashable, group: _Group, slot: Slot, *, keep: bool) -> None:
        row = group.rows.pop(slot)
        try:
            kept = group.pool.leave(slot, keep=keep and not row.request.alone)
            if kept:
                self._reuse.keep(row.request.computes, tuple(row.tokens[: kept.length]), kept)
        finally:
            if not any(other.request is row.request for other in group.rows.values()):
                self._admission.done(row.request)
            if not group.rows:
                self._groups.pop(key, None)
            self._reuse.shrink(self._spare_bytes())

    def _spare_bytes(self) -> int:
        """For what is kept for later turns: pools hold places that nobody has at the moment."""
        taken = sum(group.pool.n_bytes for group in self._groups.values()) + sum(r.cache.n_bytes for r in self._readers)
        return self.budget_bytes - max(self._admission.held_bytes, taken)

    def _end(self, request: Request, exc: BaseException) -> None:
        self._drop(lambda other: other is request)
        self._fail([request], exc)

    def _fail(self, requests: list[Request], exc: BaseException) -> None:
        if not isinstance(exc, GpuError):
            log.error("text rows failed", exc_info=exc)
        told = translate(exc)
        for request in requests:
            request.send(told)
            self._admission.done(request)
        if isinstance(told, OutOfMemory):  # the estimates were too hopeful: what is kept for later turns goes first
            self._reuse.shrink(0)
            give_back(self._device)


def _rows(requests: list[Request]) -> Rows:
    """The batch as the decoder asks for it. All have the same weights; that is what a group is."""
    first = requests[0]
    return Rows(
        first.served.weights,
        quantized=first.served.quantized,
        full=first.adapter.full if first.adapter else None,
        lora=[r.adapter.lora if r.adapter else None for r in requests],
        dials=[r.dials for r in requests],
        arithmetic=first.served.arithmetic,
        joined=first.served.joined,
    )
