"""Which gpus there are, which are alive, which can be reached, and which one takes a request.

Alive (it sends heartbeats) and reachable (its tunnel led to it when last tried) are two facts: the first is in the
database, the second is what this process knows by itself. Knows nothing of jobs.
"""

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import Row, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

import wire
from relay import errors
from relay.calls import Call
from relay.gpu_client import GpuClient
from relay.settings import Settings
from relay.store import Clock, Store
from relay.tables import base_models, gpus, offers
from relay.transport import Endpoint

log = logging.getLogger("relay.gpus")

SHOWN_FOR_S = 24 * 3600.0  # a gpu that left is still listed this long
SHOWN = 100


class Gpus:
    def __init__(self, store: Store, client: GpuClient, settings: Settings, clock: Clock) -> None:
        self._store = store
        self._client = client
        self._settings = settings
        self._clock = clock
        self._seen = wire.SeenNonces()
        self._proven: dict[str, int] = {}  # gpu id -> the epoch whose URL led to it
        self._tried_at: dict[str, float] = {}
        self._challenges: dict[tuple[str, int], asyncio.Task[None]] = {}  # under way, by gpu id and epoch
        self._calls: set[Call] = set()  # live requests of this process
        self._enrol_token = secrets.token_hex(32)  # nobody's, until open()

    def open(self, enrol_token: str) -> None:
        self._enrol_token = enrol_token

    @property
    def enrol_token(self) -> str:
        return self._enrol_token

    async def close(self) -> None:
        for task in list(self._challenges.values()):
            task.cancel()
        await asyncio.gather(*self._challenges.values(), return_exceptions=True)

    # --- what gpus say ---

    def check_enrol_token(self, authorization: str | None) -> None:
        """Raises InvalidEnrolToken."""
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), self._enrol_token.encode()):
            raise errors.InvalidEnrolToken(
                "the enrol token is missing or wrong: it lies in enrol.token in the relay's data folder, "
                "and the gpu reads it from GPU_ENROL_TOKEN"
            )

    async def enrol(self, request: wire.EnrolRequest) -> wire.EnrolReply:
        """The same instance is the same gpu, one epoch on, with a new key. Raises InvalidRequest, BadGpuUrl."""
        if request.protocol != wire.PROTOCOL:
            raise errors.InvalidRequest(
                f"this relay speaks protocol {wire.PROTOCOL}, the gpu {request.protocol}: update the older of the two",
                param="protocol",
            )
        dialled = request.tunnel == wire.DIALLED
        url = check_url(request.url, self._settings) if request.url and not dialled else None
        now, signing_key = self._clock(), secrets.token_hex(32)
        row = {
            "signing_key": signing_key,
            "process": request.process,
            "name": request.name,
            "url": url,
            "tunnel": request.tunnel,
            "device": request.device.model_dump(),
            "families": list(request.families),
            "free_bytes": request.device.free_bytes,
            "runtime_ends_at": request.runtime_ends_at,
            "enrolled_at": now,
            "last_seen_at": now,
        }
        instance = hashlib.sha256(request.instance.encode()).hexdigest()
        async with self._store.write() as db:
            known = select(gpus.c.id, gpus.c.epoch).where(gpus.c.instance_sha256 == instance)
            found = (await db.execute(known)).one_or_none()
            gpu_id, epoch = (found.id, found.epoch + 1) if found else (f"gpu-{secrets.token_hex(6)}", 1)
            if found:
                await db.execute(update(gpus).where(gpus.c.id == gpu_id).values(**row, epoch=epoch))
            else:
                await db.execute(insert(gpus).values(**row, id=gpu_id, epoch=epoch, instance_sha256=instance))
            await self._offer(db, gpu_id, request.models)
        self._proven.pop(gpu_id, None)
        log.info("gpu %s %r enrolled, epoch %d, tunnel %s", gpu_id, request.name, epoch, request.tunnel)
        return wire.EnrolReply(
            gpu_id=gpu_id,
            epoch=epoch,
            signing_key=signing_key,
            relay_time=now,
            heartbeat_s=self._settings.heartbeat_s,
            lease_s=self._settings.lease_s,
        )

    async def verify(self, method: str, target: str, headers: Mapping[str, str]) -> tuple[wire.SignedBy, str]:
        """Who signed, and the SHA-256 that the body must have. Raises BadSignature, UnknownGpu."""
        try:
            by = wire.SignedBy.claimed(headers)
        except wire.BadSignature as exc:
            raise errors.BadSignature(str(exc)) from exc
        query = select(gpus.c.signing_key).where(gpus.c.id == by.gpu_id, gpus.c.epoch == by.epoch)
        async with self._store.read() as db:
            key = (await db.execute(query)).scalar_one_or_none()
        if key is None:
            raise errors.UnknownGpu("this gpu and epoch are not enrolled here: enrol again")
        try:
            return by, wire.verify(key, by, method, target, headers, self._clock(), self._seen)
        except wire.BadSignature as exc:
            log.warning("%s %s by %s refused: %s", method, target.partition("?")[0], by.gpu_id, exc)
            raise errors.BadSignature("the signature is not good, too old, or used before: sign again") from exc

    async def heard(self, by: wire.SignedBy, beat: wire.Heartbeat) -> None:
        async with self._store.write() as db:
            row = {"last_seen_at": self._clock(), "free_bytes": beat.free_bytes}
            current = (gpus.c.id == by.gpu_id) & (gpus.c.epoch == by.epoch)
            await db.execute(update(gpus).where(current).values(**row, active_requests=beat.active_requests))
            await self._offer(db, by.gpu_id, beat.models)
        if not self.reachable(by.gpu_id, by.epoch):
            await self.prove(by.gpu_id)

    async def goodbye(self, by: wire.SignedBy) -> None:
        """It is gone, and counts as silent from now on; a heartbeat would bring it back."""
        long_ago = self._clock() - self._settings.alive_s - 1
        current = (gpus.c.id == by.gpu_id) & (gpus.c.epoch == by.epoch)
        async with self._store.write() as db:
            await db.execute(update(gpus).where(current).values(last_seen_at=long_ago, active_requests=0))
        self.unproven(by)
        log.info("gpu %s said goodbye", by.gpu_id)

    async def _offer(self, db: AsyncConnection, gpu_id: str, models: list[wire.OfferedModel]) -> None:
        held = {r.model_id: r.loaded for r in await db.execute(select(offers).where(offers.c.gpu_id == gpu_id))}
        now_held = {m.id: m.loaded for m in models}
        if held == now_held:
            return
        known = set((await db.execute(select(base_models.c.id).where(base_models.c.id.in_(now_held)))).scalars())
        for model in {m.id: m for m in models if m.id not in known}.values():
            row = model.model_dump(exclude={"loaded"})
            await db.execute(insert(base_models).values(**row, created_at=self._clock()))
        await db.execute(delete(offers).where(offers.c.gpu_id == gpu_id))
        for model_id, loaded in now_held.items():
            await db.execute(insert(offers).values(gpu_id=gpu_id, model_id=model_id, loaded=loaded))

    # --- reaching them ---

    def reachable(self, gpu_id: str, epoch: int) -> bool:
        return self._proven.get(gpu_id) == epoch

    def reachable_ids(self) -> list[str]:
        return list(self._proven)

    def mark_unreachable(self, to: Endpoint) -> None:
        """Until it has answered a challenge again."""
        if self._proven.get(to.gpu_id) == to.epoch:
            del self._proven[to.gpu_id]
            log.warning("gpu %s %r can't be reached", to.gpu_id, to.name)
            self._start_challenge(to)  # at once: one answer that broke off need not mean more than itself

    def unproven(self, by: wire.SignedBy) -> None:
        """Its way to us is new, or gone: nothing goes there before it has answered a challenge."""
        if self._proven.get(by.gpu_id) == by.epoch:
            del self._proven[by.gpu_id]

    async def prove(self, at_once: str | None = None) -> None:
        """Challenge, in the background, whoever is alive and has not proven its URL to this process lately.

        The gpu `at_once` is not told to wait for its turn. Requests that wait for a gpu that went silent end here.
        """
        now, alive = self._clock(), await self._alive()
        self._break_off_silent({row.id for row in alive}, now)
        # Since its enrolment, too: it must have read our reply before it can prove anything. Who is gone is forgotten.
        self._tried_at = {row.id: max(self._tried_at.get(row.id, 0.0), row.enrolled_at) for row in alive}
        for row in alive:
            due = row.id == at_once or now - self._tried_at[row.id] >= self._settings.heartbeat_s
            if due and not self.reachable(row.id, row.epoch):
                self._start_challenge(_endpoint(row))

    def _break_off_silent(self, alive: Collection[str], now: float) -> None:
        """A gpu that still sends bytes is not silent, whatever its heartbeats do."""
        for call in self._calls:
            if call.to.gpu_id not in alive:
                call.break_off(waiting_since=now - self._settings.alive_s)

    def _start_challenge(self, to: Endpoint) -> None:
        which = (to.gpu_id, to.epoch)
        if which in self._challenges:
            return
        self._tried_at[to.gpu_id] = self._clock()
        self._challenges[which] = asyncio.create_task(self._challenge(to))
        self._challenges[which].add_done_callback(lambda _: self._challenges.pop(which, None))

    async def _challenge(self, to: Endpoint) -> None:
        try:
            proven = await self._client.challenge(to)
        except errors.GpuUnreachable as exc:
            log.warning("gpu %s: %s", to.gpu_id, exc.message)
            return
        if not proven:
            log.warning("gpu %s: what is behind its URL is not the gpu that enrolled", to.gpu_id)
            return
        self._proven[to.gpu_id] = to.epoch
        log.info("gpu %s %r is reachable", to.gpu_id, to.name)

    # --- choosing one ---

    async def choose(self, model: str, exclude: Collection[str] = ()) -> Endpoint | None:
        """Alive, reachable, with this base model; the least busy. None if there is no such gpu."""
        able = [row for row in await self._alive(model) if row.id not in exclude and self.reachable(row.id, row.epoch)]
        if not able:
            return None
        in_flight = Counter(call.to.gpu_id for call in self._calls)
        return _endpoint(min(able, key=lambda row: (in_flight[row.id], not row.loaded, secrets.randbits(16))))

    @contextlib.contextmanager
    def busy(self, to: Endpoint) -> Iterator[Call]:
        """Counts a live request for as long as it lasts; of this process only."""
        call = Call(to, self._clock)
        self._calls.add(call)
        try:
            yield call
        finally:
            self._calls.discard(call)

    async def any_alive(self, model: str) -> bool:
        """Whether a gpu with this base model is there, reachable or not."""
        return bool(await self._alive(model))

    async def known(self) -> list[tuple[Row[Any], list[Row[Any]]]]:
        """Those heard within a day, the latest first, each with the base models that it offers."""
        recent = (
            select(gpus).where(gpus.c.last_seen_at >= self._clock() - SHOWN_FOR_S).order_by(gpus.c.enrolled_at.desc())
        )
        has = select(offers, base_models.c.family).join(base_models, base_models.c.id == offers.c.model_id)
        async with self._store.read() as db:
            rows = (await db.execute(recent.limit(SHOWN))).all()
            offered = (await db.execute(has.where(offers.c.gpu_id.in_([row.id for row in rows])))).all()
        return [(row, [offer for offer in offered if offer.gpu_id == row.id]) for row in rows]

    def is_alive(self, row: Row[Any]) -> bool:
        return bool(row.last_seen_at >= self._clock() - self._settings.alive_s)

    async def _alive(self, model: str | None = None) -> Sequence[Row[Any]]:
        """Those with a way to them and, where one is named, the model; then also whether they have it `loaded`."""
        has_way = gpus.c.url.is_not(None) | (gpus.c.tunnel == wire.DIALLED)
        query = select(gpus).where(has_way, gpus.c.last_seen_at >= self._clock() - self._settings.alive_s)
        if model is not None:
            query = query.join(offers, offers.c.gpu_id == gpus.c.id).where(offers.c.model_id == model)
            query = query.add_columns(offers.c.loaded)
        async with self._store.read() as db:
            return (await db.execute(query)).all()


