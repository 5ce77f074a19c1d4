"""The gpus that are alive, and what they offer, in memory: a live request asks here and not the database.

What this process changes it says here at once; what another process changed is seen READ_EVERY_S later at most. Does
not know which of them can be reached.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import select

import wire
from relay.store import Clock, Store
from relay.tables import gpus, offers
from relay.transport import Endpoint

READ_EVERY_S = 1.0


@dataclass
class Listed:
    """A gpu with a way to it, as last read."""

    to: Endpoint
    enrolled_at: float
    last_seen_at: float
    draining: bool
    active_requests: int  # by its last heartbeat, whichever process they came from
    loaded: Mapping[str, bool]  # of each base model that it offers


class Roster:
    def __init__(self, store: Store, alive_s: float, clock: Clock) -> None:
        self._store = store
        self._alive_s = alive_s
        self._clock = clock
        self._listed: dict[str, Listed] = {}
        self._offering: dict[str, list[Listed]] = {}  # by base model
        self._reading = asyncio.Lock()
        self._good_until = 0.0  # of the loop's clock
        self._changes = 0

    def changed(self) -> None:
        """Something was written: what was read before counts no more."""
        self._changes += 1
        self._good_until = 0.0

    def heard(self, by: wire.SignedBy) -> None:
        """A heartbeat with nothing new in it."""
        known = self._listed.get(by.gpu_id)
        if known and known.to.epoch == by.epoch:
            known.last_seen_at = self._clock()
        else:
            self.changed()

    async def alive(self) -> Sequence[Listed]:
        await self._read()
        return [gpu for gpu in self._listed.values() if self._is_alive(gpu)]

    async def offering(self, model: str) -> Sequence[Listed]:
        """Those alive that have this base model."""
        await self._read()
        return [gpu for gpu in self._offering.get(model, ()) if self._is_alive(gpu)]

    def _is_alive(self, gpu: Listed) -> bool:
        return gpu.last_seen_at >= self._clock() - self._alive_s

    async def _read(self) -> None:
        now = asyncio.get_running_loop().time()
        if now < self._good_until:
            return
        async with self._reading:
            if now < self._good_until:  # another has read since we asked
                return
            changes = self._changes
            has_way = gpus.c.url.is_not(None) | (gpus.c.tunnel == wire.DIALLED)
            recent = has_way & (gpus.c.last_seen_at >= self._clock() - self._alive_s)
            way = (gpus.c.tunnel, gpus.c.url, gpus.c.signing_key, gpus.c.relay_id)
            columns = (gpus.c.id, gpus.c.epoch, gpus.c.name, *way)
            has = select(offers).join(gpus, gpus.c.id == offers.c.gpu_id).where(recent)
            async with self._store.read() as db:
                state = (gpus.c.enrolled_at, gpus.c.last_seen_at, gpus.c.draining, gpus.c.active_requests)
                rows = (await db.execute(select(*columns, *state).where(recent))).all()
                offered = (await db.execute(has)).all()
            loaded: dict[str, dict[str, bool]] = {row.id: {} for row in rows}
            for offer in offered:
                if offer.gpu_id in loaded:
                    loaded[offer.gpu_id][offer.model_id] = offer.loaded
            self._listed = {}
            for row in rows:
                state_of = (row.enrolled_at, row.last_seen_at, row.draining, row.active_requests)
                self._listed[row.id] = Listed(Endpoint(*row[:7]), *state_of, loaded[row.id])
            self._offering = {}
            for gpu in self._listed.values():
                for model in gpu.loaded:
                    self._offering.setdefault(model, []).append(gpu)
            if changes == self._changes:
                self._good_until = now + READ_EVERY_S
