"""Which gpus there are, which are alive, which can be reached, and which one takes a request.

Alive (it sends heartbeats) and reachable (its tunnel led to it when last tried) are two facts: the first is in the
database, the second is what this process knows by itself. Knows nothing of jobs.
"""

import asyncio
import contextlib
import hashlib
import ipaddress
import logging
import re
import secrets
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import Row, delete, insert, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

import wire
from relay import enrol_tokens, errors, tables
from relay.breaker import Breaker, State
from relay.calls import Call
from relay.gpu_client import GpuClient
from relay.roster import Listed, Roster
from relay.settings import Settings
from relay.store import Clock, Store
from relay.tables import base_models, gpus, offers
from relay.transport import Endpoint

log = logging.getLogger("relay.gpus")

SHOWN_FOR_S = 24 * 3600.0  # a gpu that left is still listed this long
SHOWN = 100
PROOF_S = 5.0  # a URL that was not proven for as long gets no prompt before it is proven again
PROOF_WAIT_S = 5.0  # for that; a gpu that can't answer a challenge sooner is left for another
LOAD_AGAIN_S = 60.0  # a gpu that was told to load a model is not told again sooner


class Gpus:
    def __init__(
        self, store: Store, client: GpuClient, settings: Settings, clock: Clock, relay_id: str | None = None
    ) -> None:
        """`relay_id`: this process, where there are several."""
        self._relay_id = relay_id
        self._store = store
        self._client = client
        self._settings = settings
        self._clock = clock
        self._seen = wire.SeenNonces()
        self._proven: dict[str, int] = {}  # gpu id -> the epoch whose URL led to it
        self._proven_at: dict[str, float] = {}
        self._tried_at: dict[str, float] = {}
        self._tried_by: dict[str, str | None] = {}  # through which relay process, of those that dialled in
        self._dialled_in: dict[str, int] = {}  # to this process, where there are several: gpu id -> epoch
        self._challenges: dict[tuple[str, int], asyncio.Task[None]] = {}  # under way, by gpu id and epoch
        self._calls: set[Call] = set()  # live requests of this process
        self._in_flight: Counter[str] = Counter()  # the same, counted by gpu
        self._roster = Roster(store, settings.alive_s, clock)
        self._breakers: dict[str, Breaker] = {}  # of those that failed last; the others' are closed
        self._wanted: Counter[str] = Counter()  # base models that live requests of this process wait for
        self._told_to_load: dict[tuple[str, str], tuple[int, float]] = {}  # gpu and model: in which epoch, when

    async def close(self) -> None:
        for task in list(self._challenges.values()):
            task.cancel()
        await asyncio.gather(*self._challenges.values(), return_exceptions=True)

    # --- what gpus say ---

    async def enrol(self, request: wire.EnrolRequest, token_id: str | None = None) -> wire.EnrolReply:
        """The same instance is the same gpu, one epoch on, with a new key. `token_id`: of a token that was made.

        Raises InvalidRequest, BadGpuUrl, InvalidEnrolToken.
        """
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
            "enrol_token": token_id,
            "relay_id": None,
        }
        instance = hashlib.sha256(request.instance.encode()).hexdigest()
        async with self._store.write() as db:
            if token_id is not None:
                await enrol_tokens.use(db, token_id, instance, now)
            known = select(gpus.c.id, gpus.c.epoch, gpus.c.process, gpus.c.draining).where(
                gpus.c.instance_sha256 == instance
            )
            found = (await db.execute(known)).one_or_none()
            gpu_id, epoch = (found.id, found.epoch + 1) if found else (f"gpu-{secrets.token_hex(6)}", 1)
            if found:
                drains = found.draining and found.process == request.process
                await db.execute(update(gpus).where(gpus.c.id == gpu_id).values(**row, epoch=epoch, draining=drains))
            else:
                await db.execute(insert(gpus).values(**row, id=gpu_id, epoch=epoch, instance_sha256=instance))
            await self._offer(db, gpu_id, request.models)
        self._proven.pop(gpu_id, None)
        self._roster.changed()
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
        token = tables.enrol_tokens
        query = (
            select(gpus.c.signing_key)
            .outerjoin(token, token.c.id == gpus.c.enrol_token)
            .where(gpus.c.id == by.gpu_id, gpus.c.epoch == by.epoch, token.c.revoked_at.is_(None))
        )
        async with self._store.read() as db:
            key = (await db.execute(query)).scalar_one_or_none()
        if key is None:
            raise errors.UnknownGpu("this gpu and epoch are not enrolled here, or its token is revoked: enrol again")
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
            offers_changed = await self._offer(db, by.gpu_id, beat.models)
        if offers_changed:
            self._roster.changed()
        else:
            self._roster.heard(by)
        if not self.reachable(by.gpu_id, by.epoch):
            await self.prove(by.gpu_id)

    async def goodbye(self, by: wire.SignedBy) -> None:
        """It is gone, and counts as silent from now on; a heartbeat would bring it back."""
        long_ago = self._clock() - self._settings.alive_s - 1
        current = (gpus.c.id == by.gpu_id) & (gpus.c.epoch == by.epoch)
        async with self._store.write() as db:
            await db.execute(update(gpus).where(current).values(last_seen_at=long_ago, active_requests=0))
        self._roster.changed()
        self.unproven(by)
        log.info("gpu %s said goodbye", by.gpu_id)

    async def _offer(self, db: AsyncConnection, gpu_id: str, models: list[wire.OfferedModel]) -> bool:
        """Whether that is anything new."""
        held = {r.model_id: r.loaded for r in await db.execute(select(offers).where(offers.c.gpu_id == gpu_id))}
        now_held = {m.id: m.loaded for m in models}
        if held == now_held:
            return False
        known = set((await db.execute(select(base_models.c.id).where(base_models.c.id.in_(now_held)))).scalars())
        for model in {m.id: m for m in models if m.id not in known}.values():
            row = model.model_dump(exclude={"loaded"})
            await db.execute(insert(base_models).values(**row, created_at=self._clock()))
        await db.execute(delete(offers).where(offers.c.gpu_id == gpu_id))
        for model_id, loaded in now_held.items():
            await db.execute(insert(offers).values(gpu_id=gpu_id, model_id=model_id, loaded=loaded))
        return True

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
            self._roster.changed()  # it may have dialled another relay process
            self._start_challenge(to)  # at once: one answer that broke off need not mean more than itself

    async def dialled_in(self, by: wire.SignedBy) -> None:
        """Its socket is here: other relay processes go through this one. Raises Unavailable."""
        if self._relay_id is not None:
            self._dialled_in[by.gpu_id] = by.epoch
            await self._say_dialled_in(by.gpu_id, by.epoch)

    async def _say_dialled_in(self, gpu_id: str, epoch: int) -> None:
        async with self._store.write() as db:
            current = (gpus.c.id == gpu_id) & (gpus.c.epoch == epoch)
            await db.execute(update(gpus).where(current).values(relay_id=self._relay_id))
        self._roster.changed()

    async def hung_up(self, by: wire.SignedBy) -> None:
        """Its socket is gone; perhaps it is at another process by now."""
        if self._relay_id is None:
            return
        if self._dialled_in.get(by.gpu_id) == by.epoch:
            del self._dialled_in[by.gpu_id]
        mine = (gpus.c.id == by.gpu_id) & (gpus.c.epoch == by.epoch) & (gpus.c.relay_id == self._relay_id)
        try:
            async with self._store.write() as db:
                await db.execute(update(gpus).where(mine).values(relay_id=None))
        except (SQLAlchemyError, errors.Unavailable):
            log.warning("gpu %s has hung up, which could not be written: others try it here in vain", by.gpu_id)
        self._roster.changed()

    def unproven(self, by: wire.SignedBy) -> None:
        """Its way to us is new, or gone: nothing goes there before it has answered a challenge."""
        if self._proven.get(by.gpu_id) == by.epoch:
            del self._proven[by.gpu_id]

    async def prove(self, at_once: str | None = None) -> None:
        """Challenge, in the background, whoever is alive and has not proven its URL to this process lately.

        The gpu `at_once` is not told to wait for its turn. Requests that wait for a gpu that went silent end here.
        """
        now, alive = self._clock(), {gpu.to.gpu_id: gpu for gpu in await self._roster.alive()}
        self._break_off_silent(alive, now)
        # Since its enrolment, too: it must have read our reply before it can prove anything. Who is gone is forgotten.
        self._tried_at = {i: max(self._tried_at.get(i, 0.0), gpu.enrolled_at) for i, gpu in alive.items()}
        self._breakers = {i: b for i, b in self._breakers.items() if i in alive and b.epoch == alive[i].to.epoch}
        self._tried_by = {i: by for i, by in self._tried_by.items() if i in alive}
        self._told_to_load = {key: told for key, told in self._told_to_load.items() if key[0] in alive}
        self._proven_at = {i: at for i, at in self._proven_at.items() if i in alive or i in self._proven}
        for gpu_id, gpu in alive.items():
            if gpu.to.relay_id is None and self._dialled_in.get(gpu_id) == gpu.to.epoch:
                await self._say_dialled_in(gpu_id, gpu.to.epoch)  # a process that it left has said so late
            dialled = gpu.to.relay_id is not None and self._tried_by.get(gpu_id) != gpu.to.relay_id
            due = gpu_id == at_once or dialled or now - self._tried_at[gpu_id] >= self._settings.heartbeat_s
            if due and not self.reachable(gpu_id, gpu.to.epoch):
                self._start_challenge(gpu.to)

    def _break_off_silent(self, alive: Mapping[str, Listed], now: float) -> None:
        """A gpu that still sends bytes is not silent, whatever its heartbeats do.

        One that has enrolled anew, or dialled in elsewhere, no longer vouches for the way by which it was asked: what
        was there may have lost its power, and then no connection says so.
        """
        for call in self._calls:
            gpu = alive.get(call.to.gpu_id)
            if gpu is None or (gpu.to.epoch, gpu.to.relay_id) != (call.to.epoch, call.to.relay_id):
                call.break_off(waiting_since=now - self._settings.alive_s)

    def _start_challenge(self, to: Endpoint) -> None:
        which = (to.gpu_id, to.epoch)
        if which in self._challenges:
            return
        self._tried_at[to.gpu_id], self._tried_by[to.gpu_id] = self._clock(), to.relay_id
        self._challenges[which] = asyncio.create_task(self._challenge(to))
        self._challenges[which].add_done_callback(lambda _: self._challenges.pop(which, None))

    async def _challenge(self, to: Endpoint) -> None:
        try:
            proven = await self._client.challenge(to)
        except errors.Unavailable as exc:
            log.warning("gpu %s: %s", to.gpu_id, exc.message)
            return
        if not proven:
            log.warning("gpu %s: what is behind its URL is not the gpu that enrolled", to.gpu_id)
            self.unproven(wire.SignedBy(gpu_id=to.gpu_id, epoch=to.epoch))
            return
        if not self.reachable(to.gpu_id, to.epoch):
            log.info("gpu %s %r is reachable", to.gpu_id, to.name)
        self._proven[to.gpu_id], self._proven_at[to.gpu_id] = to.epoch, self._clock()

    async def be_sure(self, to: Endpoint) -> None:
        """Before a prompt goes there: a URL may change hands while its gpu lives on. Raises GpuUnreachable.

        While requests come, the proof is renewed beside them, and nobody waits. A socket that the gpu opened is the
        gpu's for as long as it lasts.
        """
        age_s = self._clock() - self._proven_at.get(to.gpu_id, 0.0)
        if to.tunnel == wire.DIALLED or age_s < PROOF_S / 2:
            return
        self._start_challenge(to)
        if age_s < PROOF_S:
            return
        which = (to.gpu_id, to.epoch)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PROOF_WAIT_S):
                await asyncio.wait({self._challenges[which]})
        if not self.reachable(*which) or self._clock() - self._proven_at[to.gpu_id] >= PROOF_S:
            raise errors.GpuUnreachable(f"gpu {to.name!r} can't be reached: it does not prove itself. Try again.")

    # --- choosing one ---

    async def choose(self, model: str, exclude: Collection[str] = ()) -> Endpoint | None:
        """Alive, reachable, with this base model, neither draining nor failing; the least busy. None: no such gpu."""
        able = [
            gpu
            for gpu in await self._roster.offering(model)
            if gpu.to.gpu_id not in exclude and not gpu.draining and self._takes_requests(gpu.to)
        ]
        if not able:
            return None
        if len(able) == 1:
            return able[0].to
        return min(able, key=lambda gpu: self._burden(gpu, model)).to

    def _takes_requests(self, to: Endpoint) -> bool:
        if not self.reachable(to.gpu_id, to.epoch):
            return False
        breaker = self._breakers.get(to.gpu_id)
        return breaker is None or breaker.epoch != to.epoch or breaker.lets_through(self._clock())

    def _burden(self, gpu: Listed, model: str) -> tuple[int, bool, int]:
        busy = self._in_flight[gpu.to.gpu_id]
        if self._relay_id is not None:  # what others send there is known by its heartbeats, so some seconds late
            busy = max(busy, gpu.active_requests)
        return busy, not gpu.loaded[model], secrets.randbits(16)

    @contextlib.contextmanager
    def busy(self, to: Endpoint) -> Iterator[Call]:
        """Counts a live request for as long as it lasts, and how it ended; of this process only."""
        call, breaker = Call(to, self._clock), self._breaker(to)
        self._calls.add(call)
        self._in_flight[to.gpu_id] += 1
        if breaker:
            breaker.began()
        try:
            yield call
        finally:
            self._calls.discard(call)
            self._in_flight[to.gpu_id] -= 1
            if not self._in_flight[to.gpu_id]:
                del self._in_flight[to.gpu_id]
            if breaker:
                breaker.ended()
            if call.worked is True and breaker and self._breaker(to) is breaker:
                del self._breakers[to.gpu_id]
            elif call.worked is False:
                self._failed(to)

    def _breaker(self, to: Endpoint) -> Breaker | None:
        breaker = self._breakers.get(to.gpu_id)
        return breaker if breaker and breaker.epoch == to.epoch else None

    def _failed(self, to: Endpoint) -> None:
        current = self._breakers.get(to.gpu_id)
        if current is None or current.epoch < to.epoch:
            current = self._breakers[to.gpu_id] = Breaker(to.epoch)
        if current.epoch > to.epoch:
            return  # of an epoch that is over
        before = current.state(now := self._clock())
        current.failed(now)
        if before != (after := current.state(now)):
            log.warning("gpu %s %r: its breaker is %s, was %s", to.gpu_id, to.name, after, before)

    def breaker_state(self, gpu_id: str, epoch: int) -> State:
        breaker = self._breakers.get(gpu_id)
        return breaker.state(self._clock()) if breaker and breaker.epoch == epoch else "closed"

    async def drain(self, gpu_id: str, *, on: bool = True) -> None:
        """No new work until told otherwise or started anew: live requests go on to their end, jobs are given back.

        Raises NotFound.
        """
        if gpu_id not in {gpu.to.gpu_id for gpu in await self._roster.alive()}:
            raise errors.NotFound(f"no gpu '{gpu_id[:50]}' is alive: GET /api/gpus names those that are")
        async with self._store.write() as db:
            await db.execute(update(gpus).where(gpus.c.id == gpu_id).values(draining=on))
        self._roster.changed()

    async def states(self) -> tuple[dict[str, int], dict[str, int]]:
        """How many of those alive are ready, unreachable and draining, and how many breakers are in which state."""
        found = Counter(ready=0, unreachable=0, draining=0)
        breakers = Counter({"closed": 0, "open": 0, "half-open": 0})
        for gpu in await self._roster.alive():
            reachable = self.reachable(gpu.to.gpu_id, gpu.to.epoch)
            found["draining" if gpu.draining else "ready" if reachable else "unreachable"] += 1
            breakers[self.breaker_state(gpu.to.gpu_id, gpu.to.epoch)] += 1
        return dict(found), dict(breakers)

    async def any_alive(self, model: str) -> bool:
        """Whether a gpu with this base model is there, reachable or not."""
        return bool(await self._roster.offering(model))

    # --- models that somebody waits for ---

    @contextlib.contextmanager
    def waiting_for(self, model: str) -> Iterator[None]:
        """As long as the block lasts, gpus that offer this base model are told to have it in memory."""
        self._wanted[model] += 1
        try:
            yield
        finally:
            self._wanted[model] -= 1
            if not self._wanted[model]:
                del self._wanted[model]

    async def to_load(self, by: wire.SignedBy) -> list[wire.LoadModel]:
        """What the gpu should have in memory, and has not; each is said again only after LOAD_AGAIN_S."""
        commands, now = list[wire.LoadModel](), self._clock()
        for model in list(self._wanted):
            for gpu in await self._roster.offering(model):
                told = self._told_to_load.get((by.gpu_id, model), (0, 0.0))
                due = told[0] != by.epoch or now - told[1] >= LOAD_AGAIN_S
                if gpu.to.gpu_id == by.gpu_id and not gpu.loaded[model] and due:
                    self._told_to_load[by.gpu_id, model] = (by.epoch, now)
                    commands.append(wire.LoadModel(model=model))
        return commands

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
