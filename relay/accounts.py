"""Users and their API keys. A key is shown once and kept as its hash.

The admin's key comes from the settings, and is the only one that can be read again. A good key is remembered for a
second, so a busy one costs no query a request: what this process revokes is refused at once, what another process or
the command line revokes within that second. When a key was last used is written in batches: a crash loses a few
seconds of it.
"""

import asyncio
import hashlib
import logging
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final, Literal

from sqlalchemy import insert, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from relay import errors
from relay.audit import COMMAND_LINE, By, note
from relay.shared import Shared
from relay.store import Clock, Store
from relay.tables import key_rules, keys, users

log = logging.getLogger("relay.accounts")

KEY_PREFIX = "sk-fine-"
ADMIN = "admin"
SHOWN_CHARS = 14  # of a key, in lists
ADMIN_KEY_ID = "key-admin"
LAST_USED_EVERY_S = 60.0  # nobody needs it more exactly
REMEMBERED_S = 1.0  # how long a key counts as good without another look
MOST_REMEMBERED = 10_000  # keys
FOLD_EVERY_S = 5.0
LIMITS = ("expires_at", "requests_per_minute", "tokens_per_month", "spend_per_month")
RULES = (key_rules.c.scopes, *(key_rules.c[name] for name in LIMITS))
WHERE_KEYS_COME_FROM = (
    "send 'Authorization: Bearer sk-fine-...'. The key of admin lies in admin.key in the relay's data folder; "
    "'python -m relay keys create --user NAME' makes others"
)


Scope = Literal["generate", "train", "admin"]
SCOPES: Final[tuple[Scope, ...]] = ("generate", "train", "admin")


@dataclass(frozen=True)
class Rules:
    """What a key may do. Without limits it may do all that its user may."""

    scopes: Collection[Scope] = SCOPES
    expires_at: float | None = None
    requests_per_minute: int | None = None
    tokens_per_month: int | None = None
    spend_per_month: float | None = None

    @property
    def limited(self) -> bool:
        return self != Rules()


@dataclass(frozen=True)
class User:
    id: str
    name: str
    key_id: str  # of the key that they came with
    rules: Rules = Rules()  # of that key

    @property
    def is_admin(self) -> bool:
        return self.name == ADMIN and "admin" in self.rules.scopes

    def need(self, scope: Scope) -> None:
        """Raises MissingScope."""
        if scope not in self.rules.scopes:
            has = ", ".join(self.rules.scopes)
            raise errors.MissingScope(f"this takes a key with the scope '{scope}'; this one has: {has}", param=scope)


@dataclass(frozen=True)
class Key:
    id: str
    user: str
    name: str | None
    prefix: str
    created_at: float
    last_used_at: float | None
    revoked_at: float | None
    rules: Rules


@dataclass
class _Remembered:
    user: User
    looked_at: float
    last_used_at: float


