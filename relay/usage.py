"""What each key and user has used this month: tokens of answers, tokens trained, seconds of gpus; and what that costs.

Live requests are counted in memory and folded into the database every few seconds, so that they cost no write: a crash
loses a few seconds of it. Jobs are counted in the transaction that ends a lease. A month is a calendar month in UTC.
A limit is looked at before work begins, never in its middle; each process knows of the others' work after a fold.
"""

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Protocol

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

import wire
from relay import errors
from relay.accounts import User
from relay.meter import NOTHING, Used, add, month, month_ends, total
from relay.settings import Settings
from relay.store import Clock, Store
from relay.tables import usage, users

log = logging.getLogger("relay.usage")

FOLD_EVERY_S = 5.0
LOOK_EVERY_S = 10.0  # at what a key with a limit has used, for other processes' sake
MOST_KNOWN = 10_000
OPENING_EVENTS = 1  # of an answer, without text


class Limited(Protocol):
    """What a key may use, be it of an account or of a row."""

    @property
    def tokens_per_month(self) -> int | None: ...
    @property
    def spend_per_month(self) -> float | None: ...


@dataclass(frozen=True)
class Prices:
    """In whatever money the relay's owner thinks in."""

    per_million_tokens: float
    per_gpu_hour: float

    def of(self, used: Used) -> float:
        return used.tokens / 1e6 * self.per_million_tokens + used.gpu_s / 3600 * self.per_gpu_hour

    def spent(self, limits: Limited, used: Used) -> str | None:
        """Why a key's month is spent; None: it is not."""
        tokens, spend = limits.tokens_per_month, limits.spend_per_month
        if tokens is not None and used.tokens >= tokens:
            return f"this key may use {tokens:,} tokens a month and has used {used.tokens:,}"
        if spend is not None and (spent := self.of(used)) >= spend:
            return f"this key may spend {spend:,.2f} a month and has spent {spent:,.2f}"
        return None


class Usage:
    def __init__(self, store: Store, settings: Settings, clock: Clock) -> None:
        self._store, self._clock = store, clock
        self.prices = Prices(settings.price_per_million_tokens, settings.price_per_gpu_hour)
        self._noted: dict[tuple[str, str, str], Used] = {}  # month, user, key -> not yet in the database
        self._known: dict[str, tuple[float, str, Used]] = {}  # keys with limits: looked at, month, as stored then
        self._folding = asyncio.Lock()

    def note(self, user_id: str, key_id: str, used: Used) -> None:
        """A live request is over, however it ended."""
        if used == NOTHING:
            return
        at = (month(self._clock()), user_id, key_id)
        self._noted[at] = self._noted.get(at, NOTHING) + used

    async def check(self, user: User) -> None:
        """Raises LimitSpent where the key's month is spent."""
        if user.rules.tokens_per_month is None and user.rules.spend_per_month is None:
            return
        why = self.prices.spent(user.rules, await self._used_by(user))
        if why is None:
            return
        left_s = month_ends(self._clock()) - self._clock()
        raise errors.LimitSpent(f"{why}: a new month begins in {left_s / 86400:.1f} days; or use another key", left_s)

    async def _used_by(self, user: User) -> Used:
        """What is stored, as lately seen, and what is not stored yet."""
        now, of = self._clock(), month(self._clock())
        looked_at, known_month, stored = self._known.get(user.key_id, (0.0, "", NOTHING))
        if known_month != of or not 0 <= now - looked_at < LOOK_EVERY_S:
            async with self._store.read() as db:
                query = select(usage).where(usage.c.month == of, usage.c.key_id == user.key_id)
                stored = total((await db.execute(query)).all())
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[user.key_id] = (now, of, stored)
        return stored + self._noted.get((of, user.id, user.key_id), NOTHING)

    async def of_user(self, user_id: str) -> tuple[str, float, dict[str, Used]]:
        """This month, when it ends, and what each key has used; jobs from before keys were noted stand under ''."""
        await self.fold()
        now = self._clock()
        async with self._store.read() as db:
            query = select(usage).where(usage.c.month == month(now), usage.c.user_id == user_id)
            rows = (await db.execute(query)).all()
        return month(now), month_ends(now), {row.key_id: total([row]) for row in rows}

    async def fold(self) -> None:
        """What was noted goes into the database; it stays noted where that fails."""
        async with self._folding:
            noted = dict(self._noted)
            if not noted:
                return
            try:
                async with self._store.write() as db:
                    there = select(users.c.id).where(users.c.id.in_({user_id for _, user_id, _ in noted}))
                    known = set((await db.execute(there)).scalars())
                    for (of, user_id, key_id), used in noted.items():
                        if user_id in known:  # else deleted meanwhile
                            await add(db, of, user_id, key_id, used)
            except (SQLAlchemyError, errors.Unavailable):
                log.exception("what was used could not be written; it is tried again")
                return
            for at, used in noted.items():
                self._noted[at] -= used  # more may have come meanwhile
                if self._noted[at] == NOTHING:
                    del self._noted[at]
                self._known.pop(at[2], None)  # what is stored is more than was seen

    async def keep_folding(self) -> None:
        """Every few seconds, until it is cancelled."""
        while True:
            await asyncio.sleep(FOLD_EVERY_S)
            await self.fold()


def read_usage(text: bytes) -> Used | None:
    """`prompt,completion`, as a gpu says it. None for what is no such thing."""
    found = re.fullmatch(rb"(\d{1,12}),(\d{1,12})", text)
    return Used(prompt_tokens=int(found[1]), completion_tokens=int(found[2])) if found else None


class StreamMeter:
    """Counts a stream that passes by, and takes the gpu's comments about it out; the rest goes on to the byte.

    A stream that is cut off, by whomever, ends without the second comment: then each event counts as a token.
    """

    def __init__(self) -> None:
        self._told = NOTHING
        self._comments = 0
        self._events = 0

    @property
    def used(self) -> Used:
        if self._comments >= 2:
            return self._told
        return replace(self._told, completion_tokens=max(0, self._events - OPENING_EVENTS))

    async def passing(self, frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for buffer in frames:
            rest = self._take(buffer) if wire.USAGE_COMMENT in buffer else buffer
            self._events += rest.count(b"\n\n")
            if rest:
                yield rest

    def _take(self, buffer: bytes) -> bytes:
        """Only where a frame begins: inside of one it is somebody's text."""
        kept = []
        for frame in buffer.split(b"\n\n"):
            said = read_usage(frame.removeprefix(wire.USAGE_COMMENT)) if frame.startswith(wire.USAGE_COMMENT) else None
            if said is None:
                kept.append(frame)
                continue
            self._told, self._comments = said, self._comments + 1
        return b"\n\n".join(kept)
