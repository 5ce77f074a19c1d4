"""Users and their API keys. A key is shown once and kept as its hash.

The admin's key comes from the settings, and is the only one that can be read again.
"""

import hashlib
import re
import secrets
from dataclasses import dataclass

from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from relay import errors
from relay.store import Clock, Store
from relay.tables import keys, users

KEY_PREFIX = "sk-fine-"
ADMIN = "admin"
SHOWN_CHARS = 14  # of a key, in lists
ADMIN_KEY_ID = "key-admin"
LAST_USED_EVERY_S = 60.0  # writing it at each request would make every read a write
WHERE_KEYS_COME_FROM = (
    "send 'Authorization: Bearer sk-fine-...'. The key of admin lies in admin.key in the relay's data folder; "
    "'python -m relay keys create --user NAME' makes others"
)


@dataclass(frozen=True)
class User:
    id: str
    name: str
    key_id: str  # of the key that they came with

    @property
    def is_admin(self) -> bool:
        return self.name == ADMIN


@dataclass(frozen=True)
class Key:
    id: str
    user: str
    name: str | None
    prefix: str
    created_at: float
    last_used_at: float | None
    revoked_at: float | None


class Accounts:
    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def open(self, admin_key: str) -> None:
        """Exactly one admin key is good: this one."""
        now = self._clock()
        async with self._store.write() as db:
            owner = await self._user_id(db, ADMIN)
            row = {"sha256": _sha256(admin_key), "prefix": admin_key[:SHOWN_CHARS]}
            done = await db.execute(update(keys).where(keys.c.id == ADMIN_KEY_ID).values(**row))
            if not done.rowcount:
                await db.execute(insert(keys).values(id=ADMIN_KEY_ID, owner=owner, created_at=now, **row))

    async def user_of(self, authorization: str | None) -> User:
        """Whose key this header carries. Raises InvalidKey."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise errors.InvalidKey(f"no API key: {WHERE_KEYS_COME_FROM}")
        # Looked up by its hash: how long that takes says nothing about the key.
        query = (
            select(users.c.id, users.c.name, keys.c.id.label("key_id"), keys.c.last_used_at)
            .join(keys, keys.c.owner == users.c.id)
            .where(keys.c.sha256 == _sha256(key.strip()), keys.c.revoked_at.is_(None))
        )
        async with self._store.read() as db:
            row = (await db.execute(query)).one_or_none()
        if row is None:
            raise errors.InvalidKey(f"this API key is wrong or revoked: {WHERE_KEYS_COME_FROM}")
        if (row.last_used_at or 0.0) < self._clock() - LAST_USED_EVERY_S:
            async with self._store.write() as db:
                await db.execute(update(keys).where(keys.c.id == row.key_id).values(last_used_at=self._clock()))
        return User(row.id, row.name, row.key_id)

    async def create_key(self, user: str, name: str | None = None) -> tuple[str, str]:
        """Its id and the key. Makes the user if there is none. Raises InvalidRequest for a name that can't be."""
        if not re.fullmatch(r"[\w.@-]{1,100}", user):
            raise errors.InvalidRequest("a user's name is 1 to 100 letters, digits, '.', '_', '-' or '@'", param="user")
        key, key_id = KEY_PREFIX + secrets.token_urlsafe(32), f"key-{secrets.token_hex(6)}"
        async with self._store.write() as db:
            owner = await self._user_id(db, user)
            row = {"id": key_id, "owner": owner, "sha256": _sha256(key), "prefix": key[:SHOWN_CHARS]}
            await db.execute(insert(keys).values(**row, name=name, created_at=self._clock()))
        return key_id, key

    async def list_keys(self) -> list[Key]:
        query = (
            select(keys, users.c.name.label("user")).join(users, keys.c.owner == users.c.id).order_by(keys.c.created_at)
        )
        async with self._store.read() as db:
            rows = await db.execute(query)
        return [Key(r.id, r.user, r.name, r.prefix, r.created_at, r.last_used_at, r.revoked_at) for r in rows]

    async def revoke(self, key_id: str) -> None:
        """Works at once, in every process. Raises NotFound, and InvalidRequest for the admin's."""
        if key_id == ADMIN_KEY_ID:
            raise errors.InvalidRequest("the admin's key is changed by RELAY_ADMIN_KEY, or by deleting admin.key")
        async with self._store.write() as db:
            mark = update(keys).where(keys.c.id == key_id, keys.c.revoked_at.is_(None))
            done = await db.execute(mark.values(revoked_at=self._clock()))
        if not done.rowcount:
            raise errors.NotFound(f"no key '{key_id}' that is still good: 'python -m relay keys list' shows them")

    async def _user_id(self, db: AsyncConnection, name: str) -> str:
        found: str | None = (await db.execute(select(users.c.id).where(users.c.name == name))).scalar_one_or_none()
        if found is None:
            found = f"user-{secrets.token_hex(8)}"
            await db.execute(insert(users).values(id=found, name=name, created_at=self._clock()))
        return found


def _sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
