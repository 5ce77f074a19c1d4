"""Checkpoints of jobs, and the room that is set aside for them. All writes stand under the lease's fence.

A checkpoint exists once its manifest is stored, after all of its chunks. The last two and the best are kept while the
job is not over. Knows nothing of HTTP, nor of what is in a checkpoint.
"""

from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

import wire
from relay import errors, refs
from relay.blobs import Blobs
from relay.jobs import checkpoint_holder, drop_checkpoints
from relay.leases import Leases
from relay.room import Room
from relay.store import Clock, Store
from relay.sweep import letting_go
from relay.tables import checkpoints, jobs

LAST_KEPT = 2
AT_ONCE = LAST_KEPT + 2  # with the best, and the one on its way
BESIDES_BYTES = 4 * 2**20  # of any job: its reports


class Checkpoints:
    def __init__(self, store: Store, blobs: Blobs, leases: Leases, room: Room, clock: Clock) -> None:
        self._store = store
        self._blobs = blobs
        self._leases = leases
        self._room = room
        self._clock = clock

    async def reserve(self, by: wire.SignedBy, job_id: str, wanted: wire.Reservation) -> int:
        """Set aside what the job will store at most; how many bytes. Safe to repeat.

        Raises LeaseLost, QuotaExceeded, DiskFull.
        """
        bytes = AT_ONCE * wanted.checkpoint_bytes + wanted.result_bytes + BESIDES_BYTES
        async with self._store.write() as db:
            job = await self._leases.held(db, by, job_id, wanted.fence)
            await self._room.check_disk(db, job_id, bytes)
            await self._room.check(db, job.owner, bytes, "the job", but_job=job_id)
            values = {"reserved_bytes": bytes, "estimated_s": wanted.estimated_s}
            await db.execute(update(jobs).where(jobs.c.id == job_id).values(**values))
        return bytes

    async def store(self, by: wire.SignedBy, job_id: str, said: wire.CheckpointStored) -> list[int]:
        """From here on it exists; the steps of those that are kept. The same again is no conflict.

        Raises LeaseLost, and InvalidRequest if a chunk is not here.
        """
        checkpoint = said.checkpoint
        chunks = {chunk.sha256: chunk.bytes for file in checkpoint.files for chunk in file.chunks}
        for file in checkpoint.files:
            if sum(chunk.bytes for chunk in file.chunks) != file.bytes:
                message = f"checkpoint.files: the chunks of {file.name} are not its {file.bytes:,} bytes"
                raise errors.InvalidRequest(message, param="checkpoint")
        async with letting_go(self._store, self._blobs) as (db, gone):
            job = await self._leases.held(db, by, job_id, said.fence)
            here = await self._blobs.sizes(chunks)
            for sha256, size_bytes in chunks.items():
                if here.get(sha256) != size_bytes:
                    message = f"checkpoint.files: chunk {sha256} is not stored here: upload it, then say this again"
                    raise errors.InvalidRequest(message, param="checkpoint", code="blob_missing")
            # A run that began again, for want of a sound checkpoint, comes by the same steps: the newest word counts.
            theirs = (checkpoints.c.job_id == job_id) & (checkpoints.c.step >= checkpoint.step)
            gone |= await drop_checkpoints(db, theirs)
            row = {"job_id": job_id, "step": checkpoint.step}
            await db.execute(
                insert(checkpoints).values(
                    **row,
                    fence=said.fence,
                    validation_loss=checkpoint.validation_loss,
                    bytes=sum(chunks.values()),
                    manifest=checkpoint.model_dump(),
                    created_at=self._clock(),
                )
            )
            await refs.name(db, "checkpoint", checkpoint_holder(job_id, checkpoint.step), job.owner, chunks)
            gone |= await refs.unname(db, "chunk", job_id)
            await db.execute(update(jobs).where(jobs.c.id == job_id).values(saved_step=checkpoint.step))
            kept, others = await self._kept(db, job_id)
            gone |= await drop_checkpoints(db, (checkpoints.c.job_id == job_id) & checkpoints.c.step.in_(others))
        return kept

    async def _kept(self, db: AsyncConnection, job_id: str) -> tuple[list[int], list[int]]:
        """Steps of those that stay, the newest first, and of those that go."""
        query = select(checkpoints.c.step, checkpoints.c.validation_loss).where(checkpoints.c.job_id == job_id)
        rows = (await db.execute(query.order_by(checkpoints.c.step.desc()))).all()
        kept = {row.step for row in rows[:LAST_KEPT]}
        validated = [(row.validation_loss, row.step) for row in rows if row.validation_loss is not None]
        kept |= {min(validated)[1]} if validated else set()
        return sorted(kept, reverse=True), [row.step for row in rows if row.step not in kept]
