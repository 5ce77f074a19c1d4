"""Leases of jobs: who runs what, until when. What the dispatcher and the gpus do to a job, state by state (tables.py).

Each write by a gpu says `fence = ? AND lease_until > now`; zero rows is LeaseLost. Only the relay's clock counts.
Knows nothing of HTTP, of gpus beyond their ids, or of who wakes whom.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, and_, exists, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

import wire
from relay import errors, fairness, placement, refs
from relay.blobs import Blobs
from relay.jobs import NO_LEASE, ON_ITS_WAY, OVER, JobRow, ended, forget, say
from relay.meter import charge
from relay.outbox import announce
from relay.settings import Settings
from relay.store import Clock, Store
from relay.sweep import letting_go
from relay.tables import (
    LEASED,
    base_models,
    batches,
    checkpoints,
    gpus,
    job_events,
    job_reports,
    jobs,
    models,
    offers,
    users,
)

MAX_ATTEMPTS = 3  # leases that may be lost in a row without a new checkpoint before the job is given up
HEADS_SHOWN = 1000  # pairs of user and base model that one look compares
MAX_ETA_S = 365 * 86400
DIVERGED = "training_diverged"  # the gpu's word for a loss that is no number, or rises out of reach
KEPT_S = 7 * 86400.0  # a checkpoint of such a job
ONE_OF = "give exactly one of 'adapter' and 'error'; of a batch neither, or 'error'"
MODEL_ID_HEX = 12  # of the job's id, in the id of its model


@dataclass(frozen=True)
class Match:
    """A waiting job, and a gpu that could take it."""

    job_id: str
    gpu_id: str
    gpu_epoch: int
    waiting: frozenset[str] = frozenset()  # users, who gain as much credit each
    gain_s: float = 0.0


class Leases:
    def __init__(self, store: Store, blobs: Blobs, settings: Settings, clock: Clock) -> None:
        self._store = store
        self._blobs = blobs
        self._settings = settings
        self._clock = clock

    # --- the dispatcher's side ---

    async def next_match(self) -> Match | None:
        """The job whose turn it is (fairness.py), and the gpu that suits it best. None: nothing can be handed out.

        A gpu where it did not run last comes first, then one with the base model in memory, then the most free memory.
        """
        async with self._store.read() as db:
            takes = exists().where(offers.c.model_id == base_models.c.id, offers.c.gpu_id == gpus.c.id, self._idle())
            able = (await db.execute(select(base_models.c.id).where(takes))).scalars().all()
            if not able:
                return None
            heads = await self._heads(db, able)
            turn = fairness.turn(heads, self._clock())
            if turn is None:
                return None
            job = jobs.alias("waiting")
            suits = (
                select(gpus.c.id, gpus.c.epoch)
                .select_from(job)
                .join(offers, offers.c.model_id == job.c.base_model)
                .join(gpus, gpus.c.id == offers.c.gpu_id)
                .where(job.c.id == turn.head.job_id, self._idle(), placement.fits(job))
                .order_by(job.c.last_gpu_id == gpus.c.id, offers.c.loaded.desc(), gpus.c.free_bytes.desc(), gpus.c.id)
            )
            gpu = (await db.execute(suits.limit(1))).one_or_none()
            if gpu is None:
                return None  # the last that fits has just been drained, or gone
        return Match(turn.head.job_id, gpu.id, gpu.epoch, frozenset(head.owner for head in heads), turn.gain_s)

    async def _heads(self, db: AsyncConnection, able: Sequence[str]) -> list[fairness.Head]:
        """For each user and base model that a gpu could take, the job that waits longest, of the highest priority."""
        queued = (jobs.c.status == "queued") & jobs.c.base_model.in_(able)
        pair = select(jobs.c.base_model, jobs.c.owner).where(queued).distinct().limit(HEADS_SHOWN).subquery()
        longest = jobs.alias("longest")
        large = (  # hardly ever looked at
            exists()
            .where(offers.c.model_id == longest.c.base_model, offers.c.gpu_id == gpus.c.id, self._idle())
            .where(placement.fits(longest))
            .correlate(longest)
        )
        theirs = (longest.c.base_model == pair.c.base_model) & (longest.c.owner == pair.c.owner)
        oldest = (
            select(longest.c.id)
            .where(longest.c.status == "queued", theirs, or_(longest.c.needed_bytes.is_(None), large))
            .order_by(longest.c.behind, longest.c.created_at, longest.c.id)
            .limit(1)
            .correlate(pair)
            .scalar_subquery()
        )
        found = await db.execute(
            select(*_COST, jobs.c.id, jobs.c.behind, jobs.c.created_at, users.c.credit_s, users.c.served_at)
            .select_from(pair)
            .join(jobs, jobs.c.id == oldest)
            .join(users, users.c.id == jobs.c.owner)
        )
        rows, first = found.all(), dict[str, int]()
        for row in rows:
            first[row.owner] = min(row.behind, first.get(row.owner, row.behind))
        return [
            fairness.Head(row.id, row.owner, _cost_s(row), max(row.created_at, row.served_at), row.credit_s)
            for row in rows
            if row.behind == first[row.owner]
        ]

    def _idle(self) -> ColumnElement[bool]:
        return placement.idle(self._settings, self._clock())

    async def claim(self, match: Match) -> int | None:
        """queued -> leased, raising the fence, which it returns. None if somebody was first, or the gpu left."""
        # a goodbye, or a drain, may have come since the match was seen
        same = exists().where(gpus.c.id == match.gpu_id, gpus.c.epoch == match.gpu_epoch, self._idle())
        values = {
            "status": "leased",
            "fence": jobs.c.fence + 1,
            "gpu_id": match.gpu_id,
            "last_gpu_id": match.gpu_id,
            "gpu_epoch": match.gpu_epoch,
            "leased_at": self._clock(),
            "lease_until": self._term(),
        }
        async with self._store.write() as db:
            claimed = update(jobs).where(jobs.c.id == match.job_id, jobs.c.status == "queued", same)
            done = await db.execute(claimed.values(**values).returning(jobs.c.fence, *_COST))
            job = done.one_or_none()
            if job is None:
                return None
            if match.gain_s:
                gains = update(users).where(users.c.id.in_(match.waiting))
                await db.execute(gains.values(credit_s=users.c.credit_s + match.gain_s))
            had_s = (await db.execute(select(users.c.credit_s).where(users.c.id == job.owner))).scalar_one()
            paid = {"credit_s": fairness.paid_s(had_s, _cost_s(job)), "served_at": self._clock()}
            await db.execute(update(users).where(users.c.id == job.owner).values(**paid))
            name = (await db.execute(select(gpus.c.name).where(gpus.c.id == match.gpu_id))).scalar_one()
            await say(db, self._clock(), match.job_id, job.fence, f"Given to gpu '{name}'.")
            begins = update(batches).where(batches.c.job_id == match.job_id, batches.c.in_progress_at.is_(None))
            await db.execute(begins.values(in_progress_at=self._clock()))
        fence: int = job.fence
        return fence

    async def expire(self) -> int:
        """Leases that are over go back to the queue; how many."""
        over = jobs.c.status.in_(LEASED) & (jobs.c.lease_until <= self._clock())
        async with self._store.read() as db:  # nearly always there is none, and reading disturbs nobody
            if (await db.execute(select(jobs.c.id).where(over).limit(1))).first() is None:
                return 0
        async with letting_go(self._store, self._blobs) as (db, gone):
            rows = (await db.execute(select(jobs).where(over))).all()
            for job in rows:
                gone |= await self._requeue(db, job, "The gpu has gone silent.", "gpu_lost", counts=True)
        return len(rows)

    async def forget_diverged(self) -> int:
        """Checkpoints of jobs that nobody resumed in time go, with their data; of how many."""
        old = (jobs.c.status == "failed") & (jobs.c.finished_at <= self._clock() - KEPT_S)
        theirs = select(checkpoints.c.job_id).join(jobs, jobs.c.id == checkpoints.c.job_id).where(old).distinct()
        async with self._store.read() as db:
            if (await db.execute(theirs.limit(1))).first() is None:
                return 0
        async with letting_go(self._store, self._blobs) as (db, gone):
            job_ids = (await db.execute(theirs)).scalars().all()
            for job_id in job_ids:
                gone |= await forget(db, job_id)
        return len(job_ids)

    # --- the gpu's side ---

    async def adopt(self, by: wire.SignedBy, held: Sequence[wire.HeldLease]) -> None:
        """After an enrolment: leases that the gpu still holds move to its new epoch, the others are queued again."""
        keeps = {(lease.job_id, lease.fence) for lease in held}
        async with letting_go(self._store, self._blobs) as (db, gone):
            mine = select(jobs).where(jobs.c.gpu_id == by.gpu_id, jobs.c.status.in_(LEASED))
            for job in (await db.execute(mine)).all():
                if (job.id, job.fence) in keeps:
                    values = {"gpu_epoch": by.epoch, "lease_until": self._term()}
                    await db.execute(update(jobs).where(jobs.c.id == job.id).values(**values))
                else:
                    why = "The gpu was started anew."
                    gone |= await self._requeue(db, job, why, "gpu_lost", counts=job.status != "leased")

    async def hand_back(self, by: wire.SignedBy, reason: str) -> int:
        """The gpu stops: what it holds waits again at once, and that costs no attempt. How many."""
        mine = select(jobs).where(jobs.c.gpu_id == by.gpu_id, jobs.c.gpu_epoch == by.epoch, jobs.c.status.in_(LEASED))
        async with letting_go(self._store, self._blobs) as (db, gone):
            rows = (await db.execute(mine)).all()
            for job in rows:
                gone |= await self._requeue(
                    db, job, f"The gpu handed the job back: {reason}.", "gpu_left", counts=False
                )
        return len(rows)

    async def renew(self, by: wire.SignedBy, held: Sequence[wire.HeldLease]) -> None:
        """Those of the leases that are still the gpu's."""
        if not held:
            return
        mine = or_(*(self._live(by, lease.job_id, lease.fence) for lease in held))
        async with self._store.write() as db:
            await db.execute(update(jobs).where(mine).values(lease_until=self._term()))

    async def commands(
        self, by: wire.SignedBy, held: Sequence[wire.HeldLease], *, drains: bool = False
    ) -> list[wire.Command]:
        """What the gpu must do so that what it holds is what the database says. The same each time until it has.

        `drains`: it says that it does. A gpu that drains gives back what it holds by itself.
        """
        query = select(jobs).where(jobs.c.gpu_id == by.gpu_id, jobs.c.gpu_epoch == by.epoch, jobs.c.status.in_(LEASED))
        async with self._store.read() as db:
            mine = {(job.id, job.fence): job for job in await db.execute(query)}
            should = (await db.execute(select(gpus.c.draining).where(gpus.c.id == by.gpu_id))).scalar()
        reported = {(lease.job_id, lease.fence) for lease in held}
        turns: list[wire.Command] = []
        if should is not None and should != drains:
            turns = [wire.Drain() if should else wire.Undrain()]
        cancels = [wire.CancelLease(job_id=job_id, fence=fence) for job_id, fence in sorted(reported - mine.keys())]
        pauses = [
            wire.PauseLease(job_id=job_id, fence=fence)
            for (job_id, fence), job in mine.items()
            if (job_id, fence) in reported and job.pause_asked_at is not None and job.status != "finalizing"
        ]
        grants = [await self._grant(job) for lease, job in mine.items() if lease not in reported]
        return [*turns, *cancels, *pauses, *grants]

    async def _grant(self, job: JobRow) -> wire.GrantLease | wire.GrantBatch:
        if job.kind == "batch":
            async with self._store.read() as db:
                batch = (await db.execute(select(batches).where(batches.c.job_id == job.id))).one()
            return wire.GrantBatch(fence=job.fence, job=batch_spec(job, batch))
        return wire.GrantLease(fence=job.fence, job=job_spec(job, await self._checkpoints(job.id)))

    async def _checkpoints(self, job_id: str) -> list[wire.Checkpoint]:
        kept = select(checkpoints.c.manifest).where(checkpoints.c.job_id == job_id)
        async with self._store.read() as db:
            rows = await db.execute(kept.order_by(checkpoints.c.step.desc()))
        return [wire.Checkpoint.model_validate(manifest) for manifest in rows.scalars()]

    async def record(self, by: wire.SignedBy, job_id: str, batch: wire.JobEvents) -> None:
        """Each event once, however often it is sent; renews the lease. Raises LeaseLost."""
        async with self._store.write() as db:
            job = await self.held(db, by, job_id, batch.fence)
            seen = select(job_events.c.seq).where(
                job_events.c.job_id == job_id, job_events.c.fence == batch.fence, job_events.c.seq.is_not(None)
            )
            wanted = [event.seq for event in batch.events]
            known = set((await db.execute(seen.where(job_events.c.seq.in_(wanted)))).scalars())
            fresh = {event.seq: event for event in batch.events if event.seq not in known}
            rows = [
                {"job_id": job_id, "fence": batch.fence, "seq": seq, "created_at": self._not_later(event.at)}
                | event.model_dump(exclude={"at", "seq"})
                for seq, event in sorted(fresh.items())
            ]
            if rows:
                await db.execute(insert(job_events), rows)
            values: dict[str, Any] = {"lease_until": self._term()}
            if job.status == "leased":
                values["status"] = "running"
            for _, event in sorted(fresh.items()):
                if (eta_s := _eta_s(event)) is not None:
                    values["estimated_finish"] = self._not_later(event.at) + eta_s
            await db.execute(update(jobs).where(jobs.c.id == job_id).values(**values))

    async def check_lease(self, by: wire.SignedBy, job_id: str, fence: int) -> None:
        """Raises LeaseLost."""
        async with self._store.read() as db:
            await self.held(db, by, job_id, fence)

    async def finalize(self, by: wire.SignedBy, job_id: str, fence: int) -> None:
        """The gpu begins to hand in the result. Raises LeaseLost."""
        async with self._store.write() as db:
            await self.held(db, by, job_id, fence)
            values = {"status": "finalizing", "lease_until": self._term()}
            await db.execute(update(jobs).where(jobs.c.id == job_id).values(**values))

    async def finish(self, by: wire.SignedBy, job_id: str, result: wire.JobResult) -> JobRow:
        """The job ends, and its model exists, in one transaction. The same result again is no conflict.

        The blobs that the result names must be there. Raises LeaseLost, InvalidRequest.
        """
        if result.adapter is not None and result.error is not None:
            raise errors.InvalidRequest(ONE_OF, param="adapter")
        stored = result.model_dump()
        async with letting_go(self._store, self._blobs) as (db, gone):
            job = (await db.execute(select(jobs).where(jobs.c.id == job_id))).one_or_none()
            if job is not None and job.fence == result.fence and job.last_gpu_id == by.gpu_id and job.result == stored:
                return job
            job = await self.held(db, by, job_id, result.fence)
            if result.error is None and job.kind == "batch":
                await self._answered(db, job, result)
            elif result.error is None and result.adapter is None:
                raise errors.InvalidRequest(ONE_OF, param="adapter")
            elif result.adapter is not None:
                gone |= await self._succeed(db, job, result, result.adapter)
            elif result.error is not None and result.error.needed_bytes is not None:
                gone |= await self._does_not_fit(db, job, result.error, result.error.needed_bytes)
                await db.execute(update(jobs).where(jobs.c.id == job_id).values(result=stored))
            elif result.error is not None and result.error.retry:
                gone |= await self._requeue(db, job, result.error.message, result.error.code, counts=True)
                await db.execute(update(jobs).where(jobs.c.id == job_id).values(result=stored))
            elif result.error is not None:
                gone |= await self.fail(db, job, result.error.message, result.error.code, result.error.param)
                await db.execute(update(jobs).where(jobs.c.id == job_id).values(result=stored))
            return (await db.execute(select(jobs).where(jobs.c.id == job_id))).one()

    async def _succeed(
        self, db: AsyncConnection, job: JobRow, result: wire.JobResult, adapter: wire.AdapterManifest
    ) -> set[str]:
        """The blobs that it names no more."""
        if adapter.base_model != job.base_model:
            raise errors.InvalidRequest(f"adapter.base_model: the job is about '{job.base_model}'", param="adapter")
        for file in [*adapter.files, *result.reports]:
            if await self._blobs.size_bytes(file.sha256) != file.bytes:
                message = f"adapter.files: blob {file.sha256} ({file.name}) is not stored here: upload it, then finish"
                raise errors.InvalidRequest(message, param="adapter", code="blob_missing")
        now = self._clock()
        model_id = f"ft:{job.base_model}:{job.suffix or 'tuned'}:{job.id.removeprefix('ftjob-')[:MODEL_ID_HEX]}"
        resolved = result.hyperparameters.model_dump() if result.hyperparameters else job.hyperparameters
        values = {
            "status": "succeeded",
            "finished_at": now,
            "result": result.model_dump(),
            "hyperparameters": resolved,
            "trained_tokens": result.trained_tokens,
            "fine_tuned_model": model_id,
            **OVER,
        }
        await db.execute(update(jobs).where(jobs.c.id == job.id).values(**values))
        row = {"id": model_id, "owner": job.owner, "base_model": job.base_model, "job_id": job.id, "created_at": now}
        await db.execute(insert(models).values(**row, adapter=adapter.model_dump()))
        await refs.name(db, "model", model_id, job.owner, refs.sizes(adapter.files))
        if result.reports:
            await db.execute(
                insert(job_reports), [{"job_id": job.id, **report.model_dump()} for report in result.reports]
            )
            await refs.name(db, "report", job.id, job.owner, refs.sizes(result.reports))
        await say(db, self._clock(), job.id, job.fence, f"The job has succeeded. New model: {model_id}")
        await charge(db, now, job, result.trained_tokens)
        return await ended(db, now, job, "succeeded")

    async def _answered(self, db: AsyncConnection, job: JobRow, result: wire.JobResult) -> None:
        """Every row of a batch is; its files are still to be written."""
        total = (await db.execute(select(batches.c.total).where(batches.c.job_id == job.id))).scalar_one()
        if job.saved_step < total:
            raise errors.InvalidRequest(f"{total - job.saved_step:,} rows are not answered yet: send their part first")
        now = self._clock()
        values = {"status": "succeeded", "finished_at": now, "result": result.model_dump(), **OVER}
        await db.execute(update(jobs).where(jobs.c.id == job.id).values(**values))
        await say(db, now, job.id, job.fence, f"All {total:,} rows are answered.")

    async def fail(
        self, db: AsyncConnection, job: JobRow, message: str, code: str, param: str | None = None
    ) -> set[str]:
        """The blobs that it names no more."""
        values = {
            "status": "failed",
            "finished_at": self._clock(),
            "error": {"code": code, "message": message, "param": param},
            **OVER,
        }
        await db.execute(update(jobs).where(jobs.c.id == job.id).values(**values))
        await say(db, self._clock(), job.id, job.fence, f"The job has failed: {message}", level="error")
        await charge(db, self._clock(), job)
        if code == DIVERGED and job.saved_step:
            await announce(db, self._clock(), job, "failed")
            until = f"for {KEPT_S / 86400:.0f} days"
            kept = (
                f"The checkpoint of step {job.saved_step} is kept {until}: resume with a learning_rate_factor below 1."
            )
            await say(db, self._clock(), job.id, job.fence, kept)
            return set()
        return await ended(db, self._clock(), job, "failed")

    async def _does_not_fit(
        self, db: AsyncConnection, job: JobRow, error: wire.JobError, needed_bytes: int
    ) -> set[str]:
        """It waits for a gpu with more memory than this one, which costs no attempt: each gpu is tried once at most."""
        device = (await db.execute(select(gpus.c.device).where(gpus.c.id == job.gpu_id))).scalar_one()
        values = {"needed_bytes": max(needed_bytes, device["memory_bytes"] + 1)}
        await db.execute(update(jobs).where(jobs.c.id == job.id).values(**values))
        return await self._requeue(db, job, error.message, error.code, counts=False)

    async def release(self, by: wire.SignedBy, job_id: str, release: wire.Release) -> JobRow:
        """The gpu gives the job back on purpose, which costs no attempt. Raises LeaseLost."""
        async with letting_go(self._store, self._blobs) as (db, gone):
            job = await self.held(db, by, job_id, release.fence)
            why = "The gpu stops." if release.reason == "leaving" else "The gpu gave the job back."
            gone |= await self._requeue(db, job, why, "gpu_left", counts=False)
            return (await db.execute(select(jobs).where(jobs.c.id == job_id))).one()

    async def _requeue(self, db: AsyncConnection, job: JobRow, why: str, code: str, *, counts: bool) -> set[str]:
        """Back to the queue, or paused where its owner has asked for that. A lease with a new checkpoint costs none.

        The blobs that it names no more. What was on its way is left to the sweep, for the next gpu may come by it.
        """
        for kind in ON_ITS_WAY:
            await refs.unname(db, kind, job.id)
        attempts = 0 if job.saved_step > job.lost_step else job.attempts
        attempts += counts and job.saved_step <= job.lost_step
        values = {"attempts": attempts, "lost_step": job.saved_step}
        await db.execute(update(jobs).where(jobs.c.id == job.id).values(**values))
        if attempts >= MAX_ATTEMPTS:
            return await self.fail(db, job, f"{why} That was attempt {attempts} of {MAX_ATTEMPTS}.", code)
        if job.leased_at is not None and (unused_s := _cost_s(job) - (self._clock() - job.leased_at)) > 0:
            back = update(users).where(users.c.id == job.owner)
            await db.execute(back.values(credit_s=users.c.credit_s + unused_s))
        if job.kind == "batch":
            await self._estimate_rest(db, job)
        paused = job.pause_asked_at is not None
        values = {"status": "paused" if paused else "queued", "estimated_finish": None, **NO_LEASE}
        await db.execute(update(jobs).where(jobs.c.id == job.id).values(**values))
        now = "The job is paused" if paused else "The job waits for a gpu again"
        since = f", to go on {_from(job)}" if job.saved_step else ""
        spent = f" Attempt {attempts} of {MAX_ATTEMPTS} is spent." if counts and attempts else ""
        level = "warn" if counts else "info"
        await say(db, self._clock(), job.id, job.fence, f"{why} {now}{since}.{spent}", level=level)
        await charge(db, self._clock(), job)
        if paused:
            await announce(db, self._clock(), job, "paused")
        return set()

    async def _estimate_rest(self, db: AsyncConnection, job: JobRow) -> None:
        """The rows of a batch that this lease has answered are not paid for again."""
        total = (await db.execute(select(batches.c.total).where(batches.c.job_id == job.id))).scalar_one()
        share = (total - job.saved_step) / max(1, total - job.lost_step)
        await db.execute(update(jobs).where(jobs.c.id == job.id).values(estimated_s=job.estimated_s * share))

    async def held(self, db: AsyncConnection, by: wire.SignedBy, job_id: str, fence: int) -> JobRow:
        """The job, if this lease of it stands. Raises LeaseLost."""
        row: JobRow | None = (await db.execute(select(jobs).where(self._live(by, job_id, fence)))).one_or_none()
        if row is None:
            raise errors.LeaseLost(f"the lease of job '{job_id}' with fence {fence} is not yours any more: stop")
        return row

    def _live(self, by: wire.SignedBy, job_id: str, fence: int) -> ColumnElement[bool]:
        return and_(
            jobs.c.id == job_id,
            jobs.c.fence == fence,
            jobs.c.gpu_id == by.gpu_id,
            jobs.c.gpu_epoch == by.epoch,
            jobs.c.status.in_(LEASED),
            jobs.c.lease_until > self._clock(),
        )

    def _not_later(self, at: float) -> float:
        """A gpu's clock may be wrong; the future is not for it to write about."""
        return min(max(at, 0.0), self._clock())

    def _term(self) -> float:
        return self._clock() + self._settings.lease_s


