"""What the frozen layers put out: computed once for a data set, kept on disk, read back in every epoch.

Below the lowest trained layer nothing changes during a run: no gradient, no dropout. So the hidden states that enter
that layer are a function of the base weights and the tokens alone. They are computed in fixed batches, row by row on
disk in one file that is memory-mapped, and named by the hash of everything that they follow from. A file counts once
its description stands beside it, and only after each of its batches has met its hash again: what is damaged, cut short,
half written or of something else is made anew. Knows neither loss nor optimizer.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import wire
from gpu_service.artifacts import atomic_file
from gpu_service.cache import Whole
from gpu_service.costs import LEAST_GAIN_S
from gpu_service.data import TokenStore
from gpu_service.decoder import Decoder
from gpu_service.device import Device
from gpu_service.models import Source
from gpu_service.rows import Rows

FORMAT = 1  # of the files; raised when the same key would name other numbers
STATES, DESCRIPTION = "states", "meta.json"
SPARE_BYTES = 2**30  # of the disk: never taken
GROUP_BYTES = 2**30  # of hidden states in memory while layers are read one after another

Stage = tuple[int, int, Rows]  # layers `first` to `last - 1` (0, 0: the embedding), and who holds their weights
Stages = Callable[[], Iterator[Stage]]  # all of them below the cut, in order


@dataclass(frozen=True)
class Chosen:
    """Whether a run reads its frozen prefix from disk, and why; fixed for its whole life, wherever it goes on."""

    cached: bool
    why: str


@dataclass(frozen=True)
class Working:
    """One slice of preparation is done."""

    done: int  # tokens
    of: int


@dataclass(frozen=True)
class Wanted:
    """What hidden states follow from."""

    source: Source
    store: TokenStore
    cut: int  # the lowest trained layer
    batch_tokens: int  # padding included, of one pass
    quantize: wire.Quantize
    device: Device

    @cached_property
    def key(self) -> str:
        """Rounding follows from the batches and from what multiplies, so these are part of it."""
        device = self.device
        kernels = torch.backends.cpu.get_cpu_capability() if device.torch.type == "cpu" else device.name
        told = [FORMAT, self.source.revision, self.source.family, device.precision.name, self.quantize, self.cut]
        told += [self.store.content, self.batch_tokens, device.torch.type, kernels, torch.__version__]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    @property
    def token_bytes(self) -> int:
        return int(self.source.config.hidden_size) * self.device.precision.dtype.itemsize

    @property
    def n_bytes(self) -> int:
        return int(self.store.lengths.sum()) * self.token_bytes

    @cached_property
    def batches(self) -> list[list[int]]:
        """Rows of like length together, so that little is padding; the same for the same data, always."""
        lengths = self.store.lengths
        order = np.argsort(-lengths, kind="stable").tolist()
        found: list[list[int]] = []
        for row in order:
            if found and (len(found[-1]) + 1) * int(lengths[found[-1][0]]) <= self.batch_tokens:
                found[-1].append(row)
            else:
                found.append([row])
        return found


class Prefix:
    """The hidden states of one data set, by row, from a file that has been checked."""

    def __init__(self, file: Path, wanted: Wanted) -> None:
        self._dtype, self._device = wanted.device.precision.dtype, wanted.device.torch
        self._width = int(wanted.source.config.hidden_size)
        self._lengths = wanted.store.lengths
        self._starts = np.zeros(len(wanted.store), np.int64)
        order = [row for batch in wanted.batches for row in batch]
        self._starts[order] = np.cumsum(self._lengths[order]) - self._lengths[order]
        # numpy knows no bf16: what is mapped are words of the same size.
        words = {4: np.int32, 2: np.int16}[self._dtype.itemsize]
        self._states = np.memmap(file, words, "r", shape=(int(self._lengths.sum()), self._width))

    def row(self, row: int) -> Tensor:
        """(T, D) of a row's own length, on the CPU."""
        start = int(self._starts[row])
        words = self._states[start : start + int(self._lengths[row])]
        return torch.from_numpy(np.array(words)).view(self._dtype)

    def hidden(self, rows: Sequence[int]) -> Tensor:
        """(B, T, D), T of the longest; zeros behind a row's end, where no token of it looks."""
        longest = int(self._lengths[list(rows)].max())
        h = torch.zeros((len(rows), longest, self._width), dtype=self._dtype)
        for i, row in enumerate(rows):
            h[i, : int(self._lengths[row])] = self.row(row)
        return h.to(self._device)


