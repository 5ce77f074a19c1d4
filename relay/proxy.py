"""One live request to one gpu, and its answer back, as bytes.

The body goes through as it came. An answer goes through as it is: status, errors, stream. Knows no OpenAI field and no
model's owner. It is an ASGI response, because only there can a caller's leaving be seen.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

import wire
from relay import errors
from relay.gpu_client import GpuAnswer, GpuClient
from relay.gpus import Gpus
from relay.metrics import Metrics
from relay.streams import STREAM_HEADERS, Endings
from relay.transport import Endpoint
from relay.usage import StreamMeter, Usage, read_usage

log = logging.getLogger("relay.proxy")

BUSY = (429, 503)  # of a gpu: full, or about to stop; another one, or the same one later, will do
GPU_STOPPING = b'"gpu_stopping"'  # the code of a gpu that takes nothing new
TRIES = 2  # gpus asked before the first byte of an answer; from that byte on there is no other gpu
STOP_GRACE_S = 1.0  # what is nearly done may end when the relay stops
MAX_ANSWER_BYTES = 64 * 2**20  # of an answer that is no stream
MAX_FRAME_BYTES = 16 * 2**20  # a picture of 1536 x 1536 takes up to 10
PASSED_DOWN = ("content-type", "retry-after", "retry-after-ms", "x-should-retry")
BLANK_LINES = (b"\n\n", b"\r\n\r\n", b"\r\r")


@dataclass(frozen=True)
class Ask:
    """What to ask of whichever gpu has the model."""

    caller: str  # a user's id; a gpu is fair between callers
    base_model: str
    method: str
    target: str  # path and query, as the gpu gets them
    body: bytes
    headers: Mapping[str, str]
    key: str = ""  # the id of the one that it came with, which is charged


@dataclass(frozen=True)
class Opened:
    """An answer of which the first byte is here."""

    answer: GpuAnswer
    first: bytes
    rest: AsyncIterator[bytes] | None  # whole frames, of a stream
    held: contextlib.ExitStack  # the connection, and the gpu's count of live requests

    def head(self) -> list[tuple[bytes, bytes]]:
        """The headers for the caller."""
        headers = {name: value for name in PASSED_DOWN if (value := self.answer.headers.get(name))}
        headers |= STREAM_HEADERS if self.rest else {"content-length": str(len(self.first))}
        return [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]


class _BrokeOff(errors.GpuUnreachable):
    """After the first byte: asking another gpu would do the work twice."""


class Proxy:
    def __init__(self, gpus: Gpus, client: GpuClient, stopping: asyncio.Event, metrics: Metrics, usage: Usage) -> None:
        self._gpus = gpus
        self._client = client
        self._metrics = metrics
        self._usage = usage
        self.endings = Endings(stopping, STOP_GRACE_S)

    def forward(self, ask: Ask) -> Response:
        """A response which asks a gpu when it is sent. Raises Unavailable then, before anything went out."""
        return _Forwarded(lambda: self.open(ask), self.endings)

    async def open(self, ask: Ask, chosen: Callable[[Endpoint], None] = lambda _: None) -> Opened:
        """An answer whose first byte is here, from the first gpu that gives one; `chosen` hears of each that is asked.

        The caller closes `held`. Raises Unavailable.
        """
        tried: list[str] = []
        failure: errors.GpuUnreachable | None = None
        refusal: Opened | None = None
        while len(tried) < TRIES and (to := await self._gpus.choose(ask.base_model, exclude=tried)):
            chosen(to)
            try:
                await self._gpus.be_sure(to)
                opened = await self._open(to, ask)
                if not _stops(opened):
                    return opened
                opened.held.close()  # it drains, and we chose it before we knew: another may do, and nothing was begun
                tried.append(to.gpu_id)
                refusal = opened
            except errors.GpuUnreachable as exc:
                log.warning("%s", exc.message)
                self._gpus.mark_unreachable(to)
                if isinstance(exc, _BrokeOff):
                    raise
                tried.append(to.gpu_id)
                failure = exc
        if refusal:
            return refusal
        raise failure or errors.NoGpu(
            f"no gpu that has '{ask.base_model}' can be reached now: start one, or try again when one is back"
        )

    async def _open(self, to: Endpoint, ask: Ask) -> Opened:
        with contextlib.ExitStack() as held:
            call = held.enter_context(self._gpus.busy(to))
            headers, asked = {**ask.headers, wire.HEADER_CALLER: ask.caller}, time.monotonic()
            answer = await call.wait(self._client.send(to, ask.method, ask.target, ask.body, headers))
            held.callback(answer.close)
            if answer.status >= 500 and answer.status not in BUSY:
                call.worked = False
            chunks = call.chunks(answer.chunks())
            first = await anext(chunks, b"")
            if not first:
                call.worked = False
                raise errors.GpuUnreachable(f"gpu {to.name!r} closed the connection without an answer. Try again.")
            self._metrics.first_byte.observe(time.monotonic() - asked)
            if answer.is_stream:
                meter = StreamMeter()
                held.callback(lambda: self._usage.note(ask.caller, ask.key, meter.used))  # however it ends
                return Opened(answer, b"", meter.passing(whole_frames(first, chunks)), held.pop_all())
            # Whole before it starts, so that a gpu that dies halfway is a clean 503 and not half an object.
            body = await _whole_body(first, chunks)
            if used := read_usage(answer.headers.get(wire.HEADER_USAGE, "").encode()):
                self._usage.note(ask.caller, ask.key, used)
            return Opened(answer, body, None, held.pop_all())


def _stops(opened: Opened) -> bool:
    return opened.answer.status == 503 and opened.rest is None and GPU_STOPPING in opened.first


async def _whole_body(first: bytes, chunks: AsyncIterator[bytes]) -> bytes:
    body = bytearray(first)
    try:
        async for chunk in chunks:
            body += chunk
            if len(body) > MAX_ANSWER_BYTES:
                raise _BrokeOff(f"the gpu's answer is longer than {MAX_ANSWER_BYTES:,} bytes: ask for less")
    except errors.GpuUnreachable as exc:
        raise _BrokeOff(exc.message) from exc
    return bytes(body)


async def whole_frames(first: bytes, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Server-sent events, never cut: https://html.spec.whatwg.org/multipage/server-sent-events.html

    Raises GpuUnreachable where the stream breaks, or ends inside a frame.
    """
    buffer = first
    while True:
        if buffer.endswith(BLANK_LINES):  # nearly always
            yield buffer
            buffer = b""
        elif cut := max((at + len(blank) for blank in BLANK_LINES if (at := buffer.rfind(blank)) >= 0), default=0):
            yield buffer[:cut]
            buffer = buffer[cut:]
        if len(buffer) > MAX_FRAME_BYTES:
            raise errors.GpuUnreachable("the gpu sent a frame that does not end. Send the request again.")
        chunk = await anext(chunks, b"")
        if not chunk:
            break
        buffer += chunk
    if buffer:
        raise errors.GpuUnreachable("the gpu's stream ended in the middle of a frame. Send the request again.")


