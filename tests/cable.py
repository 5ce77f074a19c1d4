"""A TCP connection's cable: bytes pass through a port of its own until a test cuts it, or unplugs it for a while."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from urllib.parse import urlsplit


class Cable:
    def __init__(self, host: str, port: int) -> None:
        self._to = (host, port)
        self._open: set[asyncio.StreamWriter] = set()
        self._plugged = True
        self.url = ""
        self.bytes_back = 0  # from the far end

    @classmethod
    @contextlib.asynccontextmanager
    async def to(cls, url: str) -> AsyncIterator["Cable"]:
        parts = urlsplit(url)
        assert parts.hostname
        assert parts.port
        cable = cls(parts.hostname, parts.port)
        server = await asyncio.start_server(cable._carry, "127.0.0.1", 0)
        cable.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield cable
        finally:
            server.close()
            cable.cut()
            await server.wait_closed()

    def cut(self) -> None:
        """Every connection, without a goodbye; new ones may be made."""
        for end in self._open:
            end.transport.abort()

    def unplug(self) -> None:
        self._plugged = False
        self.cut()

    def plug_in(self) -> None:
        self._plugged = True

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._plugged:
            writer.transport.abort()
            return
        far_reader, far_writer = await asyncio.open_connection(*self._to)
        ends = {writer, far_writer}
        self._open |= ends
        await asyncio.gather(self._pass(reader, far_writer, 0), self._pass(far_reader, writer, 1))
        self._open -= ends

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counts: int) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(2**16):
                self.bytes_back += counts * len(data)
                writer.write(data)
                await writer.drain()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
