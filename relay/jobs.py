"""Jobs as their owners see them: create, look, read events, pause, resume, cancel.

Of a batch all but its beginning and its last steps is the same (batches.py). Knows nothing of HTTP. What gpus and the
dispatcher do to a job is in leases.py; the states are in tables.py.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Row, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

import wire
from relay import errors, refs
from relay.blobs import Blobs
from relay.meter import charge
from relay.outbox import announce
from relay.store import Clock, Store, one_page
from relay.sweep import letting_go
from relay.tables import LEASED, OPEN, Kind, checkpoints, files, job_events, job_reports, jobs, models

JobRow = Row[Any]
EventRow = Row[Any]
NO_LEASE: Mapping[str, None] = dict.fromkeys(("gpu_id", "gpu_epoch", "lease_until", "leased_at", "pause_asked_at"))
ON_ITS_WAY: Sequence[refs.Kind] = ("chunk", "result")  # uploaded by a lease, and not yet part of anything
OVER: Mapping[str, int | None] = {**NO_LEASE, "reserved_bytes": 0, "estimated_finish": None}
NAMED: Mapping[Kind, tuple[str, str]] = {
    "fine-tune": ("fine-tuning job", "fine_tuning_job_id"),
    "batch": ("batch", "batch_id"),
}


@dataclass(frozen=True, kw_only=True)
class NewJob:
    base_model: str
    suffix: str | None
    layers: Sequence[wire.LayerSpec]
    hyperparameters: wire.Hyperparameters
    seed: int
    priority: int  # among its owner's own
    training_file: str
    training_blob: wire.FileRef
    validation_file: str | None
    validation_blob: wire.FileRef | None
    key_id: str | None = None  # that asked for it
    sample_prompts: Sequence[str] = ()
    concept: wire.Concept | None = None
    estimated_s: float | None = None  # of gpu time, until a gpu says better; None: by the size of the file
    continue_from: str | None = None  # a tuned model of the same owner's


class Jobs:
    """Those of one kind; of another there are none here."""

    def __init__(self, store: Store, blobs: Blobs, clock: Clock, kind: Kind = "fine-tune") -> None:
        self._kind: Kind = kind
        self._store = store
        self._blobs = blobs
        self._clock = clock

    async def create(self, owner: str, new: NewJob) -> JobRow:
        """Raises NotFound if a file was deleted since the caller looked it up; its blob may be gone with it.

        ModelNotFound if the tuned model was, that it is to continue from.
        """
        job_id = f"ftjob-{secrets.token_hex(12)}"
        async with self._store.write() as db:
            for param, file_id in (("training_file", new.training_file), ("validation_file", new.validation_file)):
                if file_id is not None:
                    await is_there(db, owner, file_id, param)
            continue_from = await tuned(db, owner, new.continue_from) if new.continue_from else None
            await db.execute(
                insert(jobs).values(
                    id=job_id,
                    owner=owner,
                    status="queued",
                    base_model=new.base_model,
                    suffix=new.suffix,
                    layers=[spec.model_dump() for spec in new.layers],
                    hyperparameters=new.hyperparameters.model_dump(),
                    seed=new.seed,
                    behind=-new.priority,
                    training_file=new.training_file,
                    training_blob=new.training_blob.model_dump(),
                    validation_file=new.validation_file,
                    validation_blob=new.validation_blob.model_dump() if new.validation_blob else None,
                    sample_prompts=list(new.sample_prompts),
                    concept=new.concept.model_dump() if new.concept else None,
                    estimated_s=new.estimated_s,
                    continue_from=continue_from.model_dump() if continue_from else None,
                    created_at=self._clock(),
                    key_id=new.key_id,
                )
            )
            kept = [new.training_blob, new.validation_blob, *(continue_from.adapter.files if continue_from else ())]
            await refs.name(db, "job", job_id, owner, refs.sizes(kept))
            await say(db, self._clock(), job_id, 0, "Job created and queued.")
            return (await db.execute(select(jobs).where(jobs.c.id == job_id))).one()

    async def get(self, owner: str, job_id: str) -> JobRow:
        """Raises NotFound, also for somebody else's."""
        async with self._store.read() as db:
            return await self._of(db, owner, job_id)

    async def page(self, owner: str, after: str | None, limit: int) -> tuple[Sequence[JobRow], bool]:
        """The newest first, and whether there are more."""
        mine = select(jobs).where(jobs.c.owner == owner, jobs.c.kind == self._kind)
        async with self._store.read() as db:
            last = await self._of(db, owner, after) if after is not None else None
            return await one_page(db, mine, jobs, last, limit)

    async def events(self, owner: str, job_id: str, after: int | None, limit: int) -> tuple[Sequence[EventRow], bool]:
        """The newest first, and whether there are more."""
        query = select(job_events).where(job_events.c.job_id == job_id).order_by(job_events.c.id.desc())
        if after is not None:
            query = query.where(job_events.c.id < after)
        async with self._store.read() as db:
            await self._of(db, owner, job_id)
            rows = (await db.execute(query.limit(limit + 1))).all()
        return rows[:limit], len(rows) > limit

    async def events_after(self, owner: str, job_id: str, after: int, limit: int) -> tuple[JobRow, Sequence[EventRow]]:
        """The job, and its events past that number, the oldest first; one view of both. Raises NotFound."""
        query = select(job_events).where(job_events.c.job_id == job_id, job_events.c.id > after)
        async with self._store.read() as db:
            job = await self._of(db, owner, job_id)
            return job, (await db.execute(query.order_by(job_events.c.id).limit(limit))).all()

    async def on_gpus(self) -> dict[str, JobRow]:
        """Which job each gpu holds now, by the gpu's id; whoever owns it."""
        async with self._store.read() as db:
            return {job.gpu_id: job for job in await db.execute(select(jobs).where(jobs.c.status.in_(LEASED)))}

    async def cancel(self, owner: str, job_id: str) -> tuple[JobRow, str | None]:
        """At once, and the gpu that has to hear of it. Raises NotFound, JobOver."""
        now = self._clock()
        async with letting_go(self._store, self._blobs) as (db, gone):
            job = await self._of(db, owner, job_id)
            if job.status not in OPEN and not await _is_kept(db, job):
                raise errors.JobOver(f"the job has already {_ended(job.status)}; there is nothing to cancel")
            values = {"status": "cancelled", "finished_at": now, "fence": job.fence + 1, **OVER}
            await db.execute(update(jobs).where(jobs.c.id == job_id).values(**values))
            await say(db, now, job_id, job.fence + 1, "Job cancelled.")
            await charge(db, now, job)
            gone |= await ended(db, now, job, "cancelled")
            return await self._of(db, owner, job_id), job.gpu_id

    async def pause(self, owner: str, job_id: str) -> tuple[JobRow, str | None]:
        """At once if it waits; else the gpu, which has to hear of it, stores a checkpoint first.

        Safe to repeat. Raises NotFound, JobOver.
        """
        now = self._clock()
        async with self._store.write() as db:
            job = await self._of(db, owner, job_id)
            if job.status not in OPEN:
                raise errors.JobOver(f"the job has already {_ended(job.status)}; there is nothing to pause")
            if job.status == "queued":
                await db.execute(update(jobs).where(jobs.c.id == job_id).values(status="paused"))
                await say(db, now, job_id, job.fence, "Job paused.")
                await announce(db, now, job, "paused")
            elif job.status in LEASED and job.pause_asked_at is None:
                await db.execute(update(jobs).where(jobs.c.id == job_id).values(pause_asked_at=now))
                await say(db, now, job_id, job.fence, "Pausing: the gpu stores a checkpoint first.")
            return await self._of(db, owner, job_id), job.gpu_id

    async def resume(self, owner: str, job_id: str, rate_factor: float = 1.0) -> JobRow:
        """It waits for a gpu again; one that was asked to pause goes on. Safe to repeat. Raises NotFound, JobOver.

        One whose training has diverged goes on from its last checkpoint, and must lower its learning rate for that.
        """
        now = self._clock()
        async with self._store.write() as db:
            job = await self._of(db, owner, job_id)
            if job.status not in OPEN and not await _is_kept(db, job):
                raise errors.JobOver(f"the job has already {_ended(job.status)}; there is nothing to resume")
            if job.status == "failed":
                if rate_factor >= 1:
                    message = "learning_rate_factor: the training diverged: lower the rate, to 0.5 of itself, say"
                    raise errors.InvalidRequest(message, param="learning_rate_factor")
                values = {"status": "queued", "attempts": 0, "error": None, "finished_at": None, "result": None}
                factor = job.rate_factor * rate_factor
                again = update(jobs).where(jobs.c.id == job_id)
                await db.execute(again.values(**values, rate_factor=factor))
                how = f"{factor:g} of its learning rate"
                since = f"from the checkpoint of step {job.saved_step}"
                await say(db, now, job_id, job.fence, f"Job resumed {since} with {how}: it waits for a gpu.")
                return await self._of(db, owner, job_id)
            if rate_factor != 1:
                message = "learning_rate_factor: only a job whose training has diverged changes its rate"
                raise errors.InvalidRequest(message, param="learning_rate_factor")
            if job.status == "paused":
                await db.execute(
                    update(jobs).where(jobs.c.id == job_id).values(status="queued", attempts=0, needed_bytes=None)
                )
                await say(db, now, job_id, job.fence, "Job resumed: it waits for a gpu.")
            elif job.pause_asked_at is not None:
                await db.execute(update(jobs).where(jobs.c.id == job_id).values(pause_asked_at=None))
                await say(db, now, job_id, job.fence, "Job resumed before it was paused.")
            return await self._of(db, owner, job_id)

    async def checkpoints(self, owner: str, job_id: str) -> Sequence[Row[Any]]:
        """Those that are kept, the newest first. Raises NotFound."""
        query = select(checkpoints).where(checkpoints.c.job_id == job_id).order_by(checkpoints.c.step.desc())
        async with self._store.read() as db:
            await self._of(db, owner, job_id)
            return (await db.execute(query)).all()

    async def report(self, owner: str, job_id: str, name: str) -> Row[Any]:
        """Its blob: `sha256` and `bytes`. Raises NotFound, saying why there is none."""
        query = select(job_reports).where(job_reports.c.job_id == job_id, job_reports.c.name == name)
        async with self._store.read() as db:
            job = await self._of(db, owner, job_id)
            row = (await db.execute(query)).one_or_none()
        if row is None:
            why = {
                "succeeded": "it went with its model, or its gpu wrote none",
                "failed": "the job has failed, and its events say why",
                "cancelled": "the job was cancelled",
            }.get(job.status, "it is written when the job ends")
            raise errors.NotFound(f"no report of job '{job_id}': {why}", param="fine_tuning_job_id")
        return row

    async def _of(self, db: AsyncConnection, owner: str, job_id: str) -> JobRow:
        mine = jobs.c.id == job_id, jobs.c.owner == owner, jobs.c.kind == self._kind
        row = (await db.execute(select(jobs).where(*mine))).one_or_none()
        if row is None:
            what, param = NAMED[self._kind]
            raise errors.NotFound(f"no {what} '{job_id}'", param=param)
        return row


