"""What has to be told to somebody else's server: written with the deed itself, delivered later, at least once.

A row for each webhook and event, in the transaction that ends a job: so nothing is told that did not happen, and what
happened is told though the relay is killed in between. Who takes a row has CLAIM_S for it; then it is anybody's again.
Signed as https://www.standardwebhooks.com says. Knows no HTTP route, and of a job no more than its id and its state.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import secrets
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Row, delete, func, insert, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection
from yarl import URL

from relay import errors
from relay.metrics import Metrics
from relay.store import Clock, Store
from relay.tables import Kind, webhooks
from relay.tables import webhook_deliveries as deliveries
from relay.transport import GuardedHttp, TransportFailed

log = logging.getLogger("relay.outbox")

ANSWER_WITHIN_S = 10.0
CLAIM_S = 20.0
AT_ONCE = 32  # of one webhook only one
LOOK_EVERY_S = 1.0
AGAIN_AFTER_S = (5, 30, 120, 600, 1800, 3600, 3 * 3600, 6 * 3600, 12 * 3600)  # a day in all; then it is given up
KEPT_S = 30 * 86400.0
SWEEP_EVERY_S = 3600.0
SECRET_PREFIX = "whsec_"  # noqa: S105  of each secret
EVENT_OF: Mapping[Kind, Mapping[str, str]] = {
    "fine-tune": {how: f"fine_tuning.job.{how}" for how in ("succeeded", "failed", "cancelled", "paused")},
    "batch": {how: f"batch.{how}" for how in ("completed", "failed", "expired", "cancelled", "paused")},
}
HEADERS = {"user-agent": "im-fine-webhooks", "accept-encoding": "identity"}


async def announce(db: AsyncConnection, at: float, job: Row[Any], status: str) -> None:
    """The job has come to `status`: for each webhook of its owner that wants to know."""
    event = EVENT_OF[job.kind][status]
    wanted = await db.execute(select(webhooks.c.id, webhooks.c.event_types).where(webhooks.c.owner == job.owner))
    for hook in wanted.all():
        if event not in hook.event_types:
            continue
        event_id = f"evt_{secrets.token_hex(12)}"
        body = {"id": event_id, "object": "event", "created_at": int(at), "type": event, "data": {"id": job.id}}
        row = {"event_id": event_id, "webhook_id": hook.id, "job_id": job.id, "event_type": event}
        await db.execute(insert(deliveries).values(**row, body=json.dumps(body), created_at=at, next_at=at))


def signed(secret: str, event_id: str, at: float, body: str) -> dict[str, str]:
    """The three headers. https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md"""
    key, stamp = base64.b64decode(secret.removeprefix(SECRET_PREFIX)), str(int(at))
    mac = hmac.new(key, f"{event_id}.{stamp}.{body}".encode(), hashlib.sha256).digest()
    signature = "v1," + base64.b64encode(mac).decode()
    return {"webhook-id": event_id, "webhook-timestamp": stamp, "webhook-signature": signature}


class Outbox:
    def __init__(self, store: Store, clock: Clock, metrics: Metrics, *, allow_loopback: bool) -> None:
        self._store, self._clock, self._metrics = store, clock, metrics
        self._http = GuardedHttp(HEADERS, allow_loopback=allow_loopback)
        self._under_way: dict[str, asyncio.Task[None]] = {}  # by webhook
        self._swept_at = 0.0

    async def keep_delivering(self) -> None:
        """Until it is cancelled."""
        await self._http.open()
        try:
            while True:
                try:
                    await self._round()
                except errors.Unavailable as exc:
                    log.warning("a round of webhooks failed (%s); it is tried again", exc.code)
                except (SQLAlchemyError, errors.RelayError):
                    log.exception("a round of webhooks failed; it is tried again")
                await asyncio.sleep(LOOK_EVERY_S)
        finally:
            for task in self._under_way.values():
                task.cancel()
            await asyncio.gather(*self._under_way.values(), return_exceptions=True)
            await self._http.close()

    async def _round(self) -> None:
        if self._clock() - self._swept_at >= SWEEP_EVERY_S:
            await self._sweep()
            self._swept_at = self._clock()
        for row in await self._claim():
            task = asyncio.create_task(self._deliver(row))
            self._under_way[row.webhook_id] = task
            task.add_done_callback(lambda _, hook=row.webhook_id: self._under_way.pop(hook, None))  # type: ignore[misc]

    async def _claim(self) -> list[Row[Any]]:
        """Those that are due, the oldest of each webhook; nobody else takes them for CLAIM_S."""
        now = self._clock()
        due = deliveries.c.next_at <= now
        first = select(func.min(deliveries.c.id)).where(due).group_by(deliveries.c.webhook_id)
        if self._under_way:
            first = first.where(deliveries.c.webhook_id.not_in(list(self._under_way)))
        async with self._store.read() as db:  # nearly always there is none, and reading disturbs nobody
            ids = (await db.execute(first.limit(AT_ONCE - len(self._under_way)))).scalars().all()
        if not ids:
            return []
        taken = update(deliveries).where(deliveries.c.id.in_(ids), due)
        async with self._store.write() as db:
            done = await db.execute(
                taken.values(next_at=now + CLAIM_S, attempts=deliveries.c.attempts + 1).returning(deliveries.c.id)
            )
            mine = done.scalars().all()
            query = select(deliveries, webhooks.c.url, webhooks.c.secret).join(
                webhooks, webhooks.c.id == deliveries.c.webhook_id
            )
            return list((await db.execute(query.where(deliveries.c.id.in_(mine)))).all())

    async def _deliver(self, row: Row[Any]) -> None:
        status, why = await self._send(row)
        values = self._next(row.attempts, status, why)
        outcome = "delivered" if values["delivered_at"] else "failed" if values["next_at"] else "given_up"
        self._metrics.webhooks(outcome)
        log.info("webhook %s, attempt %d for job %s: %s", row.webhook_id, row.attempts, row.job_id, why or status)
        try:
            async with self._store.write() as db:
                await db.execute(update(deliveries).where(deliveries.c.id == row.id).values(**values))
        except (SQLAlchemyError, errors.RelayError):
            log.exception("what became of a webhook could not be written; it is sent again")

    def _next(self, attempts: int, status: int | None, why: str) -> Mapping[str, Any]:
        now, told = self._clock(), {"last_status": status, "last_error": why or None}
        if status is not None and 200 <= status < 300:
            return {**told, "delivered_at": now, "next_at": None}
        over = attempts > len(AGAIN_AFTER_S)
        return {**told, "delivered_at": None, "next_at": None if over else now + AGAIN_AFTER_S[attempts - 1]}

    async def _send(self, row: Row[Any]) -> tuple[int | None, str]:
        """The answer's status, or why there is none; what it says beyond that is not read."""
        headers = {"content-type": "application/json", **signed(row.secret, row.event_id, self._clock(), row.body)}
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                answer = await self._http.request("POST", URL(row.url), headers, row.body.encode())
            answer.close()
        except TimeoutError:
            return None, f"no answer in {ANSWER_WITHIN_S:.0f} s"
        except TransportFailed as exc:
            return None, "no public address" if exc.forbidden else "no connection"
        redirected = 300 <= answer.status < 400
        return answer.status, "redirects are not followed" if redirected else ""

    async def _sweep(self) -> None:
        """The log of deliveries has an end."""
        old = deliveries.c.created_at < self._clock() - KEPT_S
        async with self._store.write() as db:
            await db.execute(delete(deliveries).where(old))
