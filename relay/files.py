"""The files that users upload: rows that name blobs. A training file is checked before it is kept.

A blob goes when nothing names it any more.
"""

import asyncio
import secrets
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from sqlalchemy import Row, delete, insert, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

import dataset
import wire
from relay import errors, refs
from relay.blobs import Blobs, Incoming
from relay.room import Room
from relay.store import Clock, Store
from relay.sweep import letting_go
from relay.tables import files

FileRow = Row[Any]
PURPOSE = "fine-tune"
MAX_NAME_CHARS = 200


class Files:
    def __init__(self, store: Store, blobs: Blobs, room: Room, clock: Clock) -> None:
        self._store = store
        self._blobs = blobs
        self._room = room
        self._clock = clock

    async def add(self, owner: str, filename: str, incoming: Incoming) -> FileRow:
        """Raises InvalidTrainingFile with line numbers, and QuotaExceeded; then nothing stays."""
        await incoming.finish()
        report = await asyncio.to_thread(dataset.check, incoming.path)
        if not report.ok:
            raise errors.InvalidTrainingFile(report.summary(), param="file")
        row: dict[str, Any] = {
            "id": f"file-{secrets.token_hex(12)}",
            "owner": owner,
            "filename": PurePosixPath(filename.replace("\\", "/")).name[-MAX_NAME_CHARS:] or "file",
            "purpose": PURPOSE,
            "bytes": incoming.bytes,
            "sha256": incoming.sha256,
            "rows": report.rows,
            "created_at": self._clock(),
        }
        # Within the transaction, so that nobody who deletes the same content elsewhere takes the blob away in between.
        async with self._store.write() as db:
            await self._room.check(db, owner, incoming.bytes, "the file")  # others may have come meanwhile
            await refs.hold(db)
            await self._blobs.keep(incoming)
            await db.execute(insert(files).values(**row))
            await refs.name(db, "file", row["id"], owner, {incoming.sha256: incoming.bytes})
            return (await db.execute(select(files).where(files.c.id == row["id"]))).one()

    async def get(self, owner: str, file_id: str, *, param: str = "file_id") -> FileRow:
        """Raises NotFound, also for somebody else's."""
        async with self._store.read() as db:
            return await self._of(db, owner, file_id, param)

    async def page(
        self, owner: str, purpose: str | None, after: str | None, limit: int, newest_first: bool
    ) -> tuple[Sequence[FileRow], bool]:
        """Some files, and whether there are more."""
        query = select(files).where(files.c.owner == owner)
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        created, file_id = files.c.created_at, files.c.id
        query = query.order_by(*((created.desc(), file_id.desc()) if newest_first else (created, file_id)))
        async with self._store.read() as db:
            if after is not None:
                last = await self._of(db, owner, after, "after")
                further = created < last.created_at if newest_first else created > last.created_at
                tied = file_id < last.id if newest_first else file_id > last.id
                query = query.where(or_(further, (created == last.created_at) & tied))
            rows = (await db.execute(query.limit(limit + 1))).all()
        return rows[:limit], len(rows) > limit

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
