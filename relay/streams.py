"""A stream of server-sent events as an ASGI response, which ends when its reader leaves or the relay stops.

Knows nothing of what the frames say.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Literal

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

IDLE_S = 10.0  # a comment after this long without a frame, or proxies on the way take the connection for dead
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
DONE = b"data: [DONE]\n\n"


async def caller_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


Why = Literal["left", "stopping"]


class Early:
    """Why a block had to end before its time; None if it had not."""

    def __init__(self) -> None:
        self.why: Why | None = None
        self.task = asyncio.current_task()

    def end(self, why: Why) -> None:
        if self.task and self.why is None:
            self.why = why
            self.task.cancel()


class Endings:
    """Ends what serves a caller who left, at once, and what goes on when the relay stops, after `grace_s`.

    It costs a task for each caller. Another for each, to wait for the stop, would be felt.
    """

    def __init__(self, stopping: asyncio.Event, grace_s: float) -> None:
        self._stopping = stopping
        self._grace_s = grace_s
        self._under_way: set[Early] = set()
        self._watch: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def watched(self, receive: Receive) -> AsyncIterator[Early]:
        """The block may be cancelled, which does not go beyond it: what it then answers, it must see in `why`."""
        self._watch = self._watch or asyncio.create_task(self._stop_all())
        early = Early()
        self._under_way.add(early)
        gone = asyncio.create_task(caller_gone(receive))
        gone.add_done_callback(lambda _: early.end("left"))
        cancelled = False
        try:
            yield early
        except asyncio.CancelledError:
            cancelled = True
            if early.why is None:
                raise
        finally:
            task, early.task = early.task, None
            self._under_way.discard(early)
            gone.cancel()
            if early.why and task:
                if not cancelled:  # it was ready a moment before: the cancelling must not meet who called us
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.sleep(0)
                    early.why = None
                task.uncancel()

    async def _stop_all(self) -> None:
        await self._stopping.wait()
        asyncio.get_running_loop().call_later(self._grace_s, self._end_all)
        self._watch = None

    def _end_all(self) -> None:
        for early in list(self._under_way):
            early.end("stopping")


class EventStream(Response):
    """`frames` is closed in every case, also when nobody reads to its end."""

    def __init__(self, frames: AsyncIterator[bytes], stopping: asyncio.Event) -> None:
        super().__init__(media_type="text/event-stream", headers=STREAM_HEADERS)
        del self.headers["content-length"]
        self._frames = frames
        self._stopping = stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._pass_on(send))
        gone = asyncio.create_task(caller_gone(receive))
        stop = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({work, gone, stop}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            left = gone.done()
            for task in (work, gone, stop):
                task.cancel()
            await asyncio.gather(work, gone, stop, return_exceptions=True)
        if not work.cancelled():
            work.result()
        elif not left:
            await send({"type": "http.response.body", "body": b""})  # without [DONE]: it can be picked up again

    async def _pass_on(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        coming: asyncio.Future[bytes] | None = None
        try:
            while True:
                coming = coming or asyncio.ensure_future(anext(self._frames, b""))
                await asyncio.wait({coming}, timeout=IDLE_S)
                frame = coming.result() if coming.done() else b": idle\n\n"
                if not frame:
                    break
                await send({"type": "http.response.body", "body": frame, "more_body": True})
                coming = None if coming.done() else coming
            await send({"type": "http.response.body", "body": b""})
        finally:
            if coming and not coming.done():
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)
            if close := getattr(self._frames, "aclose", None):
                await close()
