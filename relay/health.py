"""Whether this process can do its work now: the database answers, the disk has room, the bucket answers where
there is one, it is not about to stop.

Anybody may ask, so one look serves everybody who asks within a second. Knows nothing of gpus: without one, the relay
still takes files and jobs.
"""

import asyncio
import logging
import math
import shutil
import time
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from relay import errors
from relay.blobs import Blobs
from relay.settings import Settings
from relay.store import Store
from relay.tables import users

log = logging.getLogger("relay.health")

LOOK_EVERY_S = 1.0
ANSWER_WITHIN_S = 2.0  # a database that takes longer is as good as none


@dataclass(frozen=True)
class Reason:
    """Why not; for strangers too, so it names no path and no size."""

    code: str
    message: str


class Health:
    def __init__(self, store: Store, blobs: Blobs, settings: Settings, stopping: asyncio.Event) -> None:
        self._store = store
        self._blobs = blobs
        self._settings = settings
        self._stopping = stopping
        self._one_at_a_time = asyncio.Lock()
        self._looked_at = -math.inf
        self._found: list[Reason] = []

    async def reasons(self) -> list[Reason]:
        """Why this process is not ready; empty if it is. What is on disk was looked at within the last second."""
        async with self._one_at_a_time:
            if time.monotonic() - self._looked_at >= LOOK_EVERY_S:
                looks = self._database(), asyncio.to_thread(self._disk), self._storage()
                self._found = [reason for found in await asyncio.gather(*looks) for reason in found]
                self._looked_at = time.monotonic()
        if self._stopping.is_set():
            return [Reason("stopping", "the relay is being restarted"), *self._found]
        return self._found

    async def _database(self) -> list[Reason]:
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S), self._store.read() as db:
                await db.execute(select(users.c.id).limit(1))  # unlike SELECT 1, this one opens SQLite's file
        except (SQLAlchemyError, OSError, errors.Unavailable) as exc:
            log.warning("the database does not answer: %s", str(exc).partition("\n")[0] or type(exc).__name__)
            return [Reason("database", "the database does not answer; the relay's log says more")]
        return []

    async def _storage(self) -> list[Reason]:
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                await self._blobs.check()
        except (TimeoutError, errors.Unavailable) as exc:
            log.warning("the bucket of the blobs does not answer: %s", str(exc) or type(exc).__name__)
            return [Reason("storage", "the storage of files and models does not answer; the relay's log says more")]
        return []

    def _disk(self) -> list[Reason]:
        try:
            free_bytes = shutil.disk_usage(self._settings.data_dir).free
        except OSError as exc:
            log.warning("the data folder can't be looked at: %s", exc.strerror)
            return [Reason("disk", "the data folder can't be reached")]
        if free_bytes < self._settings.min_free_bytes:
            log.warning(
                "%d bytes are free in the data folder, %d are needed", free_bytes, self._settings.min_free_bytes
            )
            return [Reason("disk", "the disk is nearly full: make room on the relay's machine")]
        return []
