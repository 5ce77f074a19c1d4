"""The second way to a gpu: back through the WebSocket that it opened to us. Same interface as the first.

Knows nothing of signatures, models or what an answer means; frames.py has the format and the flow control.
A socket belongs to one gpu in one epoch, and lives in this process.
"""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Mapping

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

import wire
from frames import Kind, ProtocolError, RequestHead, Stream, StreamOver, unpack
from relay.transport import Endpoint, TransportFailed

log = logging.getLogger("relay.dialout")

CLOSE_REPLACED, CLOSE_BROKE_RULES = 4001, 1002  # https://www.rfc-editor.org/rfc/rfc6455#section-7.4


class DialOut:
    """The sockets of the gpus that dialled in."""

    def __init__(self) -> None:
        self._sockets: dict[tuple[str, int], Socket] = {}

    def has(self, by: wire.SignedBy) -> bool:
        return (by.gpu_id, by.epoch) in self._sockets

    async def request(
        self, to: Endpoint, method: str, target: str, headers: Mapping[str, str], body: bytes
    ) -> "_Answer":
        """Returns once the answer's headers are here. Raises TransportFailed."""
        socket = self._sockets.get((to.gpu_id, to.epoch))
        if socket is None:
            raise TransportFailed("it has not dialled in")
        return await socket.request(method, target, headers, body)

    @contextlib.asynccontextmanager
    async def joined(self, by: wire.SignedBy, websocket: WebSocket) -> AsyncIterator["Socket"]:
        """An accepted WebSocket, usable for requests inside the block while somebody runs its `receive`."""
        key = (by.gpu_id, by.epoch)
        if before := self._sockets.get(key):
            await before.close(CLOSE_REPLACED, "replaced by a newer socket")
        socket = self._sockets[key] = Socket(websocket)
        try:
            yield socket
        finally:
            if self._sockets.get(key) is socket:
                del self._sockets[key]
            socket.fail("the gpu's socket is gone")


class Socket:
    def __init__(self, websocket: WebSocket) -> None:
        self._websocket = websocket
        self._numbers = itertools.count(1)
        self._streams: dict[int, Stream] = {}
        self._goodbyes: set[asyncio.Task[None]] = set()

    async def receive(self) -> None:
        """Hand out what comes, until the socket is gone. Never waits for a reader."""
        try:
            while (message := await self._websocket.receive())["type"] != "websocket.disconnect":
                frame = message.get("bytes")
                if frame is None:
                    raise ProtocolError("a text message")
                self._feed(frame)
        except ProtocolError as exc:
            log.warning("a gpu's socket is closed: %s", exc)
            await self.close(CLOSE_BROKE_RULES, str(exc))

    def _feed(self, frame: bytes) -> None:
        kind, number, payload = unpack(frame)
        if kind == Kind.OPEN:
            raise ProtocolError("a gpu opened a stream")
        if stream := self._streams.get(number):  # else it is over, and this was under way
            stream.feed(kind, payload)
            self._forget_if_over(stream)

    async def request(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> "_Answer":
        stream = Stream(next(self._numbers), self._send)
        self._streams[stream.number] = stream
        try:
            await stream.start(Kind.OPEN, RequestHead(method=method, target=target, headers=dict(headers)))
            await stream.write(body)
            await stream.end()
            head = await stream.head()
        except BaseException as exc:
            self.give_up(stream)
            if isinstance(exc, StreamOver):
                raise TransportFailed(repr(exc)) from exc
            raise
        return _Answer(self, stream, head.status, {name.lower(): value for name, value in head.headers.items()})

    def give_up(self, stream: Stream) -> None:
        """Tell the gpu to stop, if it has not finished."""
        self._streams.pop(stream.number, None)
        if not stream.is_over:
            task = asyncio.create_task(stream.reset("the caller left"))
            self._goodbyes.add(task)
            task.add_done_callback(self._goodbyes.discard)

    def fail(self, why: str) -> None:
        for stream in self._streams.values():
            stream.fail(why)
        self._streams.clear()

    async def close(self, code: int, why: str) -> None:
        self.fail(why)
        if self._websocket.application_state is WebSocketState.CONNECTED:
            with contextlib.suppress(WebSocketDisconnect, RuntimeError):
                await self._websocket.close(code, why[:100])

    def _forget_if_over(self, stream: Stream) -> None:
        if stream.is_over:
            self._streams.pop(stream.number, None)

    async def _send(self, frame: bytes) -> None:
        try:
            await self._websocket.send_bytes(frame)
        except (WebSocketDisconnect, RuntimeError) as exc:  # RuntimeError: it was closed before
            raise StreamOver("the gpu's socket is gone") from exc


class _Answer:
    def __init__(self, socket: Socket, stream: Stream, status: int, headers: Mapping[str, str]) -> None:
        self._socket, self._stream = socket, stream
        self.status, self.headers = status, headers

    async def chunks(self) -> AsyncIterator[bytes]:
        try:
            while chunk := await self._stream.read():
                yield chunk
        except StreamOver as exc:
            raise TransportFailed(repr(exc)) from exc

    def close(self) -> None:
        self._socket.give_up(self._stream)
