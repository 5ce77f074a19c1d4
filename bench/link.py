"""What the way to a gpu costs: dial-out against plain HTTP on loopback, through the same relay, in one run.

A relay process; two stub gpus in a process of their own that answer at once: one is called by HTTP at its port, one
has dialled in. Four ways are asked in turn, so that drift of the machine meets all of them alike:

    direct     this process -> the stub's port
    http       this process -> relay -> the stub's port
    dial-out   this process -> relay -> WebSocket -> the stub

What a way adds is its time minus `direct`. The last line is JSON: added p50 of dial-out over that of http, for a whole
answer asked one at a time. Run it by `make bench-link`.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

import wire
from gpu_service.dialout import DialOut
from gpu_service.gate import Gate, Identity

ROOT = Path(__file__).parent.parent
ADMIN_KEY, ENROL_TOKEN = "sk-fine-of-the-bench-of-the-link", "enrol-token-of-the-bench"
GPU_KEY = "sk-gpu-of-the-bench"
FRAME = b'data: {"choices":[{"index":0,"delta":{"content":" fine"}}]}\n\n'
N_FRAMES = 64
WAYS = ("direct", "http", "dial-out")


class StubGpu:
    """Enrols, proves itself, and answers at once; nothing else of a gpu."""

    def __init__(self, session: aiohttp.ClientSession, relay_url: str, model: str, url: str | None) -> None:
        self._session, self._relay_url, self._model, self._url = session, relay_url, model, url
        self._offset_s = 0.0
        self._reply: wire.EnrolReply | None = None
        self.gate = Gate(GPU_KEY, 2**20, self.identity)

    def identity(self) -> Identity | None:
        return Identity(self.by, self._reply.signing_key, self._now) if self._reply else None

    @property
    def by(self) -> wire.SignedBy:
        assert self._reply
        return wire.SignedBy(gpu_id=self._reply.gpu_id, epoch=self._reply.epoch)

    def _now(self) -> float:
        return time.monotonic() + self._offset_s

    def _models(self) -> list[wire.OfferedModel]:
        return [wire.OfferedModel(id=self._model, family="llama", n_layers=1, context_tokens=128, loaded=True)]

    async def enrol(self) -> None:
        device = wire.Device(
            kind="cpu", name="stub", memory_bytes=1, free_bytes=1, precision="fp32", precision_why="a bench"
        )
        request = wire.EnrolRequest(
            instance=secrets.token_hex(16),
            process=secrets.token_hex(8),
            name=f"stub of {self._model}",
            url=self._url,
            tunnel="none" if self._url else wire.DIALLED,
            device=device,
            families=["llama"],
            models=self._models(),
        )
        headers = {"authorization": f"Bearer {ENROL_TOKEN}"}
        async with self._session.post(
            f"{self._relay_url}/gpu/enrol", data=request.model_dump_json(), headers=headers
        ) as response:
            assert response.status == 200, await response.text()
            self._reply = wire.EnrolReply.model_validate_json(await response.read())
        self._offset_s = self._reply.relay_time - time.monotonic()

    async def beat(self) -> None:
        while True:
            beat = wire.Heartbeat(free_bytes=1, models=self._models(), leases=[], active_requests=0)
            body = beat.model_dump_json().encode()
            headers = self.sign("POST", "/gpu/heartbeat", wire.body_sha256(body))
            async with self._session.post(f"{self._relay_url}/gpu/heartbeat", data=body, headers=headers) as response:
                assert response.status == 200, await response.text()

    def sign(self, method: str, target: str, sha256: str) -> dict[str, str]:
        assert self._reply
        return wire.sign(self._reply.signing_key, self.by, method, target, sha256, self._now())

    # --- what a dial-out needs of a link ---

    def signed(self, method: str, target: str) -> dict[str, str]:
        return self.sign(method, target, wire.EMPTY_SHA256)

    async def wait_enrolled(self) -> wire.SignedBy:
        return self.by

    async def superseded(self, by: wire.SignedBy) -> None:
        await asyncio.Event().wait()

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        body = json.loads(await self.gate.admit(request))
        response: Response
        if request.url.path == "/challenge":
            assert self._reply
            response = JSONResponse({"proof": wire.challenge_proof(self._reply.signing_key, body["nonce"], self.by)})
        elif body.get("stream"):
            response = StreamingResponse(_frames(), headers={"content-type": "text/event-stream"})
        else:
            response = JSONResponse({"content": "I'm fine."})
        await response(scope, receive, send)


async def _frames() -> Any:
    for _ in range(N_FRAMES):
        yield FRAME
    yield b"data: [DONE]\n\n"


def stubs(relay_url: str, told: Connection) -> None:
    """A process: both stubs. Tells the port of the one that is called by HTTP."""
    asyncio.run(_stubs(relay_url, told))


async def _stubs(relay_url: str, told: Connection) -> None:
    listener = socket.socket(proto=socket.IPPROTO_TCP)  # as in gpu_service
    listener.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with aiohttp.ClientSession() as session:
        called, dialled = StubGpu(session, relay_url, "http", url), StubGpu(session, relay_url, "dial-out", None)
        server = uvicorn.Server(
            uvicorn.Config(called.app, log_level="warning", access_log=False, lifespan="off", interface="asgi3")
        )
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await called.enrol()
        await dialled.enrol()
        dialout = DialOut(relay_url, dialled, dialled.app)
        await dialout.open()
        told.send(url)
        await asyncio.gather(serving, called.beat(), dialled.beat())


class Caller:
    def __init__(self, session: aiohttp.ClientSession, relay_url: str, stub_url: str) -> None:
        self._session = session
        self._urls = {"direct": stub_url, "http": relay_url, "dial-out": relay_url}

    async def ask(self, way: str, *, stream: bool = False) -> float:
        """Milliseconds until the whole answer is here."""
        key = GPU_KEY if way == "direct" else ADMIN_KEY
        body = {"model": "http" if way == "direct" else way, "stream": stream, "messages": []}
        began = time.perf_counter()
        async with self._session.post(
            f"{self._urls[way]}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"}
        ) as response:
            answer = await response.read()
            assert response.status == 200, answer
        assert not stream or answer.endswith(b"data: [DONE]\n\n")
        return 1000 * (time.perf_counter() - began)

    async def until_reachable(self) -> None:
        async with asyncio.timeout(20):
            for way in WAYS:
                while True:
                    try:
                        await self.ask(way)
                        break
                    except AssertionError:
                        await asyncio.sleep(0.05)


async def in_turn(n: int, ask: Callable[[str], Awaitable[float]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(n):
        for way in WAYS:
            found[way].append(await ask(way))
    return found


async def side_by_side(caller: Caller, n: int, at_once: int) -> dict[str, list[float]]:
    async def batch(way: str) -> list[float]:
        return await asyncio.gather(*(caller.ask(way) for _ in range(at_once)))

    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(n // at_once):
        for way in WAYS:
            found[way] += await batch(way)
    return found


def report(what: str, found: dict[str, list[float]]) -> float:
    """Prints a row for each way. Returns added p50 of dial-out over that of http."""
    p50 = {way: statistics.median(times) for way, times in found.items()}
    print(what)
    for way in WAYS:
        times = sorted(found[way])
        added = "" if way == "direct" else f"   added p50 {p50[way] - p50['direct']:6.3f}"
        print(f"  {way:9} p50 {p50[way]:7.3f} ms   p95 {times[int(0.95 * len(times))]:7.3f} ms{added}")
    ratio = (p50["dial-out"] - p50["direct"]) / (p50["http"] - p50["direct"])
    print(f"  added p50, dial-out over http: {ratio:.2f}")
    return ratio


async def measure(relay_url: str, stub_url: str, n: int) -> float:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        caller = Caller(session, relay_url, stub_url)
        await caller.until_reachable()
        await in_turn(n // 10, caller.ask)  # warm
        ratio = report("whole answers, one at a time", await in_turn(n, caller.ask))
        streamed = await in_turn(n // 4, lambda way: caller.ask(way, stream=True))
        report(f"streams of {N_FRAMES} frames, one at a time", streamed)
        report("whole answers, 16 at once", await side_by_side(caller, n, 16))
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser(description="What the way to a gpu costs.")
    parser.add_argument("--n", type=int, default=1000, help="requests of each way")
    n = parser.parse_args().n
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {
            "RELAY_PORT": "0",
            "RELAY_DATA_DIR": folder,
            "RELAY_ADMIN_KEY": ADMIN_KEY,
            "RELAY_ENROL_TOKEN": ENROL_TOKEN,
            "RELAY_ALLOW_LOOPBACK_GPUS": "1",
        }
        command = [sys.executable, "-m", "relay", "serve"]
        relay = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
        try:
            assert relay.stderr
            url = ""
            while not url:
                line = relay.stderr.readline()
                assert line, "the relay did not start"
                url = found[0] if (found := re.findall(r"http://127\.0\.0\.1:\d+", line)) else ""
            mine, theirs = multiprocessing.Pipe()
            spawn = multiprocessing.get_context("spawn")
            stub = spawn.Process(target=stubs, args=(url, theirs), daemon=True)
            drained = subprocess.Popen(["cat"], stdin=relay.stderr, stdout=subprocess.DEVNULL)
            stub.start()
            try:
                ratio = asyncio.run(measure(url, mine.recv(), n))
            finally:
                stub.kill()
                stub.join()
        finally:
            relay.kill()
            relay.wait()
        drained.wait()
    print(json.dumps({"added_p50_ratio": round(ratio, 3)}))


if __name__ == "__main__":
    main()
