"""A streamed request of /v1 that says `wait_s` waits for a gpu, in a line that is fair between users.

While it waits it gets comments, the first of which commits its status 200; what fails later is an event of the stream.
The line is that of the page too (lines.py). Knows no OpenAI field.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from relay import errors
from relay.gpus import Gpus
from relay.lines import Line, Lines, Place
from relay.metrics import Metrics
from relay.proxy import BUSY, Ask, Opened, Proxy
from relay.streams import IDLE_S, Endings
from relay.transport import Endpoint

MAX_WAIT_S = 600.0
TRY_EVERY_S = 1.0
COMMENT = b": waiting\n\n"


class Waiting:
    def __init__(self, proxy: Proxy, gpus: Gpus, lines: Lines, metrics: Metrics) -> None:
        self._proxy = proxy
        self._gpus = gpus
        self._lines = lines
        self._metrics = metrics

    def forward(self, ask: Ask, wait_s: float) -> Response:
        """A response that waits when it is sent. Raises TooMany and Unavailable then, before anything went out."""
        return _Waited(self, ask, wait_s, self._proxy.endings)

    async def at_once(self, ask: Ask) -> Opened | None:
        """An answer without waiting; None if there is none yet, or others wait already."""
        return None if ask.base_model in self._lines else (await attempt(self._proxy, self._gpus, ask))[0]

    async def opened(self, ask: Ask, wait_s: float, joined: Callable[[], Awaitable[None]]) -> Opened:
        """An answer, after `joined` once it stands in line. Raises TooMany, and Unavailable after `wait_s`."""
        began = time.monotonic()
        try:
            with (
                self._lines.joined(ask.base_model, ask.caller, "api") as (line, place),
                self._gpus.waiting_for(ask.base_model),
            ):
                await joined()
                return await self._in_turn(line, place, ask, wait_s)
        finally:
            self._metrics.waited["api"].observe(time.monotonic() - began)

    async def _in_turn(self, line: Line, place: Place, ask: Ask, wait_s: float) -> Opened:
        loop = asyncio.get_running_loop()
        until = loop.time() + wait_s
        while True:
            moved = line.moved
            if line.is_first(place):
                # The next may try while this one's prompt is read.
                opened, line.reason = await attempt(self._proxy, self._gpus, ask, lambda _: line.serve(place))
                if opened:
                    return opened
            line.rejoin(place)
            if (left_s := until - loop.time()) <= 0:
                raise errors.NoGpu(f"no gpu took the request in {wait_s:.0f} s: try again when one is free")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(TRY_EVERY_S, left_s)):
                    await moved.wait()


async def attempt(
    proxy: Proxy, gpus: Gpus, ask: Ask, chosen: Callable[[Endpoint], None] = lambda _: None
) -> tuple[Opened | None, str]:
    """An answer, or why there is none yet. Raises what another gpu would not mend."""
    try:
        opened = await proxy.open(ask, chosen)
    except errors.NoGpu:
        return None, "gpu_unreachable" if await gpus.any_alive(ask.base_model) else "no_gpu"
    except errors.Unavailable:
        return None, "gpu_unreachable"
    if opened.answer.status in BUSY:
        opened.held.close()
        return None, "busy"
    return opened, "queue"


class _Waited(Response):
    def __init__(self, waiting: Waiting, ask: Ask, wait_s: float, endings: Endings) -> None:
        self._waiting, self._ask, self._wait_s, self._endings = waiting, ask, wait_s, endings
        self._committed = False
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._endings.watched(receive) as early:
            try:
                await self._pass_on(send)
            except errors.RelayError as exc:
                if not self._committed:
                    raise
                await _end_with(send, exc.body())
        if early.why == "stopping":
            stopping = errors.Stopping("the relay is being restarted: send the request again in a moment")
            if not self._committed:
                raise stopping
            await _end_with(send, stopping.body())

    async def _pass_on(self, send: Send) -> None:
        comments: asyncio.Task[None] | None = None

        async def joined() -> None:
            nonlocal comments
            head = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
            head.append((b"x-accel-buffering", b"no"))
            self._committed = True
            await send({"type": "http.response.start", "status": 200, "headers": head})
            await send({"type": "http.response.body", "body": COMMENT, "more_body": True})
            comments = asyncio.create_task(_comment(send))

        try:
            opened = await self._waiting.at_once(self._ask)
            opened = opened or await self._waiting.opened(self._ask, self._wait_s, joined)
        finally:
            if comments:
                comments.cancel()
                await asyncio.wait({comments})
        with opened.held:
            if not self._committed:
                self._committed = opened.rest is not None
                await self._proxy_pass(opened, send)
                return
            if opened.rest is None:  # no stream: an error of the gpu's own
                await send({"type": "http.response.body", "body": _event(opened.first), "more_body": True})
            else:
                async for frames in opened.rest:
                    await send({"type": "http.response.body", "body": frames, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    @staticmethod
    async def _proxy_pass(opened: Opened, send: Send) -> None:
        await send({"type": "http.response.start", "status": opened.answer.status, "headers": opened.head()})
        if opened.rest is None:
            await send({"type": "http.response.body", "body": opened.first})
            return
        async for frames in opened.rest:
            await send({"type": "http.response.body", "body": frames, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _comment(send: Send) -> None:
    while True:
        await asyncio.sleep(IDLE_S)
        await send({"type": "http.response.body", "body": COMMENT, "more_body": True})


def _event(body: bytes) -> bytes:
    try:
        return b"data: " + json.dumps(json.loads(body)).encode() + b"\n\n"
    except ValueError:
        broken = errors.GpuUnreachable("the gpu answered with something that is not JSON. Try again.")
        return b"data: " + json.dumps(broken.body()).encode() + b"\n\n"


async def _end_with(send: Send, body: dict[str, object]) -> None:
    await send({"type": "http.response.body", "body": b"data: " + json.dumps(body).encode() + b"\n\n"})
