"""A relay on a real port for each test, on a clock that stands still until the test moves it.

A module that says ON_BOTH_DATABASES has its tests run on SQLite and on PostgreSQL: all (True), or those that it names.
One that says ON_BOTH_STORES has those that take `bucket` run on a folder and on a bucket.
"""

import asyncio
import contextlib
import inspect
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from openai import AsyncOpenAI

from relay.app import create_app
from relay.settings import Settings
from tests.postgres import Postgres
from tests.relay.double_gpu import BASE, DoubleGpu
from tests.s3 import S3Server

ADMIN_KEY = "sk-fine-of-the-admin-in-tests"
ENROL_TOKEN = "enrol-token-of-the-tests"
CHAT_ROW = '{"messages": [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Fine."}]}\n'


async def until(true: Callable[[], Any], within_s: float = 5.0) -> None:
    """Looks again and again; `true` may be a coroutine function."""
    async with asyncio.timeout(within_s):
        while not (await found if inspect.isawaitable(found := true()) else found):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


class Clock:
    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


class Relay:
    """A running relay and ways to talk to it."""

    def __init__(self, url: str, settings: Settings, clock: Clock) -> None:
        self.url = url
        self.settings = settings
        self.clock = clock
        self.http = httpx2.AsyncClient(
            base_url=url,
            headers={"authorization": f"Bearer {settings.admin_key}"},
            timeout=20,
            trust_env=False,
            verify=False,
        )
        self.openai = self.client(str(settings.admin_key))

    def client(self, key: str) -> AsyncOpenAI:
        http = httpx2.AsyncClient(trust_env=False, verify=False)  # to plain HTTP; loading certificates takes long
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20, http_client=http)

    @asynccontextmanager
    async def gpu(self, *models: str, enrol: bool = True) -> AsyncIterator[DoubleGpu]:
        """One that is enrolled and reachable, unless told otherwise."""
        async with DoubleGpu(self.url, ENROL_TOKEN, self.clock, models or (BASE,)).serving() as gpu:
            if enrol:
                assert (await gpu.enrol()).status_code == 200
                await gpu.until_reachable()
            yield gpu

    async def upload(self, content: str = CHAT_ROW * 3) -> str:
        return (await self.openai.files.create(file=("rows.jsonl", content.encode()), purpose="fine-tune")).id

    def stored(self) -> list[Path]:
        """Every blob, and every file that is half a blob."""
        root = self.settings.data_dir / "blobs"
        return [p for p in root.rglob("*") if p.is_file() and p.name not in ("lock", "opening")]


@asynccontextmanager
async def running_relay(folder: Path, clock: Clock, **changes: Any) -> AsyncIterator[Relay]:
    """`has_peers`: other relays beside it know where it is."""
    values: dict[str, Any] = {
        "data_dir": folder,
        "admin_key": ADMIN_KEY,
        "enrol_token": ENROL_TOKEN,
        "allow_loopback_gpus": True,
        "heartbeat_s": 0.3,
        "max_upload_bytes": 200_000,
        "page_dir": folder / "page",  # not built, unless a test does
    }
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    if changes.pop("has_peers", False):
        values["internal_url"] = url
    settings = Settings(**(values | changes))
    app = create_app(settings, clock)
    config = uvicorn.Config(app, access_log=False, log_config=None, lifespan="on", timeout_graceful_shutdown=2)
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.005)
        assert not serving.done()
    relay = Relay(url, settings, clock)
    try:
        yield relay
    finally:
        await relay.http.aclose()
        await relay.openai.close()
        app.state.dispatcher.stop()
        server.should_exit = True
        await serving


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    both = getattr(metafunc.module, "ON_BOTH_DATABASES", False)
    chosen = both is True or (both and metafunc.function.__name__ in both)
    if "database" in metafunc.fixturenames and chosen:
        metafunc.parametrize("database", ["sqlite", "postgresql"], indirect=True)
    if "bucket" in metafunc.fixturenames and getattr(metafunc.module, "ON_BOTH_STORES", False):
        metafunc.parametrize("bucket", ["folder", "bucket"], indirect=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    server = Postgres()
    try:
        server.start()
        server.make_template()
        yield server
    finally:
        server.close()


@pytest.fixture
def database(request: pytest.FixtureRequest) -> Iterator[str]:
    """RELAY_DATABASE_URL: empty, which is SQLite in the data folder, or a fresh database of the tests' PostgreSQL."""
    if getattr(request, "param", "sqlite") == "sqlite":
        yield ""
        return
    server: Postgres = request.getfixturevalue("postgres")
    name = server.new()
    yield server.url(name)
    server.drop(name)


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    server = S3Server()
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def bucket(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Settings of a fresh bucket, unless a test is for the folder."""
    if getattr(request, "param", "bucket") == "folder":
        return {}
    server: S3Server = request.getfixturevalue("s3")
    return server.settings(server.new())


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def start_relay(tmp_path: Path, clock: Clock, database: str) -> AsyncIterator[Callable[..., Any]]:
    """For tests that need other settings."""
    async with AsyncExitStack() as stack:

        async def start(**changes: Any) -> Relay:
            changes = {"database_url": database} | changes
            return await stack.enter_async_context(running_relay(tmp_path / "data", clock, **changes))

        yield start


@pytest.fixture
async def relay(tmp_path: Path, clock: Clock, database: str) -> AsyncIterator[Relay]:
    async with running_relay(tmp_path / "data", clock, database_url=database) as relay:
        yield relay


@pytest.fixture
async def gpu(relay: Relay) -> AsyncIterator[DoubleGpu]:
    async with relay.gpu() as gpu:
        yield gpu
