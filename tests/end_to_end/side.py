"""Two relay processes on one PostgreSQL and one data folder, as two machines have them, and what stands before them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
from sqlalchemy import select

import wire
from relay.store import Store
from relay.tables import gpus, relays
from tests.end_to_end.stack import Service, free_port
from tests.relay.double_gpu import DoubleGpu
from tests.relay.processes import RelayProcess

T = TypeVar("T")
ADMIN_KEY, ENROL_TOKEN = "sk-fine-of-the-admin-in-tests", "enrol-token-of-the-tests"
DEAD = (httpx2.TransportError,)  # a request was with a process that was killed


class Front:
    """What nginx is before several relays: each connection to one that answers the knock."""

    def __init__(self, relays: list["RelayProcess"]) -> None:
        self._relays, self._next = relays, 0
        self._carrying: set[asyncio.Task[None]] = set()
        self.url = ""

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["Front"]:
        server = await asyncio.start_server(self._knock, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            for task in self._carrying:
                task.cancel()
            await asyncio.gather(*self._carrying, return_exceptions=True)

    def _knock(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._carry(reader, writer))
        self._carrying.add(task)
        task.add_done_callback(self._carrying.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in self._relays:
            self._next = (self._next + 1) % len(self._relays)
            port = urlsplit(self._relays[self._next].url).port
            with contextlib.suppress(OSError):
                far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
                break
        else:
            writer.close()
            return
        try:
            await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))
        finally:
            writer.close()
            far_writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()
    with contextlib.suppress(OSError):
        writer.close()


class Side:
    """Two relays, what stands before them, and their database."""

    def __init__(self, folder: Path, url: str, **changes: str) -> None:
        self.store = Store(url)
        self.relays = []
        for _ in range(2):
            port = str(free_port())
            settings = {
                "RELAY_DATABASE_URL": url,
                "RELAY_PORT": port,
                "RELAY_INTERNAL_URL": f"http://127.0.0.1:{port}",
                "RELAY_ADMIN_KEY": ADMIN_KEY,
                "RELAY_ENROL_TOKEN": ENROL_TOKEN,
                "RELAY_HEARTBEAT_S": "1",
                "RELAY_LEASE_S": "15",
            }
            self.relays.append(RelayProcess(folder / "data", **(settings | changes)))
        self.front = Front(self.relays)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Side"]:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.store.close)
            for relay in self.relays:
                stack.push_async_callback(relay.stop)
            await asyncio.gather(*(relay.start() for relay in self.relays))
            await stack.enter_async_context(self.front.serving())
            yield self

    @asynccontextmanager
    async def client(self, url: str = "", key: str = ADMIN_KEY) -> AsyncIterator[httpx2.AsyncClient]:
        headers = {"authorization": f"Bearer {key}"}
        limits = httpx2.Limits(max_keepalive_connections=0)  # so that the front chooses for each request
        async with httpx2.AsyncClient(
            base_url=url or self.front.url, headers=headers, timeout=20, trust_env=False, verify=False, limits=limits
        ) as client:
            yield client

    async def rows(self, query: Any) -> list[Any]:
        async with self.store.read() as db:
            return list((await db.execute(query)).all())

    async def holder(self) -> RelayProcess:
        """That the one gpu has dialled in to."""
        (row,) = await self.rows(select(relays.c.url).join(gpus, gpus.c.relay_id == relays.c.id))
        return next(relay for relay in self.relays if relay.url == row.url)

    def beside(self, *command: str, name: str) -> Service:
        """Another process with the relays' settings."""
        settings = self.relays[0].changes | {"RELAY_DATA_DIR": str(self.relays[0].folder)}
        return Service(["relay", *command], self.relays[0].folder.parent / name, settings)


async def again(ask: Callable[[], Awaitable[T]]) -> T:
    """Until it is neither cut off nor put off: what gpus do, and careful callers."""
    while True:
        try:
            found = await ask()
        except DEAD:
            pass
        except httpx2.HTTPStatusError as exc:
            if exc.response.status_code != 503:
                raise
        else:
            if getattr(found, "status_code", 200) != 503:
                return found
        await asyncio.sleep(0.1)


@asynccontextmanager
async def beating(gpu: DoubleGpu, leases: list[wire.HeldLease]) -> AsyncIterator[None]:
    """As a living gpu does, whatever becomes of the relays."""

    async def beat() -> None:
        while True:
            await again(lambda: gpu.beat(*leases))

    task = asyncio.create_task(beat())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
