"""Data sets and adapters as blobs named by their SHA-256. A blob is there whole or not at all.

What comes is written to the local disk first, within bounds, whatever keeps it: a folder (here), or a bucket
(bucket.py). Does not know who owns a blob or what is in it.
"""

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import math
import os
import secrets
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Collection
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from relay import errors

CHUNK_BYTES = 2**18  # read at once
BUFFER_BYTES = 2**20  # written at once


@dataclass(frozen=True)
class Bound:
    """So much may come; past it, that error."""

    bytes: int
    past: errors.RelayError


class Incoming:
    """A blob on its way in. What is not kept disappears."""

    def __init__(self, path: Path, bound: Bound) -> None:
        self.path = path
        self.bytes = 0
        self._bound = bound
        self._hash = hashlib.sha256()
        self._buffer = bytearray()
        self._file: IO[bytes] = path.open("wb")

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    async def write(self, chunk: bytes) -> None:
        """Raises the bound's error as soon as it is passed."""
        self.count(len(chunk))
        self._buffer += chunk
        if len(self._buffer) >= BUFFER_BYTES:
            await self._flush()

    def count(self, bytes: int) -> None:
        """So much more comes. Raises the bound's error."""
        self.bytes += bytes
        if self.bytes > self._bound.bytes:
            raise self._bound.past

    async def finish(self) -> None:
        """Everything is on disk, under its temporary name."""
        await self._flush()
        await asyncio.to_thread(os.fsync, self._file.fileno())

    async def _flush(self) -> None:
        data, self._buffer = bytes(self._buffer), bytearray()
        await asyncio.to_thread(self._append, data)

    def put(self, data: bytes) -> None:
        """At once, by a thread that has nothing else to do. Raises the bound's error as soon as it is passed."""
        self.count(len(data))
        self._append(data)

    def _append(self, data: bytes) -> None:
        self._hash.update(data)
        self._file.write(data)
        self._file.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what a full disk did not take is tried once more here
            self._file.close()
        self.path.unlink(missing_ok=True)


class Blobs(ABC):
    """What all of them share: the way in. And what a store of blobs must do."""

    on_this_disk = True  # what is kept takes the room that comes in needs

    def __init__(self, root: Path, min_free_bytes: int = 0) -> None:
        self._root = root
        self._min_free_bytes = min_free_bytes
        self._incoming_root = root / "incoming"
        self._incoming = self._incoming_root / secrets.token_hex(8)
        self._lock: IO[bytes] | None = None

    def open(self) -> None:
        """Removes what processes that are gone left half-written; a living one holds the lock of its folder."""
        self._incoming_root.mkdir(parents=True, exist_ok=True)
        with (self._root / "opening").open("wb") as opening:
            fcntl.flock(opening, fcntl.LOCK_EX)  # one process at a time
            for folder in self._incoming_root.iterdir():
                with contextlib.suppress(OSError), (folder / "lock").open("rb") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
            self._clear()
            self._incoming.mkdir()
            self._lock = (self._incoming / "lock").open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    @abstractmethod
    def _clear(self) -> None:
        """What else a process that is gone left behind; one process at a time comes by."""

    def close(self) -> None:
        if self._lock:
            shutil.rmtree(self._incoming, ignore_errors=True)
            self._lock.close()

    def free_bytes(self) -> int:
        """Of the disk, beside what stays free in any case; may be below 0."""
        return shutil.disk_usage(self._root).free - self._min_free_bytes

    def check_room(self, bytes: int) -> None:
        """Raises DiskFull if so much more would not fit."""
        if bytes > (free_bytes := self.free_bytes()):
            raise errors.DiskFull(
                f"the relay's disk has room for {max(0, free_bytes):,} bytes more, and {bytes:,} are needed: "
                "its administrator must make room"
            )

    @contextlib.asynccontextmanager
    async def incoming(self, bound: Bound) -> AsyncIterator[Incoming]:
        """Write to it, finish it, then keep it or leave. Raises DiskFull, also in the middle."""
        self.check_room(1)
        try:
            incoming = Incoming(self._incoming / secrets.token_hex(8), bound)
            try:
                yield incoming
            finally:
                incoming.close()
        except OSError as exc:
            if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            message = "the relay's disk is full: its administrator must make room, then send it again"
            raise errors.DiskFull(message) from exc

    def scratch(self) -> IO[bytes]:
        """A file without a name: once closed it is gone, and with the process too."""
        return tempfile.TemporaryFile(dir=self._incoming)

    @abstractmethod
    async def send(self, incoming: Incoming) -> None:
        """What of keeping it takes long, ahead of the transaction that keeps it. Raises StorageUnavailable."""

    @abstractmethod
    async def keep(self, incoming: Incoming) -> None:
        """The finished blob is there, for good; within the write that names it. The same content twice is one blob."""

    async def size_bytes(self, sha256: str) -> int | None:
        """None if there is no such blob."""
        return (await self.sizes([sha256])).get(sha256)

    @abstractmethod
    async def sizes(self, shas: Collection[str]) -> dict[str, int]:
        """The bytes of those that are there. Within a write, what is there may be named."""

    @abstractmethod
    def local(self, sha256: str) -> AbstractAsyncContextManager[Path]:
        """A file with its content, for reading, meanwhile. FileNotFoundError, here or at its opening: it is gone."""

    @abstractmethod
    async def read(self, sha256: str) -> AsyncIterator[bytes]:
        """Its content, opened already. Raises NotFound."""

    @abstractmethod
    async def has_any(self) -> bool: ...

    @abstractmethod
    async def total_bytes(self) -> int:
        """Of all of them; looks at each."""

    @abstractmethod
    async def older_than(self, at: float) -> list[str]:
        """By when they were stored last, in unix seconds."""

    @abstractmethod
    async def set_aside(self, shas: Collection[str], older_than: float, aside: list[str]) -> None:
        """They may not be named any more, and can be brought back; within a write that finds that nothing names them.

        `aside` is told what to hand to drop() or bring_back(), before it happens.
        """

    @abstractmethod
    async def drop(self, aside: Collection[str]) -> None:
        """What was set aside is gone for good."""

    @abstractmethod
    async def bring_back(self, aside: Collection[str]) -> None:
        """What was set aside is there again."""

    @abstractmethod
    async def left_aside(self, older_than: float) -> dict[str, str]:
        """What a process that is gone has set aside so long ago, with its SHA-256."""

    @abstractmethod
    async def claim(self, pair: str, *, named: bool) -> None:
        """They belong to this database (folder.py), and `named`: it names some. Raises WrongFolder."""

    @abstractmethod
    async def check(self) -> None:
        """Whether they can be reached now. Raises StorageUnavailable."""

    @abstractmethod
    async def probe(self) -> None:
        """Before a relay starts: whether it may do all that it will. Raises StorageUnavailable."""


