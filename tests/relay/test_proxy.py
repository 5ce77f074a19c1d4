"""A live request to a gpu and back: bytes, streams, people who leave, tunnels that lie."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import openai
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

import wire
from relay import errors
from relay.breaker import FAILURES, FIRST_OPEN_S, LONGEST_OPEN_S
from relay.gpus import PROOF_S
from relay.proxy import whole_frames
from tests.relay.conftest import Relay, until
from tests.relay.double_gpu import BASE, DONE, FRAMES, DoubleGpu, cut, say_fine, start_stream

ASK: dict[str, Any] = {"model": BASE, "messages": [{"role": "user", "content": "How are you?"}]}


async def chat(relay: Relay, **more: Any) -> httpx2.Response:
    return await relay.http.post("/v1/chat/completions", json={**ASK, **more})


def error_of(response: httpx2.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


async def test_the_official_client_chats_whole_and_in_a_stream(relay: Relay, gpu: DoubleGpu) -> None:
    whole = await relay.openai.chat.completions.create(**ASK)
    assert whole.choices[0].message.content == "I'm fine."
    stream = await relay.openai.chat.completions.create(**ASK, stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "I'm fine."


async def test_the_body_reaches_the_gpu_byte_for_byte(relay: Relay, gpu: DoubleGpu) -> None:
    body = f'{{ "model" : "{BASE}",\n "dials": {{"eps": 1.50}}, "x": "아임파인" }}'.encode()
    await relay.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert gpu.prompts == [body]


async def test_the_callers_key_stays_at_the_relay(relay: Relay, gpu: DoubleGpu) -> None:
    await chat(relay)
    assert "authorization" not in gpu.headers[-1]
    assert gpu.headers[-1]["ngrok-skip-browser-warning"]


async def test_a_gpus_own_error_goes_through_as_it_is(relay: Relay, gpu: DoubleGpu) -> None:
    body = {"error": {"message": "too long", "type": "invalid_request_error", "param": "messages", "code": "long"}}

    async def refuse(request: web.Request, _: bytes) -> web.StreamResponse:
        return web.json_response(body, status=400, headers={"x-request-id": "of-the-gpu", "retry-after": "7"})

    gpu.answer = refuse
    response = await chat(relay)
    assert (response.status_code, response.json()) == (400, body)
    assert response.headers.get_list("x-request-id") == [gpu.headers[-1]["x-request-id"]]  # one id all the way
    assert response.headers["retry-after"] == "7"


async def test_frames_arrive_whole_and_at_once_however_the_gpu_cuts_them(relay: Relay, gpu: DoubleGpu) -> None:
    go_on = asyncio.Event()

    async def stutter(request: web.Request, _: bytes) -> web.StreamResponse:
        response = await start_stream(request)
        await response.write(FRAMES[0].encode() + FRAMES[1].encode()[:9])
        await go_on.wait()
        await response.write(FRAMES[1].encode()[9:] + DONE.encode())
        return response

    gpu.answer = stutter
    async with relay.http.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as response:
        assert response.headers["content-type"] == "text/event-stream"
        chunks = response.aiter_raw()
        assert await anext(chunks) == FRAMES[0].encode()
        go_on.set()
        assert b"".join([chunk async for chunk in chunks]) == (FRAMES[1] + DONE).encode()


@given(st.lists(st.sampled_from(["data: a\n\n", "data: b\r\n\r\n", ": ping\n\n", "id: 1\ndata: c\r\r"])), st.data())
async def test_frames_are_whole_whatever_the_chunks_are(frames: list[str], data: st.DataObject) -> None:
    text = "".join(frames).encode()
    marks = sorted(data.draw(st.sets(st.integers(1, max(1, len(text))), max_size=12)) | {len(text)})
    cuts = [text[a:b] for a, b in zip([0, *marks], marks, strict=False) if text[a:b]]

    async def chunks() -> AsyncIterator[bytes]:
        for piece in cuts[1:]:
            yield piece

    out = [frame async for frame in whole_frames(cuts[0], chunks())] if cuts else []
    assert b"".join(out) == text
    assert all(frame.endswith((b"\n\n", b"\r\n\r\n", b"\r\r")) for frame in out)


async def test_a_stream_that_ends_inside_a_frame_is_an_error() -> None:
    async def nothing() -> AsyncIterator[bytes]:
        return
        yield

    with pytest.raises(errors.GpuUnreachable):
        [frame async for frame in whole_frames(b"data: half", nothing())]


async def test_a_gpu_that_dies_in_mid_stream_is_one_error_event_and_no_done(relay: Relay, gpu: DoubleGpu) -> None:
    async def die(request: web.Request, _: bytes) -> web.StreamResponse:
        response = await start_stream(request)
        await response.write(FRAMES[0].encode() + FRAMES[1].encode()[:9])
        await asyncio.sleep(0.05)
        cut(request)
        return response

    gpu.answer = die
    text = (await chat(relay, stream=True)).text
    first, error, end = text.split("\n\n")
    assert first + "\n\n" == FRAMES[0]
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "gpu_unreachable"
    assert end == ""
    with pytest.raises(openai.APIError):
        [chunk async for chunk in await relay.openai.chat.completions.create(**ASK, stream=True)]


async def test_a_gpu_that_dies_before_the_first_byte_is_replaced_by_another(relay: Relay, gpu: DoubleGpu) -> None:
    async with relay.gpu() as other:

        async def die(request: web.Request, _: bytes) -> web.StreamResponse:
            gpu.answer = other.answer = say_fine
            cut(request)
            return web.Response()

        gpu.answer = other.answer = die
        response = await chat(relay)
        assert response.json()["choices"][0]["message"]["content"] == "I'm fine."
        assert len(gpu.prompts) == len(other.prompts) == 1


async def test_a_gpu_that_refuses_our_signature_is_passed_over(relay: Relay, gpu: DoubleGpu) -> None:
    async with relay.gpu() as other:

        async def refuse(request: web.Request, _: bytes) -> web.StreamResponse:
            gpu.answer = other.answer = say_fine
            return web.json_response({"error": {"message": "bad signature"}}, status=401)

        gpu.answer = other.answer = refuse
        assert (await chat(relay)).status_code == 200


async def test_a_gpu_that_dies_halfway_through_a_whole_answer_is_a_clean_503(relay: Relay, gpu: DoubleGpu) -> None:
    async with relay.gpu() as other:

        async def die(request: web.Request, _: bytes) -> web.StreamResponse:
            response = web.StreamResponse(headers={"content-type": "application/json", "content-length": "100"})
            await response.prepare(request)
            await response.write(b'{"id":')
            await asyncio.sleep(0.05)
            cut(request)
            return response

        gpu.answer = other.answer = die
        response = await chat(relay)
        assert response.status_code == 503
        assert len(gpu.prompts) + len(other.prompts) == 1  # the work is not done twice


@pytest.mark.parametrize("stream", [False, True])
async def test_a_caller_who_leaves_while_waiting_stops_the_gpu_within_a_second(
    relay: Relay, gpu: DoubleGpu, stream: bool
) -> None:
    async def think(request: web.Request, _: bytes) -> web.StreamResponse:
        await asyncio.sleep(60)
        return web.Response()

    gpu.answer = think
    asking = asyncio.create_task(chat(relay, stream=stream))
    await until(lambda: gpu.prompts)
    asking.cancel()
    await asyncio.wait_for(gpu.left.wait(), 1)


async def test_a_caller_who_leaves_a_stream_stops_the_gpu_within_a_second(relay: Relay, gpu: DoubleGpu) -> None:
    async def talk(request: web.Request, _: bytes) -> web.StreamResponse:
        response = await start_stream(request)
        while True:
            await response.write(FRAMES[0].encode())
            await asyncio.sleep(0.02)

    gpu.answer = talk
    async with relay.http.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as response:
        await anext(response.aiter_raw())
    await asyncio.wait_for(gpu.left.wait(), 1)


PAGES: list[tuple[int, dict[str, str], str, str]] = [
    (404, {"ngrok-error-code": "ERR_NGROK_3200"}, "<html>offline</html>", "offline"),
    (502, {}, "<html>ERR_NGROK_8012</html>", "not (ERR_NGROK_8012)"),
    (403, {}, "<html><p>ERR_NGROK_727</p></html>", "quota"),
    (200, {}, "<html>You are about to visit...</html>", "no gpu"),
    (530, {}, "error code: 1033", "no gpu"),
]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_tunnels_page_is_a_503_and_never_an_answer(relay: Relay, gpu: DoubleGpu, stream: bool) -> None:
    async def tunnel(request: web.Request, body: bytes) -> web.StreamResponse:
        status, headers, page, _ = showing
        return web.Response(status=status, headers=headers, text=page, content_type="text/html")

    gpu.answer = tunnel
    for showing in PAGES:
        page, means = showing[2:]
        relay.clock.advance(LONGEST_OPEN_S)  # the breaker lets one request through again
        await gpu.until_reachable()
        response = await chat(relay, stream=stream)
        assert response.status_code == 503, page
        assert error_of(response)["code"] == "gpu_unreachable"
        assert means in error_of(response)["message"]
        assert "<html>" not in response.text
        assert int(response.headers["retry-after"]) > 0


async def fail_500(request: web.Request, body: bytes) -> web.StreamResponse:
    return web.json_response({"error": {"message": "a fault"}}, status=500)


async def breaker_of(relay: Relay) -> str:
    (gpu,) = (await relay.http.get("/api/gpus")).json()["data"]
    return str(gpu["breaker"])


async def test_a_gpu_that_only_fails_is_left_alone_and_then_tried_with_one_request(
    relay: Relay, gpu: DoubleGpu
) -> None:
    gpu.answer = fail_500
    for _ in range(FAILURES):
        assert await breaker_of(relay) == "closed"
        assert (await chat(relay)).status_code == 500
    assert await breaker_of(relay) == "open"
    assert error_of(await chat(relay))["code"] == "no_gpu"
    assert len(gpu.prompts) == FAILURES
    relay.clock.advance(FIRST_OPEN_S)
    await gpu.beat(wire.HeldLease(job_id="nobody's", fence=1))
    assert await breaker_of(relay) == "half-open"
    go_on = asyncio.Event()

    async def wait(request: web.Request, body: bytes) -> web.StreamResponse:
        await go_on.wait()
        return await say_fine(request, body)

    gpu.answer = wait
    probe = asyncio.create_task(chat(relay))
    await until(lambda: len(gpu.prompts) == FAILURES + 1)
    assert error_of(await chat(relay))["code"] == "no_gpu"  # one at a time
    go_on.set()
    assert (await probe).status_code == 200
    assert await breaker_of(relay) == "closed"


async def test_a_callers_errors_and_leaving_never_open_the_breaker(relay: Relay, gpu: DoubleGpu) -> None:
    async def refuse(request: web.Request, _: bytes) -> web.StreamResponse:
        return web.json_response({"error": {"message": "too long"}}, status=400)

    async def think(request: web.Request, _: bytes) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    for _ in range(FAILURES + 1):
        gpu.answer = refuse
        assert (await chat(relay)).status_code == 400
        gpu.answer, asked = think, len(gpu.prompts)
        gpu.left.clear()
        asking = asyncio.create_task(chat(relay))
        await until(lambda asked=asked: len(gpu.prompts) > asked)  # type: ignore[misc]
        asking.cancel()
        await asyncio.wait_for(gpu.left.wait(), 1)
    assert await breaker_of(relay) == "closed"


async def test_a_new_epoch_starts_with_a_closed_breaker(relay: Relay, gpu: DoubleGpu) -> None:
    gpu.answer = fail_500
    for _ in range(FAILURES):
        await chat(relay)
    assert await breaker_of(relay) == "open"
    gpu.answer = say_fine
    await gpu.enrol()
    await gpu.until_reachable()
    assert await breaker_of(relay) == "closed"
    assert (await chat(relay)).status_code == 200


async def test_a_request_by_the_way_of_an_old_epoch_ends_though_the_gpu_beats_on(relay: Relay, gpu: DoubleGpu) -> None:
    async def hang(request: web.Request, _: bytes) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    gpu.answer = hang
    asking = asyncio.create_task(chat(relay))
    await until(lambda: gpu.prompts)
    gpu.answer = say_fine
    await gpu.enrol()
    relay.clock.advance(relay.settings.alive_s + 0.1)
    await gpu.until_reachable()
    response = await asyncio.wait_for(asking, 3)  # another way to it may have been found by then
    assert response.status_code in (200, 503)
    await asyncio.wait_for(gpu.left.wait(), 1)


async def test_a_draining_gpu_ends_what_runs_and_gets_nothing_new(relay: Relay, gpu: DoubleGpu) -> None:
    go_on = asyncio.Event()

    async def wait(request: web.Request, body: bytes) -> web.StreamResponse:
        await go_on.wait()
        return await say_fine(request, body)

    gpu.answer = wait
    running = asyncio.create_task(chat(relay))
    await until(lambda: gpu.prompts)
    drain = f"/api/gpus/{gpu.by.gpu_id}/drain"
    assert (await relay.http.post(drain)).json()["draining"] is True
    assert (await relay.http.get("/api/gpus")).json()["data"][0]["draining"] is True
    assert error_of(await chat(relay))["code"] == "no_gpu"
    go_on.set()
    assert (await running).status_code == 200
    assert (await relay.http.delete(drain)).json()["draining"] is False
    assert (await chat(relay)).status_code == 200
    assert (await relay.http.post("/api/gpus/nobody/drain")).status_code == 404


async def test_a_gpu_that_says_it_drains_before_we_know_is_left_for_another(relay: Relay, gpu: DoubleGpu) -> None:
    async def drains(request: web.Request, body: bytes) -> web.StreamResponse:
        return web.json_response(wire.error_body("draining", type="server_error", code="gpu_stopping"), status=503)

    gpu.answer = drains
    assert error_of(await chat(relay))["code"] == "gpu_stopping"  # there is no other
    async with relay.gpu():
        for _ in range(4):
            assert (await chat(relay)).status_code == 200


async def test_a_url_that_changed_hands_while_its_gpu_lives_on_gets_no_prompt(relay: Relay, gpu: DoubleGpu) -> None:
    assert (await chat(relay)).status_code == 200
    gpu.proves = False
    relay.clock.advance(PROOF_S + 0.1)
    await gpu.beat()  # it is alive all the same
    assert error_of(await chat(relay))["code"] in ("gpu_unreachable", "no_gpu")
    assert len(gpu.prompts) == 1
    gpu.proves = True
    await gpu.until_reachable()
    assert (await chat(relay)).status_code == 200


async def test_a_proof_is_renewed_beside_the_requests_and_seldom(relay: Relay, gpu: DoubleGpu) -> None:
    challenges = len(gpu.headers)
    for _ in range(5):
        assert (await chat(relay)).status_code == 200
    assert len(gpu.headers) - len(gpu.prompts) == challenges
    relay.clock.advance(PROOF_S * 0.6)
    await gpu.beat()
    for _ in range(5):
        assert (await chat(relay)).status_code == 200
    await until(lambda: len(gpu.headers) - len(gpu.prompts) == challenges + 1)
    relay.clock.advance(PROOF_S * 0.45)  # past the first proof, within the second
    await gpu.beat()
    gpu.proves = False
    assert (await chat(relay)).status_code == 200


async def test_a_redirect_is_not_followed(relay: Relay, gpu: DoubleGpu) -> None:
    async def elsewhere(request: web.Request, _: bytes) -> web.StreamResponse:
        raise web.HTTPTemporaryRedirect(f"{relay.url}/healthz")

    gpu.answer = elsewhere
    assert (await chat(relay)).status_code == 503


async def test_what_can_not_prove_itself_never_gets_a_prompt(relay: Relay) -> None:
    async with relay.gpu(enrol=False) as gpu:
        gpu.proves = False
        await gpu.enrol()
        assert not (await gpu.beat()).reachable
        response = await chat(relay)
        assert response.status_code == 503
        assert error_of(response)["code"] == "no_gpu"
        assert gpu.prompts == []


async def test_a_gpu_that_was_cut_off_is_back_after_its_next_proof(relay: Relay, gpu: DoubleGpu) -> None:
    async def die(request: web.Request, _: bytes) -> web.StreamResponse:
        cut(request)
        return web.Response()

    gpu.answer = die
    gpu.proves = False
    assert (await chat(relay)).status_code == 503
    assert not (await gpu.beat()).reachable
    assert len(gpu.prompts) == 1
    gpu.answer, gpu.proves = say_fine, True
    await gpu.until_reachable()
    assert (await chat(relay)).status_code == 200


async def test_a_silent_gpu_gets_no_prompt_and_its_model_stays_known(relay: Relay, gpu: DoubleGpu) -> None:
    relay.clock.advance(relay.settings.alive_s + 0.1)
    response = await chat(relay)
    assert response.status_code == 503
    assert response.headers["x-should-retry"] == "false"
    assert int(response.headers["retry-after"]) > 0
    assert error_of(response)["code"] == "no_gpu"
    model = await relay.openai.models.retrieve(BASE)
    assert model.model_dump()["available"] is False


@pytest.mark.parametrize("after", ["nothing", "the headers", "a frame"])
async def test_a_request_to_a_gpu_that_went_silent_ends(relay: Relay, gpu: DoubleGpu, after: str) -> None:
    """Its tunnel has swallowed the answer: no connection breaks, and no heartbeat comes."""

    async def hang(request: web.Request, _: bytes) -> web.StreamResponse:
        if after != "nothing":
            response = await start_stream(request)
            await response.write(FRAMES[0].encode() if after == "a frame" else b"")
        await asyncio.Event().wait()
        raise AssertionError

    gpu.answer = hang
    asking = asyncio.create_task(chat(relay, stream=True))
    await until(lambda: gpu.prompts)
    await asyncio.sleep(0.1)
    relay.clock.advance(relay.settings.alive_s + 0.1)
    response = await asyncio.wait_for(asking, 3)
    if after == "a frame":
        error = json.loads(response.text.removeprefix(FRAMES[0]).removeprefix("data: "))["error"]
    else:
        assert response.status_code == 503
        error = error_of(response)
    assert error["code"] == "gpu_unreachable"
    assert "gone silent" in error["message"]
    await asyncio.wait_for(gpu.left.wait(), 1)


async def test_an_answer_goes_on_while_its_bytes_come_or_its_heartbeats_do(relay: Relay, gpu: DoubleGpu) -> None:
    step = asyncio.Event()

    async def slowly(request: web.Request, _: bytes) -> web.StreamResponse:
        response = await start_stream(request)
        for frame in (*FRAMES, DONE):
            await response.write(frame.encode())
            await step.wait()
            step.clear()
        return response

    gpu.answer = slowly
    asking = asyncio.create_task(chat(relay, stream=True))
    await until(lambda: gpu.prompts)
    for _ in FRAMES:  # silent for long, in all, but not at a stretch
        relay.clock.advance(relay.settings.alive_s * 0.7)
        step.set()
        await asyncio.sleep(1.2)  # a round of the dispatcher
    relay.clock.advance(relay.settings.alive_s * 0.7)
    await gpu.beat()
    relay.clock.advance(relay.settings.alive_s * 0.7)
    await asyncio.sleep(1.2)
    assert not asking.done()
    step.set()
    assert (await asking).text == "".join((*FRAMES, DONE))


async def test_the_less_busy_gpu_is_asked(relay: Relay, gpu: DoubleGpu) -> None:
    async with relay.gpu() as other:
        release = asyncio.Event()

        async def wait(request: web.Request, body: bytes) -> web.StreamResponse:
            await release.wait()
            return await say_fine(request, body)

        gpu.answer = other.answer = wait
        asking = [asyncio.create_task(chat(relay)) for _ in range(4)]
        await until(lambda: len(gpu.prompts) + len(other.prompts) == 4)
        assert len(gpu.prompts) == len(other.prompts) == 2
        release.set()
        assert [r.status_code for r in await asyncio.gather(*asking)] == [200] * 4


async def test_layers_are_asked_of_a_gpu(relay: Relay, gpu: DoubleGpu) -> None:
    response = await relay.http.get(f"/v1/models/{BASE}/layers")
    assert response.json() == {"path": f"/v1/models/{BASE}/layers", "asked": None}
    asked = {"model": BASE, "layers": {"layers": "last:2"}}
    response = await relay.http.post("/v1/layers/preview", json=asked)
    assert response.json() == {"path": "/v1/layers/preview", "asked": asked}


MALFORMED: list[tuple[bytes, str | None, str]] = [
    (b'{"model": "x"', None, "not JSON"),
    (b"[1]", None, "object"),
    (b'{"messages": []}', "model", "missing"),
    (b'{"model": 3}', "model", "string"),
    (b'{"model": "nope", "stream": true}', "model", BASE),
    (f'{{"model": "{BASE}", "stream": "yes"}}'.encode(), "stream", "true or false"),
    (b'{"model": "\xff"}', None, "UTF-8"),
    (b'{"model": "\\ud800"}', None, "half of a character"),
    (b'{"model": NaN}', None, "NaN"),
]


async def test_a_malformed_body_is_refused_by_name(relay: Relay, gpu: DoubleGpu) -> None:
    for body, param, says in MALFORMED:
        response = await relay.http.post("/v1/chat/completions", content=body)
        assert response.status_code in (400, 404), body
        assert error_of(response)["param"] == param
        assert says in error_of(response)["message"]
    assert gpu.prompts == []


async def test_a_body_over_its_limit_is_413(start_relay: Any) -> None:
    relay = await start_relay(max_body_bytes=1000)

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b" " * 500

    for content in (b" " * 1001, endless()):
        response = await relay.http.post("/v1/completions", content=content)
        assert response.status_code == 413
        assert error_of(response)["code"] == "request_too_large"
