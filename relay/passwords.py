"""Signing in with a name and a password. Argon2id; wrong names cost what wrong passwords cost.

A password stands for a hidden key of its user, whose text nobody has: sessions hang on it as on any key, and end when
the password changes or that key is revoked. Guessing is slowed by name and by address; a key still signs in then.
"""

import asyncio
import contextlib
import hashlib
import ipaddress
import secrets
import unicodedata
from collections.abc import AsyncIterator

import argon2
import argon2.exceptions
from sqlalchemy import delete, insert, select, update

from relay import errors
from relay.accounts import Accounts
from relay.audit import COMMAND_LINE, By, note
from relay.limits import Buckets
from relay.store import Clock, Store
from relay.tables import keys, passwords, sessions, users

MIN_CHARS, MAX_CHARS = 10, 500
HASHES_AT_ONCE = 2  # each takes 19 MiB and some 20 ms of a core
MOST_WAITING = 20  # those two among them
TRIES_PER_NAME, TRIES_PER_ADDRESS = 10, 30  # a minute
SHOWN = "password"  # in lists of keys
# https://cheatsheetseries.owasp.org/cheatsheets/Password_Storage_Cheat_Sheet.html
HASHER = argon2.PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1)


class Passwords:
    def __init__(self, store: Store, accounts: Accounts, clock: Clock) -> None:
        self._store = store
        self._accounts = accounts
        self._clock = clock
        self._tries = Buckets(clock)
        self._turn = asyncio.Semaphore(HASHES_AT_ONCE)
        self._waiting = 0
        self._nobodys: str | None = None  # what a name without a password is compared with

    async def check(self, name: str, password: str, address: str) -> str:
        """The hash of the key that it stands for. Raises InvalidKey, RateLimited, TooMany."""
        for what, limit in ((f"name {name}", TRIES_PER_NAME), (f"from {network(address)}", TRIES_PER_ADDRESS)):
            taken, bucket = self._tries.take(what, limit)
            if not taken:
                wait_s = str(bucket.seconds_until(1))
                message = f"too many attempts to sign in: try again in {wait_s} s, or sign in with a key"
                raise errors.RateLimited(message, {"retry-after": wait_s})
        query = (
            select(users.c.id, passwords.c.argon2)
            .join(passwords, passwords.c.user_id == users.c.id)
            .where(users.c.name == name)
        )
        async with self._store.read() as db:
            row = (await db.execute(query)).one_or_none()
        if self._nobodys is None:
            self._nobodys = await self._hash(secrets.token_urlsafe(16))
        good = await self._verify(row.argon2 if row else self._nobodys, password)
        if row is None or not good:
            raise errors.InvalidKey("this name and password do not go together")
        return await self._key_of(row.id, row.argon2)

    async def set(self, name: str, password: str, by: By = COMMAND_LINE) -> None:
        """Makes the user if there is none; ends the sessions that were opened by password. Raises InvalidRequest."""
        if not MIN_CHARS <= len(password) <= MAX_CHARS:
            raise errors.InvalidRequest(f"a password has {MIN_CHARS} to {MAX_CHARS} characters", param="password")
        made = await self._hash(password)
        user_id = await self._accounts.make_user(name, by)
        async with self._store.write() as db:
            old = (await db.execute(select(keys.c.sha256).where(keys.c.id == _key_id(user_id)))).scalar_one_or_none()
            await db.execute(delete(sessions).where(sessions.c.key_sha256 == old))
            await db.execute(update(keys).where(keys.c.id == _key_id(user_id)).values(sha256=_nobody_knows()))
            row = {"argon2": made, "changed_at": self._clock()}
            done = await db.execute(update(passwords).where(passwords.c.user_id == user_id).values(**row))
            if not done.rowcount:
                await db.execute(insert(passwords).values(user_id=user_id, **row))
            await note(db, self._clock(), by, "password.set", name)
        self._accounts.forget()

    async def has(self, user_id: str) -> bool:
        async with self._store.read() as db:
            found = await db.execute(select(passwords.c.user_id).where(passwords.c.user_id == user_id))
        return found.one_or_none() is not None

    async def _key_of(self, user_id: str, checked: str) -> str:
        """Raises InvalidKey where the password has changed since it was checked."""
        async with self._store.write() as db:
            still = select(passwords.c.argon2).where(passwords.c.user_id == user_id)
            if (await db.execute(still)).scalar_one_or_none() != checked:
                raise errors.InvalidKey("the password has changed just now: sign in with the new one")
            key = (await db.execute(select(keys).where(keys.c.id == _key_id(user_id)))).one_or_none()
            if key is not None and key.revoked_at is None:
                return str(key.sha256)
            sha256 = _nobody_knows()
            if key is None:
                row = {"id": _key_id(user_id), "owner": user_id, "prefix": SHOWN, "created_at": self._clock()}
                await db.execute(insert(keys).values(**row, sha256=sha256))
            else:  # revoked, which ended its sessions; these do not come back
                await db.execute(update(keys).where(keys.c.id == key.id).values(sha256=sha256, revoked_at=None))
        return sha256

    async def _hash(self, password: str) -> str:
        async with self._in_turn():
            return await asyncio.to_thread(HASHER.hash, _normal(password))

    async def _verify(self, stored: str, password: str) -> bool:
        async with self._in_turn():
            try:
                return await asyncio.to_thread(HASHER.verify, stored, _normal(password))
            except argon2.exceptions.VerificationError:
                return False

    @contextlib.asynccontextmanager
    async def _in_turn(self) -> AsyncIterator[None]:
        """Few at once, so that a flood of attempts eats neither memory nor threads. Raises TooMany."""
        if self._waiting >= MOST_WAITING:
            raise errors.TooMany("too many people sign in at this moment: try again in a few seconds")
        self._waiting += 1
        try:
            async with self._turn:
                yield
        finally:
            self._waiting -= 1


def _key_id(user_id: str) -> str:
    return f"password-{user_id}"


def _nobody_knows() -> str:
    return hashlib.sha256(secrets.token_bytes(32)).hexdigest()


def _normal(password: str) -> bytes:
    """However the keyboard composed it."""
    return unicodedata.normalize("NFC", password).encode("utf-8", "surrogatepass")


def network(address: str) -> str:
    """Whoever has one IPv6 address has its /64."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return "nowhere"
    return str(ipaddress.ip_network((ip, 64), strict=False) if ip.version == 6 else ip)