class FolderBlobs(Blobs):
    """Files on the local disk, which several processes of one machine may share."""

    def __init__(self, root: Path, min_free_bytes: int = 0) -> None:
        super().__init__(root, min_free_bytes)
        self._aside = root / "aside"

    def path(self, sha256: str) -> Path:
        return self._root / sha256[:2] / sha256

    def paths(self) -> list[Path]:
        return list(self._root.glob("??/*"))

    def _clear(self) -> None:
        """Its process did not live to know whether it may go; where it may, the sweep sees to it."""
        self._bring_back([path.name for path in self._aside.iterdir()] if self._aside.exists() else [])

    async def send(self, incoming: Incoming) -> None:
        pass  # a new name takes no time

    async def keep(self, incoming: Incoming) -> None:
        await asyncio.to_thread(self._keep, incoming)

    def _keep(self, incoming: Incoming) -> None:
        target = self.path(incoming.sha256)
        target.parent.mkdir(exist_ok=True)
        incoming.path.rename(target)
        for folder in (target.parent, self._root):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    async def sizes(self, shas: Collection[str]) -> dict[str, int]:
        found = {}
        for sha256 in shas:
            with contextlib.suppress(FileNotFoundError):
                found[sha256] = self.path(sha256).stat().st_size
        return found

    @contextlib.asynccontextmanager
    async def local(self, sha256: str) -> AsyncIterator[Path]:
        yield self.path(sha256)

    async def read(self, sha256: str) -> AsyncIterator[bytes]:
        try:
            return chunks(await asyncio.to_thread(self.path(sha256).open, "rb"))
        except FileNotFoundError:
            raise errors.NotFound(f"no blob {sha256}") from None

    async def has_any(self) -> bool:
        return any(self._root.glob("??/*"))

    async def total_bytes(self) -> int:
        return await asyncio.to_thread(self._total_bytes)

    def _total_bytes(self) -> int:
        total = 0
        for folder in self._root.glob("??"):
            with contextlib.suppress(FileNotFoundError), os.scandir(folder) as found:
                for entry in found:
                    with contextlib.suppress(FileNotFoundError):
                        total += entry.stat().st_size
        return total

    async def older_than(self, at: float) -> list[str]:
        return await asyncio.to_thread(lambda: [path.name for path in self.paths() if _mtime(path) < at])

    async def set_aside(self, shas: Collection[str], older_than: float, aside: list[str]) -> None:
        await asyncio.to_thread(self._set_aside, shas, older_than, aside)

    def _set_aside(self, shas: Collection[str], older_than: float, aside: list[str]) -> None:
        self._aside.mkdir(exist_ok=True)
        for sha256 in shas:
            path = self.path(sha256)
            if _mtime(path) < older_than:
                aside.append(sha256)
                with contextlib.suppress(FileNotFoundError):
                    path.rename(self._aside / sha256)

    async def drop(self, aside: Collection[str]) -> None:
        def unlink() -> None:
            for sha256 in aside:
                (self._aside / sha256).unlink(missing_ok=True)

        await asyncio.to_thread(unlink)

    async def bring_back(self, aside: Collection[str]) -> None:
        self._bring_back(aside)

    def _bring_back(self, aside: Collection[str]) -> None:
        for sha256 in aside:
            with contextlib.suppress(FileNotFoundError):
                (self._aside / sha256).rename(self.path(sha256))  # its folder stays, once it was there

    async def left_aside(self, older_than: float) -> dict[str, str]:
        return {}  # the next process that starts brings it back

    async def claim(self, pair: str, *, named: bool) -> None:
        pass  # the data folder says it, which they are in

    async def check(self) -> None:
        pass  # as there as the disk

    async def probe(self) -> None:
        pass


async def chunks(file: IO[bytes]) -> AsyncIterator[bytes]:
    """And closes it."""
    try:
        while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
            yield chunk
    finally:
        file.close()


def _mtime(path: Path) -> float:
    """Never, if it is gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return math.inf
