"""The files that users upload: rows that name blobs. What they are for is checked before they are kept.

A blob goes when nothing names it any more.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from sqlalchemy import Row, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

import batchfile
import datafile
import dataset
import picturefile
import wire
from relay import errors, refs
from relay.blobs import Blobs, Bound, Incoming
from relay.room import Room
from relay.store import Clock, Store, one_page
from relay.sweep import letting_go
from relay.tables import files

FileRow = Row[Any]
T = TypeVar("T")
PURPOSE = "fine-tune"
BATCH_PURPOSE = "batch"
MAX_NAME_CHARS = 200
CHECKS_AT_ONCE = 2
GROW_TRIES = 5
COPY_BYTES = 2**20


class Files:
    def __init__(self, store: Store, blobs: Blobs, room: Room, clock: Clock) -> None:
        self._store = store
        self._blobs = blobs
        self._room = room
        self._clock = clock
        self._checking = asyncio.Semaphore(CHECKS_AT_ONCE)  # each reads a file through, on a thread
        self._looking = asyncio.Semaphore(1)  # at pictures: one may take 400 MB once it is unpacked

    async def add(self, owner: str, filename: str, incoming: Incoming, purpose: str = PURPOSE) -> FileRow:
        """Raises InvalidTrainingFile or InvalidBatchFile with lines or the names of pictures, and QuotaExceeded; then
        nothing stays.
        """
        await incoming.finish()
        name = PurePosixPath(filename.replace("\\", "/")).name[-MAX_NAME_CHARS:] or "file"
        report = await self._checked(incoming.path, name, purpose)
        if not report.ok:
            kind = errors.InvalidTrainingFile if purpose == PURPOSE else errors.InvalidBatchFile
            raise kind(report.summary(), param="file")
        row: dict[str, Any] = {
            "id": f"file-{secrets.token_hex(12)}",
            "owner": owner,
            "filename": name,
            "purpose": purpose,
            "bytes": incoming.bytes,
            "sha256": incoming.sha256,
            "rows": report.rows,
            "created_at": self._clock(),
        }
        if isinstance(report, picturefile.Report):
            row |= {"kind": "pictures", "captioned": report.captioned, "report": report.told()}
        await self._blobs.send(incoming)
        # Within the transaction, so that nobody who deletes the same content elsewhere takes the blob away in between.
        async with self._store.write() as db:
            await self._room.check(db, owner, incoming.bytes, "the file")  # others may have come meanwhile
            await self._blobs.keep(incoming)
            await db.execute(insert(files).values(**row))
            await refs.name(db, "file", row["id"], owner, {incoming.sha256: incoming.bytes})
            return (await db.execute(select(files).where(files.c.id == row["id"]))).one()

    async def _checked(
        self, path: Path, name: str, purpose: str
    ) -> dataset.Report | picturefile.Report | batchfile.Report:
        if purpose != PURPOSE:
            async with self._checking:
                return await asyncio.to_thread(batchfile.check, path)
        if await asyncio.to_thread(picturefile.is_zip, path, name):
            async with self._looking:
                return await asyncio.to_thread(picturefile.check, path, name)
        async with self._checking:
            return await asyncio.to_thread(dataset.check, path, name)

    async def report(self, owner: str, file_id: str) -> tuple[FileRow, dict[str, Any]]:
        """What all of a file holds, as JSON. Raises NotFound."""
        row = await self.get(owner, file_id, purpose=PURPOSE)
        return row, row.report or (await self._read(self._checking, dataset.check, row, row.filename)).told()

    async def requests(self, row: FileRow) -> batchfile.Report:
        """What a batch's file asks for. Raises NotFound."""
        return await self._read(self._checking, batchfile.check, row)

    async def sample(self, row: FileRow, most: int, most_bytes: int) -> list[tuple[int, dict[str, Any]]]:
        """Some rows from all over a file of text, as JSON with their lines. Raises NotFound."""
        return await self._read(self._checking, dataset.sample, row, row.filename, row.rows, most, most_bytes)

    async def pictures(self, row: FileRow, most: int, most_bytes: int, side: int) -> list[dict[str, Any]]:
        """Some pictures from all over a file of them, small, with their captions. Raises NotFound."""
        return await self._read(self._looking, picturefile.sample, row, most, most_bytes, side)

    async def _read(self, turn: asyncio.Semaphore, read: Callable[..., T], row: FileRow, *more: int | str) -> T:
        try:
            async with turn, self._blobs.local(row.sha256) as path:
                return await asyncio.to_thread(read, path, *more)
        except FileNotFoundError as exc:
            raise errors.NotFound(f"'{row.id}' was changed or deleted meanwhile: try again", param="file_id") from exc

    async def grow(
        self, owner: str, file_id: str, rows: Sequence[dataset.Row], limit_bytes: int
    ) -> tuple[FileRow, int]:
        """Add rows to a file that is JSON lines; how many it did not have yet. Safe to repeat.

        A new version is written and takes the old one's place; jobs that have begun keep theirs. Raises NotFound,
        InvalidRequest, TooLarge, QuotaExceeded.
        """
        for _ in range(GROW_TRIES):
            old = await self.get(owner, file_id, param="dataset_id", purpose=PURPOSE)
            if old.kind != "text":
                raise errors.InvalidRequest("a zip of pictures can't grow: upload a new one", param="dataset_id")
            with contextlib.suppress(FileNotFoundError):  # changed meanwhile
                if grown := await self._grow(old, rows, limit_bytes):
                    return grown
        raise errors.Unavailable("the data set is being changed by others all the time: try again in a moment")

    async def _grow(self, old: FileRow, rows: Sequence[dataset.Row], limit_bytes: int) -> tuple[FileRow, int] | None:
        """None if somebody else was first: begin again with their version."""
        bound = Bound(limit_bytes, errors.TooLarge(f"it would be larger than {limit_bytes:,} bytes: begin a new one"))
        async with self._blobs.incoming(bound) as incoming, self._checking:
            async with self._blobs.local(old.sha256) as path:
                added = await asyncio.to_thread(_grown, path, old.filename, rows, incoming)
            if not added:
                return old, 0
            await incoming.finish()
            await self._blobs.send(incoming)
            async with letting_go(self._store, self._blobs) as (db, gone):
                new = {"sha256": incoming.sha256, "bytes": incoming.bytes, "rows": old.rows + added}
                same = (files.c.id == old.id) & (files.c.owner == old.owner) & (files.c.sha256 == old.sha256)
                if not (await db.execute(update(files).where(same).values(**new))).rowcount:
                    return None
                await self._room.check(db, old.owner, incoming.bytes - old.bytes, "the new version")
                await self._blobs.keep(incoming)
                gone |= await refs.unname(db, "file", old.id)
                await refs.name(db, "file", old.id, old.owner, {incoming.sha256: incoming.bytes})
                return (await db.execute(select(files).where(files.c.id == old.id))).one(), added

    async def get(self, owner: str, file_id: str, *, param: str = "file_id", purpose: str | None = None) -> FileRow:
        """Raises NotFound, also for somebody else's, and InvalidRequest for one of another purpose."""
        async with self._store.read() as db:
            row = await self._of(db, owner, file_id, param)
        if purpose is not None and row.purpose != purpose:
            message = f"'{file_id}' was made with the purpose '{row.purpose}': upload one with the purpose '{purpose}'"
            raise errors.InvalidRequest(message, param=param)
        return row

    async def page(
        self, owner: str, purpose: str | None, after: str | None, limit: int, newest_first: bool
    ) -> tuple[Sequence[FileRow], bool]:
        """Some files, and whether there are more."""
        query = select(files).where(files.c.owner == owner)
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        async with self._store.read() as db:
            last = await self._of(db, owner, after, "after") if after is not None else None
            return await one_page(db, query, files, last, limit, newest_first=newest_first)

    async def delete(self, owner: str, file_id: str) -> None:
        """Jobs that are not over keep what they need. Raises NotFound."""
        async with letting_go(self._store, self._blobs) as (db, gone):
            await self._of(db, owner, file_id, "file_id")
            await db.execute(delete(files).where(files.c.id == file_id))
            gone |= await refs.unname(db, "file", file_id)

    async def _of(self, db: AsyncConnection, owner: str, file_id: str, param: str) -> FileRow:
        row = (await db.execute(select(files).where(files.c.id == file_id, files.c.owner == owner))).one_or_none()
        if row is None:
            raise errors.NotFound(f"no file '{file_id}'", param=param)
        return row


def file_ref(row: FileRow) -> wire.FileRef:
    return wire.FileRef(name=row.filename, sha256=row.sha256, bytes=row.bytes)


def _grown(path: Path, name: str, rows: Sequence[dataset.Row], to: Incoming) -> int:
    """Copy a file and write behind it the rows that it lacks; how many. Raises InvalidRequest for other formats."""
    if datafile.kind_of(path, name) != "jsonl":
        raise errors.InvalidRequest(
            "only JSON lines can grow, and this file is a table, an array or text: upload it as JSON lines first",
            param="dataset_id",
        )
    wanted = {dataset.as_line(row): row for row in rows}
    for _, row in dataset.read(path, name):
        if not isinstance(row, datafile.RowError):
            wanted.pop(dataset.as_line(row), None)
    if wanted:
        last = b"\n"
        with path.open("rb") as file:
            while chunk := file.read(COPY_BYTES):
                to.put(chunk)
                last = chunk
        to.put((b"" if last.endswith(b"\n") else b"\n") + b"".join(wanted))
    return len(wanted)
