"""The relay processes that work on this database now, side by side: who they are, and how one asks another.

Each has a row while it lives, and says so in it every few seconds. What it is asked by others is signed with a secret
that it makes at its start and keeps in that row: who can read the database may ask. On SQLite there is one process, and
a row only for Celery's workers to see. Knows nothing of what they ask each other.

And whether they watch: a lease is over only where its gpu could have renewed it all the while. A relay that was away
itself, or whose database was, gives every lease a full term again.
"""

import asyncio
import logging
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from sqlalchemy import ColumnElement, delete, insert, select, true, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

import wire
from relay import errors
from relay.settings import Settings
from relay.store import Clock, Store
from relay.tables import LEASED, gpus, jobs, relays

log = logging.getLogger("relay.peers")

READ_EVERY_S = 1.0
FORGOTTEN_S = 3600.0


@dataclass(frozen=True)
class Peer:
    id: str
    url: str | None  # where it is asked, without a slash at the end; None: it can't be
    secret: str = field(repr=False)


class Peers:
    def __init__(self, store: Store, settings: Settings, clock: Clock) -> None:
        self._store, self._clock = store, clock
        self._lease_s, self._gone_s = settings.lease_s, gone_s(settings)
        self._has_row = store.is_shared or bool(settings.broker_url)
        self._beaten_at = -math.inf  # of the loop's clock: when the database last took our word
        self.me = Peer(f"relay-{secrets.token_hex(8)}", settings.internal_url or None, secrets.token_hex(32))
        self._others: dict[str, Peer] = {}
        self._good_until = -math.inf  # of the loop's clock
        self._reading = asyncio.Lock()
        self._seen = wire.SeenNonces()

    @property
    def name(self) -> str | None:
        """This process, for the others; None where there are none."""
        return self.me.id if self._store.is_shared else None

    async def join(self) -> None:
        """An earlier process at the same address is none of the others: it has ended."""
        gone = relays.c.seen_at < self._clock() - FORGOTTEN_S
        if not self._store.is_shared:
            gone = true()
        elif self.me.url:
            gone |= relays.c.url == self.me.url
        async with self._store.write() as db:
            await db.execute(delete(relays).where(gone))
            others = await self._are_others(db)
            await self._begin(db, others)
        self._beaten_at = asyncio.get_running_loop().time()
        if others and not self.me.url:
            log.warning(
                "other relay processes are here, and this one has no RELAY_INTERNAL_URL: they can't reach gpus that "
                "dial in to it"
            )

    async def _begin(self, db: AsyncConnection, others: bool) -> None:
        """To watch. Where nobody did, that must cost nobody a lease."""
        now = self._clock()
        if not others:
            term = update(jobs).where(jobs.c.status.in_(LEASED)).values(lease_until=now + self._lease_s)
            await db.execute(term)
        if self._has_row:
            await db.execute(delete(relays).where(relays.c.id == self.me.id))
            await db.execute(insert(relays).values(**vars(self.me), seen_at=now, since=now))

    async def _are_others(self, db: AsyncConnection) -> bool:
        them = select(relays.c.id).where(self._lives(), relays.c.id != self.me.id)
        return (await db.execute(them.limit(1))).first() is not None

    async def leave(self) -> None:
        """At its end. Gpus that had dialled in to it dial another."""
        if not self._has_row:
            return
        try:
            async with self._store.write() as db:
                await db.execute(delete(relays).where(relays.c.id == self.me.id))
                await db.execute(update(gpus).where(gpus.c.relay_id == self.me.id).values(relay_id=None))
        except (SQLAlchemyError, errors.Unavailable):
            log.warning("the database could not be told that this process ends; the others see it by its silence")

    async def keep_beating(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(self._gone_s / 3)
            try:
                await self._beat()
            except (SQLAlchemyError, errors.RelayError):
                log.warning("the database could not be told that this process lives; it is tried again")

    async def _beat(self) -> None:
        async with self._store.write() as db:  # without a row, to see that writing is possible
            mine = update(relays).where(relays.c.id == self.me.id).values(seen_at=self._clock())
            known = not self._has_row or (await db.execute(mine)).rowcount
            if not (known and await self.is_watching()):
                log.warning("for a while no lease could be renewed here; where nobody else could, all get a full term")
                await self._begin(db, await self._are_others(db))
        self._beaten_at = asyncio.get_running_loop().time()

    async def is_watching(self) -> bool:
        """Whether leases could be renewed here until now."""
        return asyncio.get_running_loop().time() - self._beaten_at <= self._gone_s

    async def find(self, peer_id: str) -> Peer | None:
        """Another one that lives."""
        async with self._reading:
            now = asyncio.get_running_loop().time()
            if now >= self._good_until:
                async with self._store.read() as db:
                    rows = await db.execute(select(relays).where(self._lives(), relays.c.id != self.me.id))
                    self._others = {row.id: Peer(row.id, row.url, row.secret) for row in rows}
                self._good_until = now + READ_EVERY_S
        return self._others.get(peer_id)

    def _lives(self) -> ColumnElement[bool]:
        return relays.c.seen_at >= self._clock() - self._gone_s

    def sign(self, to: Peer, method: str, target: str, body: bytes) -> dict[str, str]:
        """Headers by which that one believes us."""
        return wire.sign(to.secret, _by(to), method, target, wire.body_sha256(body), self._clock())

    def verify(self, method: str, target: str, headers: Mapping[str, str]) -> str:
        """The SHA-256 that the body must have. Raises BadSignature."""
        try:
            return wire.verify(self.me.secret, _by(self.me), method, target, headers, self._clock(), self._seen)
        except wire.BadSignature as exc:
            log.warning("%s %s refused: %s", method, target.partition("?")[0], exc)
            raise errors.BadSignature("this is for relay processes to ask each other, and is signed") from exc


def gone_s(settings: Settings) -> float:
    """Silent for longer, a relay is gone. What is left of a lease then is enough to be heard elsewhere."""
    return settings.lease_s / 4


async def is_watched(store: Store, settings: Settings, clock: Clock) -> bool:
    """For who has no part in renewing: whether a relay could, for as long as a lease is. Raises as Store.read does."""
    lives = relays.c.seen_at >= clock() - gone_s(settings), relays.c.since <= clock() - settings.lease_s
    async with store.read() as db:
        return (await db.execute(select(relays.c.id).where(*lives).limit(1))).first() is not None


def _by(peer: Peer) -> wire.SignedBy:
    """For whom it is: what is signed for one is of no use with another."""
    return wire.SignedBy(gpu_id=peer.id, epoch=0)
