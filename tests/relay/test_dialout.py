"""A gpu that is reached by the WebSocket that it opened: streams, cuts, slow readers, rule breakers."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import psutil
import pytest
from starlette.requests import Request
from starlette.responses import Response
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus

import frames
import wire
from frames import Kind
from tests.cable import Cable
from tests.relay.conftest import ENROL_TOKEN, Clock, Relay, until
from tests.relay.dialler import DiallingGpu, fine, streamed
from tests.relay.double_gpu import BASE, DONE, FRAMES

ASK: dict[str, Any] = {"model": BASE, "messages": [{"role": "user", "content": "How are you?"}]}


@asynccontextmanager
async def dialling(relay: Relay, url: str | None = None, *, reachable: bool = True) -> AsyncIterator[DiallingGpu]:
    gpu = DiallingGpu(relay.url, ENROL_TOKEN, relay.clock, [BASE])
    async with gpu.dialling(url or relay.url):
        await gpu.enrol_and_tell()
        if reachable:
            await gpu.until_reachable()
        yield gpu


@pytest.fixture
async def cable(relay: Relay) -> AsyncIterator[Cable]:
    async with Cable.to(relay.url) as cable:
        yield cable


@pytest.fixture
async def gpu(relay: Relay, cable: Cable) -> AsyncIterator[DiallingGpu]:
    async with dialling(relay, cable.url) as gpu:
        yield gpu


async def chat(relay: Relay, **more: Any) -> str:
    response = await relay.http.post("/v1/chat/completions", json={**ASK, **more})
    assert response.status_code == 200, response.text
    return response.text


async def status(relay: Relay) -> int:
    return (await relay.http.post("/v1/chat/completions", json=ASK)).status_code


async def test_answers_come_back_whole_and_in_streams(relay: Relay, gpu: DiallingGpu) -> None:
    assert json.loads(await chat(relay)) == {"content": "I'm fine."}
    assert await chat(relay, stream=True) == "".join(FRAMES) + DONE


async def test_frames_are_passed_on_as_they_come(relay: Relay, gpu: DiallingGpu) -> None:
    go_on = asyncio.Event()

    async def haltingly() -> AsyncIterator[str]:
        yield FRAMES[0]
        await go_on.wait()
        yield DONE

    async def reply(request: Request, body: bytes) -> Response:
        return streamed(haltingly())

    gpu.reply_with = reply
    async with relay.http.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as response:
        lines = response.aiter_lines()
        assert await anext(lines) == FRAMES[0].strip()
        go_on.set()
        assert [line async for line in lines][-2:] == [DONE.strip(), ""]


async def test_a_long_prompt_and_a_long_answer_arrive_byte_for_byte(relay: Relay, gpu: DiallingGpu) -> None:
    text = "나는 괜찮아요. " * 40_000  # about a megabyte, eight windows

    async def echo(request: Request, body: bytes) -> Response:
        return Response(body, media_type="application/json")

    gpu.reply_with = echo
    body = json.dumps({**ASK, "messages": [{"role": "user", "content": text}]}, ensure_ascii=False).encode()
    response = await relay.http.post("/v1/chat/completions", content=body)
    assert response.content == body == gpu.prompts[0]


async def test_headers_longer_than_a_frames_head_do_no_harm(relay: Relay, gpu: DiallingGpu) -> None:
    for name in ("accept", "content-type"):
        headers = {name: "application/json;q=" + "1" * 9_000}
        response = await relay.http.post(
            "/v1/chat/completions", content=json.dumps({"model": BASE, "messages": []}), headers=headers
        )
        assert response.status_code == 200, name


async def test_without_its_socket_it_gets_nothing(relay: Relay) -> None:
    gpu = DiallingGpu(relay.url, ENROL_TOKEN, relay.clock, [BASE])
    assert (await gpu.enrol()).status_code == 200
    assert not (await gpu.beat()).reachable
    assert await status(relay) == 503
    await gpu.http.aclose()


async def test_a_socket_that_can_not_prove_itself_never_gets_a_prompt(relay: Relay) -> None:
    async with dialling(relay, reachable=False) as gpu:
        gpu.proves = False
        await until(lambda: gpu.asked)
        assert await status(relay) == 503
        assert not gpu.prompts


async def test_a_caller_who_leaves_stops_the_gpu(relay: Relay, gpu: DiallingGpu) -> None:
    async def for_ever() -> AsyncIterator[str]:
        while True:
            yield FRAMES[0]
            await asyncio.sleep(0.01)

    async def reply(request: Request, body: bytes) -> Response:
        return streamed(for_ever())

    async def think(request: Request, body: bytes) -> Response:
        await until(request.is_disconnected)
        gpu.left.set()
        return Response()

    gpu.reply_with = reply
    async with relay.http.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as response:
        await anext(response.aiter_lines())
    stopped = asyncio.Event()

    async def stops() -> AsyncIterator[str]:
        try:
            async for frame in for_ever():
                yield frame
        finally:
            stopped.set()

    async def reply_and_note(request: Request, body: bytes) -> Response:
        return streamed(stops())

    gpu.reply_with = reply_and_note
    async with relay.http.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as response:
        await anext(response.aiter_lines())
    await asyncio.wait_for(stopped.wait(), 2)

    gpu.reply_with = think
    asking = asyncio.create_task(chat(relay))
    await until(lambda: len(gpu.prompts) == 3)
    asking.cancel()
    await asyncio.wait_for(gpu.left.wait(), 2)
    gpu.reply_with = fine
    assert await chat(relay, stream=True) == "".join(FRAMES) + DONE  # and the socket is as good as new


async def test_a_cut_in_mid_stream_is_one_error_event_and_the_gpu_is_back_within_five_seconds(
    relay: Relay, gpu: DiallingGpu, cable: Cable
) -> None:
    async def hang() -> AsyncIterator[str]:
        yield FRAMES[0]
        yield FRAMES[1][:9]
        await asyncio.sleep(60)

    async def reply(request: Request, body: bytes) -> Response:
        return streamed(hang())

    gpu.reply_with = reply
    async with relay.http.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as response:
        lines = response.aiter_lines()
        await anext(lines)
        cable.cut()
        began = time.monotonic()
        rest = [line for line in [line async for line in lines] if line]
    assert len(rest) == 1
    assert json.loads(rest[0].removeprefix("data: "))["error"]["code"] == "gpu_unreachable"
    gpu.reply_with = fine

    async def answers() -> bool:
        return await status(relay) == 200

    await until(answers, within_s=5)
    assert time.monotonic() - began < 5


async def test_it_comes_back_when_the_network_was_away_for_a_while(
    relay: Relay, gpu: DiallingGpu, cable: Cable
) -> None:
    cable.unplug()
    await until(lambda: unreachable(relay))
    await asyncio.sleep(1)
    cable.plug_in()

    async def answers() -> bool:
        return await status(relay) == 200

    await until(answers, within_s=5)


async def unreachable(relay: Relay) -> bool:
    return await status(relay) == 503


async def test_two_hundred_streams_at_once_lose_no_frame(relay: Relay, gpu: DiallingGpu) -> None:
    n_streams, n_frames = 200, 50

    async def count(name: str) -> AsyncIterator[str]:
        for i in range(n_frames):
            yield f"data: {name} {i} {'x' * (i % 7) * 20}\n\n"
            if i % 10 == 0:
                await asyncio.sleep(0.005)
        yield DONE

    async def reply(request: Request, body: bytes) -> Response:
        return streamed(count(json.loads(body)["user"]))

    async def one(i: int) -> None:
        text = await chat(relay, stream=True, user=f"caller-{i}")
        assert text == "".join([frame async for frame in count(f"caller-{i}")])

    gpu.reply_with = reply
    async with asyncio.timeout(60):
        await asyncio.gather(*(one(i) for i in range(n_streams)))
    assert gpu.asked >= n_streams


async def test_a_slow_reader_stalls_nobody_and_takes_no_memory(relay: Relay, gpu: DiallingGpu) -> None:
    given_bytes = 0

    async def flood() -> AsyncIterator[str]:
        nonlocal given_bytes
        frame = "data: " + "x" * 8000 + "\n\n"
        for _ in range(50_000):  # 400 MB, if anybody took it
            yield frame
            given_bytes += len(frame)

    async def reply(request: Request, body: bytes) -> Response:
        return streamed(flood()) if json.loads(body).get("user") == "slow" else await fine(request, body)

    gpu.reply_with = reply
    before = psutil.Process().memory_info().rss
    asked = {**ASK, "stream": True, "user": "slow"}
    async with relay.http.stream("POST", "/v1/chat/completions", json=asked) as response:
        assert response.status_code == 200
        chunks = response.aiter_raw()
        await anext(chunks)
        last = -1
        while given_bytes != last:  # until everything between us is full
            last = given_bytes
            await asyncio.sleep(0.3)
        for _ in range(20):
            assert await asyncio.wait_for(chat(relay, stream=True), 2) == "".join(FRAMES) + DONE
        assert given_bytes == last
    assert given_bytes < 16 * 2**20  # sockets' own buffers between relay and caller
    assert psutil.Process().memory_info().rss - before < 64 * 2**20


async def test_an_answer_that_does_not_wait_for_the_body_arrives_and_the_socket_lives_on(
    relay: Relay, gpu: DiallingGpu
) -> None:
    gpu.refuses_unread = True
    response = await relay.http.post("/v1/chat/completions", json={**ASK, "padding": "x" * 900_000})
    assert response.status_code == 413
    gpu.refuses_unread = False
    assert await status(relay) == 200


# --- who may dial, and what happens to those who break the rules ---


def ws_url(relay: Relay) -> str:
    return relay.url.replace("http", "ws") + "/gpu/dial"


@asynccontextmanager
async def raw_socket(relay: Relay, gpu: DiallingGpu) -> AsyncIterator[ClientConnection]:
    async with connect(ws_url(relay), additional_headers=gpu.sign("GET", "/gpu/dial"), proxy=None) as socket:
        yield socket


@pytest.fixture
async def enrolled(relay: Relay) -> AsyncIterator[DiallingGpu]:
    """Enrolled, and not dialled: the test does that by hand."""
    gpu = DiallingGpu(relay.url, ENROL_TOKEN, relay.clock, [BASE])
    assert (await gpu.enrol()).status_code == 200
    yield gpu
    await gpu.http.aclose()


async def refusal(relay: Relay, headers: dict[str, str]) -> str:
    with pytest.raises(InvalidStatus) as refused:
        async with connect(ws_url(relay), additional_headers=headers, proxy=None):
            pass
    assert refused.value.response.status_code == 401
    assert refused.value.response.body
    return str(json.loads(refused.value.response.body)["error"]["code"])


async def test_only_a_fresh_signature_of_this_epoch_may_dial(relay: Relay, enrolled: DiallingGpu, clock: Clock) -> None:
    assert await refusal(relay, {}) == "bad_signature"
    assert await refusal(relay, enrolled.sign("GET", "/gpu/heartbeat")) == "bad_signature"
    endless = enrolled.sign("GET", "/gpu/dial") | {wire.HEADER_EPOCH: "9" * 20}
    assert await refusal(relay, endless) == "bad_signature"
    good = enrolled.sign("GET", "/gpu/dial")
    async with connect(ws_url(relay), additional_headers=good, proxy=None):
        assert await refusal(relay, good) == "bad_signature"  # used before
    old = enrolled.sign("GET", "/gpu/dial")
    clock.advance(wire.SIGNATURE_WINDOW_S + 1)
    assert await refusal(relay, old) == "bad_signature"
    of_last_epoch = enrolled.sign("GET", "/gpu/dial")
    assert (await enrolled.enrol()).status_code == 200
    assert await refusal(relay, of_last_epoch) == "unknown_gpu"


Frame = Callable[[int], bytes | str]


@pytest.mark.parametrize(
    "frame",
    [
        lambda n: "text",
        lambda n: b"\x09",
        lambda n: frames.pack(Kind.OPEN, n, b"{}"),
        lambda n: frames.pack(Kind.HEAD, n, b"no json"),
        lambda n: frames.pack(Kind.DATA, n),
        lambda n: frames.pack(Kind.CREDIT, n, b"1"),
    ],
)
async def test_a_gpu_that_breaks_the_rules_loses_its_socket(relay: Relay, enrolled: DiallingGpu, frame: Frame) -> None:
    async with raw_socket(relay, enrolled) as socket:
        kind, number, _ = frames.unpack(await challenge_of(socket))
        assert kind is Kind.OPEN
        await socket.send(frame(number))
        await asyncio.wait_for(socket.wait_closed(), 5)
        assert socket.close_code == 1002
    assert not (await enrolled.beat()).reachable


async def challenge_of(socket: ClientConnection) -> bytes:
    frame = await asyncio.wait_for(socket.recv(), 5)
    assert isinstance(frame, bytes)
    return frame


async def test_more_data_than_it_has_credit_for_costs_the_socket(relay: Relay, enrolled: DiallingGpu) -> None:
    async with raw_socket(relay, enrolled) as socket:
        _, number, _ = frames.unpack(await challenge_of(socket))
        chunk = frames.pack(Kind.DATA, number, bytes(frames.CHUNK_BYTES))
        for _ in range(frames.WINDOW_BYTES // frames.CHUNK_BYTES + 1):
            await socket.send(chunk)
        await asyncio.wait_for(socket.wait_closed(), 5)
        assert socket.close_code == 1002


async def test_frames_of_a_stream_that_is_over_are_ignored(relay: Relay, enrolled: DiallingGpu) -> None:
    async with raw_socket(relay, enrolled) as socket:
        await challenge_of(socket)
        await socket.send(frames.pack(Kind.DATA, 4711, b"late"))
        await socket.send(frames.pack(Kind.RESET, 4711, b"late"))
        await asyncio.wait_for(await socket.ping(), 5)


async def test_the_newest_socket_replaces_the_one_before_and_proves_itself_anew(relay: Relay, gpu: DiallingGpu) -> None:
    asked = gpu.asked
    async with raw_socket(relay, gpu) as socket:
        assert frames.unpack(await challenge_of(socket))[0] is Kind.OPEN  # nothing proven holds for this one
        assert await status(relay) == 503
    await until(lambda: gpu.asked > asked)  # the gpu's own dial-out is back
    await gpu.until_reachable()
    assert await status(relay) == 200


async def test_after_enrolling_again_it_dials_again(relay: Relay, gpu: DiallingGpu) -> None:
    await gpu.enrol_and_tell()
    await gpu.until_reachable()
    assert await status(relay) == 200
