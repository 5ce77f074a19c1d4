"""Keys and values of the rows under way, and attention over them.

The linear maps of a step run on all rows at once; attention can't, for rows differ in length. So decoding rows live in
size classes (256, 512, 1024 ... tokens), one attention call each, and no row pays for more than twice its length. A row
reads its prompt alone, in a cache of its own, and then joins the class that fits; when it leaves, the last of the class
takes its place, so that a class is always one dense block.

A decoder asks an attention for `positions` and calls its `attend` in every layer. There are four: `Whole`
and `Packed` for a forward pass without a cache, `Reading` for a prompt, `Decoding` for one token of many rows.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_service.kernels import TORCH, Arithmetic, Places

SMALLEST_CLASS_TOKENS = 256
READY_ROWS, READY_BYTES = 4, 64 * 2**20  # places that a class allocates ahead: what is less of both, but one


class Attention(Protocol):
    positions: Tensor  # (B or 1, T) of the tokens in this pass

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, T, Dh), k and v (B, G, T, Dh) of these tokens -> (B, H, T, Dh)."""


@dataclass(frozen=True)
class Geometry:
    n_layers: int
    kv_heads: int  # G
    head_dim: int  # Dh
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.n_layers * self.kv_heads * self.head_dim * self.dtype.itemsize

    def row_bytes(self, tokens: int) -> int:
        """What a row of this length takes, in the class that it lives in."""
        return self.token_bytes * class_tokens(tokens)


def class_tokens(tokens: int) -> int:
    capacity = SMALLEST_CLASS_TOKENS
    while capacity < tokens:
        capacity *= 2
    return capacity


class Whole:
    """Rows (B, T), right-padded, every position from 0: training, and a forward pass without a cache."""

    def __init__(self, tokens: int, device: torch.device, dropout: float = 0.0) -> None:
        """`dropout` of attention weights, where gradients are kept."""
        self.positions = torch.arange(tokens, device=device)[None]
        self._dropout = dropout

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Padding stands on the right, where no token of the row looks.
        k, v = _expand(k, q.shape[1]), _expand(v, q.shape[1])
        dropout = self._dropout if torch.is_grad_enabled() else 0.0
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)


