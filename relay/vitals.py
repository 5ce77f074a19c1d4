"""What /metrics has to ask: jobs in the database, gpus, lines, disk. Looked at when somebody reads, not in between.

One look serves all who read within LOOK_EVERY_S. Blobs are added up once in ADD_UP_EVERY_S, for that looks at each.
"""

import asyncio
import contextlib
import math
import shutil
import time
from collections.abc import Callable

from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from relay import errors
from relay.blobs import Blobs
from relay.gpus import Gpus
from relay.metrics import Metrics
from relay.settings import Settings
from relay.store import Store
from relay.tables import STATUSES, jobs

LOOK_EVERY_S = 2.0
ADD_UP_EVERY_S = 300.0


class Vitals:
    def __init__(
        self,
        metrics: Metrics,
        store: Store,
        blobs: Blobs,
        gpus: Gpus,
        settings: Settings,
        waiting: dict[str, Callable[[], int]],
    ) -> None:
        """`waiting`: how many stand in each line."""
        self._metrics, self._store, self._blobs, self._gpus = metrics, store, blobs, gpus
        self._settings, self._waiting = settings, waiting
        self._one_at_a_time = asyncio.Lock()
        self._looked_at = self._added_up_at = -math.inf

    async def text(self) -> bytes:
        async with self._one_at_a_time:
            if time.monotonic() - self._looked_at >= LOOK_EVERY_S:
                await self._look()
                self._looked_at = time.monotonic()
        return await asyncio.to_thread(self._metrics.text)

    async def _look(self) -> None:
        gpus, breakers = await self._gpus.states()
        self._metrics.set_states("gpus", gpus)
        self._metrics.set_states("breakers", breakers)
        self._metrics.set_states("waiting", {line: waiting() for line, waiting in self._waiting.items()})
        with contextlib.suppress(
            SQLAlchemyError, errors.Unavailable
        ):  # the rest is wanted all the more; /readyz says what is wrong
            self._metrics.set_states("jobs", await self._jobs())
        with contextlib.suppress(OSError, errors.Unavailable):
            self._metrics.set_bytes("disk_free", shutil.disk_usage(self._settings.data_dir).free)
            if time.monotonic() - self._added_up_at >= ADD_UP_EVERY_S:
                self._metrics.set_bytes("blobs", await self._blobs.total_bytes())
                self._added_up_at = time.monotonic()

    async def _jobs(self) -> dict[str, int]:
        async with self._store.read() as db:
            rows = await db.execute(select(jobs.c.status, func.count().label("n")).group_by(jobs.c.status))
        return {**dict.fromkeys(STATUSES, 0), **{row.status: row.n for row in rows}}