def job_spec(job: JobRow, kept: Sequence[wire.Checkpoint] = ()) -> wire.JobSpec:
    return wire.JobSpec(
        job_id=job.id,
        base_model=job.base_model,
        layers=job.layers,
        hyperparameters=job.hyperparameters,
        seed=job.seed,
        training_file=job.training_blob,
        validation_file=job.validation_blob,
        sample_prompts=job.sample_prompts or [],
        concept=job.concept,
        continue_from=job.continue_from,
        rate_factor=job.rate_factor,
        checkpoints=list(kept),
    )


def batch_spec(job: JobRow, batch: JobRow) -> wire.BatchSpec:
    return wire.BatchSpec(
        job_id=job.id,
        base_model=job.base_model,
        endpoint=batch.endpoint,
        input_file=job.training_blob,
        total=batch.total,
        tuned=job.continue_from,
        done=[wire.RowSpan(first=first, last=last) for first, last in batch.done],
        is_last_try=job.attempts == MAX_ATTEMPTS - 1,
    )


_COST = (jobs.c.owner, jobs.c.estimated_s, jobs.c.training_blob, jobs.c.hyperparameters)


def _cost_s(job: Any) -> float:
    """Of gpu time, to its owner."""
    n_epochs = job.hyperparameters.get("n_epochs", "auto")
    return fairness.estimate_s(job.estimated_s, job.training_blob["bytes"], n_epochs)


def _from(job: JobRow) -> str:
    if job.kind == "batch":
        return f"behind the {job.saved_step:,} rows that are answered"
    return f"from the checkpoint of step {job.saved_step}"


def _eta_s(event: wire.JobEvent) -> float | None:
    eta_s = event.data.get("eta_s") if event.type == "metrics" else None
    return float(eta_s) if isinstance(eta_s, int | float) and 0 <= eta_s <= MAX_ETA_S else None
