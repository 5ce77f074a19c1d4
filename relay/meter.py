"""What somebody has used, and how it is written: a row for each month (a calendar month in UTC), user and key.

Who adds a lease's gpu time to it is in that lease's transaction. Knows no limit and no price.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import Row, insert, update
from sqlalchemy.ext.asyncio import AsyncConnection

from relay.tables import usage

FIELDS: Final = ("prompt_tokens", "completion_tokens", "trained_tokens", "gpu_s")


@dataclass(frozen=True)
class Used:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    trained_tokens: int = 0
    gpu_s: float = 0.0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens + self.trained_tokens

    def __add__(self, other: "Used") -> "Used":
        return Used(*(getattr(self, name) + getattr(other, name) for name in FIELDS))

    def __sub__(self, other: "Used") -> "Used":
        return Used(*(getattr(self, name) - getattr(other, name) for name in FIELDS))


NOTHING = Used()


def total(rows: Iterable[Row[Any]]) -> Used:
    return sum((Used(*(getattr(row, name) for name in FIELDS)) for row in rows), NOTHING)


async def add(db: AsyncConnection, of: str, user_id: str, key_id: str, used: Used) -> None:
    more = {name: usage.c[name] + getattr(used, name) for name in FIELDS}
    row = {"month": of, "user_id": user_id, "key_id": key_id}
    mine = [usage.c[name] == value for name, value in row.items()]
    done = await db.execute(update(usage).where(*mine).values(**more))
    if not done.rowcount:
        await db.execute(insert(usage).values(**row, **{name: getattr(used, name) for name in FIELDS}))


async def charge(db: AsyncConnection, at: float, job: Row[Any], trained_tokens: int = 0) -> None:
    """A lease of the job ends, in this transaction: its owner and the key that made it have used a gpu so long.

    A batch has used the tokens of its answers, as live requests do, which were counted when they came.
    """
    if job.kind == "batch":
        return
    gpu_s = max(0.0, at - job.leased_at) if job.leased_at is not None else 0.0
    if gpu_s or trained_tokens:
        used = Used(trained_tokens=trained_tokens, gpu_s=gpu_s)
        await add(db, month(at), job.owner, job.key_id or "", used)


def month(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m")


def month_ends(at: float) -> float:
    now = datetime.fromtimestamp(at, UTC)
    year, following = (now.year + 1, 1) if now.month == 12 else (now.year, now.month + 1)
    return datetime(year, following, 1, tzinfo=UTC).timestamp()
