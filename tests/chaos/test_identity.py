"""Somebody pretends: to be the relay, to be a gpu, or to be where a gpu was. Nobody gets in, and no prompt gets out."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

import wire
from tests.chaos.world import Way, World
from tests.conftest import ROOT, TINY
from tests.relay.double_gpu import BASE, DONE, FRAMES, DoubleGpu

SECRET = "nobody else may read this"
BEAT = wire.Heartbeat(free_bytes=1, models=[], leases=[], active_requests=0).model_dump_json().encode()


async def fine(body: bytes) -> AsyncIterator[str]:
    for frame in (*FRAMES, DONE):
        yield frame


class Stranger:
    """A server of somebody else's, which notes all that it hears and answers as a gpu might."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self.heard = b""
        self.connections = 0

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        async with server:
            yield server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        while data := await reader.read(2**16):
            self.heard += data
            if b"\r\n\r\n" in self.heard:
                writer.write(self._answer)
                break
        writer.close()


def page(status: str, body: bytes = b"", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", "content-type: application/json", "connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body


async def ask(world: World, model: str = BASE) -> httpx2.Response:
    body = {"model": model, "messages": [{"role": "user", "content": SECRET}]}
    return await world.http.post("/v1/chat/completions", json=body)


def as_relay(world: World, name: str, method: str, target: str, body: bytes, **changes: Any) -> dict[str, str]:
    """Headers as the relay would sign them for the gpu of that name, now."""
    (gpu,) = world.rows("select id, epoch, signing_key from gpus where name = ?", name)
    by = wire.SignedBy(gpu_id=gpu["id"], epoch=gpu["epoch"])
    asked = {"key": gpu["signing_key"], "by": by, "now": time.time()} | changes
    return wire.sign(asked["key"], asked["by"], method, target, wire.body_sha256(body), asked["now"])


async def test_replayed_stale_altered_and_misdirected_requests_to_a_gpu_are_refused(world: World, way: Way) -> None:
    """By somebody who can read what passes through a tunnel, or keeps it. A gpu that dials out has a port too."""
    gpu = await world.gpu("first", way)
    await world.gpu("second", way)
    await world.until_reachable("first", "second")
    target = "/v1/completions"
    body = json.dumps({"model": TINY, "prompt": "Hi", "max_tokens": 2}).encode()
    good = as_relay(world, "first", "POST", target, body)
    stale = as_relay(world, "first", "POST", target, body, now=time.time() - wire.SIGNATURE_WINDOW_S - 5)
    early = as_relay(world, "first", "POST", target, body, now=time.time() + wire.SIGNATURE_WINDOW_S + 5)
    of_second = as_relay(world, "second", "POST", target, body)
    by = wire.SignedBy.claimed(as_relay(world, "first", "POST", target, body))
    older = as_relay(world, "first", "POST", target, body, by=by.model_copy(update={"epoch": by.epoch + 1}))

    def fresh() -> dict[str, str]:
        return as_relay(world, "first", "POST", target, body)

    async with httpx2.AsyncClient(base_url=gpu.url, trust_env=False, timeout=30) as http:

        async def send(headers: dict[str, str], path: str = target, content: bytes = body, method: str = "POST") -> int:
            return (await http.request(method, path, content=content, headers=headers)).status_code

        assert await send(good) == 200
        refused = {
            "replayed": await send(good),
            "stale": await send(stale),
            "early": await send(early),
            "altered": await send(fresh(), content=body.replace(b"Hi", b"Ho")),
            "misdirected to another path": await send(fresh(), "/v1/chat/completions"),
            "misdirected to another query": await send(fresh(), target + "?x=1"),
            "misdirected to another gpu": await send(of_second),
            "of another epoch": await send(older),
            "with another nonce": await send(fresh() | {wire.HEADER_NONCE: "0" * 32}),
            "with another time": await send(fresh() | {wire.HEADER_TIME: f"{time.time() + 1:.3f}"}),
            "without a signature": await send({}),
        }
    assert refused == dict.fromkeys(refused, 401)
    assert (await world.http.post(target, content=body)).status_code == 200, "and the relay itself is still heard"


async def test_replayed_stale_altered_and_misdirected_requests_to_the_relay_are_refused(world: World, way: Way) -> None:
    gpu, other = await world.double(way, fine), await world.double(way, fine)
    target = "/gpu/heartbeat"

    def signed(method: str = "POST", target: str = target, by: DoubleGpu = gpu, age_s: float = 0) -> dict[str, str]:
        assert by.reply
        digest = wire.body_sha256(BEAT)
        return wire.sign(by.reply.signing_key, by.by, method, target, digest, time.time() - age_s)

    async def send(headers: dict[str, str], content: bytes = BEAT, target: str = target) -> int:
        return (await gpu.http.post(target, content=content, headers=headers)).status_code

    good = signed()
    assert await send(good) == 200
    before = world.rows("select id, epoch, url, signing_key from gpus order by id")
    stolen = signed(by=other) | {wire.HEADER_GPU: gpu.by.gpu_id}
    refused = {
        "replayed": await send(good),
        "stale": await send(signed(age_s=wire.SIGNATURE_WINDOW_S + 5)),
        "early": await send(signed(age_s=-wire.SIGNATURE_WINDOW_S - 5)),
        "altered": await send(signed(), BEAT.replace(b"1", b"2")),
        "misdirected": await send(signed(), target="/gpu/goodbye"),
        "of another method": await send(signed("PUT")),
        "by another gpu": await send(stolen),
        "without a signature": await send({}),
    }
    assert refused == dict.fromkeys(refused, 401)
    assert before == world.rows("select id, epoch, url, signing_key from gpus order by id"), "nothing was changed"
    dialled = await gpu.http.get("/gpu/dial", headers=signed("GET", "/gpu/heartbeat") | WEBSOCKET)
    assert dialled.status_code == 401


WEBSOCKET = {
    "connection": "Upgrade",
    "upgrade": "websocket",
    "sec-websocket-version": "13",
    "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
}


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254",
        "https://169.254.169.254",
        "http://[fd00:ec2::254]",
        "https://metadata.google.internal",
        "http://2852039166",
        "http://0xa9fea9fe",
        "http://[::ffff:169.254.169.254]",
        "https://169.254.169.254#.ngrok-free.app",
    ],
)
async def test_enrolment_with_a_metadata_address_is_refused_and_leaves_nothing(world: World, url: str) -> None:
    gpu = DoubleGpu(world.relay.url, world.relay.secret("enrol.token"), time.time, [BASE])
    async with gpu.serving():
        refused = await gpu.enrol(url=url)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "bad_gpu_url")
        assert world.rows("select id from gpus") == []
        assert (await ask(world)).status_code == 404


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2"])
async def test_a_name_that_leads_inside_is_never_connected_to(
    start_world: Callable[..., Any], tmp_path: Path, address: str
) -> None:
    """It has the suffix of a known tunnel, and its owner's name server says what it likes."""
    name = "evil.ngrok-free.app"
    stranger = Stranger(page("200 OK", b"{}"))
    async with stranger.listening() as port:
        names = tmp_path / "names"
        names.write_text(json.dumps({name: [address, port]}))
        double = ROOT / "tests/doubles/dns"
        world: World = await start_world(NAMES_DOUBLE=str(names), PYTHONPATH=f"{double}:{ROOT}")
        gpu = DoubleGpu(world.relay.url, world.relay.secret("enrol.token"), time.time, [BASE])
        async with gpu.serving():
            assert (await gpu.enrol(url=f"https://{name}")).status_code == 200
            beats = 0

            async def was_looked_up() -> bool:
                nonlocal beats
                beats += 1
                assert not (await gpu.beat(wire.HeldLease(job_id="nobody's", fence=1))).reachable
                return beats > 3 and (tmp_path / "names.asked").exists()

            await world.eventually(was_looked_up)
            assert (await ask(world)).status_code == 503
    assert stranger.connections == 0


