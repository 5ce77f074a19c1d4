"""Everything said to the relay: enrol, heartbeat, progress, results, and fetching by hash.

Heartbeats and jobs go out by plain HTTP(S) and need no tunnel. While the relay is away the link keeps trying, and
training goes on: a lost contact is no reason to stop healthy work; only the relay's 409 is.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import random
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import quote, urlsplit

import httpx2
from pydantic import ValidationError

import wire
from gpu_service.artifacts import CHUNK_BYTES, BlobCache
from gpu_service.device import Device
from gpu_service.errors import GpuError, RelayUnavailable
from gpu_service.gate import Identity
from gpu_service.models import FAMILIES, Models
from gpu_service.settings import Settings

log = logging.getLogger(__name__)

REQUEST_TIMEOUT_S = 30.0
GOODBYE_S = 2.0
RETRY_S = (0.5, 15.0)  # first and longest pause between tries
LIVE_TRIES_S = 20.0  # how long a caller who waits for a tuned model is kept waiting for the relay

M = TypeVar("M", bound=wire.Message)


class LeaseLost(Exception):
    """The job is another's, or nobody's, now: stop."""


class Refused(GpuError):
    """The relay understood, and said no."""

    status, code = 502, "relay_refused"
    reason: str | None = None  # the relay's own code


class RelayFull(RelayUnavailable):
    """The relay has no room now; it may have later."""

    code = "disk_full"


class NotEnrolled(Exception):
    """The relay does not know this gpu (any more): enrol."""


class Jobs(Protocol):
    """What the link needs of whoever runs the leases."""

    def held(self) -> list[wire.HeldLease]: ...
    def draining(self) -> bool: ...
    def obey(self, command: wire.Command) -> None: ...


@dataclass(frozen=True)
class Enrolment:
    reply: wire.EnrolReply
    by: wire.SignedBy
    offset_s: float  # relay's time minus our monotonic clock, which nobody sets back


class Link:
    def __init__(
        self, settings: Settings, instance: str, device: Device, models: Models, active_requests: Callable[[], int]
    ) -> None:
        assert settings.relay_url
        assert settings.enrol_token
        self._settings, self._instance, self._device, self._models = settings, instance, device, models
        self._active_requests = active_requests
        self._process = secrets.token_hex(8)
        self._http = httpx2.AsyncClient(
            base_url=settings.relay_url,
            timeout=REQUEST_TIMEOUT_S,
            follow_redirects=False,
            # A proxy of the environment leads to the world outside, and not back to a relay on this machine.
            trust_env=urlsplit(settings.relay_url).hostname not in ("127.0.0.1", "localhost", "::1"),
        )
        self._prefix = urlsplit(settings.relay_url).path  # of a relay behind a path: part of what is signed
        self._enrolment: Enrolment | None = None
        self._enrolled = asyncio.Event()
        self._url = settings.public_url
        self._moved = asyncio.Event()
        self._is_enrolling = False
        self._changed = asyncio.Event()  # set, and replaced, by each enrolment
        self.reachable: bool | None = None  # what the relay says; None: not heard yet
        self.trouble = ""  # why the relay does not answer, while it does not

    def identity(self) -> Identity | None:
        e = self._enrolment
        return Identity(e.by, e.reply.signing_key, lambda: time.monotonic() + e.offset_s) if e else None

    def now(self) -> float:
        """The relay's time, as far as it is known."""
        return time.monotonic() + self._enrolment.offset_s if self._enrolment else time.time()

    async def aclose(self) -> None:
        await self._http.aclose()

    # --- the loop ----------------------------------------------------------------------------------------------------

    async def run(self, jobs: Jobs) -> None:
        """Enrol, then heartbeat for ever; enrol again when the URL moved. Ends only by being cancelled."""
        pauses = Pauses()
        while True:
            try:
                if self._enrolment is None or self._moved.is_set():
                    await self._enrol(jobs)
                if await self._unless_moved(self._heartbeat(jobs)):
                    pauses, self.trouble = Pauses(), ""
            except NotEnrolled:
                log.info("the relay does not know this gpu any more: enrolling again")
                self._forget()
            except (RelayUnavailable, Refused) as exc:
                self.trouble = exc.message
                pause = next(pauses)
                log.warning("%s Trying again in %.0f s.", exc.message, pause)
                await asyncio.sleep(pause)

    def moved(self, url: str | None) -> None:
        """The tunnel has a new URL, or none: the relay is told at once. Jobs go on, with the leases that they have."""
        if url != self._url:
            self._url = url
            self._moved.set()

    async def _unless_moved(self, heartbeat: Coroutine[Any, Any, None]) -> bool:
        """Whether it was answered: the relay holds it back, and news of ours need not wait for that."""
        beat, moved = asyncio.ensure_future(heartbeat), asyncio.ensure_future(self._moved.wait())
        try:
            await asyncio.wait({beat, moved}, return_when=asyncio.FIRST_COMPLETED)
            if beat.done():
                beat.result()
            return beat.done()
        finally:
            for task in (beat, moved):
                task.cancel()
            await asyncio.gather(beat, moved, return_exceptions=True)

    def status(self) -> str:
        """For a person."""
        e = self._enrolment
        if self.trouble or e is None:
            return self.trouble or f"enrolling with {self._settings.relay_url}"
        reached = {
            True: "reaches this gpu",
            False: "can't reach this gpu yet",
            None: "is about to try to reach this gpu",
        }
        return f"enrolled as {e.by.gpu_id}, epoch {e.by.epoch}; the relay {reached[self.reachable]}"

    async def goodbye(self, reason: str) -> None:
        """Leases go back at once. A relay that does not answer notices by itself, later."""
        try:
            async with asyncio.timeout(GOODBYE_S):
                await self._signed("POST", "/gpu/goodbye", wire.Goodbye(reason=reason))
        except (TimeoutError, RelayUnavailable, NotEnrolled, LeaseLost):
            log.info("could not say goodbye to the relay: it will miss this gpu after a while")

    async def _enrol(self, jobs: Jobs) -> None:
        self._moved.clear()  # before the URL is read: a move from here on is told by another enrolment
        try:
            await self._enrol_once(jobs)
        except BaseException:
            self._moved.set()  # the relay has not heard of the URL yet
            raise

    async def _enrol_once(self, jobs: Jobs) -> None:
        request = wire.EnrolRequest(
            instance=self._instance,
            process=self._process,
            name=(self._settings.name or self._device.name or "gpu")[:100],
            url=self._url,
            tunnel=self._settings.tunnel,
            device=self._device.wire(),
            families=sorted(set(FAMILIES.values())),
            models=self._models.offered(),
            leases=jobs.held(),
            runtime_ends_at=self._settings.runtime_ends_at,
        )
        bearer = {"authorization": f"Bearer {self._settings.enrol_token}", "content-type": "application/json"}
        asked = time.monotonic()
        self._is_enrolling = True
        try:
            response = await self._exchange("POST", "/gpu/enrol", bearer, request.model_dump_json().encode())
        finally:
            self._is_enrolling = False
        if response.status_code != 200:
            raise Refused(f"The relay refused to enrol this gpu: {_message(response)}.")
        reply = _parse(wire.EnrolReply, response)
        # The relay took its time about half-way between question and answer.
        offset_s = reply.relay_time - (asked + time.monotonic()) / 2
        by = wire.SignedBy(gpu_id=reply.gpu_id, epoch=reply.epoch)
        self._enrolment = Enrolment(reply, by, offset_s)
        self.reachable = None
        self._enrolled.set()
        self._changed.set()
        self._changed = asyncio.Event()
        log.info("enrolled with %s as %s, epoch %d", self._settings.relay_url, reply.gpu_id, reply.epoch)

    def _forget(self) -> None:
        self._enrolment = None
        self._enrolled.clear()

    async def _heartbeat(self, jobs: Jobs) -> None:
        beat = wire.Heartbeat(
            free_bytes=self._device.free_bytes(),
            models=self._models.offered(),
            leases=jobs.held(),
            active_requests=self._active_requests(),
            draining=jobs.draining(),
        )
        reply = _parse(wire.HeartbeatReply, _checked(await self._signed("POST", "/gpu/heartbeat", beat)))
        if reply.reachable is not self.reachable:
            self.reachable = reply.reachable
            way = "by its own WebSocket" if self._settings.tunnel == wire.DIALLED else f"at {self._url or 'no URL'}"
            log.info("the relay %s this gpu %s", "reaches" if reply.reachable else "can't reach", way)
        for command in reply.commands:
            jobs.obey(command)

    # --- what jobs and callers need ----------------------------------------------------------------------------------

    async def report(self, job_id: str, events: wire.JobEvents) -> None:
        """Raises LeaseLost; RelayUnavailable when it should be tried again."""
        _checked(await self._signed("POST", f"/gpu/jobs/{job_id}/events", events))

    async def finish(self, job_id: str, result: wire.JobResult) -> None:
        """Safe to repeat. Raises LeaseLost, RelayUnavailable."""
        _checked(await self._signed("POST", f"/gpu/jobs/{job_id}/finish", result))

    async def upload(self, job_id: str, fence: int, ref: wire.FileRef, path: Path) -> None:
        """Store a blob for a job, unless the relay has it. Raises LeaseLost, RelayUnavailable, Refused."""
        await self.put(f"/gpu/jobs/{job_id}/blobs/{ref.sha256}?fence={fence}", ref.sha256, path)

    async def put(self, target: str, sha256: str, path: Path, *, anew: bool = False) -> None:
        """A file, unless the relay has it; `anew`: though it has. Raises LeaseLost, RelayUnavailable, Refused."""
        if not anew:
            there, size = await self._signed("HEAD", target), await asyncio.to_thread(os.path.getsize, path)
            if there.status_code == 200 and there.headers.get("content-length") == str(size):  # not cut short
                return
        response = await self._signed("PUT", target, (path, sha256))
        if _code(response) == "blob_damaged":  # on its way: the next time it arrives
            raise RelayUnavailable(f"The relay answers with status {response.status_code}: {_message(response)}.")
        _checked(response)

    async def post(self, target: str, message: wire.Message) -> None:
        """Raises LeaseLost, RelayUnavailable, Refused."""
        _checked(await self._signed("POST", target, message))

    async def fetch(self, ref: wire.FileRef | wire.ChunkRef, cache: BlobCache) -> Path:
        """A blob by hash, from this disk or from the relay. Raises RelayUnavailable, NotEnrolled, BadBlob."""
        if here := await asyncio.to_thread(cache.path, ref.sha256):
            return here
        target = f"/gpu/blobs/{ref.sha256}"
        headers = self._sign("GET", target, wire.EMPTY_SHA256)
        try:
            async with self._http.stream("GET", target, headers=headers) as response:
                if response.status_code != 200:
                    await response.aread()
                    self._judge(response)
                    _checked(response)
                return await cache.store(ref.sha256, ref.bytes, response.aiter_bytes(CHUNK_BYTES))
        except httpx2.RequestError as exc:
            raise self._away(exc) from exc

    async def tuned(self, model: str) -> wire.TunedModel | None:
        """What to fetch for a tuned model; None if the relay has none of that name. Somebody is waiting for this."""
        async with _patience():
            response = await self._signed("GET", f"/gpu/models/{quote(model, safe='')}")
        return None if response.status_code == 404 else _parse(wire.TunedModel, _checked(response))

    # --- requests ----------------------------------------------------------------------------------------------------

    async def _signed(
        self, method: str, target: str, content: wire.Message | tuple[Path, str] | None = None
    ) -> httpx2.Response:
        """`content` may be a file and its SHA-256. Raises NotEnrolled, LeaseLost, RelayUnavailable."""
        enrolment = self._enrolment
        if isinstance(content, tuple):
            path, sha256 = content
            size = await asyncio.to_thread(os.path.getsize, path)
            headers = {**self._sign(method, target, sha256), "content-length": str(size)}
            response = await self._exchange(method, target, headers, _chunks(path))
        else:
            body = content.model_dump_json().encode() if content else b""
            headers = {**self._sign(method, target, hashlib.sha256(body).hexdigest())}
            if content:
                headers["content-type"] = "application/json"
            response = await self._exchange(method, target, headers, body)
        if response.status_code == 401:
            raise NotEnrolled
        if response.status_code == 409:
            if self._is_enrolling or self._enrolment is not enrolment:
                raise NotEnrolled  # the lease has moved to our new epoch meanwhile: say it again
            raise LeaseLost(_message(response))
        return response

    def _sign(self, method: str, target: str, sha256: str) -> dict[str, str]:
        if self._enrolment is None:
            raise NotEnrolled
        e = self._enrolment
        return wire.sign(e.reply.signing_key, e.by, method, self._prefix + target, sha256, self.now())

    async def _exchange(
        self, method: str, target: str, headers: dict[str, str], content: bytes | AsyncIterator[bytes]
    ) -> httpx2.Response:
        try:
            response = await self._http.request(method, target, headers=headers, content=content)
        except httpx2.RequestError as exc:
            raise self._away(exc) from exc
        if response.status_code != 401:
            self._judge(response)
        return response

    @staticmethod
    def _judge(response: httpx2.Response) -> None:
        """What passes when the relay is back, or has heard of us again. Raises RelayUnavailable, NotEnrolled."""
        if response.status_code == 401:
            raise NotEnrolled
        if response.status_code == 507:
            raise RelayFull(f"{_message(response)}.")
        if response.status_code >= 500 or response.status_code == 429:
            raise RelayUnavailable(f"The relay answers with status {response.status_code}: {_message(response)}.")

    def _away(self, exc: Exception) -> RelayUnavailable:
        return RelayUnavailable(f"The relay at {self._settings.relay_url} does not answer ({type(exc).__name__}).")

    def signed(self, method: str, target: str) -> dict[str, str]:
        """Headers for a request without a body. Raises NotEnrolled."""
        return self._sign(method, target, wire.EMPTY_SHA256)

    async def wait_enrolled(self) -> wire.SignedBy:
        while self._enrolment is None:
            await self._enrolled.wait()
        return self._enrolment.by

    async def superseded(self, by: wire.SignedBy) -> None:
        """Wait until another enrolment stands."""
        while self._enrolment is None or self._enrolment.by == by:
            await self._changed.wait()


