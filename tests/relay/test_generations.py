"""The page's streams: they wait for a gpu in a fair line, are picked up again after a cut, and stop when told."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
from aiohttp import web

from relay import generations
from relay.lines import Lines
from relay.metrics import Metrics
from tests.relay.conftest import Relay, until
from tests.relay.double_gpu import BASE, DONE, FRAMES, DoubleGpu, cut, start_stream
from tests.relay.test_jobs import create, metrics

ASK: dict[str, Any] = {"kind": "chat", "body": {"model": BASE, "messages": [{"role": "user", "content": "Hi"}]}}
Frame = tuple[int | None, Any]


class Reader:
    """One connection to a stream of events."""

    def __init__(self, response: httpx2.Response) -> None:
        self.response = response
        self._lines = response.aiter_lines()

    async def next(self) -> Frame:
        """The next event: its id, and its data. Raises StopAsyncIteration at the end."""
        event_id, data = None, ""
        async with asyncio.timeout(10):
            async for line in self._lines:
                if line.startswith("id: "):
                    event_id = int(line[4:])
                elif line.startswith("data: "):
                    data += line[6:]
                elif not line and data:
                    return event_id, data if data == "[DONE]" else json.loads(data)
        raise StopAsyncIteration

    async def rest(self) -> list[Frame]:
        frames = []
        while True:
            try:
                frames.append(await self.next())
            except StopAsyncIteration:
                return frames


@asynccontextmanager
async def reading(relay: Relay, path: str = "/api/generations", after: int | None = None) -> AsyncIterator[Reader]:
    """Asks, or with another path picks up what was asked."""
    method, body = ("POST", ASK) if path == "/api/generations" else ("GET", None)
    headers = {"last-event-id": str(after)} if after is not None else {}
    async with relay.http.stream(method, path, json=body, headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        yield Reader(response)


def words(frames: list[Frame]) -> str:
    return "".join(f["choices"][0]["delta"]["content"] for _, f in frames if isinstance(f, dict) and "choices" in f)


def kinds(frames: list[Frame]) -> list[str]:
    return [f["type"] for _, f in frames if isinstance(f, dict) and "type" in f]


async def test_frames_are_numbered_and_name_the_gpu(relay: Relay, gpu: DoubleGpu) -> None:
    async with reading(relay) as reader:
        assert reader.response.headers["content-type"].startswith("text/event-stream")
        frames = await reader.rest()
    assert [number for number, _ in frames] == list(range(1, len(frames) + 1))
    assert kinds(frames) == ["started", "reading"]
    assert frames[1][1]["gpu"] == "double"
    assert words(frames) == "I'm fine."
    assert frames[-1][1] == "[DONE]"
    assert json.loads(gpu.prompts[0])["stream"] is True


async def test_of_a_picture_on_its_way_only_the_newest_is_kept_for_who_comes_back(relay: Relay, gpu: DoubleGpu) -> None:
    def shown(kind: str, index: int, what: str) -> str:
        seen = {"type": f"image_generation.{kind}", "b64_json": what * 100, "index": index}
        return f"data: {json.dumps(seen)}\n\n"

    async def draw(request: web.Request, body: bytes) -> web.StreamResponse:
        assert request.path == "/v1/images/generations"
        assert json.loads(body) == {"model": BASE, "prompt": "a heart", "stream": True}
        response = await start_stream(request)
        for kind, index, what in (
            ("partial_image", 0, "a"),
            ("partial_image", 1, "b"),
            ("partial_image", 0, "c"),
            ("completed", 1, "d"),
            ("completed", 0, "e"),
        ):
            await response.write(shown(kind, index, what).encode())
        await response.write(DONE.encode())
        return response

    gpu.answer = draw
    ask = {"kind": "image", "body": {"model": BASE, "prompt": "a heart"}}
    async with relay.http.stream("POST", "/api/generations", json=ask) as response:
        frames = await Reader(response).rest()
    pictures = [(f["index"], f["b64_json"][0]) for _, f in frames if isinstance(f, dict) and "index" in f]
    assert pictures[-2:] == [(1, "d"), (0, "e")]
    async with reading(relay, f"/api/generations/{frames[0][1]['id']}", after=0) as reader:
        again = await reader.rest()
    pictures = [(f["index"], f["b64_json"][0]) for _, f in again if isinstance(f, dict) and "index" in f]
    assert pictures == [(1, "d"), (0, "e")], "the newest of each, once"
    assert again[-1] == frames[-1]


async def test_large_pictures_one_after_the_other_are_whole_though_all_of_them_are_too_much(
    relay: Relay, gpu: DoubleGpu
) -> None:
    async def draw(request: web.Request, body: bytes) -> web.StreamResponse:
        response = await start_stream(request)
        for index in range(json.loads(body)["n"]):
            shown = {"type": "image_generation.completed", "b64_json": "a" * 9 * 2**20, "index": index}
            await response.write(f"data: {json.dumps(shown)}\n\n".encode())
        await response.write(DONE.encode())
        return response

    async def last(n: int) -> Any:
        ask = {"kind": "image", "body": {"model": BASE, "prompt": "a heart", "n": n}}
        async with relay.http.stream("POST", "/api/generations", json=ask) as response:
            return (await Reader(response).rest())[-1][1]

    gpu.answer = draw
    assert [await last(4) for _ in range(3)] == ["[DONE]"] * 3
    assert (await last(8))["error"]["code"] == "request_too_large"


async def test_without_a_gpu_it_waits_and_is_answered_when_one_comes(relay: Relay) -> None:
    async with relay.gpu() as gpu:
        pass  # the model is known now, and its gpu gone
    relay.clock.advance(60)
    async with reading(relay) as first, reading(relay) as second:
        for reader, place in ((first, 1), (second, 2)):
            assert (await reader.next())[1]["type"] == "started"
            assert (await reader.next())[1] == {"type": "waiting", "place": place, "reason": "no_gpu"}
        async with relay.gpu() as gpu:
            assert words(await first.rest()) == "I'm fine."
            assert words(await second.rest()) == "I'm fine."
            assert len(gpu.prompts) == 2


async def test_the_page_and_the_api_wait_in_one_line_and_users_take_turns_in_it(relay: Relay) -> None:
    async with relay.gpu():
        pass
    relay.clock.advance(60)
    key = (await relay.http.post("/api/keys", json={"user": "modest"})).json()["key"]
    body = {**ASK["body"], "stream": True, "wait_s": 60, "user": "modest"}
    headers = {"authorization": f"Bearer {key}"}
    async with reading(relay) as first, reading(relay) as second:
        for reader, place in ((first, 1), (second, 2)):
            await reader.next()
            assert (await reader.next())[1]["place"] == place
        async with relay.http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as modest:
            assert (await second.next())[1]["place"] == 3  # behind the other user's first
            async with relay.gpu() as gpu:
                assert b"[DONE]" in await modest.aread()
                await first.rest()
                await second.rest()
                assert ["modest" in prompt.decode() for prompt in gpu.prompts] == [False, True, False]


async def test_who_leaves_the_line_moves_the_others_up(relay: Relay) -> None:
    async with relay.gpu():
        pass
    relay.clock.advance(60)
    async with reading(relay) as first, reading(relay) as second:
        started = (await first.next())[1]
        await first.next()
        await second.next()
        assert (await second.next())[1]["place"] == 2
        assert (await relay.http.delete(f"/api/generations/{started['id']}")).status_code == 200
        assert (await second.next())[1]["place"] == 1


async def test_a_full_gpu_is_waited_for(relay: Relay, gpu: DoubleGpu) -> None:
    healthy = gpu.answer

    async def full(request: web.Request, body: bytes) -> web.StreamResponse:
        gpu.answer = healthy
        return web.json_response(
            {"error": {"message": "full", "type": "x", "param": None, "code": "gpu_busy"}}, status=429
        )

    gpu.answer = full
    async with reading(relay) as reader:
        frames = await reader.rest()
    assert kinds(frames) == ["started", "reading", "waiting", "reading"]
    assert frames[2][1]["reason"] == "busy"
    assert words(frames) == "I'm fine."


async def test_a_cut_stream_is_picked_up_where_it_broke(relay: Relay, gpu: DoubleGpu) -> None:
    go_on = asyncio.Event()

    async def slowly(request: web.Request, body: bytes) -> web.StreamResponse:
        response = await start_stream(request)
        await response.write(FRAMES[0].encode())
        await go_on.wait()
        for frame in (*FRAMES[1:], DONE):
            await response.write(frame.encode())
        return response

    gpu.answer = slowly
    async with reading(relay) as reader:
        seen = [await reader.next() for _ in range(3)]
    go_on.set()
    path = f"/api/generations/{seen[0][1]['id']}"
    async with reading(relay, path, after=seen[-1][0]) as reader:
        rest = await reader.rest()
    assert words(seen) + words(rest) == "I'm fine."
    assert [number for number, _ in seen + rest] == list(range(1, len(seen + rest) + 1))
    assert not gpu.left.is_set()
    async with reading(relay, path) as reader:
        assert await reader.rest() == seen + rest  # from the beginning, after its end


async def test_stopping_frees_the_gpu_at_once(relay: Relay, gpu: DoubleGpu) -> None:
    async def for_ever(request: web.Request, body: bytes) -> web.StreamResponse:
        response = await start_stream(request)
        while True:
            await response.write(FRAMES[0].encode())
            await asyncio.sleep(0.01)

    gpu.answer = for_ever
    async with reading(relay) as reader:
        started = (await reader.next())[1]
        while "choices" not in (await reader.next())[1]:
            pass
        path = f"/api/generations/{started['id']}"
        assert (await relay.http.delete(path)).status_code == 200
        async with asyncio.timeout(1):
            await gpu.left.wait()
    assert (await relay.http.get(path)).status_code == 404


async def test_a_reader_who_does_not_come_back_lets_the_gpu_go(
    relay: Relay, gpu: DoubleGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = generations.Generations(None, None, Lines(), Metrics(), keep_s=0.05)  # type: ignore[arg-type]
    generation = generations.Generation("user")
    lines._all[generation.id] = generation
    generation.task = asyncio.create_task(asyncio.sleep(60))
    generation.say("{}")
    frames = lines.frames(generation, 0)
    await anext(frames)
    await frames.aclose()  # type: ignore[attr-defined]
    assert lines.get("user", generation.id) is generation
    await until(lambda: generation.task and generation.task.cancelled())


async def test_an_error_of_the_gpu_ends_the_stream_with_its_words(relay: Relay, gpu: DoubleGpu) -> None:
    async def refuse(request: web.Request, body: bytes) -> web.StreamResponse:
        error = {"message": "too long", "type": "x", "param": "messages", "code": "context_length_exceeded"}
        return web.json_response({"error": error}, status=400)

    gpu.answer = refuse
    async with reading(relay) as reader:
        frames = await reader.rest()
    assert frames[-1][1]["error"]["code"] == "context_length_exceeded"


async def test_a_gpu_that_dies_in_the_middle_is_an_error_and_no_end(relay: Relay, gpu: DoubleGpu) -> None:
    async def die(request: web.Request, body: bytes) -> web.StreamResponse:
        response = await start_stream(request)
        await response.write(FRAMES[0].encode())
        cut(request)
        return response

    gpu.answer = die
    async with reading(relay) as reader:
        frames = await reader.rest()
    assert words(frames) == "I'm"
    assert frames[-1][1]["error"]["code"] == "gpu_unreachable"


@pytest.mark.parametrize(
    ("body", "param"),
    [({}, "kind"), ({"kind": "song", "body": {}}, "kind"), ({"kind": "chat", "body": {}}, "model")],
)
async def test_nonsense_is_refused_before_anything_waits(relay: Relay, body: Any, param: str) -> None:
    response = await relay.http.post("/api/generations", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_somebody_elses_answer_does_not_exist(relay: Relay, gpu: DoubleGpu) -> None:
    made = (await relay.http.post("/api/keys", json={"user": "bora"})).json()
    async with reading(relay) as reader:
        started = (await reader.next())[1]
        bora = {"authorization": f"Bearer {made['key']}"}
        for method in ("GET", "DELETE"):
            path = f"/api/generations/{started['id']}"
            assert (await relay.http.request(method, path, headers=bora)).status_code == 404
        await reader.rest()


async def test_a_job_is_followed_to_its_end_and_picked_up_after_an_event(relay: Relay, gpu: DoubleGpu) -> None:
    job = await create(relay)
    grant = await gpu.next_grant()
    async with reading(relay, f"/api/jobs/{job.id}/stream") as reader:
        assert (await reader.next())[1]["status"] == "queued"
        created, given = await reader.next(), await reader.next()
        assert created[1]["message"] == "Job created and queued."
        await gpu.report(grant, metrics(0, step=1, train_loss=2.5))
        assert (await reader.next())[1]["status"] == "running"
        step = await reader.next()
        assert step[1]["data"]["train_loss"] == 2.5
    await gpu.succeed(grant)
    async with reading(relay, f"/api/jobs/{job.id}/stream", after=given[0]) as reader:
        frames = await reader.rest()
    assert frames[0][1]["status"] == "succeeded"
    assert frames[1] == step
    assert frames[-1][1] == "[DONE]"


async def test_the_gpus_screen_tells_who_is_here_and_whose_job_it_is(relay: Relay, gpu: DoubleGpu) -> None:
    job = await create(relay)
    await gpu.next_grant()
    made = (await relay.http.post("/api/keys", json={"user": "bora"})).json()
    (mine,) = (await relay.http.get("/api/gpus")).json()["data"]
    assert (mine["alive"], mine["reachable"], mine["models"][0]["id"]) == (True, True, BASE)
    assert mine["job"]["id"] == job.id
    assert "url" not in mine
    bora = {"authorization": f"Bearer {made['key']}"}
    (theirs,) = (await relay.http.get("/api/gpus", headers=bora)).json()["data"]
    assert theirs["job"] == {"id": None, "status": "leased"}
    relay.clock.advance(60)
    (later,) = (await relay.http.get("/api/gpus")).json()["data"]
    assert (later["alive"], later["reachable"]) == (False, False)
