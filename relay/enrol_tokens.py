"""What lets a gpu join: the fixed token of the settings, and tokens that are made, end and are revoked one by one.

A made token is shown once and kept as its hash. A one-time token belongs to the instance that used it first. An
instance that enrolled with a token may come back with it, also after the token's end, until it is revoked; then
what that gpu signs is refused too. Knows nothing of gpus beyond the token that they came with.
"""

import hashlib
import hmac
import secrets
from dataclasses import dataclass

from sqlalchemy import func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from relay import errors
from relay.audit import COMMAND_LINE, By, note
from relay.store import Clock, Store
from relay.tables import enrol_tokens, gpus

PREFIX = "enrol-"
SHOWN_CHARS = 12  # of a token, in lists
LONG_GONE = 0.0  # when a gpu was heard last whose token is revoked
WHERE_TOKENS_COME_FROM = (
    "the fixed one lies in enrol.token in the relay's data folder, 'python -m relay tokens create' makes others, "
    "and the gpu reads it from GPU_ENROL_TOKEN"
)


@dataclass(frozen=True)
class EnrolToken:
    id: str
    name: str | None
    prefix: str
    reusable: bool
    created_at: float
    expires_at: float | None
    used_at: float | None  # when a gpu enrolled with it last
    revoked_at: float | None
    gpus: int  # that came with it last


class EnrolTokens:
    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._fixed = secrets.token_hex(32)  # nobody's, until open()

    def open(self, fixed: str) -> None:
        self._fixed = fixed

    @property
    def fixed(self) -> str:
        return self._fixed

    async def check(self, authorization: str | None) -> str | None:
        """The id of a made token, None for the fixed one. Raises InvalidEnrolToken; whose it is, use() checks."""
        scheme, _, token = (authorization or "").partition(" ")
        token = token.strip()
        if scheme.lower() == "bearer" and hmac.compare_digest(token.encode(), self._fixed.encode()):
            return None
        # By its hash: how long that takes says nothing about the token.
        query = select(enrol_tokens.c.id).where(
            enrol_tokens.c.sha256 == _sha256(token), enrol_tokens.c.revoked_at.is_(None)
        )
        async with self._store.read() as db:
            found: str | None = (await db.execute(query)).scalar_one_or_none()
        if scheme.lower() != "bearer" or found is None:
            raise errors.InvalidEnrolToken(f"the enrol token is missing, wrong or revoked: {WHERE_TOKENS_COME_FROM}")
        return found

    async def create(
        self,
        name: str | None = None,
        *,
        reusable: bool = False,
        expires_at: float | None = None,
        by: By = COMMAND_LINE,
    ) -> tuple[str, str]:
        """Its id and the token."""
        token, token_id = PREFIX + secrets.token_urlsafe(32), f"enrol-token-{secrets.token_hex(6)}"
        row = {"id": token_id, "sha256": _sha256(token), "prefix": token[:SHOWN_CHARS], "name": name}
        async with self._store.write() as db:
            made = {"created_at": self._clock(), "expires_at": expires_at, "reusable": reusable}
            await db.execute(insert(enrol_tokens).values(**row, **made))
            await note(db, self._clock(), by, "enrol_token.create", token_id)
        return token_id, token

    async def known(self) -> list[EnrolToken]:
        """The newest first, the revoked ones too."""
        came = select(func.count()).where(gpus.c.enrol_token == enrol_tokens.c.id).scalar_subquery()
        query = select(enrol_tokens, came.label("gpus")).order_by(enrol_tokens.c.created_at.desc(), enrol_tokens.c.id)
        async with self._store.read() as db:
            rows = await db.execute(query)
        return [
            EnrolToken(r.id, r.name, r.prefix, r.reusable, r.created_at, r.expires_at, r.used_at, r.revoked_at, r.gpus)
            for r in rows
        ]

    async def revoke(self, token_id: str, by: By = COMMAND_LINE) -> None:
        """For good. The gpus that came with it count as gone; their jobs wait again when the leases are over.

        Raises NotFound.
        """
        async with self._store.write() as db:
            mark = update(enrol_tokens).where(enrol_tokens.c.id == token_id, enrol_tokens.c.revoked_at.is_(None))
            done = await db.execute(mark.values(revoked_at=self._clock()))
            await db.execute(update(gpus).where(gpus.c.enrol_token == token_id).values(last_seen_at=LONG_GONE))
            if done.rowcount:
                await note(db, self._clock(), by, "enrol_token.revoke", token_id)
        if not done.rowcount:
            raise errors.NotFound(
                f"no enrol token '{token_id[:50]}' that is still good: 'python -m relay tokens list' shows them"
            )


async def use(db: AsyncConnection, token_id: str, instance_sha256: str, now: float) -> None:
    """Within the enrolment's transaction, so that of two at once one wins. Raises InvalidEnrolToken."""
    t = enrol_tokens.c
    came_with = select(gpus.c.enrol_token).where(gpus.c.instance_sha256 == instance_sha256).scalar_subquery()
    returns = or_(t.instance_sha256 == instance_sha256, t.reusable & (came_with == token_id))
    begins = or_(t.expires_at.is_(None), t.expires_at > now) & or_(t.reusable, t.instance_sha256.is_(None))
    mark = update(enrol_tokens).where(t.id == token_id, t.revoked_at.is_(None), or_(returns, begins))
    done = await db.execute(mark.values(instance_sha256=instance_sha256, used_at=now))
    if not done.rowcount:
        raise errors.InvalidEnrolToken(
            "the enrol token has ended, is revoked, or is a one-time token that another gpu has used: "
            "'python -m relay tokens create' makes another, for GPU_ENROL_TOKEN"
        )


def _sha256(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