class Accounts:
    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._remembered: dict[str, _Remembered] = {}  # by the key's hash
        self._looks: Shared[tuple[str, int], _Remembered] = Shared()
        self._changes = 0  # of keys by this process: a look that began before one is not remembered
        self._used: dict[str, float] = {}  # key id -> when; not yet in the database

    async def open(self, admin_key: str) -> None:
        """Exactly one admin key is good: this one."""
        now = self._clock()
        async with self._store.write() as db:
            owner = await self._user_id(db, ADMIN, By("relay"))
            row = {"sha256": _sha256(admin_key), "prefix": admin_key[:SHOWN_CHARS]}
            done = await db.execute(update(keys).where(keys.c.id == ADMIN_KEY_ID).values(**row))
            if not done.rowcount:
                await db.execute(insert(keys).values(id=ADMIN_KEY_ID, owner=owner, created_at=now, **row))
        self.forget()

    async def user_of(self, authorization: str | None) -> User:
        """Whose key this header carries. Raises InvalidKey."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise errors.InvalidKey(f"no API key: {WHERE_KEYS_COME_FROM}")
        return await self.user_of_hash(_sha256(key.strip()))

    async def user_of_hash(self, sha256: str) -> User:
        """Whose key has this hash. Raises InvalidKey."""
        now = self._clock()
        held = self._remembered.get(sha256)
        if held is None or not 0 <= now - held.looked_at < REMEMBERED_S:  # a clock that was set back proves nothing
            held = await self._looks.get((sha256, self._changes), lambda: self._look_up(sha256, now))
        if (ends := held.user.rules.expires_at) is not None and ends <= now:
            raise errors.InvalidKey("this API key has expired: make another on the page, or by 'keys create'")
        if held.last_used_at < now - LAST_USED_EVERY_S:
            held.last_used_at = self._used[held.user.key_id] = now
        return held.user

    async def _look_up(self, sha256: str, now: float) -> "_Remembered":
        # By its hash: how long that takes says nothing about the key.
        query = (
            select(users.c.id, users.c.name, keys.c.id.label("key_id"), keys.c.last_used_at, *RULES)
            .join(keys, keys.c.owner == users.c.id)
            .outerjoin(key_rules, key_rules.c.key_id == keys.c.id)
            .where(keys.c.sha256 == sha256, keys.c.revoked_at.is_(None))
            .where(users.c.disabled_at.is_(None), users.c.deleting_at.is_(None))
        )
        changes = self._changes
        async with self._store.read() as db:
            row = (await db.execute(query)).one_or_none()
        if row is None:
            self._remembered.pop(sha256, None)
            raise errors.InvalidKey(f"this API key is wrong or revoked: {WHERE_KEYS_COME_FROM}")
        used_at = max(row.last_used_at or 0.0, self._used.get(row.key_id, 0.0))
        held = _Remembered(User(row.id, row.name, row.key_id, _rules(row)), now, used_at)
        if changes == self._changes:
            if len(self._remembered) >= MOST_REMEMBERED:
                self._remembered.clear()
            self._remembered[sha256] = held
        return held

    def forget(self) -> None:
        """Keys have changed: each is looked up again."""
        self._changes += 1
        self._remembered.clear()

    async def fold(self) -> None:
        """What was noted since the last time goes into the database; it stays noted where that fails."""
        noted = dict(self._used)
        if not noted:
            return
        try:
            async with self._store.write() as db:
                for key_id, at in noted.items():
                    await db.execute(update(keys).where(keys.c.id == key_id).values(last_used_at=at))
        except (SQLAlchemyError, errors.Unavailable):
            log.exception("when keys were used could not be written; it is tried again")
            return
        for key_id, at in noted.items():
            if self._used.get(key_id) == at:
                del self._used[key_id]

    async def keep_folding(self) -> None:
        """Every few seconds, until it is cancelled."""
        while True:
            await asyncio.sleep(FOLD_EVERY_S)
            await self.fold()

    async def create_key(
        self, user: str, name: str | None = None, rules: Rules | None = None, by: By = COMMAND_LINE
    ) -> tuple[str, str]:
        """Its id and the key. Makes the user if there is none. Raises InvalidRequest for a name that can't be."""
        _check_name(user)
        key, key_id = KEY_PREFIX + secrets.token_urlsafe(32), f"key-{secrets.token_hex(6)}"
        async with self._store.write() as db:
            owner = await self._user_id(db, user, by)
            row = {"id": key_id, "owner": owner, "sha256": _sha256(key), "prefix": key[:SHOWN_CHARS]}
            await db.execute(insert(keys).values(**row, name=name, created_at=self._clock()))
            if rules and rules.limited:
                limits = {name: getattr(rules, name) for name in LIMITS}
                await db.execute(insert(key_rules).values(key_id=key_id, scopes=list(rules.scopes), **limits))
            await note(db, self._clock(), by, "key.create", f"{key_id} of {user}")
        return key_id, key

    async def make_user(self, name: str, by: By = COMMAND_LINE) -> str:
        """Its id, whether it is new or not. Raises InvalidRequest for a name that can't be."""
        _check_name(name)
        async with self._store.write() as db:
            return await self._user_id(db, name, by)

    async def list_keys(self) -> list[Key]:
        query = (
            select(keys, users.c.name.label("user"), *RULES)
            .join(users, keys.c.owner == users.c.id)
            .outerjoin(key_rules, key_rules.c.key_id == keys.c.id)
            .order_by(keys.c.created_at)
        )
        async with self._store.read() as db:
            rows = await db.execute(query)
        return [
            Key(r.id, r.user, r.name, r.prefix, r.created_at, r.last_used_at, r.revoked_at, _rules(r)) for r in rows
        ]

    async def revoke(self, key_id: str, by: By = COMMAND_LINE) -> None:
        """At once here, within REMEMBERED_S in other processes. Raises NotFound, and InvalidRequest for the admin's."""
        if key_id == ADMIN_KEY_ID:
            raise errors.InvalidRequest("the admin's key is changed by RELAY_ADMIN_KEY, or by deleting admin.key")
        async with self._store.write() as db:
            mark = update(keys).where(keys.c.id == key_id, keys.c.revoked_at.is_(None))
            done = await db.execute(mark.values(revoked_at=self._clock()))
            if done.rowcount:
                await note(db, self._clock(), by, "key.revoke", key_id)
        self.forget()
        if not done.rowcount:
            raise errors.NotFound(f"no key '{key_id}' that is still good: 'python -m relay keys list' shows them")

    async def _user_id(self, db: AsyncConnection, name: str, by: By) -> str:
        found: str | None = (await db.execute(select(users.c.id).where(users.c.name == name))).scalar_one_or_none()
        if found is None:
            found = f"user-{secrets.token_hex(8)}"
            await db.execute(insert(users).values(id=found, name=name, created_at=self._clock()))
            await note(db, self._clock(), by, "user.create", name)
        return found


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[\w.@-]{1,100}", name):
        raise errors.InvalidRequest("a user's name is 1 to 100 letters, digits, '.', '_', '-' or '@'", param="user")


def _rules(row: Any) -> Rules:
    if row.scopes is None:
        return Rules()
    return Rules(tuple(row.scopes), **{name: getattr(row, name) for name in LIMITS})


def _sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