async def is_there(db: AsyncConnection, owner: str, file_id: str, param: str) -> None:
    """Its blob does not go before the transaction ends, for writes are one at a time. Raises NotFound."""
    here = select(files.c.id).where(files.c.id == file_id, files.c.owner == owner)
    if (await db.execute(here)).first() is None:
        raise errors.NotFound(f"no file '{file_id}'", param=param)


async def tuned(db: AsyncConnection, owner: str, model_id: str) -> wire.TunedModel:
    """Its files do not go before the transaction ends. Raises ModelNotFound."""
    here = select(models.c.adapter).where(models.c.id == model_id, models.c.owner == owner)
    adapter = (await db.execute(here)).scalar_one_or_none()
    if adapter is None:
        raise errors.ModelNotFound(f"no tuned model '{model_id[:200]}'", param="model")
    return wire.TunedModel(id=model_id, adapter=wire.AdapterManifest.model_validate(adapter))


async def drop_reports(db: AsyncConnection, job_id: str) -> set[str]:
    """The blobs that they named."""
    await db.execute(delete(job_reports).where(job_reports.c.job_id == job_id))
    return await refs.unname(db, "report", job_id)


async def _is_kept(db: AsyncConnection, job: JobRow) -> bool:
    """Its training has diverged, and there is a checkpoint to go on from."""
    here = select(checkpoints.c.step).where(checkpoints.c.job_id == job.id).limit(1)
    return job.status == "failed" and (await db.execute(here)).first() is not None


