"""A TCP connection's cable: bytes pass through a port of its own until a test cuts it, or lets it do worse.

`only`: what a connection must begin with to be spoiled; others pass untouched. "Back" is from the far end, "forth"
towards it. A test names what is spoiled by its source, so that one test holds for cables laid either way.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Literal
from urllib.parse import urlsplit

Direction = Literal["forth", "back"]


class Cable:
    def __init__(self, host: str, port: int, only: bytes = b"") -> None:
        self._to = (host, port)
        self._only = only
        self._open: set[asyncio.StreamWriter] = set()
        self._carrying: set[asyncio.Task[None]] = set()
        self._plugged = True
        self._passing = asyncio.Event()
        self._passing.set()
        self._cut_in: tuple[Direction, bytes] | None = None
        self._flip_in: tuple[Direction, bytes] | None = None
        self._page = b""
        self.url = ""
        self.passed_bytes: dict[Direction, int] = {"forth": 0, "back": 0}
        self.connections = 0
        self.spoiled = asyncio.Event()  # what was asked for has happened

    @classmethod
    @contextlib.asynccontextmanager
    async def to(cls, url: str, only: bytes = b"") -> AsyncIterator["Cable"]:
        parts = urlsplit(url)
        assert parts.hostname
        assert parts.port
        cable = cls(parts.hostname, parts.port, only)
        server = await asyncio.start_server(cable._accept, "127.0.0.1", 0)
        cable.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield cable
        finally:
            server.close()
            cable.cut()
            for task in cable._carrying:
                task.cancel()
            await asyncio.gather(*cable._carrying, return_exceptions=True)
            await server.wait_closed()

    @property
    def bytes_back(self) -> int:
        return self.passed_bytes["back"]

    def leads_to(self, host: str, port: int) -> None:
        """From the next connection on."""
        self._to = (host, port)

    def cut(self) -> None:
        """Every connection, without a goodbye; new ones may be made."""
        for end in self._open:
            end.transport.abort()

    def cut_in_the_middle(self, direction: Direction, of: bytes = b"") -> None:
        """Of whatever comes next that way, or next with these words in it: the first half of it passes."""
        self.spoiled.clear()
        self._cut_in = (direction, of)

    def flip(self, direction: Direction, after: bytes) -> None:
        """One bit of the first byte that comes that way behind `after`, which must come in one piece with it."""
        self.spoiled.clear()
        self._flip_in = (direction, after)

    def unplug(self) -> None:
        self._plugged = False
        self.cut()

    def plug_in(self) -> None:
        self._plugged = True

    def swallow(self) -> None:
        """Nothing passes any more, and nobody is told: neither end sees its connection break."""
        self._passing.clear()

    def pass_again(self) -> None:
        self._passing.set()

    def answer_with(self, page: bytes) -> None:
        """A whole HTTP response, to whoever asks anything, in place of the far end. Empty: the far end again."""
        self._page = page
        self.cut()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._carrying.add(task)
        try:
            await self._carry(reader, writer)
        finally:
            self._carrying.discard(task)
            writer.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = b""
        spoils = True
        if self._only:
            with contextlib.suppress(OSError):
                while len(first) < len(self._only) and (data := await reader.read(2**16)):
                    first += data
            spoils = first.startswith(self._only)
        if spoils:
            self.connections += 1
        if spoils and not self._plugged:
            writer.transport.abort()
            return
        if spoils and self._page:
            await self._answer(reader, writer, first)
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._to)
        except OSError:
            writer.transport.abort()
            return
        ends = {writer, far_writer}
        if spoils:
            self._open |= ends
        try:
            await asyncio.gather(
                self._pass("forth", reader, far_writer, spoils, first), self._pass("back", far_reader, writer, spoils)
            )
        finally:
            self._open -= ends
            for end in ends:
                end.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: bytes) -> None:
        with contextlib.suppress(OSError):
            while b"\r\n\r\n" not in asked and (data := await reader.read(2**16)):
                asked += data
            writer.write(self._page)
            await writer.drain()

    async def _pass(
        self,
        direction: Direction,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        spoils: bool,
        first: bytes = b"",
    ) -> None:
        with contextlib.suppress(OSError):
            data = first or await reader.read(2**16)
            while data:
                if spoils:
                    data = await self._spoil(direction, data, writer)
                writer.write(data)
                await writer.drain()
                data = await reader.read(2**16)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async def _spoil(self, direction: Direction, data: bytes, writer: asyncio.StreamWriter) -> bytes:
        await self._passing.wait()
        if self._cut_in and self._cut_in[0] == direction and self._cut_in[1] in data:
            self._cut_in = None
            writer.write(data[: len(data) // 2])
            await writer.drain()
            self.cut()
            self.spoiled.set()
            raise ConnectionAbortedError
        if self._flip_in and self._flip_in[0] == direction and self._flip_in[1] in data[:-1]:
            at = data.index(self._flip_in[1]) + len(self._flip_in[1])
            data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
            self._flip_in = None
            self.spoiled.set()
        self.passed_bytes[direction] += len(data)
        return data