class Packed:
    """Rows one behind the other in one sequence, (1, sum of their lengths): each sees itself alone, from position 0.

    The linear maps meet no padding; attention runs row by row.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device, dropout: float = 0.0) -> None:
        self.positions = torch.cat([torch.arange(n, device=device) for n in lengths])[None]
        self._lengths, self._dropout = list(lengths), dropout

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = _expand(k, q.shape[1]), _expand(v, q.shape[1])
        dropout = self._dropout if torch.is_grad_enabled() else 0.0
        split = [torch.split(x, self._lengths, dim=2) for x in (q, k, v)]
        parts = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
            for q, k, v in zip(*split, strict=True)
        ]
        return torch.cat(parts, dim=2)


class RowCache:
    """One row alone, (1, G, capacity, Dh) for each layer: while it reads its prompt, or kept for another turn."""

    def __init__(self, geometry: Geometry, capacity: int) -> None:
        size = (1, geometry.kv_heads, capacity, geometry.head_dim)
        # Zeros, not empty: a masked key still meets a weight of 0, and 0 times the NaN of stale memory is NaN.
        self.keys = [torch.zeros(size, dtype=geometry.dtype, device=geometry.device) for _ in range(geometry.n_layers)]
        self.values = [torch.zeros_like(k) for k in self.keys]
        self.length = 0  # tokens that it holds

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    @property
    def n_bytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def reading(self, tokens: int) -> "Reading":
        """Attention for the next `tokens` of this row; they count as read from now on."""
        assert self.length + tokens <= self.capacity
        start, self.length = self.length, self.length + tokens
        return Reading(self, start)

    def copy(self, geometry: Geometry, length: int, capacity: int) -> "RowCache":
        """The first `length` tokens, with room for `capacity`."""
        other = RowCache(geometry, capacity)
        for mine, its in zip((*self.keys, *self.values), (*other.keys, *other.values), strict=True):
            its[:, :, :length] = mine[:, :, :length]
        other.length = length
        return other


class Reading:
    """One row, T tokens that follow those in its cache."""

    def __init__(self, cache: RowCache, start: int) -> None:
        self._cache, self._start = cache, start
        device = cache.keys[0].device
        self.positions = torch.arange(start, cache.length, device=device)[None]
        self._mask = None
        if start:  # from 0 plain causal attention says the same
            self._mask = torch.arange(cache.length, device=device) <= self.positions[0, :, None]  # (T, K)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values, end = self._cache.keys[layer], self._cache.values[layer], self._cache.length
        keys[:, :, self._start : end] = k
        values[:, :, self._start : end] = v
        k, v = _expand(keys[:, :, :end], q.shape[1]), _expand(values[:, :, :end], q.shape[1])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask, is_causal=self._mask is None)


class _Class:
    """Rows of one size class: (S, G, capacity, Dh) for each layer, of which the first `len(members)` are in use.

    A few places stand ready, so that rows come and go without copying: twice `_ready` at most, or READY_BYTES where
    that is more. To give back less would cost copies, and small blocks that come and go leave holes in the heap.
    """

    def __init__(self, geometry: Geometry, capacity: int) -> None:
        self._geometry, self.capacity = geometry, capacity
        self.members: list[Slot] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    @property
    def slots(self) -> int:
        """Places in every layer; where memory ran out on the way from one size to another, some have more."""
        return min(self.keys[0].shape[0], self.values[-1].shape[0]) if self.keys else 0

    @property
    def _ready(self) -> int:
        """1, 1, 2, 3, 4, 4 ... for short rows, and one where a row is large: they are memory that nobody asked for."""
        few = min(READY_ROWS, READY_BYTES // self._row_bytes)
        return max(1, min(len(self.members), few))

    @property
    def _idle(self) -> int:
        return self.slots - len(self.members)

    @property
    def _row_bytes(self) -> int:
        return self._geometry.row_bytes(self.capacity)

    def grow(self) -> None:
        self._resize(len(self.members) + self._ready)

    def _resize(self, slots: int) -> None:
        g, n = self._geometry, len(self.members)
        if not slots:
            self.keys, self.values = [], []
            return
        new = partial(torch.zeros, (slots, g.kv_heads, self.capacity, g.head_dim), dtype=g.dtype, device=g.device)
        if not self.keys:
            blocks = [new() for _ in range(2 * g.n_layers)]
            self.keys, self.values = blocks[: g.n_layers], blocks[g.n_layers :]
            return
        for held in (self.keys, self.values):
            for layer, old in enumerate(held):  # one at a time, so that only one is there twice
                block = new()
                block[:n] = old[:n]
                held[layer] = block

    def remove(self, slot: "Slot") -> None:
        last = self.members.pop()
        if last is not slot:
            for block in (*self.keys, *self.values):
                block[slot.index] = block[last.index]  # what lies behind its length too, which is zeros
            last.index = slot.index
            self.members[slot.index] = last
        if not self.members:
            self._resize(0)
        elif self._idle > 2 * self._ready and self._idle * self._row_bytes > READY_BYTES:
            with contextlib.suppress(torch.OutOfMemoryError, MemoryError):  # to shrink takes memory first
                self.grow()


@dataclass(eq=False)
class Slot:
    """A decoding row's place."""

    size: _Class
    index: int
    length: int  # tokens held


