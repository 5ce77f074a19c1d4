"""A streamed request of /v1 that says `wait_s` waits for a gpu, in a line that is fair between users.

While it waits it gets comments, the first of which commits its status 200; what fails later is an event of the stream.
A line belongs to a base model, lives in this process, and is bounded. Knows no OpenAI field.
"""

import asyncio
import contextlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from relay import errors
from relay.gpus import Gpus
from relay.metrics import Metrics
from relay.proxy import BUSY, Ask, Opened, Proxy
from relay.streams import IDLE_S, Endings

MAX_WAIT_S = 600.0
MAX_OF_A_USER = 16
MAX_IN_LINE = 1000
TRY_EVERY_S = 1.0
COMMENT = b": waiting\n\n"


@dataclass(eq=False)
class _Place:
    caller: str
    number: int  # counts up, in the order of asking


class Line:
    """Who waits for one base model. Users take turns: a user's second waits behind everybody's first."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._waiting: list[_Place] = []
        self._front: _Place | None = None  # who is first; None: to be found out, for the line has changed
        self.moved = asyncio.Event()

    def join(self, caller: str) -> _Place:
        """Raises TooMany, NoGpu."""
        if sum(place.caller == caller for place in self._waiting) >= MAX_OF_A_USER:
            raise errors.TooMany(f"{MAX_OF_A_USER} requests wait already: let one of them end first")
        if len(self._waiting) >= MAX_IN_LINE:
            raise errors.NoGpu("too many wait for this model: try again later")
        place = _Place(caller, next(self._numbers))
        self._waiting.append(place)
        self._front = None
        return place

    def leave(self, place: _Place) -> None:
        if place in self._waiting:
            self._waiting.remove(place)
            self._front = None
            moved, self.moved = self.moved, asyncio.Event()
            moved.set()

    def rejoin(self, place: _Place) -> None:
        """At the place that the time of asking gives: a gpu was chosen for it in vain."""
        if place not in self._waiting:
            self._waiting.append(place)
            self._front = None

    def order(self) -> list[_Place]:
        of_caller: Counter[str] = Counter()
        turns: list[tuple[int, int, _Place]] = []
        for place in sorted(self._waiting, key=lambda p: p.number):
            turns.append((of_caller[place.caller], place.number, place))
            of_caller[place.caller] += 1
        return [place for _, _, place in sorted(turns, key=lambda turn: turn[:2])]

    def is_first(self, place: _Place) -> bool:
        if self._front is None and self._waiting:
            self._front = self.order()[0]  # once for all who ask
        return self._front is place

    def is_empty(self) -> bool:
        return not self._waiting

    def __len__(self) -> int:
        return len(self._waiting)


class Waiting:
    def __init__(self, proxy: Proxy, gpus: Gpus, metrics: Metrics) -> None:
        self._proxy = proxy
        self._gpus = gpus
        self._metrics = metrics
        self._lines: dict[str, Line] = {}

    def n_waiting(self) -> int:
        return sum(map(len, self._lines.values()))

    def forward(self, ask: Ask, wait_s: float) -> Response:
        """A response that waits when it is sent. Raises TooMany and Unavailable then, before anything went out."""
        return _Waited(self, ask, wait_s, self._proxy.endings)

    async def at_once(self, ask: Ask) -> Opened | None:
        """An answer without waiting; None if there is none yet, or others wait already."""
        return None if ask.base_model in self._lines else await self._attempt(ask)

    async def opened(self, ask: Ask, wait_s: float, joined: Callable[[], Awaitable[None]]) -> Opened:
        """An answer, after `joined` once it stands in line. Raises TooMany, and Unavailable after `wait_s`."""
        line, began = self._lines.setdefault(ask.base_model, Line()), time.monotonic()
        try:
            place = line.join(ask.caller)
            try:
                await joined()
                with self._gpus.waiting_for(ask.base_model):
                    return await self._in_turn(line, place, ask, wait_s)
            finally:
                line.leave(place)
        finally:
            self._metrics.waited["api"].observe(time.monotonic() - began)
            if line.is_empty() and self._lines.get(ask.base_model) is line:
                del self._lines[ask.base_model]

    async def _in_turn(self, line: Line, place: _Place, ask: Ask, wait_s: float) -> Opened:
        loop = asyncio.get_running_loop()
        until = loop.time() + wait_s
        while True:
            moved = line.moved
            # The next may try while this one's prompt is read.
            if line.is_first(place) and (opened := await self._attempt(ask, lambda: line.leave(place))):
                return opened
            line.rejoin(place)
            if (left_s := until - loop.time()) <= 0:
                raise errors.NoGpu(f"no gpu took the request in {wait_s:.0f} s: try again when one is free")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(TRY_EVERY_S, left_s)):
                    await moved.wait()

    async def _attempt(self, ask: Ask, chosen: Callable[[], None] = lambda: None) -> Opened | None:
        try:
            opened = await self._proxy.open(ask, lambda _: chosen())
        except errors.Unavailable:
            return None
        if opened.answer.status in BUSY:
            opened.held.close()
            return None
        return opened


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