async def ended(db: AsyncConnection, at: float, job: JobRow, status: str) -> set[str]:
    """Who wants to know is told, and what the job kept is let go: the blobs that it named.

    Of a batch later, once its files are written: they are made of what it keeps.
    """
    if job.kind == "batch":
        return set()
    await announce(db, at, job, status)
    return await forget(db, job.id)


async def forget(db: AsyncConnection, job_id: str) -> set[str]:
    """The job is over: what it kept, checkpoints and data, it keeps no more. The blobs that it named."""
    gone = await drop_checkpoints(db, checkpoints.c.job_id == job_id)
    for kind in ON_ITS_WAY:
        gone |= await refs.unname(db, kind, job_id)
    return gone | await refs.unname(db, "job", job_id)


async def drop_checkpoints(db: AsyncConnection, where: ColumnElement[bool]) -> set[str]:
    """The chunks that they named."""
    dropped = await db.execute(delete(checkpoints).where(where).returning(checkpoints.c.job_id, checkpoints.c.step))
    return await refs.unname(db, "checkpoint", *(checkpoint_holder(job_id, step) for job_id, step in dropped))


def checkpoint_holder(job_id: str, step: int) -> str:
    """Under which its chunks are named."""
    return f"{job_id}/{step}"


async def say(db: AsyncConnection, at: float, job_id: str, fence: int, message: str, level: str = "info") -> None:
    """An event of the relay's own."""
    row = {"job_id": job_id, "fence": fence, "created_at": at, "level": level, "message": message}
    await db.execute(insert(job_events).values(**row, type="message", data={}))


def _ended(status: str) -> str:
    return {"succeeded": "succeeded", "failed": "failed"}.get(status, "been cancelled")
