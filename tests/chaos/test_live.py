"""A live request, and what breaks under it. Each fault is run over HTTP and over the gpu's own dial-out."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from httpx2 import Response

import wire
from tests.cable import Direction
from tests.chaos.world import PATIENCE_S, Way, World, Zygote, a_world
from tests.conftest import TINY
from tests.relay.double_gpu import BASE, DONE, FRAMES

ASK: Any = {"model": TINY, "prompt": "Once upon a time", "max_tokens": 300, "temperature": 0}
FROM_GPU: dict[Way, Direction] = {"http": "back", "dialled": "forth"}
TO_GPU: dict[Way, Direction] = {"http": "forth", "dialled": "back"}
N_TOKENS = 5  # that a caller has when something breaks


async def whole(world: World, **changes: Any) -> str:
    return str((await world.openai.completions.create(**{**ASK, **changes})).choices[0].text)


class Reading:
    """A stream as its caller reads it, by the frames."""

    def __init__(self, response: Response) -> None:
        self._lines = response.aiter_lines()
        self.text = ""
        self.errors: list[dict[str, Any]] = []
        self.is_done = False

    async def tokens(self, most: int | None = None) -> "Reading":
        """So many more, or all of them. What is no frame fails."""
        n = 0
        while n != most and (line := await anext(self._lines, None)) is not None:
            if not line or line.startswith(":"):
                continue
            data = line.removeprefix("data: ")
            assert data != line, f"no frame: {line!r}"
            assert not self.is_done, "something after the end"
            if data == "[DONE]":
                self.is_done = True
                continue
            frame = json.loads(data)  # whole, or this fails
            if "error" in frame:
                self.errors.append(frame["error"])
            else:
                self.text += frame["choices"][0]["text"]
                n += 1
        return self


def streaming(world: World, **changes: Any) -> Any:
    return world.http.stream("POST", "/v1/completions", json={**ASK, "stream": True, **changes})


def broke_off(reading: Reading, answer: str) -> None:
    """What a caller sees of a stream that broke: a beginning of the answer, one error, and no end."""
    assert answer.startswith(reading.text)
    assert reading.text
    assert [error["code"] for error in reading.errors] == ["gpu_unreachable"]
    assert not reading.is_done


@pytest.fixture(scope="module")
async def answer(zygote: Zygote, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the tiny model says when nothing breaks."""
    async with a_world(tmp_path_factory.mktemp("oracle"), zygote, tiny_dir) as world:
        await world.gpu("oracle")
        await world.until_reachable("oracle")
        answer = await whole(world)
    assert len(answer) > 100
    return answer


async def test_a_gpu_killed_before_the_first_token_is_replaced_and_the_answer_comes_once(
    start_world: Callable[..., Any], way: Way, answer: str
) -> None:
    patient = {"RELAY_HEARTBEAT_S": "10", "RELAY_LEASE_S": "30"}  # the first is not called silent before it is killed
    world: World = await start_world(**patient)
    cable = await world.cable(way)
    first = await world.gpu("first", way, cable)
    await world.until_reachable("first")
    first.signal(signal.SIGSTOP)  # it has the request then, and no token
    before = cable.passed_bytes[TO_GPU[way]]
    asking = asyncio.create_task(whole(world))
    await world.eventually(lambda: cable.passed_bytes[TO_GPU[way]] > before + len(ASK["prompt"]))
    await world.gpu("second", way)
    await world.until_reachable("second")
    await first.kill()
    assert await asking == answer


async def test_a_gpu_killed_after_some_tokens_is_one_error_event_and_the_next_request_is_whole(
    world: World, way: Way, answer: str
) -> None:
    gpu = await world.gpu("first", way)
    await world.until_reachable("first")
    async with streaming(world) as response:
        reading = await Reading(response).tokens(N_TOKENS)
        gpu.signal(signal.SIGSTOP)
        await world.gpu("second", way)
        await world.until_reachable("second")
        await gpu.kill()
        await reading.tokens()
    broke_off(reading, answer)
    async with streaming(world) as response:
        again = await Reading(response).tokens()
    assert (again.text, again.is_done, again.errors) == (answer, True, [])


async def test_a_tunnel_cut_in_mid_frame_delivers_whole_frames_only_and_the_gpu_comes_back(
    world: World, way: Way, answer: str
) -> None:
    cable = await world.cable(way)
    await world.gpu("first", way, cable)
    await world.until_reachable("first")
    async with streaming(world) as response:
        reading = await Reading(response).tokens(N_TOKENS)
        cable.cut_in_the_middle(FROM_GPU[way])
        await reading.tokens()
    assert cable.spoiled.is_set()
    broke_off(reading, answer)
    await world.until_reachable("first")
    assert await whole(world) == answer


async def test_a_black_hole_ends_the_request_and_the_gpu_comes_back_when_it_is_gone(
    world: World, way: Way, answer: str
) -> None:
    cable = await world.cable(way)
    gpu = await world.gpu("first", way, cable)
    await world.until_reachable("first")
    async with streaming(world) as response:
        reading = await Reading(response).tokens(N_TOKENS)
        cable.swallow()
        gpu.signal(signal.SIGSTOP)  # else its heartbeats say that it is well, and the answer may yet come
        await reading.tokens()
    broke_off(reading, answer)
    with pytest.raises(openai.APIStatusError) as caught:
        await whole(world)
    assert caught.value.status_code == 503
    gpu.signal(signal.SIGCONT)
    cable.pass_again()
    await world.until_reachable("first")
    assert await whole(world) == answer


