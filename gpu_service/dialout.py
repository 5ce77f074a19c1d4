"""The tunnel that needs no tunnel: one WebSocket that this gpu opens to its relay, and requests that come back by it.

They run through the same ASGI application as those that arrive on the port, signatures and all; so streaming, a caller
who leaves, and back-pressure are what they are there. frames.py has the format. Knows no route.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit, urlunsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

import frames
import wire
from frames import AnswerHead, Kind, ProtocolError, RequestHead, Stream, StreamOver

log = logging.getLogger(__name__)

TARGET = "/gpu/dial"
OPEN_S = 10.0
PAUSES_S = (0.1, 2.5)  # first and longest between tries: back within 5 s of a cut
MOST_STREAMS = 1024
LEAVE_S = 1.0  # for the last words of requests under way when the gpu stops

Scope = dict[str, Any]
App = Callable[[Scope, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]


class Enrolled(Protocol):
    """What this needs of the link."""

    async def wait_enrolled(self) -> wire.SignedBy: ...
    async def superseded(self, by: wire.SignedBy) -> None: ...
    def signed(self, method: str, target: str) -> dict[str, str]: ...


class DialOut:
    """`relay` among the tunnels: it has no URL of its own."""

    kind = wire.DIALLED

    def __init__(self, relay_url: str, link: Enrolled, app: App) -> None:
        """`relay_url` without a slash at its end."""
        parts = urlsplit(relay_url)
        scheme = {"http": "ws", "https": "wss"}[parts.scheme]
        self._url = urlunsplit((scheme, parts.netloc, parts.path + TARGET, "", ""))
        self._link, self._app = link, app
        self._dialling: asyncio.Task[None] | None = None
        self._answering: set[asyncio.Task[None]] = set()
        self._streams = 0
        self._is_up = False
        self._trouble = ""

    async def open(self) -> None:
        """The socket comes up once the gpu is enrolled; nothing here can fail."""
        self._dialling = asyncio.create_task(self._dial())

    async def watch(self) -> None:
        """It mends itself, so this returns only if that is over."""
        assert self._dialling, "open() comes first"
        await asyncio.wait({self._dialling})
        if not self._dialling.cancelled() and (exc := self._dialling.exception()):
            log.error("dialling ended, which it should not", exc_info=exc)

    async def close(self) -> None:
        if self._answering:
            await asyncio.wait(self._answering, timeout=LEAVE_S)
        if self._dialling:
            self._dialling.cancel()
            await asyncio.wait({self._dialling})
        for task in list(self._answering):
            task.cancel()
        await asyncio.gather(*self._answering, return_exceptions=True)

    def status(self) -> str:
        if self._is_up:
            return f"the relay reaches this gpu by the WebSocket that it opened; {self._streams} requests on it now"
        return f"dialling the relay{f' ({self._trouble})' if self._trouble else ''}"

    # --- the socket ---

    async def _dial(self) -> None:
        pause_s, most_s = PAUSES_S
        while True:
            by = await self._link.wait_enrolled()
            began = asyncio.get_running_loop().time()
            session = asyncio.create_task(self._session(self._link.signed("GET", TARGET)))
            moved = asyncio.create_task(self._link.superseded(by))  # then the socket of the old epoch is of no use
            try:
                await asyncio.wait({session, moved}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (session, moved):
                    task.cancel()
                await asyncio.gather(session, moved, return_exceptions=True)
            if not session.cancelled() and (exc := session.exception()):
                raise exc
            if moved.done() and not moved.cancelled():
                continue
            if asyncio.get_running_loop().time() - began > most_s:
                pause_s = PAUSES_S[0]  # it worked for a while
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311
            pause_s = min(2 * pause_s, most_s)

    async def _session(self, signed: Mapping[str, str]) -> None:
        """One socket, from opening to its end, whatever that is."""
        try:
            async with _Connect(
                self._url,
                additional_headers=signed,
                compression=None,  # tokens are short, and pictures are compressed already
                max_size=frames.MOST_BYTES,
                open_timeout=OPEN_S,
                close_timeout=1,
                ping_interval=frames.PING_S,
                ping_timeout=frames.PONG_S,
            ) as socket:
                self._is_up, self._trouble = True, ""
                log.info("dialled %s", self._url)
                await self._receive(socket)
        except InvalidStatus as exc:
            self._trouble = f"it answers with status {exc.response.status_code}"
        except (WebSocketException, OSError, TimeoutError) as exc:
            self._trouble = f"{type(exc).__name__}: {exc}"
        except ProtocolError as exc:
            self._trouble = f"it does not keep to the protocol: {exc}"
        finally:
            was_up, self._is_up = self._is_up, False
        (log.warning if was_up else log.info)("the socket to the relay is gone: %s", self._trouble or "closed")

    async def _receive(self, socket: ClientConnection) -> None:
        """Hand out what comes. Never waits for a request's progress."""
        streams: dict[int, Stream] = {}

        async def send(frame: bytes) -> None:
            try:
                await socket.send(frame)
            except ConnectionClosed as exc:
                raise StreamOver("the socket to the relay is gone") from exc

        try:
            async for message in socket:
                if isinstance(message, str):
                    raise ProtocolError("a text message")
                kind, number, payload = frames.unpack(message)
                if kind == Kind.OPEN:
                    if number in streams or len(streams) >= MOST_STREAMS:
                        raise ProtocolError(f"stream {number} is one too many")
                    head = frames.request_head(payload)
                    stream = streams[number] = Stream(number, send)
                    task = asyncio.create_task(self._answer(stream, head), name="dialled request")
                    self._answering.add(task)
                    task.add_done_callback(self._answering.discard)
                    task.add_done_callback(lambda _, number=number: streams.pop(number, None))  # type: ignore[misc]
                elif stream_of := streams.get(number):  # else it is over, and this was under way
                    stream_of.feed(kind, payload)
        finally:
            for stream in streams.values():
                stream.fail("the socket to the relay is gone")

    async def _answer(self, stream: Stream, head: RequestHead) -> None:
        exchange = _Exchange(stream)
        self._streams += 1
        try:
            await self._app(scope_of(head), exchange.receive, exchange.send)
        except Exception:  # as a server would: the request ends here, whatever it was
            log.exception("a dialled request failed")
        finally:
            self._streams -= 1
        if not exchange.is_complete:
            await stream.reset("the gpu broke off")
        with suppress(StreamOver):
            while await stream.read():
                pass  # what nobody wanted of the body: its sender waits for room


