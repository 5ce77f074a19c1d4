"""What a gpu sends of a job that it holds: chunks of checkpoints, and results. All of it under the lease's fence.

From its arrival a blob is named as the lease's (refs.py), until its checkpoint or model names it or the lease is over:
it may take as long as it takes. So is one that was here already, once the gpu has heard so. Knows nothing of HTTP.
"""

from collections.abc import AsyncIterator
from typing import Literal

import wire
from relay import errors, refs
from relay.blobs import Blobs
from relay.leases import Leases
from relay.store import Store

Part = Literal["chunk", "result"]


class Uploads:
    def __init__(self, store: Store, blobs: Blobs, leases: Leases) -> None:
        self._store = store
        self._blobs = blobs
        self._leases = leases

    async def promise(self, by: wire.SignedBy, job_id: str, fence: int, part: Part, sha256: str) -> int | None:
        """The bytes of a blob that is here and need not be sent; None if it is not. Raises LeaseLost."""
        if self._blobs.size_bytes(sha256) is None:
            await self._leases.check_lease(by, job_id, fence)
            return None
        async with self._store.write() as db:
            job = await self._leases.held(db, by, job_id, fence)
            await refs.hold(db)
            size_bytes = self._blobs.size_bytes(sha256)
            if size_bytes is not None:
                await refs.name(db, part, job_id, job.owner, {sha256: size_bytes})
            return size_bytes

    async def take(
        self,
        by: wire.SignedBy,
        job_id: str,
        fence: int,
        part: Part,
        sha256: str,
        body: AsyncIterator[bytes],
        limit_bytes: int,
    ) -> int:
        """How many bytes it has. Raises LeaseLost, TooLarge, DiskFull, and InvalidRequest where it is damaged."""
        async with self._blobs.incoming(limit_bytes) as incoming:
            async for piece in body:
                await incoming.write(piece)
            await incoming.finish()
            if incoming.sha256 != sha256:
                raise errors.InvalidRequest("the blob was damaged on its way: send it again", code="blob_damaged")
            async with self._store.write() as db:
                job = await self._leases.held(db, by, job_id, fence)
                await refs.hold(db)
                await self._blobs.keep(incoming)
                await refs.name(db, part, job_id, job.owner, {sha256: incoming.bytes})
            return incoming.bytes
