"""Data sets and adapters as files named by their SHA-256. A blob is there whole or not at all.

Does not know who owns a blob or what is in it.
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
from collections.abc import AsyncIterator
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


class Blobs:
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
            self._incoming.mkdir()
            self._lock = (self._incoming / "lock").open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX)

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

    def path(self, sha256: str) -> Path:
        return self._root / sha256[:2] / sha256

    def size_bytes(self, sha256: str) -> int | None:
        """None if there is no such blob."""
        try:
            return self.path(sha256).stat().st_size
        except FileNotFoundError:
            return None

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

    async def keep(self, incoming: Incoming) -> None:
        """The finished blob gets its name, for good. The same content twice is one blob."""
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

    def total_bytes(self) -> int:
        """Of all of them; walks the disk."""
        total = 0
        for folder in self._root.glob("??"):
            with contextlib.suppress(FileNotFoundError), os.scandir(folder) as found:
                for entry in found:
                    with contextlib.suppress(FileNotFoundError):
                        total += entry.stat().st_size
        return total

    def older_than(self, at: float) -> list[str]:
        """By when they were stored last, in unix seconds."""
        return [path.name for path in self._root.glob("??/*") if _mtime(path) < at]

    def remove(self, sha256: str, older_than: float = math.inf) -> bool:
        """Whether it was there, and older."""
        path = self.path(sha256)
        if not _mtime(path) < older_than:
            return False
        path.unlink(missing_ok=True)
        return True

    async def chunks(self, sha256: str) -> AsyncIterator[bytes]:
        """Raises NotFound before the first chunk."""
        try:
            file = await asyncio.to_thread(self.path(sha256).open, "rb")
        except FileNotFoundError:
            raise errors.NotFound(f"no blob {sha256}") from None
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