class _Exchange:
    """One stream as ASGI's `receive` and `send`. https://asgi.readthedocs.io/en/latest/specs/www.html"""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._body_is_read = False
        self._done = asyncio.Event()

    @property
    def is_complete(self) -> bool:
        return self._done.is_set()

    async def receive(self) -> dict[str, Any]:
        if not self._body_is_read:
            try:
                body = await self._stream.read()
            except StreamOver:
                return {"type": "http.disconnect"}
            self._body_is_read = not body
            return {"type": "http.request", "body": body, "more_body": bool(body)}
        if self._stream.is_over or self.is_complete:
            return {"type": "http.disconnect"}  # without a pause: some only glance, and would be gone before it
        left, done = asyncio.ensure_future(self._stream.failed()), asyncio.ensure_future(self._done.wait())
        try:
            await asyncio.wait({left, done}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            left.cancel()
            done.cancel()
        return {"type": "http.disconnect"}

    async def send(self, message: Mapping[str, Any]) -> None:
        """To a caller who has left, it does nothing: `receive` says so."""
        try:
            if message["type"] == "http.response.start":
                headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in message["headers"]}
                await self._stream.start(Kind.HEAD, AnswerHead(status=message["status"], headers=headers))
            else:
                await self._stream.write(message.get("body", b""))
                if not message.get("more_body", False):
                    self._done.set()
                    await self._stream.end()
        except StreamOver:
            await asyncio.sleep(0)  # an application that never waits would never hear of it


class _Connect(connect):
    """A redirect would hand our signature to somebody else."""

    def process_redirect(self, exc: Exception) -> Exception:
        return exc


def scope_of(head: RequestHead) -> Scope:
    path, _, query = head.target.partition("?")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},  # 2.3: who leaves is told by http.disconnect
        "http_version": "1.1",
        "method": head.method,
        "scheme": "http",
        "path": unquote(path),
        "raw_path": path.encode("latin-1"),
        "query_string": query.encode("latin-1"),
        "root_path": "",
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in head.headers.items()],
        "client": None,
        "server": None,
        "state": {},
    }