@dataclass(frozen=True)
class Prefixes:
    """Of a run's two data sets. None: computed anew in every step."""

    training: Prefix | None = None
    validation: Prefix | None = None


class Shelf:
    """The folder of prefixes, within a budget; the least recently used leave first."""

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        self._folder, self._budget_bytes = folder, budget_bytes

    def room(self, wanted: Sequence[Wanted]) -> str | None:
        """None where all of these fit, once others have left; else what is in the way."""
        needs = sum(w.n_bytes for w in wanted if not (self._folder / w.key).is_dir())
        whole = sum(w.n_bytes for w in wanted)
        if whole > self._budget_bytes:
            return (
                f"it would take {whole / 1e6:,.0f} MB, and GPU_PREFIX_BYTES allows {self._budget_bytes / 1e6:,.0f} MB"
            )
        self._make_room(needs, keep={w.key for w in wanted})
        here = next(p for p in (self._folder, *self._folder.absolute().parents) if p.is_dir())
        free = shutil.disk_usage(here).free - SPARE_BYTES
        if needs > free:
            return f"it would take {needs / 1e6:,.0f} MB, and the disk has {max(0, free) / 1e6:,.0f} MB to spare"
        return None

    def _make_room(self, needs: int, keep: set[str]) -> None:
        entries = sorted(self._folder.iterdir(), key=_used_at) if self._folder.is_dir() else []
        sizes = {entry: sum(f.stat().st_size for f in entry.iterdir()) for entry in entries if entry.is_dir()}
        total = needs + sum(sizes.values())
        for entry in sizes:
            # A folder without its description was left by a process that died while it wrote.
            if entry.name not in keep and (total > self._budget_bytes or not (entry / DESCRIPTION).is_file()):
                shutil.rmtree(entry, ignore_errors=True)
                total -= sizes[entry]

    def speed(self, data: bytes) -> tuple[float, float]:
        """Seconds to write this much, to the disk itself, and to read it back."""
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"speed.{os.getpid()}"
        try:
            began = time.perf_counter()
            with file.open("wb") as opened:
                opened.write(data)
                opened.flush()
                os.fsync(opened.fileno())
            written = time.perf_counter()
            file.read_bytes()
            return written - began, time.perf_counter() - written
        finally:
            file.unlink(missing_ok=True)

    def prepare(
        self, wanted: Wanted, decoder: Decoder, stages: Stages, *, group_bytes: int = 0
    ) -> Generator[Working, None, Prefix]:
        """Open what is there and sound, or compute it, a batch in each slice.

        `group_bytes`: of hidden states held at once; where stages are read from a checkpoint, each group reads them
        all once. Raises OSError where the disk fails.
        """
        folder = self._folder / wanted.key
        if (yield from _sound(folder, wanted)):
            os.utime(folder / DESCRIPTION)
            return Prefix(folder / STATES, wanted)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        batches, digests = wanted.batches, []
        of, done = int(wanted.store.lengths.sum()), 0
        with atomic_file(folder / STATES) as file:
            for group in _groups(batches, wanted, group_bytes):
                hidden = yield from compute(group, wanted, decoder, stages, done)
                for rows, h in zip(group, hidden, strict=True):
                    data = _packed(h, [int(wanted.store.lengths[r]) for r in rows])
                    file.write(data)
                    digests.append(hashlib.sha256(data).hexdigest())
                    done += len(data) // wanted.token_bytes
                    yield Working(done, of)
        with atomic_file(folder / DESCRIPTION) as file:
            file.write(json.dumps({"key": wanted.key, "batches": digests}).encode())
        return Prefix(folder / STATES, wanted)


