"""What a gpu sends of a job that it holds: chunks of checkpoints, and results. All of it under the lease's fence.

From its arrival a blob is named as the lease's (refs.py), until its checkpoint or model names it or the lease is over:
it may take as long as it takes. So is one that was here already, once the gpu has heard so. Knows nothing of HTTP.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal

import wire
from relay import errors, refs
from relay.blobs import Blobs
from relay.leases import Leases
from relay.room import Room
from relay.store import Store

Part = Literal["chunk", "result"]


@dataclass(frozen=True)
class Upload:
    """A blob on its way, of which the SHA-256 was signed."""

    part: Part
    sha256: str
    body: AsyncIterator[bytes]
    most_bytes: int


class Uploads:
    def __init__(self, store: Store, blobs: Blobs, leases: Leases, room: Room) -> None:
        self._store = store
        self._blobs = blobs
        self._leases = leases
        self._room = room

    async def promise(self, by: wire.SignedBy, job_id: str, fence: int, part: Part, sha256: str) -> int | None:
        """The bytes of a blob that is here and need not be sent; None if it must be. Raises LeaseLost."""
        if await self._blobs.size_bytes(sha256) is None:
            await self._leases.check_lease(by, job_id, fence)
            return None
        async with self._store.write() as db:
            job = await self._leases.held(db, by, job_id, fence)
            size_bytes = await self._blobs.size_bytes(sha256)
            if size_bytes is None or size_bytes > (await self._room.for_job(db, job, sha256, size_bytes)).bytes:
                return None  # past what was set aside: the upload says so
            await refs.name(db, part, job_id, job.owner, {sha256: size_bytes})
            return size_bytes

    async def take(self, by: wire.SignedBy, job_id: str, fence: int, upload: Upload) -> int:
        """How many bytes it has.

        Raises LeaseLost, TooLarge, OverReservation, QuotaExceeded, DiskFull, and InvalidRequest where it is damaged.
        """
        try:
            return await self._take(by, job_id, fence, upload)
        except errors.OverReservation:
            if upload.part == "chunk":  # what an earlier checkpoint left on its way may fill the room of this one
                async with self._store.write() as db:
                    await self._leases.held(db, by, job_id, fence)
                    await refs.unname(db, "chunk", job_id)
            raise

    async def _take(self, by: wire.SignedBy, job_id: str, fence: int, upload: Upload) -> int:
        async with self._store.read() as db:
            job = await self._leases.held(db, by, job_id, fence)
            bound = await self._room.for_job(db, job, upload.sha256, upload.most_bytes)
        async with self._blobs.incoming(bound) as incoming:
            async for piece in upload.body:
                await incoming.write(piece)
            await incoming.finish()
            if incoming.sha256 != upload.sha256:
                raise errors.InvalidRequest("the blob was damaged on its way: send it again", code="blob_damaged")
            await self._blobs.send(incoming)
            async with self._store.write() as db:
                job = await self._leases.held(db, by, job_id, fence)
                bound = await self._room.for_job(db, job, upload.sha256, upload.most_bytes)
                if incoming.bytes > bound.bytes:  # others have come meanwhile
                    raise bound.past
                await self._blobs.keep(incoming)
                await refs.name(db, upload.part, job_id, job.owner, {upload.sha256: incoming.bytes})
            return incoming.bytes
