"""Blobs that nothing names any more go. What names one: a file, a tuned model and the report of its
job, a job that is not over, a checkpoint of one.

Does not know why a name went. A blob whose name is still to come, as a result on its way in, is young: left alone.
"""

import asyncio
import logging
import math
from collections.abc import Collection

from sqlalchemy import Column, ColumnElement, select, true
from sqlalchemy.ext.asyncio import AsyncConnection

from relay.blobs import Blobs
from relay.store import Clock, Store
from relay.tables import OPEN, checkpoint_chunks, files, job_reports, jobs, models

log = logging.getLogger("relay.sweep")

EVERY_S = 3600.0
YOUNG_S = 3600.0  # longer than a gpu takes from the first blob of a result to the last
AT_ONCE = 500  # blobs that one query asks about


async def remove_unnamed(
    db: AsyncConnection, blobs: Blobs, shas: Collection[str], older_than: float = math.inf
) -> list[str]:
    """Those of the blobs that no row names, within the writer's transaction; which. `older_than` is a unix time."""
    unnamed = sorted(set(shas) - await named(db, shas))
    return await asyncio.to_thread(lambda: [sha256 for sha256 in unnamed if blobs.remove(sha256, older_than)])


async def sweep(store: Store, blobs: Blobs, clock: Clock) -> int:
    """What was left behind by results that nobody finished, or by a crash; how many."""
    removed = 0
    older_than = clock() - YOUNG_S
    old = await asyncio.to_thread(blobs.older_than, older_than)
    for at in range(0, len(old), AT_ONCE):
        some = old[at : at + AT_ONCE]
        async with store.read() as db:  # nearly always there is none, and reading disturbs nobody
            unnamed = set(some) - await named(db, some)
        if unnamed:
            async with store.write() as db:
                removed += len(await remove_unnamed(db, blobs, unnamed, older_than))
    return removed


async def keep_sweeping(store: Store, blobs: Blobs, clock: Clock) -> None:
    """At the start and every hour, until it is cancelled."""
    while True:
        try:
            if removed := await sweep(store, blobs, clock):
                log.info("%d blobs that nothing named are gone", removed)
        except Exception:
            log.exception("a sweep of the blobs failed; the next is in %.0f s", EVERY_S)  # the relay must live on
        await asyncio.sleep(EVERY_S)


async def named(db: AsyncConnection, shas: Collection[str] | None = None) -> set[str]:
    """Those among them that a row names; without them, every one."""

    def among(column: Column[str]) -> ColumnElement[bool]:
        return true() if shas is None else column.in_(shas)

    found: set[str] = set()
    for column in (files.c.sha256, checkpoint_chunks.c.sha256, job_reports.c.sha256):
        found |= set((await db.execute(select(column).where(among(column)))).scalars())
    of_jobs = select(jobs.c.training_blob, jobs.c.validation_blob, jobs.c.continue_from)
    adapters = list((await db.execute(select(models.c.adapter))).scalars())
    for *data, continue_from in await db.execute(of_jobs.where(jobs.c.status.in_(OPEN))):
        found |= {blob["sha256"] for blob in data if blob}
        adapters += [continue_from["adapter"]] if continue_from else []
    for adapter in adapters:
        found |= {file["sha256"] for file in adapter["files"]}
    return found
