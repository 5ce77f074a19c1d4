"""Many requests over one WebSocket: its frames, and each stream's flow control. Pydantic and the standard library only.

A gpu that dials out opens one WebSocket to its relay; both ends run this. Each binary message is one frame:

    1 byte   kind
    4 bytes  stream, unsigned, big-endian; the relay counts up from 1 and uses no number twice on a socket
    rest     payload

      kind    from            payload
    1 OPEN    relay           RequestHead as JSON; the body follows as DATA, then END
    2 HEAD    gpu             AnswerHead as JSON; the answer's body follows as DATA, then END
    3 DATA    both            1 to CHUNK_BYTES bytes
    4 END     both            nothing; this direction is complete
    5 CREDIT  both            4 bytes, unsigned, big-endian: so many more bytes of DATA may be sent on this stream
    6 RESET   both            why, as UTF-8; the stream is over at once, in both directions

Each direction of a stream starts with WINDOW_BYTES of credit. Only DATA uses it up, and only a reader that has really
read gives it back: whoever reads slowly stops their own sender, and nobody else. So both ends hold at most WINDOW_BYTES
for each direction of a stream, and whoever receives from the socket never has to wait for a reader. Frames of a stream
that is over are ignored: they were under way already. Keep-alive is WebSocket's own ping and pong.
"""

import asyncio
import contextlib
import enum
import struct
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

CHUNK_BYTES = 2**14  # small, so that a long answer lets short ones through in between
WINDOW_BYTES = 2**17  # at 100 ms there and back, 1.3 MB/s for each stream
MOST_BYTES = 2**16  # of one frame, heads too
PING_S = 5.0  # both ends ask this often whether the other is there
PONG_S = 10.0  # and take it for gone when nothing comes back for so long

_FRAME = struct.Struct(">BI")
_CREDIT = struct.Struct(">I")

Text = Annotated[str, Field(max_length=8192)]


class Kind(enum.IntEnum):
    OPEN = 1
    HEAD = 2
    DATA = 3
    END = 4
    CREDIT = 5
    RESET = 6


class ProtocolError(Exception):
    """The other end broke the rules above: the socket is of no use any more."""


class StreamOver(Exception):
    """The other end gave up this stream, or the socket is gone. The message is for a log."""


