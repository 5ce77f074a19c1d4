"""The load of `bench.relay`, a process of its own: asks, times, and prints what it found as one line of JSON.

Below HTTP it is one asyncio protocol a connection. It knows no relay: only addresses, keys and bodies.
"""

import asyncio
import gc
import itertools
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools
import uvloop

from bench.relay_stub import N_FRAMES, PACE_S

STREAM_TIMEOUT_S = 60.0
SPREAD_S = 0.2  # of a stream's 1.3 s: for more than a second all of them are open


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of them do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else math.nan


@dataclass(frozen=True)
class Target:
    """Where to ask, and as whom."""

    url: str
    key: str
    model: str

    def request(self, *, stream: bool) -> bytes:
        body = {"model": self.model, "messages": [{"role": "user", "content": "How are you today?"}], "stream": stream}
        data = json.dumps(body).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: {urlsplit(self.url).netloc}\r\n"
            f"authorization: Bearer {self.key}\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        )
        return head.encode() + data


@dataclass
class Heard:
    """One answer: its body, and for each piece of it when it came."""

    status: int = 0
    body: bytearray = field(default_factory=bytearray)
    arrivals: list[tuple[int, float]] = field(default_factory=list)  # bytes so far, when

    def frames(self) -> tuple[list[str], list[float], bool]:
        """What the frames said, when each was complete, and whether [DONE] ended them."""
        said: list[str] = []
        times: list[float] = []
        done, begin, piece = False, 0, 0
        while (end := self.body.find(b"\n\n", begin)) >= 0:
            data = self.body[begin:end].removeprefix(b"data: ")
            begin = end + 2
            while self.arrivals[piece][0] < begin:
                piece += 1
            if data == b"[DONE]":
                done = True
            elif data.startswith(b'{"id"'):
                said.append(json.loads(data)["choices"][0]["delta"]["content"])
                times.append(self.arrivals[piece][1])
        return said, times, done


class Connection(asyncio.Protocol):
    """One request at a time. httptools calls the methods that begin with `on_`."""

    def __init__(self) -> None:
        self._waiting: asyncio.Future[Heard] | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiting and not self._waiting.done():
            self._waiting.set_exception(ConnectionError("the connection broke"))

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self._heard.body += body
        self._heard.arrivals.append((len(self._heard.body), time.perf_counter()))

    def on_message_complete(self) -> None:
        self._heard.status = self._parser.get_status_code()
        if self._waiting and not self._waiting.done():
            self._waiting.set_result(self._heard)

    def ask(self, request: bytes) -> asyncio.Future[Heard]:
        self._heard = Heard()
        self._parser = httptools.HttpResponseParser(self)
        self._waiting = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._waiting

    def close(self) -> None:
        self._transport.close()


async def connect(target: Target) -> Connection:
    parts = urlsplit(target.url)
    _, connection = await asyncio.get_running_loop().create_connection(
        Connection, str(parts.hostname), parts.port or 80
    )
    return connection


def must_be_good(heard: Heard) -> None:
    if heard.status != 200:
        raise RuntimeError(f"status {heard.status}: {bytes(heard.body[:300])!r}")


async def flood(target: Target, connections: int, seconds: float) -> dict[str, float]:
    """As many whole answers as come, each connection asking again as soon as it has one."""
    request, took_ms = target.request(stream=False), list[float]()
    open_ones = await asyncio.gather(*(connect(target) for _ in range(connections)))
    began, spent_s = time.perf_counter(), time.process_time()

    async def ask_on(connection: Connection) -> None:
        while (asked := time.perf_counter()) < began + seconds:
            must_be_good(await connection.ask(request))
            took_ms.append(1000 * (time.perf_counter() - asked))

    await asyncio.gather(*map(ask_on, open_ones))
    passed = time.perf_counter() - began
    for connection in open_ones:
        connection.close()
    return {
        "rps": len(took_ms) / passed,
        "p50_ms": percentile(took_ms, 0.5),
        "p99_ms": percentile(took_ms, 0.99),
        "cpu_s": time.process_time() - spent_s,
    }


async def paced(targets: Sequence[Target], rate: float, seconds: float) -> list[list[float]]:
    """Whole answers at `rate` a second from each target, in turn, however late earlier ones are. Milliseconds."""
    took_ms: list[list[float]] = [[] for _ in targets]
    idle: list[list[Connection]] = [[] for _ in targets]
    requests = [target.request(stream=False) for target in targets]

    async def ask(which: int) -> None:
        connection = idle[which].pop() if idle[which] else await connect(targets[which])
        asked = time.perf_counter()
        must_be_good(await connection.ask(requests[which]))
        took_ms[which].append(1000 * (time.perf_counter() - asked))
        idle[which].append(connection)

    began, every = time.perf_counter(), 1 / (rate * len(targets))
    async with asyncio.TaskGroup() as asking:
        for number in range(int(seconds * rate) * len(targets)):
            if (wait := began + number * every - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            asking.create_task(ask(number % len(targets)))
    for connections in idle:
        for connection in connections:
            connection.close()
    return took_ms


async def streams(target: Target, n: int) -> dict[str, float]:
    """`n` streams at once, their beginnings spread over SPREAD_S. How late frames were: the gap less the pace."""
    request, expected = target.request(stream=True), [f"{number} " for number in range(N_FRAMES)]

    async def follow(number: int) -> Heard:
        await asyncio.sleep(SPREAD_S * number / n)
        connection = None
        try:
            connection = await connect(target)
            async with asyncio.timeout(STREAM_TIMEOUT_S):
                return await connection.ask(request)
        except (OSError, TimeoutError):
            return Heard()
        finally:
            if connection:
                connection.close()

    lost, ok, late_ms = 0, 0, list[float]()
    for heard in await asyncio.gather(*(follow(number) for number in range(n))):  # read when none is timed any more
        said, times, done = heard.frames()
        in_order = sum(a == b for a, b in zip(said, expected, strict=False))
        lost += N_FRAMES - in_order
        ok += done and said == expected
        late_ms.extend(1000 * max(0.0, b - a - PACE_S) for a, b in itertools.pairwise(times))
    return {"ok": ok, "lost": lost, "late_p50_ms": percentile(late_ms, 0.5), "late_p99_ms": percentile(late_ms, 0.99)}


async def run(order: dict[str, Any]) -> Any:
    targets = [Target(**target) for target in order["targets"]]
    if order["do"] == "flood":
        return await flood(targets[0], order["connections"], order["seconds"])
    if order["do"] == "paced":
        return await paced(targets, order["rate"], order["seconds"])
    return await streams(targets[0], order["n"])


if __name__ == "__main__":
    gc.disable()  # a pause of ours would count as lateness of what is measured; this process lives for seconds
    print(json.dumps(uvloop.run(run(json.load(sys.stdin)))))
