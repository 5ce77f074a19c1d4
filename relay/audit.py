"""Who did what to accounts, keys, tokens and gpus: kept for 90 days, without secrets, written with the deed itself.

Names a user by name, so that an entry outlives its user. A name that was only tried is written if there is such a
user: it may be a password in the wrong field.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from sqlalchemy import Row, delete, insert, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from relay import errors
from relay.store import Clock, Store
from relay.tables import audit, users

log = logging.getLogger("relay.audit")

KEPT_S = 90 * 86400.0
SWEEP_EVERY_S = 3600.0
TARGET_CHARS, ADDRESS_CHARS = 400, 64
UNKNOWN = "unknown"

Action = Literal[
    "session.open",
    "session.refused",
    "key.create",
    "key.revoke",
    "password.set",
    "enrol_token.create",
    "enrol_token.revoke",
    "user.create",
    "user.disable",
    "user.enable",
    "user.delete",
    "user.deleted",
    "webhook.create",
    "webhook.delete",
    "gpu.drain",
    "gpu.undrain",
]


@dataclass(frozen=True)
class By:
    who: str  # a user's name
    address: str = ""  # that the request came from; none on the command line


COMMAND_LINE: Final = By("command line")


async def note(db: AsyncConnection, at: float, by: By, action: Action, target: str = "") -> None:
    """Within the transaction that does it: there is no deed without its entry."""
    row = {"who": by.who, "address": by.address[:ADDRESS_CHARS], "target": target[:TARGET_CHARS]}
    await db.execute(insert(audit).values(**row, at=at, action=action))


class Audit:
    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def write(self, by: By, action: Action, target: str = "") -> None:
        """Of what is done outside the database."""
        async with self._store.write() as db:
            await note(db, self._clock(), by, action, target)

    async def refused(self, name: str | None, address: str, what: str) -> None:
        """Somebody was not let in."""
        async with self._store.write() as db:
            found = (await db.execute(select(users.c.name).where(users.c.name == name))).scalar_one_or_none()
            await note(db, self._clock(), By(found or UNKNOWN, address), "session.refused", what)

    async def page(
        self, after: int | None, limit: int, *, who: str | None = None, action: Action | None = None
    ) -> tuple[Sequence[Row[Any]], bool]:
        """The newest first, and whether there are more."""
        query = select(audit).order_by(audit.c.id.desc()).limit(limit + 1)
        if who is not None:
            query = query.where(audit.c.who == who)
        if action is not None:
            query = query.where(audit.c.action == action)
        if after is not None:
            query = query.where(audit.c.id < after)
        async with self._store.read() as db:
            rows = (await db.execute(query)).all()
        return rows[:limit], len(rows) > limit

    async def sweep(self) -> int:
        """What is too old goes; how many."""
        old = audit.c.at < self._clock() - KEPT_S
        async with self._store.read() as db:  # nearly always there is none, and reading disturbs nobody
            if (await db.execute(select(audit.c.id).where(old).limit(1))).first() is None:
                return 0
        async with self._store.write() as db:
            return (await db.execute(delete(audit).where(old))).rowcount

    async def keep_sweeping(self) -> None:
        """At the start and every hour, until it is cancelled."""
        while True:
            try:
                await self.sweep()
            except (SQLAlchemyError, errors.Unavailable):
                log.exception("old entries of the audit log could not be removed; it is tried again")
            await asyncio.sleep(SWEEP_EVERY_S)