async def test_a_slow_reader_stalls_the_gpu_and_takes_no_memory_of_the_relay(world: World, way: Way) -> None:
    given_bytes = 0

    async def flood(body: bytes) -> AsyncIterator[str]:
        nonlocal given_bytes
        frame = "data: " + "x" * 8000 + "\n\n"
        for _ in range(50_000 if json.loads(body).get("user") == "slow" else 3):  # 400 MB, if anybody took it
            yield frame
            given_bytes += len(frame)

    gpu = await world.double(way, flood)
    ask = {"model": BASE, "messages": [], "stream": True}
    assert len((await world.http.post("/v1/chat/completions", json=ask)).content) == 3 * 8008
    before = world.memory_bytes()
    async with world.http.stream("POST", "/v1/chat/completions", json={**ask, "user": "slow"}) as response:
        chunks = response.aiter_raw()
        await anext(chunks)
        given_last = -1

        async def all_is_full() -> bool:
            nonlocal given_last
            await asyncio.sleep(0.3)
            stands = given_last == given_bytes
            given_last = given_bytes
            return stands

        await world.eventually(all_is_full)
        assert given_bytes < 16 * 2**20  # sockets' own buffers, between each two of us
        for _ in range(10):  # nobody else waits for the slow one
            assert len((await world.http.post("/v1/chat/completions", json=ask)).content) == 3 * 8008
        assert world.memory_bytes() - before < 32 * 2**20
    await asyncio.wait_for(gpu.left.wait(), PATIENCE_S)


async def test_a_caller_who_leaves_stops_the_work_while_sending_while_waiting_and_while_reading(
    world: World, way: Way, answer: str
) -> None:
    cable = await world.cable(way)
    gpu = await world.gpu("first", way, cable)
    await world.until_reachable("first")
    n = 12
    began = cable.passed_bytes[FROM_GPU[way]]
    assert await whole(world) == answer
    async with streaming(world) as response:
        await Reading(response).tokens()
    whole_bytes = cable.passed_bytes[FROM_GPU[way]] - began

    async def idle() -> bool:
        return bool((await world.listed("first"))["active_requests"] == 0)

    # While it sends: the gpu never hears of it.
    to_gpu = cable.passed_bytes[TO_GPU[way]]
    await half_a_request(world)
    # While it waits: the gpu has the request, and has not begun.
    gpu.signal(signal.SIGSTOP)
    asking = [asyncio.create_task(whole(world)) for _ in range(n)]
    await world.eventually(lambda: cable.passed_bytes[TO_GPU[way]] > to_gpu + n * len(ASK["prompt"]))
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    before = cable.passed_bytes[FROM_GPU[way]]
    gpu.signal(signal.SIGCONT)
    await world.until_reachable("first")
    await world.eventually(idle)
    # While it reads.
    async with AsyncExitStack() as callers:
        for _ in range(n):
            response = await callers.enter_async_context(streaming(world))
            await Reading(response).tokens(1)
    await world.eventually(idle)
    assert cable.passed_bytes[FROM_GPU[way]] - before < n * whole_bytes / 2, "answers were made for nobody"
    assert await whole(world) == answer


async def half_a_request(world: World) -> None:
    url = urlsplit(world.relay.url)
    _, writer = await asyncio.open_connection(url.hostname, url.port)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {world.relay.secret('admin.key')}\r\n"
    writer.write(f"{head}content-length: 1000\r\n\r\n{{".encode())
    await writer.drain()
    writer.close()
    await writer.wait_closed()


PAGES = {
    "ngrok, offline": ("404 Not Found", "ngrok-error-code: ERR_NGROK_3200\r\n", "Tunnel x.ngrok-free.app not found"),
    "ngrok, upstream refused": ("502 Bad Gateway", "", "<html>Traffic was refused. ERR_NGROK_8012</html>"),
    "ngrok, quota spent": ("402 Payment Required", "", "<html>has reached its quota ERR_NGROK_727</html>"),
    "ngrok, interstitial": ("200 OK", "ngrok-error-code: ERR_NGROK_6024\r\n", "<html>You are about to visit</html>"),
    "cloudflared, offline": ("530 <none>", "server: cloudflare\r\n", "<html>error code: 1033</html>"),
    "some proxy": ("502 Bad Gateway", "", "<html><h1>502 Bad Gateway</h1>nginx</html>"),
}


@pytest.mark.parametrize("page", PAGES)
async def test_a_page_of_the_tunnels_own_is_never_an_answer(world: World, way: Way, page: str) -> None:
    """To one that dials out it comes in place of the WebSocket, by a proxy before the relay."""

    async def fine(body: bytes) -> AsyncIterator[str]:
        for frame in (*FRAMES, DONE):
            yield frame

    cable = await world.cable(way)
    gpu = await world.double(way, fine, cable)
    status, headers, words = PAGES[page]
    head = f"HTTP/1.1 {status}\r\ncontent-type: text/html\r\n{headers}connection: close\r\n"
    cable.answer_with(f"{head}content-length: {len(words)}\r\n\r\n{words}".encode())
    asked = {"model": BASE, "messages": []}
    for more in ({}, {"stream": True}):
        response = await world.http.post("/v1/chat/completions", json={**asked, **more})
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        assert response.json()["error"]["code"] in ("gpu_unreachable", "no_gpu")
        assert words not in response.text
    assert gpu.prompts == []
    cable.answer_with(b"")

    async def answers() -> bool:
        await gpu.beat(wire.HeldLease(job_id="nobody's", fence=1))
        response = await world.http.post("/v1/chat/completions", json={**asked, "stream": True})
        return response.status_code == 200 and response.text == "".join(FRAMES) + DONE

    await world.eventually(answers)
    assert len(gpu.prompts) == 1