class RequestHead(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = Field(max_length=16)
    target: Text  # path and query, as signed
    headers: dict[str, Text]


class AnswerHead(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    status: int = Field(ge=200, le=599)
    headers: dict[str, Text]


def pack(kind: Kind, stream: int, payload: bytes | memoryview = b"") -> bytes:
    return _FRAME.pack(kind, stream) + payload


def unpack(frame: bytes) -> tuple[Kind, int, bytes]:
    """Raises ProtocolError."""
    if not _FRAME.size <= len(frame) <= MOST_BYTES:
        raise ProtocolError(f"a frame of {len(frame)} bytes")
    kind, stream = _FRAME.unpack_from(frame)
    try:
        return Kind(kind), stream, frame[_FRAME.size :]
    except ValueError as exc:
        raise ProtocolError(f"a frame of kind {kind}") from exc


def request_head(payload: bytes) -> RequestHead:
    """Raises ProtocolError."""
    try:
        return RequestHead.model_validate_json(payload)
    except ValidationError as exc:
        raise ProtocolError("a request head that can't be read") from exc


class Stream:
    """One request and its answer, seen from either end.

    `feed` and `fail` are for whoever receives from the socket, and never wait. The rest is for one reader and one
    writer. `send` puts a frame on the socket; it raises StreamOver when the socket is gone.
    """

    def __init__(self, number: int, send: Callable[[bytes], Awaitable[None]]) -> None:
        self.number = number
        self._send = send
        self._head: AnswerHead | None = None
        self._inbox: deque[bytes] = deque()
        self._ended = False  # the other end's direction is complete
        self._sent_all = False  # ours is
        self._fault: str | None = None
        self._credit_bytes = WINDOW_BYTES  # that we may send
        self._room_bytes = WINDOW_BYTES  # that the other end may send
        self._read_bytes = 0  # and not given back yet
        self._news = asyncio.Event()  # for the reader
        self._may_send = asyncio.Event()  # for the writer

    @property
    def is_over(self) -> bool:
        """Both directions are complete, or it failed: no frame will come that matters."""
        return self._fault is not None or (self._ended and self._sent_all)

    # --- what the socket brings ---

    def feed(self, kind: Kind, payload: bytes) -> None:
        """Raises ProtocolError."""
        match kind:
            case Kind.DATA:
                self._room_bytes -= len(payload)
                if self._room_bytes < 0 or self._ended or not payload:
                    raise ProtocolError(f"stream {self.number}: more data than it was given credit for, or none")
                self._inbox.append(payload)
            case Kind.HEAD if self._head is None:
                try:
                    self._head = AnswerHead.model_validate_json(payload)
                except ValidationError as exc:
                    raise ProtocolError(f"stream {self.number}: an answer head that can't be read") from exc
            case Kind.END:
                self._ended = True
            case Kind.CREDIT if len(payload) == _CREDIT.size:
                self._credit_bytes += _CREDIT.unpack(payload)[0]
                self._may_send.set()
            case Kind.RESET:
                self.fail(payload.decode(errors="replace"))
            case _:
                raise ProtocolError(f"stream {self.number}: {kind.name} out of place")
        self._news.set()

    def fail(self, why: str) -> None:
        """Over, for its reader and its writer. What had arrived can still be read."""
        self._fault = self._fault or why
        self._news.set()
        self._may_send.set()

    # --- its reader ---

    async def head(self) -> AnswerHead:
        """Raises StreamOver."""
        while self._head is None:
            if self._fault is not None or self._ended:
                raise StreamOver(self._fault or "it ended without an answer")
            await self._wait(self._news)
        return self._head

    async def read(self) -> bytes:
        """What has arrived, at least a byte; nothing at the end. Raises StreamOver."""
        while not self._inbox:
            if self._ended:
                return b""
            if self._fault is not None:
                raise StreamOver(self._fault)
            await self._wait(self._news)
        data = self._inbox.popleft() if len(self._inbox) == 1 else b"".join(self._inbox)
        self._inbox.clear()
        self._read_bytes += len(data)
        if self._read_bytes >= WINDOW_BYTES // 2 and not self._ended and self._fault is None:
            given, self._read_bytes = self._read_bytes, 0
            self._room_bytes += given
            await self._send(pack(Kind.CREDIT, self.number, _CREDIT.pack(given)))
        return data

    async def failed(self) -> None:
        """Wait until it is over by a fault."""
        while self._fault is None:
            await self._wait(self._news)

    # --- its writer ---

    async def write(self, data: bytes) -> None:
        """Waits for the other end's reader. Raises StreamOver."""
        left = memoryview(data)
        while left:
            while self._credit_bytes == 0 and self._fault is None:
                await self._wait(self._may_send)
            if self._fault is not None:
                raise StreamOver(self._fault)
            n = min(len(left), self._credit_bytes, CHUNK_BYTES)
            self._credit_bytes -= n
            await self._send(pack(Kind.DATA, self.number, left[:n]))
            left = left[n:]

    async def start(self, kind: Kind, head: RequestHead | AnswerHead) -> None:
        """Raises StreamOver, also where the head is longer than a frame may be."""
        frame = pack(kind, self.number, head.model_dump_json().encode())
        if len(frame) > MOST_BYTES:
            raise StreamOver(f"its head has {len(frame):,} bytes")
        await self._send(frame)

    async def end(self) -> None:
        """Raises StreamOver."""
        self._sent_all = True
        await self._send(pack(Kind.END, self.number))

    async def reset(self, why: str) -> None:
        """Give it up, unless it is over. Never raises."""
        if not self.is_over:
            self.fail(why)
            with contextlib.suppress(StreamOver):  # the socket is gone, and the other end knows
                await self._send(pack(Kind.RESET, self.number, why.encode()[:1000]))

    async def _wait(self, event: asyncio.Event) -> None:
        event.clear()
        await event.wait()