@contextlib.asynccontextmanager
async def _patience() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(LIVE_TRIES_S):
            yield
    except (TimeoutError, NotEnrolled) as exc:
        raise RelayUnavailable("The relay, which keeps the tuned models, does not answer. Try again later.") from exc


def _checked(response: httpx2.Response) -> httpx2.Response:
    if not response.is_success:
        refused = Refused(f"The relay answers with status {response.status_code}: {_message(response)}.")
        refused.reason = _code(response)
        raise refused
    return response


def _parse(kind: type[M], response: httpx2.Response) -> M:
    try:
        return kind.model_validate_json(response.content)
    except ValidationError as exc:
        raise Refused(
            "The relay's answer is not of this protocol: is GPU_RELAY_URL the relay, and of the same version?"
        ) from exc


def _message(response: httpx2.Response) -> str:
    try:
        return str(response.json()["error"]["message"]).rstrip(".")
    except (ValueError, KeyError, TypeError):
        return response.text[:200] or "no reason given"


def _code(response: httpx2.Response) -> str | None:
    try:
        return str(response.json()["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return None


async def _chunks(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
            yield chunk


class Pauses:
    """Doubling, with jitter so that many gpus don't return to a restarted relay at once."""

    def __init__(self) -> None:
        self._next_s, self._most_s = RETRY_S

    def __next__(self) -> float:
        pause, self._next_s = self._next_s, min(2 * self._next_s, self._most_s)
        return pause * random.uniform(0.5, 1.0)  # noqa: S311
