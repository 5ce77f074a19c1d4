"""Who may store how much: users have a share of the disk, and jobs have set part of it aside before they need it.

All figures are sums over columns. Does not know what is stored, or why.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import exists, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from relay import errors
from relay.blobs import Blobs, Bound
from relay.settings import Settings
from relay.store import Store
from relay.tables import OPEN, blob_refs, checkpoints, jobs

OF_JOBS = ("checkpoint", "chunk", "result")  # kinds of names (refs.py) that a reservation covers
UNRESERVED = ("part",)
OF_MODELS = ("model", "report")
ON_ITS_WAY = ("chunk", "result")


@dataclass(frozen=True)
class Usage:
    """Bytes of one user's."""

    files: int
    models: int
    jobs: int  # set aside by jobs that are not over, or stored without; and data whose file is deleted

    @property
    def total(self) -> int:
        return self.files + self.models + self.jobs


class Room:
    def __init__(self, store: Store, blobs: Blobs, settings: Settings) -> None:
        self._store = store
        self._blobs = blobs
        self._quota_bytes = settings.user_quota_bytes  # 0: no end

    async def usage(self, owner: str) -> Usage:
        async with self._store.read() as db:
            return await _usage(db, owner)

    async def for_file(self, owner: str, most_bytes: int) -> Bound:
        """What an upload may have: `most_bytes`, or what is left of the quota, or of the disk."""
        async with self._store.read() as db:
            usage = await _usage(db, owner)
            promised = await promised_bytes(db) if self._blobs.on_this_disk else 0
            disk_bytes = self._blobs.free_bytes() - promised
        bounds = [
            Bound(most_bytes, errors.TooLarge(f"larger than {most_bytes:,} bytes, which is the limit here: send less"))
        ]
        if self._quota_bytes:
            left_bytes = self._quota_bytes - usage.total
            bounds.append(Bound(left_bytes, errors.QuotaExceeded(self._full(usage, "the file"), param="file")))
        bounds.append(Bound(disk_bytes, errors.DiskFull(NO_DISK)))
        return min(bounds, key=lambda bound: bound.bytes)

    async def check(self, db: AsyncConnection, owner: str, more_bytes: int, what: str, but_job: str = "") -> None:
        """Raises QuotaExceeded where so much more, beside all but that job's, passes the owner's quota."""
        if not self._quota_bytes:
            return
        usage = await _usage(db, owner, but_job)
        if usage.total + more_bytes > self._quota_bytes:
            raise errors.QuotaExceeded(self._full(usage, f"{what} of {more_bytes:,} bytes"))

    async def check_disk(self, db: AsyncConnection, job_id: str, bytes: int) -> None:
        """Raises DiskFull where the job's `bytes`, beside what others have set aside, do not fit."""
        if not self._blobs.on_this_disk:
            return
        stored = await stored_bytes(db, job_id)
        self._blobs.check_room(bytes - stored + await promised_bytes(db, but_job=job_id))

    async def for_job(self, db: AsyncConnection, job: Any, but_sha256: str, most_bytes: int) -> Bound:
        """What one blob of this job may have: within its reservation; without one, within its owner's quota."""
        too_large = errors.TooLarge(f"larger than {most_bytes:,} bytes, which is the limit here")
        past: errors.RelayError
        if job.reserved_bytes:
            stored = await stored_bytes(db, job.id, but_sha256)
            message = (
                f"the job set {job.reserved_bytes:,} bytes aside and has stored {stored:,}: this would pass it. "
                "Reserve what it needs, then send it again"
            )
            left, past = job.reserved_bytes - stored, errors.OverReservation(message)
        elif self._quota_bytes:
            usage = await _usage(db, job.owner)
            left, past = self._quota_bytes - usage.total, errors.QuotaExceeded(self._full(usage, "the job"))
        else:
            return Bound(most_bytes, too_large)
        return Bound(left, past) if left < most_bytes else Bound(most_bytes, too_large)

    def _full(self, usage: Usage, what: str) -> str:
        return (
            f"{what} does not fit: of your {self._quota_bytes:,} bytes files use {usage.files:,}, models "
            f"{usage.models:,} and jobs {usage.jobs:,}. Delete files or models that you no longer need, cancel a job, "
            "or train fewer layers"
        )


