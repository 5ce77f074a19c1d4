"""One lease's checkpoints: when the next is due, its way to the relay beside the training, and reading one back.

Knows what is said to the relay and what lies on this disk; nothing of tensors or of the order in which a job runs.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import wire
from gpu_service import checkpoints
from gpu_service.artifacts import BlobCache
from gpu_service.checkpoints import Stored
from gpu_service.errors import BadBlob, BadCheckpoint, GpuError, RelayUnavailable
from gpu_service.layers import Selection
from gpu_service.link import LeaseLost, Link, NotEnrolled, Pauses, Refused, RelayFull

log = logging.getLogger(__name__)

UPLOAD_SHARE = 0.1  # of the time that writing and uploading take: what the training beside them loses
TRIES = 3  # of a checkpoint of which the relay misses a chunk
NO_ROOM = ("quota_exceeded", "disk_full")  # the user's to solve
AGAIN = ("blob_missing", "over_reservation")  # the next try sends what is missing, or meets what is freed


class Log(Protocol):
    """Where the job's owner reads."""

    def say(self, message: str, *, level: Literal["info", "warn"] = "info") -> None: ...
    def lost(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Often:
    """How often: `every_s`, or chosen where that is 0."""

    every_s: float = 0.0
    runtime_ends_at: float | None = None  # unix time

    def next_s(self, cost_s: float) -> float:
        left_s = self.runtime_ends_at - time.time() if self.runtime_ends_at else None
        return self.every_s or checkpoints.interval_s(cost_s, left_s)


async def persist(link: Link, attempt: Callable[[], Awaitable[Any]], *, full_is_away: bool = True) -> Any:
    """Until it works. What can't be said now may be said when the relay is back; LeaseLost ends it."""
    pauses = Pauses()
    while True:
        try:
            return await attempt()
        except RelayUnavailable as exc:
            if isinstance(exc, RelayFull) and not full_is_away:
                raise
            log.warning("%s Trying again.", exc.message)
            await asyncio.sleep(next(pauses))
        except NotEnrolled:
            await asyncio.sleep(next(pauses))
            await link.wait_enrolled()


async def release(link: Link, job_id: str, fence: int, reason: Literal["paused", "drained", "leaving"]) -> None:
    """The lease is given back. Raises LeaseLost."""
    message = wire.Release(fence=fence, reason=reason)
    try:
        await persist(link, lambda: link.post(f"/gpu/jobs/{job_id}/release", message))
    except Refused as exc:
        log.warning("job %s could not be released: %s", job_id, exc.message)


class Lease:
    """Use as a context around the training: within, what is taken is stored beside it, one after the other."""

    def __init__(self, link: Link, cache: BlobCache, spec: wire.JobSpec, fence: int, told: Log, often: Often) -> None:
        self._link, self._cache, self._spec, self._fence = link, cache, spec, fence
        self._told, self._often = told, often
        self._path = f"/gpu/jobs/{spec.job_id}"
        self._due = float("inf")  # monotonic; asked for on the device thread
        self._waiting: Stored | None = None  # the newest: it takes the place of one whose upload has not begun
        self._hash = ""
        self._arrived, self._idle = asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._on_disk: list[wire.Checkpoint] = []  # oldest first
        self._complaint = ""
        self._reserved: wire.Reservation | None = None
        self._stored_step = 0  # of the checkpoint that the job would go on from
        self._damaged: set[str] = set()  # chunks that the relay believes to have

    async def reserve(self, checkpoint_bytes: int, result_bytes: int, estimated_s: float) -> None:
        """Raises Refused where the user's quota or the relay's disk can't hold what the job will store."""
        message = wire.Reservation(
            fence=self._fence, checkpoint_bytes=checkpoint_bytes, result_bytes=result_bytes, estimated_s=estimated_s
        )
        try:
            await self._reserve(message)
        except RelayFull as exc:
            raise Refused(exc.message, code=exc.code) from exc
        except Refused as exc:
            if exc.reason in NO_ROOM:
                raise Refused(exc.message, code=exc.reason) from exc
            log.warning("job %s: nothing is reserved: %s", self._spec.job_id, exc.message)

    async def _reserve(self, message: wire.Reservation) -> None:
        await persist(self._link, lambda: self._link.post(f"{self._path}/reserve", message), full_is_away=False)
        self._reserved = message

    def says_what_is_lost(self, step: int) -> None:
        """Before the job is given back at `step`, if its last checkpoint found no room."""
        if step > self._stored_step:
            at = f"goes on from the checkpoint of step {self._stored_step}" if self._stored_step else "begins again"
            self._told.say(
                f"The job stops at step {step}, whose checkpoint could not be stored: it {at} when it is resumed, and "
                f"the steps since are trained again.",
                level="warn",
            )

    # --- reading -----------------------------------------------------------------------------------------------------

    async def newest(self, selection: Selection, revision: str) -> Stored | None:
        """The newest checkpoint that is sound. Those that are not are told of; None: begin at the beginning."""
        self._hash = checkpoints.job_hash(self._spec, revision)
        for checkpoint in self._spec.checkpoints:
            try:
                found = await self._read(checkpoint, selection)
            except (BadCheckpoint, BadBlob, Refused, OSError) as exc:
                self._told.say(f"The checkpoint of step {checkpoint.step} can't be used: {exc}.", level="warn")
                continue
            self._on_disk, self._stored_step = [checkpoint], checkpoint.step
            return found
        if self._spec.checkpoints:
            self._told.say("No checkpoint can be used: the job begins at its beginning.", level="warn")
        return None

    async def _read(self, checkpoint: wire.Checkpoint, selection: Selection) -> Stored:
        chunks, paths = checkpoints.chunks(checkpoint), dict[str, Path]()
        with self._cache.keep(*(chunk.sha256 for chunk in chunks)):
            for chunk in chunks:
                fetched = persist(self._link, partial(self._link.fetch, chunk, self._cache))
                try:
                    paths[chunk.sha256] = await fetched
                except BadBlob:
                    self._damaged.add(chunk.sha256)
                    raise
            at = lambda chunk: paths[chunk.sha256]  # noqa: E731
            return await asyncio.to_thread(checkpoints.load, checkpoint, at, self._hash, selection)

    def goes_on(self, found: Stored, made_on: str) -> None:
        at = datetime.fromtimestamp(found.made_at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        self._told.say(f"Goes on at step {found.state.step} of {found.plan.total_steps} from the checkpoint of {at}.")
        if found.made_on != made_on:
            self._told.say(
                f"It was made on {found.made_on} and goes on on {made_on}: the losses may differ in their last digits "
                "from those of a run that stayed."
            )

    # --- storing -----------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> "Lease":
        self._due = time.monotonic() + self._often.next_s(0.0)
        self._task = asyncio.create_task(self._loop())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    def wanted(self) -> bool:
        """Whether a checkpoint is due. Called on the device thread; says yes once."""
        if time.monotonic() < self._due:
            return False
        self._due = float("inf")
        return True

    def now(self) -> None:
        """At the next step."""
        self._due = 0.0

    def skip(self) -> None:
        """What was wanted is not to be kept: another in time."""
        self._due = time.monotonic() + self._often.next_s(0.0)

    def take(self, stored: Stored) -> None:
        self._waiting = stored
        self._idle.clear()
        self._arrived.set()

    async def settled(self) -> None:
        """Until all that was taken is stored, or has failed."""
        await self._idle.wait()

    async def _loop(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            stored, self._waiting = self._waiting, None
            assert stored
            began = time.monotonic()
            try:
                await self._store(stored)
                self._complaint = ""
            except LeaseLost:
                self._told.lost()
                return
            except (GpuError, OSError) as exc:
                self._complain(f"The checkpoint of step {stored.state.step} could not be stored: {exc}", str(exc))
            cost_s = stored.state.copy_s + UPLOAD_SHARE * (time.monotonic() - began)
            if self._due == float("inf"):  # nobody asked for one meanwhile
                self._due = time.monotonic() + self._often.next_s(cost_s)
            if not self._arrived.is_set():
                self._idle.set()

    def _complain(self, message: str, why: str) -> None:
        """Once for each reason in a row: an owner need not read the same every minute."""
        log.warning("job %s: %s", self._spec.job_id, message)
        if why != self._complaint:
            self._told.say(f"{message} The training goes on, and the next one is tried in time.", level="warn")
        self._complaint = why

    async def _store(self, stored: Stored) -> None:
        checkpoint = await asyncio.to_thread(checkpoints.save, self._cache, self._hash, stored)
        chunks = checkpoints.chunks(checkpoint)
        with self._cache.keep(*(chunk.sha256 for chunk in chunks)):
            await self._reserve_more(sum(chunk.bytes for chunk in chunks))
            for left in reversed(range(TRIES)):
                try:
                    for chunk in chunks:
                        await persist(self._link, partial(self._upload, chunk), full_is_away=False)
                    message = wire.CheckpointStored(fence=self._fence, checkpoint=checkpoint)
                    await persist(
                        self._link,
                        partial(self._link.post, f"{self._path}/checkpoints", message),
                        full_is_away=False,
                    )
                    break
                except Refused as exc:
                    if exc.reason not in AGAIN or not left:
                        raise
            log.info("job %s: the checkpoint of step %d is stored", self._spec.job_id, checkpoint.step)
        self._stored_step = checkpoint.step
        self._forget_older(checkpoint)

    async def _reserve_more(self, checkpoint_bytes: int) -> None:
        """Where checkpoints turn out larger than was thought. Raises Refused, RelayFull."""
        if self._reserved and checkpoint_bytes > self._reserved.checkpoint_bytes:
            await self._reserve(self._reserved.model_copy(update={"checkpoint_bytes": checkpoint_bytes}))

    async def _upload(self, chunk: wire.ChunkRef) -> None:
        path = await asyncio.to_thread(self._cache.path, chunk.sha256)
        if path is None:
            raise BadCheckpoint("a chunk has left this disk")
        target, anew = f"{self._path}/chunks/{chunk.sha256}?fence={self._fence}", chunk.sha256 in self._damaged
        await self._link.put(target, chunk.sha256, path, anew=anew)
        self._damaged.discard(chunk.sha256)

    def _forget_older(self, newest: wire.Checkpoint) -> None:
        """The last two stay on this disk: whoever gets the job here again need not fetch them."""
        kept = [*self._on_disk[-1:], newest]
        used = {chunk.sha256 for checkpoint in kept for chunk in checkpoints.chunks(checkpoint)}
        old = {chunk.sha256 for checkpoint in self._on_disk[:-1] for chunk in checkpoints.chunks(checkpoint)}
        self._cache.drop(old - used)
        self._on_disk = kept