def _endpoint(row: Row[Any]) -> Endpoint:
    return Endpoint(row.id, row.epoch, row.name, row.tunnel, row.url, row.signing_key)


def check_url(url: str, settings: Settings) -> str:
    """The URL as we will call it. Raises BadGpuUrl: known tunnels only, never an address of a gpu's choosing."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError as exc:
        raise errors.BadGpuUrl(f"url: '{url}' is no URL: {exc}", param="url") from exc
    if parts.username or parts.password or parts.query or parts.fragment or parts.path not in ("", "/"):
        raise errors.BadGpuUrl("url: give scheme and host only, such as https://name.ngrok-free.app", param="url")
    if _is_loopback(host):
        if not settings.allow_loopback_gpus:
            raise errors.BadGpuUrl(
                "url: gpus on loopback are for development; the relay takes them with RELAY_ALLOW_LOOPBACK_GPUS=1",
                param="url",
            )
        if parts.scheme not in ("http", "https"):
            raise errors.BadGpuUrl("url: use http or https", param="url")
        shown = f"[{host}]" if ":" in host else host
        return f"{parts.scheme}://{shown}:{port}" if port else f"{parts.scheme}://{shown}"
    if parts.scheme != "https" or port not in (None, 443):
        raise errors.BadGpuUrl("url: use https on its usual port", param="url")
    if not re.fullmatch(r"[a-z0-9.-]{1,253}", host):  # what two parsers might read in two ways, neither gets to see
        raise errors.BadGpuUrl(f"url: '{host}' is no host name", param="url")
    if not host.endswith(settings.gpu_host_suffixes):
        raise errors.BadGpuUrl(
            f"url: host '{host}' ends with none of {', '.join(settings.gpu_host_suffixes)}; "
            "RELAY_GPU_HOST_SUFFIXES on the relay adds others",
            param="url",
        )
    return f"https://{host}"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