NO_DISK = "the relay's disk has no room beside what jobs have set aside: try later, or ask its administrator for room"


async def _usage(db: AsyncConnection, owner: str, but_job: str = "") -> Usage:
    named = select(blob_refs.c.kind, func.sum(blob_refs.c.bytes)).where(blob_refs.c.owner == owner)
    by_kind: dict[str, int] = {kind: int(size) for kind, size in await db.execute(named.group_by(blob_refs.c.kind))}
    reserving = jobs.c.owner == owner, jobs.c.status.in_(OPEN), jobs.c.reserved_bytes > 0, jobs.c.id != but_job
    reserved = (await db.execute(select(func.sum(jobs.c.reserved_bytes)).where(*reserving))).scalar() or 0
    stored = _sum(by_kind, OF_JOBS) - (await stored_bytes(db, but_job) if but_job else 0)
    of_jobs = max(int(reserved), stored) + _sum(by_kind, UNRESERVED) + await _fileless(db, owner)
    return Usage(by_kind.get("file", 0), _sum(by_kind, OF_MODELS), of_jobs)


def _sum(by_kind: dict[str, int], kinds: Sequence[str]) -> int:
    return sum(by_kind.get(kind, 0) for kind in kinds)


async def _fileless(db: AsyncConnection, owner: str) -> int:
    """Data that only a job keeps: deleting a file must not make room that is not there."""
    other = blob_refs.alias("other")
    same = other.c.sha256 == blob_refs.c.sha256, other.c.owner == owner, other.c.kind.in_(("file", "model"))
    of_jobs = blob_refs.c.owner == owner, blob_refs.c.kind == "job", ~exists().where(*same).correlate(blob_refs)
    once = select(blob_refs.c.sha256, blob_refs.c.bytes).where(*of_jobs).distinct().subquery()
    return int((await db.execute(select(func.sum(once.c.bytes)))).scalar() or 0)


async def stored_bytes(db: AsyncConnection, job_id: str, but_sha256: str = "") -> int:
    """By the job, of what it set aside; one blob on its way left out."""
    kept = select(func.sum(checkpoints.c.bytes)).where(checkpoints.c.job_id == job_id)
    coming = select(func.sum(blob_refs.c.bytes)).where(
        blob_refs.c.kind.in_(ON_ITS_WAY), blob_refs.c.holder == job_id, blob_refs.c.sha256 != but_sha256
    )
    return int((await db.execute(kept)).scalar() or 0) + int((await db.execute(coming)).scalar() or 0)


async def promised_bytes(db: AsyncConnection, but_job: str = "") -> int:
    """Set aside by jobs that are not over, and not stored yet."""
    reserving = jobs.c.status.in_(OPEN), jobs.c.reserved_bytes > 0, jobs.c.id != but_job
    by_job = {
        row.id: row.reserved_bytes
        for row in await db.execute(select(jobs.c.id, jobs.c.reserved_bytes).where(*reserving))
    }
    if not by_job:
        return 0
    kept = select(checkpoints.c.job_id, func.sum(checkpoints.c.bytes)).group_by(checkpoints.c.job_id)
    coming = select(blob_refs.c.holder, func.sum(blob_refs.c.bytes)).where(blob_refs.c.kind.in_(ON_ITS_WAY))
    for stored in (kept, coming.group_by(blob_refs.c.holder)):
        for job_id, size in await db.execute(stored):
            if job_id in by_job:
                by_job[job_id] -= int(size)
    return sum(max(left, 0) for left in by_job.values())