@pytest.mark.parametrize("status", ["301 Moved Permanently", "302 Found", "307 Temporary Redirect", "308 Permanent"])
async def test_a_redirect_to_loopback_is_not_followed(world: World, status: str) -> None:
    inner = Stranger(page("200 OK", b'{"proof": "x"}'))
    async with inner.listening() as port:
        cable = await world.cable("http")
        gpu = await world.double("http", fine, cable)
        cable.answer_with(page(status, location=f"http://127.0.0.1:{port}/v1/chat/completions"))
        for _ in range(2):
            response = await ask(world)
            assert response.status_code == 503
            assert "location" not in response.headers
        assert not (await gpu.beat(wire.HeldLease(job_id="nobody's", fence=1))).reachable
    assert inner.connections == 0
    assert gpu.prompts == []


async def test_a_tunnel_url_that_now_belongs_to_another_never_gets_a_prompt(world: World) -> None:
    """The gpu's tunnel broke, and the provider gave its name to a stranger, who would gladly answer."""
    cable = await world.cable("http")
    await world.gpu("first", "http", cable)
    await world.until_reachable("first")
    stranger = Stranger(page("200 OK", b'{"choices": [], "proof": "0000"}'))
    async with stranger.listening() as port:
        cable.unplug()
        assert (await ask(world, TINY)).status_code == 503
        cable.leads_to("127.0.0.1", port)
        cable.plug_in()
        await world.eventually(lambda: b"POST /challenge" in stranger.heard)
        for _ in range(3):
            response = await ask(world, TINY)
            assert response.status_code == 503
        assert not (await world.listed("first"))["reachable"]
        assert SECRET.encode() not in stranger.heard
        assert b"/v1/" not in stranger.heard
    back = urlsplit(world.gpus["first"].url)
    assert back.hostname
    assert back.port
    cable.leads_to(back.hostname, back.port)
    await world.until_reachable("first")
    assert (await ask(world, TINY)).status_code == 200