def _sound(folder: Path, wanted: Wanted) -> Generator[Working, None, bool]:
    """Whether what lies there is all of what it should be, by the hash of every batch."""
    try:
        told = json.loads((folder / DESCRIPTION).read_bytes())
        sizes = [int(wanted.store.lengths[rows].sum()) * wanted.token_bytes for rows in wanted.batches]
        if told["key"] != wanted.key or len(told["batches"]) != len(sizes):
            return False
        if (folder / STATES).stat().st_size != sum(sizes):
            return False
        with (folder / STATES).open("rb") as file:
            for size, digest in zip(sizes, told["batches"], strict=True):
                if hashlib.sha256(file.read(size)).hexdigest() != digest:
                    return False
                yield Working(file.tell() // wanted.token_bytes, sum(sizes) // wanted.token_bytes)
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return True


def _used_at(entry: Path) -> float:
    try:
        return (entry / DESCRIPTION).stat().st_mtime
    except OSError:
        return 0.0


def _groups(batches: list[list[int]], wanted: Wanted, group_bytes: int) -> Iterator[list[list[int]]]:
    """Batches whose hidden states are in memory at once; at least one."""
    group: list[list[int]] = []
    held = 0
    for rows in batches:
        size = len(rows) * int(wanted.store.lengths[rows].max()) * wanted.token_bytes
        if group and held + size > group_bytes:
            yield group
            group, held = [], 0
        group.append(rows)
        held += size
    yield group


@torch.no_grad()
def compute(
    group: list[list[int]], wanted: Wanted, decoder: Decoder, stages: Stages, done: int = 0
) -> Generator[Working, None, list[Tensor]]:
    """Hidden states (B, T, D) entering the cut, of each batch. A stage's layers are held no longer than their turn."""
    of = int(wanted.store.lengths.sum())
    device = wanted.device.torch
    hidden: list[Tensor] = []
    for first, last, rows in stages():
        for i, batch in enumerate(group):
            ids = wanted.store.batch(batch, pad_id=0).ids.to(device)
            attention = Whole(ids.shape[1], device)
            if last == 0:
                hidden.append(decoder.embed(ids, rows, attention))
            else:
                hidden[i] = decoder.layers(hidden[i], first, last, rows, attention)
            yield Working(done, of)
        del rows  # before the next stage is read
    return hidden


def resident(rows: Rows, cut: int) -> Stages:
    """The stages of a model that is in memory."""
    return lambda: iter([(0, 0, rows), (0, cut, rows)])


def _packed(h: Tensor, lengths: list[int]) -> bytes:
    """A batch's rows one behind the other, without padding, in this machine's byte order."""
    words = {4: torch.int32, 2: torch.int16}[h.element_size()]
    flat = torch.cat([h[i, :length] for i, length in enumerate(lengths)]).cpu().contiguous()
    return flat.view(words).numpy().tobytes()


@dataclass(frozen=True)
class Costs:
    """Seconds for the whole data set, from one batch that was computed, written and read."""

    forward_s: float
    write_s: float
    read_s: float

    def gain_s(self, epochs: int) -> float:
        return (epochs - 1) * self.forward_s - self.write_s - epochs * self.read_s


def measure(shelf: Shelf, wanted: Wanted, decoder: Decoder, stages: Stages) -> Generator[Working, None, Costs]:
    batch = wanted.batches[0]
    began = time.perf_counter()
    hidden = yield from compute([batch], wanted, decoder, stages)
    lengths = [int(wanted.store.lengths[r]) for r in batch]
    data = _packed(hidden[0], lengths)
    computed = time.perf_counter()
    write_s, read_s = shelf.speed(data)
    times = wanted.n_bytes / len(data)
    return Costs((computed - began) * times, write_s * times, read_s * times)


def choose(
    shelf: Shelf,
    wanted: Sequence[Wanted],
    epochs: int,
    asked: bool | None,
    decoder: Decoder,
    stages: Stages,
) -> Generator[Working, None, Chosen]:
    """`wanted`: the training data first. `asked`: by the user; None is "auto"."""
    if asked is False:
        return Chosen(False, "prefix_cache is false")
    if wanted[0].cut == 0:
        return Chosen(False, "layer 0 or the embedding is trained, so nothing below is constant")
    if asked is None and epochs == 1:
        return Chosen(False, "every row is seen once")
    if (obstacle := shelf.room(wanted)) is not None:
        return Chosen(False, obstacle)
    if asked:
        return Chosen(True, "prefix_cache is true")
    costs = yield from measure(shelf, wanted[0], decoder, stages)
    gain_s = costs.gain_s(epochs)
    figures = (
        f"{epochs - 1} passes of {costs.forward_s:.1f} s saved, {costs.write_s:.1f} s to write, "
        f"{epochs * costs.read_s:.1f} s to read"
    )
    return Chosen(gain_s >= LEAST_GAIN_S, figures)
