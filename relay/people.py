"""Users as the admin and they themselves end them: disable, enable, delete with all that is theirs.

A deletion is marked first, which ends keys, sessions and jobs at once; then what the user had goes, job by job. Where
that is cut off, it is finished after the next start. What names a user by name only, the audit log, keeps its time.
"""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, delete, select, update
from sqlalchemy.exc import SQLAlchemyError

from relay import errors, refs
from relay.accounts import ADMIN, Accounts
from relay.audit import COMMAND_LINE, By, note
from relay.blobs import Blobs
from relay.jobs import OVER, drop_reports, forget
from relay.store import Clock, Store
from relay.sweep import letting_go
from relay.tables import (
    OPEN,
    batch_parts,
    batches,
    files,
    job_events,
    jobs,
    key_rules,
    keys,
    models,
    passwords,
    sessions,
    usage,
    users,
    webhooks,
)
from relay.tables import webhook_deliveries as deliveries

log = logging.getLogger("relay.people")

LOOK_EVERY_S = 60.0  # for deletions that were cut off, or marked by another process
FINISHER = By("relay")


class People:
    def __init__(self, store: Store, blobs: Blobs, accounts: Accounts, clock: Clock) -> None:
        self._store = store
        self._blobs = blobs
        self._accounts = accounts
        self._clock = clock
        self._marked = asyncio.Event()

    async def known(self) -> Sequence[Row[Any]]:
        """By name, and whether each has a password; those whose deletion is under way too."""
        query = (
            select(users, passwords.c.user_id.is_not(None).label("has_password"))
            .outerjoin(passwords, passwords.c.user_id == users.c.id)
            .order_by(users.c.name)
        )
        async with self._store.read() as db:
            return (await db.execute(query)).all()

    async def disable(self, name: str, by: By = COMMAND_LINE, *, on: bool = True) -> None:
        """No key, password or session of theirs is let in, until they are enabled again. Jobs go on.

        Raises NotFound, and InvalidRequest for the admin.
        """
        now = self._clock()
        async with self._store.write() as db:
            found = (await db.execute(select(users).where(users.c.name == name))).one_or_none()
            user = _deletable(found, name)
            await db.execute(update(users).where(users.c.id == user.id).values(disabled_at=now if on else None))
            await note(db, now, by, "user.disable" if on else "user.enable", name)
        self._accounts.forget()

    async def delete(self, name: str, by: By = COMMAND_LINE) -> list[str]:
        """Marks it, and ends what they have going; finish() does the rest. The gpus that have to hear of it.

        Raises NotFound, and InvalidRequest for the admin.
        """
        now = self._clock()
        async with self._store.write() as db:
            found = (await db.execute(select(users).where(users.c.name == name))).one_or_none()
            user = _deletable(found, name)
            theirs = select(keys.c.sha256).where(keys.c.owner == user.id)
            await db.execute(update(users).where(users.c.id == user.id).values(deleting_at=now))
            await db.execute(delete(sessions).where(sessions.c.key_sha256.in_(theirs)))
            await db.execute(delete(passwords).where(passwords.c.user_id == user.id))
            await db.execute(update(keys).where(keys.c.owner == user.id).values(revoked_at=now))
            going = jobs.c.owner == user.id, jobs.c.status.in_(OPEN)
            gpus = (await db.execute(select(jobs.c.gpu_id).where(*going, jobs.c.gpu_id.is_not(None)))).scalars().all()
            values = {"status": "cancelled", "finished_at": now, "fence": jobs.c.fence + 1, **OVER}
            await db.execute(update(jobs).where(*going).values(**values))
            await note(db, now, by, "user.delete", name)
        self._accounts.forget()
        self._marked.set()
        return list(gpus)

    async def finish(self) -> int:
        """Everything that is marked goes; how many users. May be cut off anywhere, and begun again."""
        async with self._store.read() as db:
            marked = (await db.execute(select(users).where(users.c.deleting_at.is_not(None)))).all()
        for user in marked:
            async with self._store.read() as db:
                of_user = (await db.execute(select(jobs.c.id).where(jobs.c.owner == user.id))).scalars().all()
            for job_id in of_user:
                await self._remove_job(job_id)
            await self._remove_user(user)
            log.info("user %s is deleted, with %d jobs", user.id, len(of_user))
        return len(marked)

    async def keep_finishing(self) -> None:
        """At the start, when something was marked here, and every minute, until it is cancelled."""
        while True:
            self._marked.clear()
            try:
                await self.finish()
            except (SQLAlchemyError, OSError, errors.RelayError):
                log.exception("a deletion could not be finished; it is tried again")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._marked.wait(), LOOK_EVERY_S)

    async def _remove_job(self, job_id: str) -> None:
        async with letting_go(self._store, self._blobs) as (db, gone):
            gone |= await forget(db, job_id) | await drop_reports(db, job_id) | await refs.unname(db, "part", job_id)
            await db.execute(delete(batch_parts).where(batch_parts.c.job_id == job_id))
            await db.execute(delete(batches).where(batches.c.job_id == job_id))
            mine = delete(models).where(models.c.job_id == job_id).returning(models.c.id)
            gone |= await refs.unname(db, "model", *(await db.execute(mine)).scalars().all())
            await db.execute(delete(job_events).where(job_events.c.job_id == job_id))
            await db.execute(delete(jobs).where(jobs.c.id == job_id))

    async def _remove_user(self, user: Row[Any]) -> None:
        async with letting_go(self._store, self._blobs) as (db, gone):
            await db.execute(delete(files).where(files.c.owner == user.id))
            await db.execute(delete(models).where(models.c.owner == user.id))  # imported: no job took them along
            gone |= await refs.unname_owned(db, user.id)
            theirs = select(keys.c.id).where(keys.c.owner == user.id)
            await db.execute(delete(key_rules).where(key_rules.c.key_id.in_(theirs)))
            await db.execute(delete(keys).where(keys.c.owner == user.id))
            hooks = select(webhooks.c.id).where(webhooks.c.owner == user.id)
            await db.execute(delete(deliveries).where(deliveries.c.webhook_id.in_(hooks)))
            await db.execute(delete(usage).where(usage.c.user_id == user.id))
            await db.execute(delete(webhooks).where(webhooks.c.owner == user.id))
            done = await db.execute(delete(users).where(users.c.id == user.id))
            if done.rowcount:
                await note(db, self._clock(), FINISHER, "user.deleted", user.name)


def _deletable(user: Row[Any] | None, name: str) -> Row[Any]:
    if name == ADMIN:
        raise errors.InvalidRequest("the user admin is the relay's own: it can't be disabled or deleted")
    if user is None or user.deleting_at is not None:
        raise errors.NotFound(f"no user '{name[:100]}': 'python -m relay users list' shows them")
    return user