class Pool:
    """The decoding rows of one model."""

    def __init__(self, geometry: Geometry, arithmetic: Arithmetic = TORCH) -> None:
        self.geometry = geometry
        self._arithmetic = arithmetic
        self._classes: dict[int, _Class] = {}

    @property
    def n_bytes(self) -> int:
        return sum(t.nbytes for size in self._classes.values() for t in (*size.keys, *size.values))

    def join(self, cache: RowCache) -> Slot:
        """Copy a row in, with room for at least one token more."""
        slot = self._place(class_tokens(cache.length + 1), cache.length)
        for own, block in zip((*cache.keys, *cache.values), (*slot.size.keys, *slot.size.values), strict=True):
            block[slot.index, :, : cache.length] = own[0, :, : cache.length]
        return slot

    def leave(self, slot: Slot, *, keep: bool) -> RowCache | None:
        """Give the place up; `keep` takes the row's keys and values along."""
        kept = None
        with contextlib.suppress(torch.OutOfMemoryError, MemoryError):  # then there is nothing to take along
            if keep:
                kept = RowCache(self.geometry, slot.length)
                for own, block in zip((*kept.keys, *kept.values), (*slot.size.keys, *slot.size.values), strict=True):
                    own[0] = block[slot.index, :, : slot.length]
                kept.length = slot.length
        slot.size.remove(slot)
        return kept

    def decoding(self) -> "Decoding":
        """Attention for one more token of every row, which counts as held from now on.

        Rows that have outgrown their class are moved first, so ask for the `order` of the rows afterwards.
        """
        for slot in self.order():
            if slot.length == slot.size.capacity:
                self._outgrow(slot)
        classes = [size for size in self._classes.values() if size.members]
        return Decoding(self.geometry, classes, self._arithmetic)

    def order(self) -> list[Slot]:
        return [slot for size in self._classes.values() for slot in size.members]

    def _place(self, capacity: int, length: int) -> Slot:
        size = self._classes.setdefault(capacity, _Class(self.geometry, capacity))
        if len(size.members) == size.slots:
            size.grow()
        slot = Slot(size, len(size.members), length)
        for block in (*size.keys, *size.values):
            block[slot.index] = 0  # who was here before may have left a NaN, which a weight of 0 does not silence
        size.members.append(slot)
        return slot

    def _outgrow(self, slot: Slot) -> None:
        old, index = slot.size, slot.index
        new = self._place(2 * old.capacity, slot.length)
        for mine, its in zip((*old.keys, *old.values), (*new.size.keys, *new.size.values), strict=True):
            its[new.index, :, : slot.length] = mine[index, :, : slot.length]
        old.remove(slot)
        new.size.members[new.index] = slot
        slot.size, slot.index = new.size, new.index


class Decoding:
    """One token of every row, class by class."""

    def __init__(self, geometry: Geometry, classes: list[_Class], arithmetic: Arithmetic) -> None:
        lengths = [slot.length for size in classes for slot in size.members]
        self.positions = torch.tensor(lengths, device=geometry.device)[:, None]  # (B, 1)
        self._arithmetic = arithmetic
        self._parts: list[tuple[_Class, slice, Places]] = []
        start = 0
        for size in classes:
            part = slice(start, start + len(size.members))
            own = lengths[part]
            places = Places(self.positions[part, 0], max(own) + 1, min(own) == max(own))
            self._parts.append((size, part, places))
            start = part.stop
            for slot in size.members:
                slot.length += 1

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if len(self._parts) == 1:
            size, _, places = self._parts[0]
            return self._arithmetic.attend(q, k, v, size.keys[layer], size.values[layer], places)
        return torch.cat(
            [
                self._arithmetic.attend(q[part], k[part], v[part], size.keys[layer], size.values[layer], places)
                for size, part, places in self._parts
            ]
        )


def _expand(x: Tensor, heads: int) -> Tensor:
    """(B, G, T, Dh) -> (B, heads, T, Dh): each key head repeated for the query heads of its group."""
    B, G, T, Dh = x.shape
    return x if heads == G else x[:, :, None].expand(B, G, heads // G, T, Dh).reshape(B, heads, T, Dh)