class _Forwarded(Response):
    """Runs in the task that serves the caller, which is cancelled when they leave, or the relay stops."""

    def __init__(self, open_answer: Callable[[], Awaitable[Opened]], endings: Endings) -> None:
        self._open_answer = open_answer
        self._endings = endings
        self._streaming = False
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._endings.watched(receive) as early:
            await self._pass_on(send)
        if early.why == "stopping":
            stopping = errors.Stopping("the relay is being restarted: send the request again in a moment")
            if not self._streaming:
                raise stopping
            await _end_with(send, stopping)

    async def _pass_on(self, send: Send) -> None:
        opened = await self._open_answer()
        with opened.held:
            await send({"type": "http.response.start", "status": opened.answer.status, "headers": opened.head()})
            if opened.rest is None:
                await send({"type": "http.response.body", "body": opened.first})
                return
            self._streaming = True
            try:
                async for frames in opened.rest:
                    await send({"type": "http.response.body", "body": frames, "more_body": True})
            except errors.GpuUnreachable as exc:
                log.warning("%s", exc.message)
                await _end_with(send, exc)
                return
            await send({"type": "http.response.body", "body": b""})


async def _end_with(send: Send, error: errors.RelayError) -> None:
    """A stream's status is long sent: the error is its last event, and there is no [DONE]."""
    event = b"data: " + json.dumps(error.body()).encode() + b"\n\n"
    await send({"type": "http.response.body", "body": event, "more_body": True})
    await send({"type": "http.response.body", "body": b""})
