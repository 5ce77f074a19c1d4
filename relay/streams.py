"""A stream of server-sent events as an ASGI response, which ends when its reader leaves or the relay stops.

Knows nothing of what the frames say.
"""

import asyncio
from collections.abc import AsyncIterator

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

IDLE_S = 10.0  # a comment after this long without a frame, or proxies on the way take the connection for dead
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
DONE = b"data: [DONE]\n\n"


async def caller_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


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
