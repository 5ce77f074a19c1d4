"""A relay, gpus and the cables between them, as real processes, for tests that break them; and what they look at."""

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import httpx2
import psutil
from aiohttp import web
from openai import AsyncOpenAI
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tests.cable import Cable
from tests.conftest import ROOT, TINY
from tests.end_to_end.stack import free_port
from tests.relay.conftest import until
from tests.relay.dialler import DiallingGpu
from tests.relay.double_gpu import BASE, DoubleGpu, start_stream
from tests.relay.processes import RelayProcess

Frames = Callable[[bytes], AsyncIterator[str]]  # of a stream, to a request's body
Way = Literal["http", "dialled"]  # how the relay gets to a gpu
PATIENCE_S = 120.0  # on a busy machine; what is awaited comes in a fraction of it
HEARTBEAT_S, LEASE_S = 1.0, 4.0
SETTINGS = {"RELAY_HEARTBEAT_S": str(HEARTBEAT_S), "RELAY_LEASE_S": str(LEASE_S)}


class Zygote:
    """The parent of all gpus of a session."""

    def __init__(self) -> None:
        self._process: Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._ended: dict[int, asyncio.Future[int]] = {}
        self._forked: asyncio.Queue[int] = asyncio.Queue()
        self._one_at_a_time = asyncio.Lock()

    async def open(self) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RELAY_", "GPU_"))}
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.chaos.zygote"), cwd=ROOT, env=kept | one_thread, stdin=PIPE, stdout=PIPE
        )
        assert self._process.stdout
        assert json.loads(await self._process.stdout.readline()) == {"ready": True}
        self._reading = asyncio.create_task(self._read())

    async def close(self) -> None:
        assert self._process
        assert self._process.stdin
        self._process.stdin.close()
        await self._process.wait()
        if self._reading:
            await self._reading

    async def _read(self) -> None:
        assert self._process
        assert self._process.stdout
        while line := await self._process.stdout.readline():
            said = json.loads(line)
            ended = self._ended.setdefault(said["pid"], asyncio.get_running_loop().create_future())
            if "status" in said:
                ended.set_result(said["status"])
            else:
                self._forked.put_nowait(said["pid"])

    async def fork(self, env: dict[str, str], log: Path) -> int:
        assert self._process
        assert self._process.stdin
        async with self._one_at_a_time:
            self._process.stdin.write(json.dumps({"env": env, "log": str(log)}).encode() + b"\n")
            pid = await self._forked.get()
        if self._ended[pid].done():  # numbers come round again
            self._ended[pid] = asyncio.get_running_loop().create_future()
        return pid

    async def ended(self, pid: int) -> int:
        return await asyncio.wait_for(asyncio.shield(self._ended[pid]), PATIENCE_S)

    def is_over(self, pid: int) -> bool:
        return self._ended[pid].done()


class Gpu:
    """`python -m gpu_service` with the tiny model, on a port and a folder of its own."""

    def __init__(self, zygote: Zygote, folder: Path, env: dict[str, str]) -> None:
        self.folder, self._zygote, self._env = folder, zygote, env
        self.url = f"http://127.0.0.1:{env['GPU_PORT']}"
        self._pid: int | None = None
        folder.mkdir(parents=True, exist_ok=True)

    async def start(self) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RELAY_", "GPU_"))}
        self._pid = await self._zygote.fork({**kept, **self._env}, self.folder / "log")

    def signal(self, number: signal.Signals) -> None:
        assert self._pid
        if not self._zygote.is_over(self._pid):
            os.kill(self._pid, number)

    async def kill(self) -> None:
        """As when the power fails. Also when it is stopped."""
        if self._pid:
            self.signal(signal.SIGKILL)
            await self._zygote.ended(self._pid)

    async def stop(self) -> int:
        """As a notebook's interrupt does. The exit status."""
        assert self._pid
        self.signal(signal.SIGINT)
        return await self._zygote.ended(self._pid)

    @property
    def name(self) -> str:
        return self.folder.name

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")


