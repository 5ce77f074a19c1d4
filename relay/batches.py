"""Batches: jobs that answer the rows of a file. Their beginning, the parts that gpus send, and the files at the end.

A batch is a job as any other: who runs it and until when is in leases.py, what its owner may do to it in jobs.py. Its
progress is parts, which are blobs under the lease's fence: a row is answered once its part is told, and by one part
only. Once it has ended, however that was, its two files are written from them (batch_files.py). Knows nothing of HTTP.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Row, Select, delete, insert, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

import batchfile
import wire
from relay import batch_files, errors, fairness, refs
from relay.blobs import Blobs, Bound, Incoming
from relay.jobs import OVER, EventRow, JobRow, Jobs, forget, is_there, say, tuned
from relay.leases import Leases
from relay.meter import Used, add, month, total
from relay.outbox import announce
from relay.store import Clock, Store, one_page
from relay.sweep import letting_go
from relay.tables import OPEN, batch_parts, batches, files, jobs, key_rules, usage
from relay.usage import Prices

log = logging.getLogger("relay.batches")

BatchRow = Row[Any]  # of both tables
OUTPUT_PURPOSE = "batch_output"
LOOK_EVERY_S = 1.0
AGAIN_AFTER_S = 60.0  # where files could not be written
LOST_AFTER_S = 900.0  # what is missing for so long does not come back: a disk that was restored, not one that is away
NO_END = Bound(wire.MAX_BYTES, errors.TooLarge("the answers of a batch are larger than any file here may be"))
MISSING: Mapping[str, tuple[str, str]] = {  # what stands in place of an answer, by how the batch has ended
    "cancelled": ("batch_cancelled", "The batch was cancelled before this row was answered."),
    "expired": ("batch_expired", "The batch's window was over before this row was answered: send it again."),
    "failed": ("batch_failed", "The batch failed before this row was answered; its errors say why."),
    "completed": ("answer_lost", "This row's answer has left the relay's disk: send it again."),
}
INPUT_LOST = {
    "code": "input_lost",
    "message": "The batch's file has left the relay's disk, and its answers can't be told without: send it again.",
    "param": "input_file_id",
}
PUBLIC_END = {"succeeded": "completed", "failed": "failed", "cancelled": "cancelled"}


@dataclass(frozen=True, kw_only=True)
class NewBatch:
    endpoint: str
    model: str
    base_model: str
    is_tuned: bool
    input_file: str
    input_blob: wire.FileRef
    total: int
    tokens: int  # that all answers will likely have
    window: str
    window_s: float
    metadata: Mapping[str, str] | None
    priority: int  # among its owner's own jobs
    key_id: str | None


def end_of(batch: BatchRow) -> str | None:
    """How it ended, in the words of the API; None: it has not."""
    return "expired" if batch.expired else PUBLIC_END.get(batch.status)


class Batches:
    def __init__(self, store: Store, blobs: Blobs, leases: Leases, prices: Prices, clock: Clock) -> None:
        self._store = store
        self._blobs = blobs
        self._leases = leases
        self._prices = prices
        self._clock = clock
        self._jobs = Jobs(store, blobs, clock, "batch")
        self._ended = asyncio.Event()
        self._again_at: dict[str, float] = {}  # of those whose files could not be written

    # --- the owner's side ---

    async def create(self, owner: str, new: NewBatch) -> BatchRow:
        """Raises NotFound and ModelNotFound where the file or the model went since the caller looked them up."""
        batch_id, now = f"batch_{secrets.token_hex(12)}", self._clock()
        async with self._store.write() as db:
            await is_there(db, owner, new.input_file, "input_file_id")
            model = await tuned(db, owner, new.model) if new.is_tuned else None
            await db.execute(
                insert(jobs).values(
                    id=batch_id,
                    owner=owner,
                    kind="batch",
                    status="queued",
                    base_model=new.base_model,
                    layers=[],
                    hyperparameters={},
                    seed=0,
                    behind=-new.priority,
                    training_file=new.input_file,
                    training_blob=new.input_blob.model_dump(),
                    continue_from=model.model_dump() if model else None,
                    estimated_s=fairness.answers_s(new.input_blob.bytes, new.tokens),
                    created_at=now,
                    key_id=new.key_id,
                )
            )
            await db.execute(
                insert(batches).values(
                    job_id=batch_id,
                    endpoint=new.endpoint,
                    model=new.model,
                    completion_window=new.window,
                    metadata=new.metadata,
                    total=new.total,
                    done=[],
                    expires_at=now + new.window_s,
                )
            )
            kept = [new.input_blob, *(model.adapter.files if model else ())]
            await refs.name(db, "job", batch_id, owner, refs.sizes(kept))
            await say(db, now, batch_id, 0, f"Batch of {new.total:,} rows created and queued.")
            return await self._of(db, owner, batch_id)

    async def get(self, owner: str, batch_id: str) -> BatchRow:
        """Raises NotFound, also for somebody else's."""
        async with self._store.read() as db:
            return await self._of(db, owner, batch_id)

    async def page(self, owner: str, after: str | None, limit: int) -> tuple[Sequence[BatchRow], bool]:
        """The newest first, and whether there are more."""
        async with self._store.read() as db:
            last = await self._of(db, owner, after) if after is not None else None
            return await one_page(db, _both().where(jobs.c.owner == owner), jobs, last, limit)

    async def events(self, owner: str, batch_id: str, after: int | None, limit: int) -> tuple[Sequence[EventRow], bool]:
        """The newest first, and whether there are more."""
        return await self._jobs.events(owner, batch_id, after, limit)

    async def cancel(self, owner: str, batch_id: str) -> tuple[BatchRow, str | None]:
        """At once, and the gpu that has to hear of it; what is answered is kept. Raises NotFound, JobOver."""
        _, gpu_id = await self._jobs.cancel(owner, batch_id)
        self.wake()
        return await self.get(owner, batch_id), gpu_id

    async def pause(self, owner: str, batch_id: str) -> tuple[BatchRow, str | None]:
        """At once if it waits; else the gpu hands in what is answered first. Raises NotFound, JobOver."""
        _, gpu_id = await self._jobs.pause(owner, batch_id)
        return await self.get(owner, batch_id), gpu_id

    async def resume(self, owner: str, batch_id: str) -> BatchRow:
        """Raises NotFound, JobOver."""
        await self._jobs.resume(owner, batch_id)
        return await self.get(owner, batch_id)

    async def _of(self, db: AsyncConnection, owner: str, batch_id: str) -> BatchRow:
        mine = _both().where(jobs.c.id == batch_id, jobs.c.owner == owner)
        row: BatchRow | None = (await db.execute(mine)).one_or_none()
        if row is None:
            raise errors.NotFound(f"no batch '{batch_id}'", param="batch_id")
        return row

    # --- the gpu's side ---

    async def store(self, by: wire.SignedBy, job_id: str, said: wire.PartStored) -> wire.PartReply:
        """From here on the part's rows are answered. The same part again is no conflict.

        A batch whose key has no tokens or money left ends with it; live requests are refused then.

        Raises LeaseLost, and InvalidRequest for rows that are answered already and for what is no part.
        """
        if await self._blobs.size_bytes(said.sha256) != said.bytes:
            raise errors.InvalidRequest(
                f"part {said.sha256} is not stored here: upload it, then say this again",
                param="sha256",
                code="blob_missing",
            )
        async with self._blobs.local(said.sha256) as path:
            part = await asyncio.to_thread(batch_files.read_part, path)
        async with letting_go(self._store, self._blobs) as (db, gone):
            job = await self._leases.held(db, by, job_id, said.fence)
            batch = (await db.execute(select(batches).where(batches.c.job_id == job_id))).one_or_none()
            if batch is None:
                raise errors.InvalidRequest(f"'{job_id}' is no batch: it has no parts", param="job_id")
            mine = batch_parts.c.job_id == job_id, batch_parts.c.sha256 == said.sha256
            if (await db.execute(select(batch_parts.c.rows).where(*mine))).first() is None:
                gone |= await self._add(db, job, batch, said, part)
                if len(part.rows) + job.saved_step < batch.total and (why := await self._spent(db, job)):
                    gone |= await self._leases.fail(db, job, f"{why}.", errors.LimitSpent.code)
                    self.wake()
            answered = (await db.execute(select(jobs.c.saved_step).where(jobs.c.id == job_id))).scalar_one()
            return wire.PartReply(done=answered, total=batch.total)

    async def _spent(self, db: AsyncConnection, job: JobRow) -> str | None:
        """Why the key that made it may use no more; None: it may."""
        limits = (await db.execute(select(key_rules).where(key_rules.c.key_id == job.key_id))).one_or_none()
        if limits is None:
            return None
        this_month = usage.c.month == month(self._clock()), usage.c.key_id == job.key_id
        return self._prices.spent(limits, total((await db.execute(select(usage).where(*this_month))).all()))

    async def _add(
        self, db: AsyncConnection, job: JobRow, batch: Row[Any], said: wire.PartStored, part: batch_files.Part
    ) -> set[str]:
        """The blobs that it names no more."""
        if await self._blobs.size_bytes(said.sha256) != said.bytes:
            raise errors.InvalidRequest("the part has left: upload it again", param="sha256", code="blob_missing")
        done = batchfile.members(batch.done)
        if again := part.rows & done:
            raise errors.InvalidRequest(f"row {min(again)} is answered already", param="sha256", code="row_answered")
        if (most := max(part.rows)) >= batch.total:
            raise errors.InvalidRequest(f"row {most} is none of the batch's {batch.total:,}", param="sha256")
        done |= part.rows
        now, row = self._clock(), {"job_id": job.id, "sha256": said.sha256, "fence": said.fence, "bytes": said.bytes}
        await db.execute(insert(batch_parts).values(**row, rows=len(part.rows), created_at=now))
        await refs.name(db, "part", job.id, job.owner, {said.sha256: said.bytes})
        names = ("completed", "failed", "prompt_tokens", "cached_tokens", "completion_tokens")
        more = {name: batches.c[name] + getattr(part, name) for name in names}
        mine = update(batches).where(batches.c.job_id == job.id)
        await db.execute(mine.values(**more, done=batchfile.spans(done)))
        values = {"saved_step": len(done), "status": "running"}
        await db.execute(update(jobs).where(jobs.c.id == job.id).values(**values))
        used = Used(prompt_tokens=part.prompt_tokens, completion_tokens=part.completion_tokens)
        await add(db, month(now), job.owner, job.key_id or "", used)
        return await refs.unname(db, "chunk", job.id)

    # --- the end ---

    def wake(self) -> None:
        """One may have ended."""
        self._ended.set()

    async def keep_ending(self) -> None:
        """At the start, when one has ended here, and every second, until it is cancelled."""
        while True:
            self._ended.clear()
            try:
                await self._expire()
                await self._write_files()
            except (SQLAlchemyError, OSError, errors.RelayError):
                log.exception("batches that are over could not be looked for; it is tried again")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), LOOK_EVERY_S)

    async def _expire(self) -> None:
        now = self._clock()
        over = batches.c.files_at.is_(None), batches.c.expires_at <= now, jobs.c.status.in_(OPEN)
        async with self._store.read() as db:  # nearly always there is none, and reading disturbs nobody
            found = (await db.execute(_both().where(*over))).all()
        for batch in found:
            error = {"code": MISSING["expired"][0], "message": "The batch's window is over.", "param": None}
            values = {"status": "failed", "finished_at": now, "fence": jobs.c.fence + 1, "error": error, **OVER}
            async with self._store.write() as db:
                ending = update(jobs).where(jobs.c.id == batch.id, jobs.c.status.in_(OPEN)).values(**values)
                fence = (await db.execute(ending.returning(jobs.c.fence))).scalar_one_or_none()
                if fence is None:
                    continue  # it ended meanwhile
                await db.execute(update(batches).where(batches.c.job_id == batch.id).values(expired=True))
                left = batch.total - batch.saved_step
                await say(db, now, batch.id, fence, f"The window is over with {left:,} rows unanswered.", level="warn")

    async def _write_files(self) -> None:
        """Of those that have ended. Several processes may do it at once: the files are the same, and one counts."""
        ended = batches.c.files_at.is_(None), jobs.c.status.not_in(OPEN)
        async with self._store.read() as db:
            found = (await db.execute(_both().where(*ended))).all()
        for batch in found:
            if self._clock() < self._again_at.get(batch.id, 0.0):
                continue
            try:
                await self._write_files_of(batch)
                self._again_at.pop(batch.id, None)
            except Exception:  # another batch's files can't wait for this one's
                log.exception("the files of %s could not be written; it is tried again", batch.id)
                self._again_at[batch.id] = self._clock() + AGAIN_AFTER_S

    async def _write_files_of(self, batch: BatchRow) -> None:
        end = end_of(batch)
        assert end, "only what has ended has files"
        theirs = select(batch_parts.c.sha256).where(batch_parts.c.job_id == batch.id)
        async with self._store.read() as db:
            shas = (await db.execute(theirs.order_by(batch_parts.c.created_at, batch_parts.c.sha256))).scalars().all()
        needed = {batch.training_blob["sha256"], *shas}
        lost, loop = needed - (await self._blobs.sizes(needed)).keys(), asyncio.get_running_loop()
        if lost and self._clock() < batch.finished_at + LOST_AFTER_S:
            raise errors.StorageUnavailable(f"{len(lost)} of the {len(needed)} blobs of {batch.id} are not there now")

        def reach(number: int) -> contextlib.AbstractContextManager[Path]:
            return _in_thread(self._blobs.local(shas[number]), loop)

        error, n_answers, n_refused = batch.error, 0, 0
        async with self._blobs.incoming(NO_END) as answers, self._blobs.incoming(NO_END) as refused:
            try:
                async with self._blobs.local(batch.training_blob["sha256"]) as rows:
                    n_answers, n_refused = await asyncio.to_thread(
                        batch_files.write, batch.id, rows, len(shas), reach, MISSING[end], answers.put, refused.put
                    )
            except FileNotFoundError:  # a disk, or a bucket, that was restored without it
                log.error("the file of %s is gone, and its answers can't be told without", batch.id)
                error = INPUT_LOST
            for incoming in (answers, refused):
                await incoming.finish()
                if incoming.bytes:
                    await self._blobs.send(incoming)
            now = self._clock()
            async with letting_go(self._store, self._blobs) as (db, gone):
                mine = update(batches).where(batches.c.job_id == batch.id, batches.c.files_at.is_(None))
                if not (await db.execute(mine.values(files_at=now))).rowcount:
                    return  # another process was first, or its owner is gone
                names = {
                    "output_file": await self._keep(db, batch, "output", answers, n_answers),
                    "error_file": await self._keep(db, batch, "error", refused, n_refused),
                }
                await db.execute(update(batches).where(batches.c.job_id == batch.id).values(**names))
                await db.execute(update(jobs).where(jobs.c.id == batch.id).values(error=error))
                gone |= await forget(db, batch.id) | await refs.unname(db, "part", batch.id)
                await db.execute(delete(batch_parts).where(batch_parts.c.job_id == batch.id))
                await say(db, now, batch.id, batch.fence, f"{n_answers:,} answers and {n_refused:,} errors are ready.")
                await announce(db, now, batch, end)

    async def _keep(self, db: AsyncConnection, batch: BatchRow, what: str, incoming: Incoming, n: int) -> str | None:
        """The file's id; None if it would be empty. It counts as its owner's, as the parts did before."""
        if not n:
            return None
        await self._blobs.keep(incoming)
        file_id = f"file-{secrets.token_hex(12)}"
        row = {"id": file_id, "owner": batch.owner, "purpose": OUTPUT_PURPOSE, "bytes": incoming.bytes}
        row |= {"filename": f"{batch.id}_{what}.jsonl", "sha256": incoming.sha256, "rows": n}
        await db.execute(insert(files).values(**row, created_at=self._clock()))
        await refs.name(db, "file", file_id, batch.owner, {incoming.sha256: incoming.bytes})
        return file_id


@contextlib.contextmanager
def _in_thread(held: contextlib.AbstractAsyncContextManager[Path], loop: asyncio.AbstractEventLoop) -> Iterator[Path]:
    """What the loop holds, for a thread beside it."""
    path = asyncio.run_coroutine_threadsafe(_enter(held), loop).result()
    try:
        yield path
    finally:
        asyncio.run_coroutine_threadsafe(_leave(held), loop).result()


async def _enter(held: contextlib.AbstractAsyncContextManager[Path]) -> Path:
    return await held.__aenter__()


async def _leave(held: contextlib.AbstractAsyncContextManager[Path]) -> None:
    await held.__aexit__(None, None, None)


def _both() -> Select[Any]:
    return select(jobs, batches).join(batches, batches.c.job_id == jobs.c.id)
