"""Who is asking: a key as bearer, or the page's session, which stands in for the key it was opened with.

The session is a random cookie, kept here as its hash. It ends with its key. So that no other site can use it, it
counts only where the page's own header stands beside it, which a foreign page can't send, and where the browser does
not say that another site is asking. The rule is the same for every route and method.
"""

import hashlib
import re
import secrets
from collections.abc import Mapping
from urllib.parse import urlsplit

from sqlalchemy import delete, insert, select
from starlette.requests import cookie_parser

from relay import errors
from relay.accounts import Accounts, User
from relay.audit import By, note
from relay.store import Clock, Store
from relay.tables import sessions

COOKIE = "imfine_session"  # and the port: browsers send a host's cookies to all of its ports
PAGE_HEADER = "x-imfine-page"
SESSION_S = 30 * 24 * 3600.0


class Sessions:
    def __init__(self, store: Store, accounts: Accounts, clock: Clock) -> None:
        self._store = store
        self._accounts = accounts
        self._clock = clock

    async def caller(self, headers: Mapping[str, str], *, secure: bool) -> User:
        """`secure`: it came by https. Raises InvalidKey, Forbidden."""
        authorization, token = headers.get("authorization"), _token(headers, secure)
        if authorization is not None or token is None or PAGE_HEADER not in headers:
            return await self._accounts.user_of(authorization)
        check_same_site(headers)
        query = select(sessions.c.key_sha256).where(
            sessions.c.sha256 == _sha256(token), sessions.c.expires_at > self._clock()
        )
        async with self._store.read() as db:
            key_sha256 = (await db.execute(query)).scalar_one_or_none()
        try:
            if key_sha256 is not None:
                return await self._accounts.user_of_hash(key_sha256)
        except errors.InvalidKey:
            pass
        raise errors.InvalidKey("the session is over: sign in again")

    async def open(self, key: str, address: str = "") -> tuple[str, User]:
        """A new session's token, and whose it is. Raises InvalidKey."""
        return await self.open_by_hash(_sha256(key.strip()), address)

    async def open_by_hash(self, key_sha256: str, address: str = "") -> tuple[str, User]:
        """For the key with this hash. Raises InvalidKey."""
        user = await self._accounts.user_of_hash(key_sha256)
        now, token = self._clock(), secrets.token_urlsafe(32)
        row = {"sha256": _sha256(token), "key_sha256": key_sha256}
        async with self._store.write() as db:
            await db.execute(delete(sessions).where(sessions.c.expires_at <= now))
            await db.execute(insert(sessions).values(**row, created_at=now, expires_at=now + SESSION_S))
            await note(db, now, By(user.name, address), "session.open", user.key_id)
        return token, user

    async def close(self, headers: Mapping[str, str], *, secure: bool) -> None:
        if token := _token(headers, secure):
            async with self._store.write() as db:
                await db.execute(delete(sessions).where(sessions.c.sha256 == _sha256(token)))


def check_same_site(headers: Mapping[str, str]) -> None:
    """Raises Forbidden for what a page of another site sent, or might have.

    https://cheatsheetseries.owasp.org/cheatsheets/Cross-Site_Request_Forgery_Prevention_Cheat_Sheet.html
    """
    origin = headers.get("origin")
    foreign = origin is not None and urlsplit(origin).netloc != headers.get("host", "")
    if PAGE_HEADER not in headers or foreign or headers.get("sec-fetch-site", "same-origin") != "same-origin":
        raise errors.Forbidden(f"a session works from this relay's own page only, which sends '{PAGE_HEADER}'")


def cookie_name(headers: Mapping[str, str], secure: bool) -> str:
    """Over https with the prefix that keeps neighbouring hosts from setting it.

    https://developer.mozilla.org/docs/Web/HTTP/Reference/Headers/Set-Cookie#cookie_prefixes
    """
    port = re.search(r":([0-9]{1,5})$", headers.get("host", ""))
    return f"{'__Host-' if secure else ''}{COOKIE}{'_' + port[1] if port else ''}"


def _token(headers: Mapping[str, str], secure: bool) -> str | None:
    return cookie_parser(headers.get("cookie", "")).get(cookie_name(headers, secure))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
