"""Streamed requests of /v1 that wait for a gpu."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from relay import errors
from relay.lines import MAX_OF_A_USER, Line
from relay.waiting import COMMENT
from tests.relay.conftest import Relay, until
from tests.relay.double_gpu import BASE, DONE, FRAMES, DoubleGpu, say_fine

ASK = {"model": BASE, "messages": [{"role": "user", "content": "How are you?"}], "stream": True, "wait_s": 20}


async def known_model(relay: Relay) -> DoubleGpu:
    """A model whose only gpu has gone."""
    async with relay.gpu() as gpu:
        return gpu


async def test_who_waits_gets_comments_and_then_the_gpus_frames(relay: Relay) -> None:
    await known_model(relay)
    relay.clock.advance(relay.settings.alive_s + 1)
    async with relay.http.stream("POST", "/v1/chat/completions", json=ASK) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream"
        pieces = response.aiter_raw()
        assert await anext(pieces) == COMMENT
        async with relay.gpu() as gpu:
            rest = b"".join([piece async for piece in pieces])
            assert rest.replace(COMMENT, b"") == "".join((*FRAMES, DONE)).encode()
            assert json.loads(gpu.prompts[0]) == ASK


async def test_who_need_not_wait_gets_the_gpus_own_status(relay: Relay, gpu: DoubleGpu) -> None:
    response = await relay.http.post("/v1/chat/completions", json=ASK)
    assert response.text == "".join((*FRAMES, DONE))

    async def refuse(request: web.Request, _: bytes) -> web.StreamResponse:
        return web.json_response({"error": {"message": "too long"}}, status=400)

    gpu.answer = refuse
    assert (await relay.http.post("/v1/chat/completions", json=ASK)).status_code == 400


async def test_a_wait_that_is_over_is_an_error_in_the_stream_without_done(relay: Relay) -> None:
    await known_model(relay)
    relay.clock.advance(relay.settings.alive_s + 1)
    text = (await relay.http.post("/v1/chat/completions", json={**ASK, "wait_s": 0.1})).text
    event = text.removeprefix(COMMENT.decode()).removeprefix("data: ")
    assert json.loads(event)["error"]["code"] == "no_gpu"
    without = await relay.http.post("/v1/chat/completions", json={**ASK, "wait_s": 0})
    assert without.status_code == 503
    assert int(without.headers["retry-after"]) > 0


async def test_a_full_gpu_is_waited_for_on_v1(relay: Relay, gpu: DoubleGpu) -> None:
    async def full(request: web.Request, _: bytes) -> web.StreamResponse:
        gpu.answer = say_fine
        return web.json_response({"error": {"message": "full"}}, status=503)

    gpu.answer = full
    text = (await relay.http.post("/v1/chat/completions", json=ASK)).text
    assert text.replace(COMMENT.decode(), "") == "".join((*FRAMES, DONE))


@pytest.mark.parametrize(
    ("fields", "says"), [({"stream": False}, "stream"), ({"wait_s": -1}, "0 to"), ({"wait_s": "long"}, "0 to")]
)
async def test_a_wait_that_can_not_be_is_refused(relay: Relay, gpu: DoubleGpu, fields: Any, says: str) -> None:
    response = await relay.http.post("/v1/chat/completions", json={**ASK, **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "wait_s"
    assert says in response.json()["error"]["message"]


async def test_a_gpu_is_told_to_load_what_somebody_waits_for(relay: Relay, gpu: DoubleGpu) -> None:
    async def full(request: web.Request, _: bytes) -> web.StreamResponse:
        return web.json_response({"error": {"message": "full"}}, status=503)

    gpu.answer, gpu.loaded = full, False
    assert not (await gpu.beat()).commands
    asking = asyncio.create_task(relay.http.post("/v1/chat/completions", json=ASK))
    await until(lambda: gpu.prompts)
    (command,) = (await gpu.beat()).commands
    assert command.model_dump() == {"kind": "load", "model": BASE}
    assert not (await gpu.beat()).commands  # it takes its time, and is not told again meanwhile
    gpu.answer = say_fine
    assert DONE in (await asking).text


async def test_a_caller_who_leaves_the_line_is_forgotten(relay: Relay) -> None:
    await known_model(relay)
    relay.clock.advance(relay.settings.alive_s + 1)
    for _ in range(2):  # more than a user may have at once, if the first ones stayed
        async with asyncio.TaskGroup() as leaving:
            for _ in range(MAX_OF_A_USER):
                leaving.create_task(leave_after_a_comment(relay))


async def leave_after_a_comment(relay: Relay) -> None:
    async with relay.http.stream("POST", "/v1/chat/completions", json=ASK) as response:
        assert response.status_code == 200
        pieces: AsyncIterator[bytes] = response.aiter_raw()
        assert await anext(pieces) == COMMENT


@given(st.lists(st.sampled_from("abc"), max_size=20))
def test_users_take_turns_in_the_line(callers: list[str]) -> None:
    async def stand() -> None:
        line = Line()
        for caller in callers:
            line.join(caller)
        order = [place.caller for place in line.order()]
        assert sorted(order) == sorted(callers)
        for at, caller in enumerate(order):  # nobody is served a second time while another waits for their first
            mine = order[: at + 1].count(caller)
            assert all(order[:at].count(other) >= min(mine - 1, callers.count(other)) for other in callers)

    asyncio.run(stand())


async def test_a_line_is_bounded_for_each_user() -> None:
    line = Line()
    for _ in range(MAX_OF_A_USER):
        line.join("greedy")
    with pytest.raises(errors.TooMany):
        line.join("greedy")
    line.join("modest")


def test_who_came_late_with_one_waits_for_one_of_a_crowd_not_for_all_of_it() -> None:
    line = Line()
    crowd = [line.join("greedy") for _ in range(5)]
    late = line.join("modest")
    line.serve(crowd[0])
    assert line.is_first(late)
    line.serve(late)
    assert line.is_first(crowd[1])
    newcomer = line.join("newcomer")
    line.serve(crowd[1])
    assert line.is_first(newcomer)


def test_who_was_chosen_in_vain_is_first_again() -> None:
    line = Line()
    first, other = line.join("ada"), line.join("bob")
    line.serve(first)
    assert line.is_first(other)
    line.rejoin(first)
    assert line.is_first(first)
