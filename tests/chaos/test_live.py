"""A live request, and what breaks under it. Each fault is run over HTTP and over the gpu's own dial-out."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from httpx2 import Response

from tests.cable import Direction
from tests.chaos.world import PATIENCE_S, Gpu, Way, World
from tests.conftest import TINY

ASK: Any = {"model": TINY, "prompt": "Once upon a time", "max_tokens": 300, "temperature": 0}
FROM_GPU: dict[Way, Direction] = {"http": "back", "dialled": "forth"}
TO_GPU: dict[Way, Direction] = {"http": "forth", "dialled": "back"}
N_TOKENS = 5  # that a caller has when something breaks


async def whole(world: World, **changes: Any) -> str:
    return (await world.openai.completions.create(**{**ASK, **changes})).choices[0].text


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


@pytest.fixture
async def answer(world: World, way: Way) -> AsyncIterator[str]:
    """What the tiny model says, from a gpu that is gone again."""
    gpu = await world.gpu("oracle", way)
    await world.until_reachable("oracle")
    answer = await whole(world)
    assert len(answer) > 100
    assert await gpu.stop() == 0
    yield answer
    assert world.relay.process.returncode is None


async def test_a_gpu_killed_before_the_first_token_is_replaced_and_the_answer_comes_once(
    world: World, way: Way, answer: str
) -> None:
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