class World:
    """One relay, and whatever a test adds to it."""

    def __init__(
        self, folder: Path, zygote: Zygote, tiny_dir: Path, stack: AsyncExitStack, *before: str, **settings: str
    ) -> None:
        self.folder, self._zygote, self._tiny_dir, self._stack = folder, zygote, tiny_dir, stack
        self.relay = RelayProcess(folder / "relay", before, **{**SETTINGS, **settings})
        self.gpus: dict[str, Gpu] = {}

    async def open(self) -> None:
        await self.relay.start()
        self._stack.push_async_callback(self.relay.stop)
        self.http = await self._stack.enter_async_context(
            httpx2.AsyncClient(
                base_url=self.relay.url,
                headers={"authorization": f"Bearer {self.relay.secret('admin.key')}"},
                timeout=PATIENCE_S,
                trust_env=False,
                verify=False,
            )
        )
        self.openai = await self._stack.enter_async_context(self.client(self.relay.secret("admin.key")))

    def client(self, key: str) -> AsyncOpenAI:
        http = httpx2.AsyncClient(trust_env=False, verify=False)
        return AsyncOpenAI(
            base_url=f"{self.relay.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE_S, http_client=http
        )

    # --- gpus ---

    async def gpu(self, name: str, way: Way = "http", cable: Cable | None = None, **settings: str) -> Gpu:
        """One that is started; a `cable` carries what `way` says of it."""
        port = free_port()
        env = {
            "GPU_PORT": str(port),
            "GPU_NAME": name,
            "GPU_DATA_DIR": str(self.folder / name / "data"),
            "GPU_DEVICE": "cpu",
            "GPU_PRECISION": "fp32",  # rows repeat in any batch, so answers can be compared
            "GPU_MODELS": f"{TINY}={self._tiny_dir}",
            "GPU_RELAY_URL": self.relay.url,
            "GPU_ENROL_TOKEN": self.relay.secret("enrol.token"),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
        }
        if way == "http":
            env |= {"GPU_TUNNEL": "none", "GPU_PUBLIC_URL": f"http://127.0.0.1:{port}"}
            if cable:
                cable.leads_to("127.0.0.1", port)
                env["GPU_PUBLIC_URL"] = cable.url
        else:
            env["GPU_TUNNEL"] = "relay"
            if cable:
                env["GPU_RELAY_URL"] = cable.url
        gpu = self.gpus[name] = Gpu(self._zygote, self.folder / name, env | settings)
        self._stack.push_async_callback(gpu.kill)
        await gpu.start()
        return gpu

    async def cable(self, way: Way) -> Cable:
        """To be given to a gpu. It spoils what live requests need, and of a gpu that dials out nothing else."""
        only = b"GET /gpu/dial" if way == "dialled" else b""
        return await self._stack.enter_async_context(Cable.to(self.relay.url, only))

    async def cable_to_relay(self) -> Cable:
        """To be given as GPU_RELAY_URL: it spoils heartbeats, reports and uploads."""
        return await self._stack.enter_async_context(Cable.to(self.relay.url))

    async def until_reachable(self, *names: str) -> None:
        async def all_are() -> bool:
            listed = (await self.http.get("/api/gpus")).json()["data"]
            return set(names) <= {gpu["name"] for gpu in listed if gpu["reachable"] and gpu["alive"]}

        await self.eventually(all_are)

    async def eventually(self, true: Callable[[], Any]) -> None:
        try:
            await until(true, PATIENCE_S)
        except TimeoutError:
            logs = [f"--- {gpu.name}\n{gpu.log()[-2000:]}" for gpu in self.gpus.values()]
            raise AssertionError("\n".join(["it did not come", self.relay.log[-3000:], *logs])) from None

    async def listed(self, name: str) -> dict[str, Any]:
        """A gpu, as the page shows it."""
        gpus = (await self.http.get("/api/gpus")).json()["data"]
        found: dict[str, Any] = next(gpu for gpu in gpus if gpu["name"] == name)
        return found

    async def double(self, way: Way, say: Frames, cable: Cable | None = None) -> DoubleGpu:
        """A gpu without a model, which says what the test wants; enrolled and reachable."""
        relay_url, token = self.relay.url, self.relay.secret("enrol.token")
        if way == "dialled":
            dialling = DiallingGpu(relay_url, token, time.time, [BASE])

            async def reply(request: Request, body: bytes) -> Response:
                return Noted(dialling, say(body))

            dialling.reply_with = reply
            await self._stack.enter_async_context(dialling.dialling(cable.url if cable else relay_url))
            await dialling.enrol_and_tell()
            await dialling.until_reachable()
            return dialling
        gpu = DoubleGpu(relay_url, token, time.time, [BASE])

        async def answer(request: web.Request, body: bytes) -> web.StreamResponse:
            response = await start_stream(request)
            async for frame in say(body):
                await response.write(frame.encode())
            return response

        gpu.answer = answer
        await self._stack.enter_async_context(gpu.serving())
        if cable:
            assert gpu.url
            cable.leads_to("127.0.0.1", int(gpu.url.rpartition(":")[2]))
        await gpu.enrol(url=cable.url if cable else None)
        await gpu.until_reachable()
        return gpu

    # --- what is left in the end ---

    @contextlib.contextmanager
    def database(self) -> Iterator[sqlite3.Connection]:
        db = sqlite3.connect(f"file:{self.folder}/relay/relay.db?mode=ro", uri=True)
        db.row_factory = sqlite3.Row
        try:
            yield db
        finally:
            db.close()

    def rows(self, query: str, *values: Any) -> list[dict[str, Any]]:
        with self.database() as db:
            return [dict(row) for row in db.execute(query, values)]

    def blob(self, sha256: str) -> Path:
        return self.folder / "relay/blobs" / sha256[:2] / sha256

    def blobs(self) -> list[Path]:
        return sorted((self.folder / "relay/blobs").glob("[0-9a-f][0-9a-f]/*"))

    def half_stored(self) -> list[Path]:
        return [p for p in (self.folder / "relay/blobs/incoming").rglob("*") if p.is_file() and p.name != "lock"]

    def memory_bytes(self) -> int:
        return int(psutil.Process(self.relay.process.pid).memory_info().rss)


class Noted(StreamingResponse):
    """Notes that nobody wanted the rest."""

    def __init__(self, gpu: DoubleGpu, frames: AsyncIterator[str]) -> None:
        super().__init__(self._until_the_end(frames), media_type="text/event-stream")
        self._gpu, self._is_whole = gpu, False

    async def _until_the_end(self, frames: AsyncIterator[str]) -> AsyncIterator[str]:
        async for frame in frames:
            yield frame
        self._is_whole = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not self._is_whole:
                self._gpu.left.set()


@asynccontextmanager
async def a_world(folder: Path, zygote: Zygote, tiny_dir: Path, *before: str, **settings: str) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        world = World(folder, zygote, tiny_dir, stack, *before, **settings)
        await world.open()
        yield world
