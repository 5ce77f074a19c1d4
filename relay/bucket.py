"""Blobs in a bucket, which several processes on several machines may share. docs/decisions/0020-blobs-in-a-bucket.md

    blobs/SHA256/NONCE        its content; a new name each time, so that a late removal can't hit what came after it
    blobs/SHA256/NONCE.gone   set aside: whoever holds the writer's lock may not name it any more
    database.id               the database that names them

The local disk holds what is on its way in, and copies that were read lately, up to a bound. Every reader has a link of
its own to a copy, so that nobody can evict it meanwhile.
"""

import asyncio
import contextlib
import hashlib
import math
import os
import secrets
from collections.abc import AsyncIterator, Collection, Coroutine, Iterable
from pathlib import Path
from typing import Any, TypeVar

from relay import errors
from relay.blobs import Blobs, Bound, Incoming
from relay.s3 import S3, Object

T = TypeVar("T")
BLOBS, PAIR, PROBE = "blobs", "database.id", "probe"
GONE = ".gone"
AT_ONCE = 32  # requests
NOWHERE = "0" * 64
NO_END = Bound(2**62, errors.TooLarge("a blob has no such size"))


class BucketBlobs(Blobs):
    on_this_disk = False

    def __init__(self, s3: S3, root: Path, min_free_bytes: int = 0, cache_bytes: int = 0) -> None:
        super().__init__(root, min_free_bytes)
        self._s3, self._cache, self._cache_bytes = s3, root / "cache", cache_bytes
        self._turns = asyncio.Semaphore(AT_ONCE)

    # --- in ---

    def check_room(self, bytes: int) -> None:
        if bytes > self.free_bytes():
            self._evict(0)
        super().check_room(bytes)

    async def send(self, incoming: Incoming) -> None:
        """Under the writer's lock, too, it is enough: what is seen there is not removed before it is let go."""
        if await self.size_bytes(incoming.sha256) is None:
            await self._s3.put(f"{BLOBS}/{incoming.sha256}/{secrets.token_hex(16)}", incoming.path)
            await asyncio.to_thread(self._cached, incoming.path, incoming.sha256)  # it will be asked for soon

    async def keep(self, incoming: Incoming) -> None:
        """It is there already, unless its sending began when it was, and somebody has removed it since."""
        await self.send(incoming)

    async def sizes(self, shas: Collection[str]) -> dict[str, int]:
        found = await _all(self._objects(sha256) for sha256 in shas)
        return {sha256: here[0].bytes for sha256, (here, _) in zip(shas, found, strict=True) if here}

    async def _objects(self, sha256: str) -> tuple[list[Object], list[Object]]:
        """Of one blob: the objects that are there, and the marks of those that are set aside."""
        async with self._turns:
            found = await self._s3.entries(f"{BLOBS}/{sha256}")
        marks = {entry.key: entry for entry in found if entry.key.endswith(GONE)}
        return [e for e in found if e.key not in marks and e.key + GONE not in marks], [*marks.values()]

    # --- out ---

    async def read(self, sha256: str) -> AsyncIterator[bytes]:
        try:
            return await self._read(sha256)
        except FileNotFoundError:
            raise errors.NotFound(f"no blob {sha256}") from None

    async def _read(self, sha256: str) -> AsyncIterator[bytes]:
        """Also what is set aside: it is named, where the process that set it aside lost its lock and its life."""
        here, marks = await self._objects(sha256)
        for entry in (*here, *marks):
            with contextlib.suppress(FileNotFoundError):
                return await self._s3.get(entry.key.removesuffix(GONE))
        raise FileNotFoundError(sha256)

    @contextlib.asynccontextmanager
    async def local(self, sha256: str) -> AsyncIterator[Path]:
        mine = self._incoming / secrets.token_hex(8)
        try:
            if not await asyncio.to_thread(self._linked, sha256, mine):
                await self._fetch(sha256, mine)
            yield mine
        finally:
            mine.unlink(missing_ok=True)

    def _linked(self, sha256: str, mine: Path) -> bool:
        """Whether there was a sound copy."""
        try:
            os.link(self._cache / sha256, mine)
        except FileNotFoundError:
            return False
        if _digest(mine) == sha256:
            os.utime(mine)  # read lately
            return True
        mine.unlink()
        (self._cache / sha256).unlink(missing_ok=True)
        return False

    async def _fetch(self, sha256: str, mine: Path) -> None:
        """Raises FileNotFoundError, DiskFull, StorageUnavailable."""
        size_bytes = await self.size_bytes(sha256)
        await asyncio.to_thread(self.check_room, size_bytes or 0)
        async with self.incoming(NO_END) as copy:
            async for chunk in await self._read(sha256):
                await copy.write(chunk)
            await copy.finish()
            if copy.sha256 != sha256:
                raise errors.StorageUnavailable(f"the bucket's {sha256} is damaged: put a sound copy in its place")
            os.link(copy.path, mine)
        await asyncio.to_thread(self._cached, mine, sha256)

    # --- the copies ---

    def _cached(self, path: Path, sha256: str) -> None:
        with contextlib.suppress(FileExistsError):
            os.link(path, self._cache / sha256)
        self._evict(self._cache_bytes)

    def _evict(self, down_to: int) -> None:
        """The copies that were read the longest ago. Readers have links of their own."""
        found = []
        for path in self._cache.glob("*"):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                found.append((stat.st_mtime, stat.st_size, path))
        held = sum(size_bytes for _, size_bytes, _ in found)
        for _, size_bytes, path in sorted(found):
            if held <= down_to and (down_to == 0 or self.free_bytes() > 0):
                break
            path.unlink(missing_ok=True)
            held -= size_bytes

    def _clear(self) -> None:
        self._cache.mkdir(exist_ok=True)

    # --- all of them ---

    async def has_any(self) -> bool:
        async for page in self._s3.pages(BLOBS):
            if any(not entry.key.endswith(GONE) for entry in page):
                return True
        return False

    async def there(self) -> set[str]:
        """Those whose content is; a mark that was left behind is none."""
        pages = self._s3.pages(BLOBS)
        return {_sha_of(entry.key) async for page in pages for entry in page if not entry.key.endswith(GONE)}

    async def total_bytes(self) -> int:
        return sum([entry.bytes async for page in self._s3.pages(BLOBS) for entry in page])

    async def older_than(self, at: float) -> list[str]:
        names = {_sha_of(entry.key) async for page in self._s3.pages(BLOBS) for entry in page if entry.at < at}
        return sorted(names)

    # --- away ---

    async def set_aside(self, shas: Collection[str], older_than: float, aside: list[str]) -> None:
        async def one(sha256: str) -> None:
            here, marks = await self._objects(sha256)
            # What somebody else has set aside is theirs to remove, unless they are long gone, as the sweep finds.
            aside.extend(mark.key.removesuffix(GONE) for mark in marks if mark.at < older_than < math.inf)
            for entry in here:
                if entry.at < older_than:
                    aside.append(entry.key)
                    async with self._turns:
                        await self._s3.put(entry.key + GONE, b"")

        await _all(one(sha256) for sha256 in shas)

    async def drop(self, aside: Collection[str]) -> None:
        """The content first: a lone mark hides nothing."""
        await self._s3.delete(aside)
        await self._s3.delete([key + GONE for key in aside])
        for key in aside:
            (self._cache / _sha_of(key)).unlink(missing_ok=True)

    async def bring_back(self, aside: Collection[str]) -> None:
        await self._s3.delete([key + GONE for key in aside])

    async def left_aside(self, older_than: float) -> dict[str, str]:
        marks = [
            e.key async for page in self._s3.pages(BLOBS) for e in page if e.key.endswith(GONE) and e.at < older_than
        ]
        return {key.removesuffix(GONE): _sha_of(key) for key in marks}

    # --- at the start ---

    async def claim(self, pair: str, *, named: bool) -> None:
        theirs = await self._pair()
        if theirs and theirs != pair:
            raise errors.WrongFolder(
                "the bucket of RELAY_BLOBS_URL belongs to another database than RELAY_DATABASE_URL names: name another "
                f"bucket or prefix. Where that database is gone for good, remove all under it, and {PAIR} last"
            )
        if not theirs and named != await self.has_any():
            lacks = (
                "lacks the blobs that the database names: copy them there with `python -m relay blobs copy`, or name "
                "the bucket that has them"
            )
            another = "holds blobs, and the database is new: name another bucket or prefix"
            raise errors.WrongFolder(f"the bucket of RELAY_BLOBS_URL {lacks if named else another}")
        if not theirs:
            await self._s3.put(PAIR, pair.encode())

    async def _pair(self) -> str | None:
        try:
            return await self._text(PAIR)
        except FileNotFoundError:
            return None

    async def _text(self, key: str) -> str:
        return b"".join([chunk async for chunk in await self._s3.get(key)]).decode()

    async def check(self) -> None:
        await self._s3.entries(f"{BLOBS}/{NOWHERE}")

    async def probe(self) -> None:
        key = f"{PROBE}/{secrets.token_hex(8)}"
        await self._s3.put(key, b"may be written")
        if await self._text(key) != "may be written" or [
            e.key for e in await self._s3.entries(PROBE) if e.key == key
        ] != [key]:
            raise errors.StorageUnavailable("the bucket of RELAY_BLOBS_URL does not give back what it was given")
        await self._s3.delete([key])


async def _all(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """At once. None of them goes on once another has failed."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha_of(key: str) -> str:
    return key.split("/")[1]
