"""Webhooks as their owners see them: make one, list, delete, and what came of its deliveries.

What a webhook is told, and when, is in outbox.py. Knows nothing of HTTP.
"""

import base64
import ipaddress
import re
import secrets
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import Row, delete, func, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from relay import errors
from relay.audit import By, note
from relay.outbox import SECRET_PREFIX
from relay.store import Clock, Store, one_page
from relay.tables import webhook_deliveries as deliveries
from relay.tables import webhooks
from relay.transport import is_loopback, is_public

MOST_OF_A_USER = 10
SECRET_BYTES = 32


class Webhooks:
    def __init__(self, store: Store, clock: Clock, *, allow_loopback: bool) -> None:
        self._store, self._clock, self._allow_loopback = store, clock, allow_loopback

    async def create(self, owner: str, name: str, url: str, event_types: Sequence[str], by: By) -> tuple[Row[Any], str]:
        """With its secret, which is told this once. Raises InvalidRequest, TooMany."""
        url = checked(url, allow_loopback=self._allow_loopback)
        hook_id, secret = f"we_{secrets.token_hex(12)}", new_secret()
        async with self._store.write() as db:
            n = (await db.execute(select(func.count()).where(webhooks.c.owner == owner))).scalar_one()
            if n >= MOST_OF_A_USER:
                raise errors.TooMany(f"you have {n} webhooks, which is the most: delete one first")
            row = {"id": hook_id, "owner": owner, "name": name, "url": url, "event_types": list(event_types)}
            await db.execute(insert(webhooks).values(**row, secret=secret, created_at=self._clock()))
            await note(db, self._clock(), by, "webhook.create", hook_id)
            return await _of(db, owner, hook_id), secret

    async def page(self, owner: str, after: str | None, limit: int) -> tuple[Sequence[Row[Any]], bool]:
        """The newest first, and whether there are more. Raises NotFound for an `after` that is not theirs."""
        async with self._store.read() as db:
            last = await _of(db, owner, after) if after is not None else None
            return await one_page(db, select(webhooks).where(webhooks.c.owner == owner), webhooks, last, limit)

    async def get(self, owner: str, hook_id: str) -> Row[Any]:
        """Raises NotFound."""
        async with self._store.read() as db:
            return await _of(db, owner, hook_id)

    async def delete(self, owner: str, hook_id: str, by: By) -> None:
        """Nothing more is told to it, and its deliveries are forgotten. Raises NotFound."""
        async with self._store.write() as db:
            await _of(db, owner, hook_id)
            await db.execute(delete(deliveries).where(deliveries.c.webhook_id == hook_id))
            await db.execute(delete(webhooks).where(webhooks.c.id == hook_id))
            await note(db, self._clock(), by, "webhook.delete", hook_id)

    async def deliveries(
        self, owner: str, hook_id: str, after: int | None, limit: int
    ) -> tuple[Sequence[Row[Any]], bool]:
        """The newest first, and whether there are more. Raises NotFound."""
        query = select(deliveries).where(deliveries.c.webhook_id == hook_id)
        if after is not None:
            query = query.where(deliveries.c.id < after)
        async with self._store.read() as db:
            await _of(db, owner, hook_id)
            rows = (await db.execute(query.order_by(deliveries.c.id.desc()).limit(limit + 1))).all()
        return rows[:limit], len(rows) > limit


async def _of(db: AsyncConnection, owner: str, hook_id: str) -> Row[Any]:
    row = (await db.execute(select(webhooks).where(webhooks.c.id == hook_id, webhooks.c.owner == owner))).one_or_none()
    if row is None:
        raise errors.NotFound(f"no webhook '{hook_id[:50]}'")
    return row


def new_secret() -> str:
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def checked(url: str, *, allow_loopback: bool) -> str:
    """A URL that we may call. What its name leads to is looked at again with each delivery. Raises InvalidRequest."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError as exc:
        raise errors.InvalidRequest("url: this is no URL", param="url") from exc
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise errors.InvalidRequest("url: use printable ASCII without spaces", param="url")
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise errors.InvalidRequest("url: leave out user, password and fragment", param="url")
    if allow_loopback and (host == "localhost" or is_loopback(host)) and parts.scheme in ("http", "https"):
        return url
    if parts.scheme != "https" or port not in (None, 443):
        raise errors.InvalidRequest("url: use https on its usual port", param="url")
    try:
        good = is_public(str(ipaddress.ip_address(host)))
    except ValueError:  # a name, which must not be read as a number by anybody
        good = bool(re.fullmatch(r"(?:[a-z0-9_-]{1,63}\.)+[a-z][a-z0-9-]{0,62}", host)) and len(host) <= 253
    if not good:
        raise errors.InvalidRequest("url: its host is no public name or address", param="url")
    return url
