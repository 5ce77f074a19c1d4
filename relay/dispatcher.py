"""Queued jobs meet gpus: the loop that hands them out, and the bells that tell a gpu's held heartbeat to look.

The database is the truth; a bell only saves waiting. So several relay processes, each with a loop of its own, are
correct without speaking to each other, and at worst a second late. With a broker Celery's workers hand out, by the same
code, and the loop only tells them to look.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

import wire
from relay import errors
from relay.broker import Broker
from relay.gpus import Gpus
from relay.leases import Leases
from relay.metrics import Metrics

log = logging.getLogger("relay.dispatcher")

ROUND_S = 1.0  # without a bell; also how long a command by another process goes unnoticed


class HandOut:
    """What is done to the database in a round, wherever that runs."""

    def __init__(self, leases: Leases, metrics: Metrics, watched: Callable[[], Awaitable[bool]]) -> None:
        """`watched`: whether leases could be renewed all the while (peers.py); else none of them is over."""
        self._leases, self._metrics, self._watched = leases, metrics, watched

    async def round(
        self, given: Callable[[str], None] = lambda gpu_id: None, stopping: Callable[[], bool] = lambda: False
    ) -> int:
        """Jobs handed out; `given` hears to which gpus."""
        if await self._watched() and (lost := await self._leases.expire()):
            self._metrics.leases_lost.inc(lost)
            log.warning("leases were over; their jobs wait again")
        await self._leases.forget_diverged()
        count = 0
        while not stopping() and (match := await self._leases.next_match()):
            fence = await self._leases.claim(match)
            if fence is None:
                break  # somebody else was first; the next round looks again
            log.info("job %s given to gpu %s, fence %d", match.job_id, match.gpu_id, fence)
            given(match.gpu_id)
            count += 1
        return count


class Dispatcher:
    """`stopping` ends the loop and every held heartbeat."""

    def __init__(
        self,
        leases: Leases,
        gpus: Gpus,
        stopping: asyncio.Event,
        metrics: Metrics,
        watched: Callable[[], Awaitable[bool]],
        broker: Broker | None = None,
    ) -> None:
        self._leases = leases
        self._gpus = gpus
        self._stopping = stopping
        self._broker = broker
        self._hand_out = HandOut(leases, metrics, watched)
        self._telling: asyncio.Task[None] | None = None
        self._woken: set[str] = set()  # jobs that there is news of; empty: of a gpu
        self._work = asyncio.Event()
        self._bells: dict[str, set[asyncio.Event]] = {}  # of the heartbeats that are held, by gpu id

    def wake(self, job_id: str = "") -> None:
        """There may be something to hand out."""
        self._woken.add(job_id)
        self._work.set()

    def ring(self, gpu_id: str | None) -> None:
        """There may be a command for this gpu."""
        for bell in self._bells.get(gpu_id or "", ()):
            bell.set()

    def stop(self) -> None:
        self._stopping.set()
        self.wake()
        for gpu_id in self._bells:
            self.ring(gpu_id)

    async def run(self) -> None:
        while not self._stopping.is_set():
            try:
                await self._round()
            except errors.Unavailable as exc:
                log.warning("a round of dispatching failed (%s); the next is in %.0f s", exc.code, ROUND_S)
            except Exception:
                log.exception("a round of dispatching failed; the next is in %.0f s", ROUND_S)  # the loop must live on
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._work.wait(), ROUND_S)
            self._work.clear()
        if self._telling:
            self._telling.cancel()

    async def _round(self) -> None:
        await self._gpus.prove()
        if self._broker is None:
            self._woken.clear()
            await self._hand_out.round(self.ring, self._stopping.is_set)
        elif self._woken and not self._stopping.is_set() and (self._telling is None or self._telling.done()):
            woken, self._woken = self._woken, set()
            self._telling = asyncio.create_task(self._tell(self._broker, woken))

    async def _tell(self, broker: Broker, woken: set[str]) -> None:
        """Beside the rounds: what only the database and the gpus need does not wait for a broker."""
        try:
            await broker.tell(woken)
        except Exception as exc:  # of whichever library the broker speaks through
            log.warning("the broker can't be told that there is work (%r); workers find it once it is back", exc)

    async def commands(self, by: wire.SignedBy, beat: wire.Heartbeat, hold_s: float) -> list[wire.Command]:
        """What the gpu must do; waits for it up to `hold_s`."""
        bell = asyncio.Event()
        bells = self._bells.setdefault(by.gpu_id, set())
        bells.add(bell)
        loop = asyncio.get_running_loop()
        until = loop.time() + hold_s
        try:
            while True:
                bell.clear()  # before the look, so that what comes in between is not missed
                due = await self._leases.commands(by, beat.leases, drains=beat.draining)
                commands = [*due, *await self._gpus.to_load(by)]
                left_s = until - loop.time()
                if commands or left_s <= 0 or self._stopping.is_set():
                    return commands
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(bell.wait(), min(left_s, ROUND_S))
        finally:
            bells.discard(bell)
            if not bells and self._bells.get(by.gpu_id) is bells:
                del self._bells[by.gpu_id]
