"""What keys use in a month: whole answers, streams, cut streams and jobs; and that a spent key is refused."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import web

import wire
from relay.meter import Used, month, month_ends
from relay.usage import StreamMeter
from tests.relay.conftest import CHAT_ROW, Clock, Relay, running_relay, until
from tests.relay.double_gpu import BASE, DONE, FRAMES, DoubleGpu, say_fine, start_stream

ON_BOTH_DATABASES = True
CHAT: Any = {"model": BASE, "messages": [{"role": "user", "content": "How are you?"}]}
PATIENCE_S = 30.0
ROWS = CHAT_ROW.encode() * 3


def comment(prompt: int, completion: int) -> bytes:
    return wire.USAGE_COMMENT + f"{prompt},{completion}\n\n".encode()


async def telling(request: web.Request, body: bytes) -> web.StreamResponse:
    """As our gpus do."""
    if b'"stream"' not in body:
        answer = await say_fine(request, body)
        answer.headers[wire.HEADER_USAGE] = "7,3"
        return answer
    response = await start_stream(request)
    for part in (comment(7, 0), *(frame.encode() for frame in FRAMES), comment(7, 3), DONE.encode()):
        await response.write(part)
    return response


async def used(relay: Relay) -> dict[str, Any]:
    found: dict[str, Any] = (await relay.http.get("/api/usage")).raise_for_status().json()
    return found


async def passed(parts: list[bytes]) -> tuple[bytes, Used]:
    async def source() -> Any:
        for part in parts:
            yield part

    meter = StreamMeter()
    return b"".join([buffer async for buffer in meter.passing(source())]), meter.used


@pytest.mark.parametrize("cut", [1, 2, 3, 5])
async def test_comments_of_the_gpu_are_taken_out_and_everything_else_goes_on_to_the_byte(cut: int) -> None:
    text = b'data: {"content":": usage 9,9"}\n\n: a comment\n\nid: 1\ndata: : usage 9,9\n\n'
    frames = [comment(7, 0), *(frame.encode() for frame in FRAMES), text, comment(7, 3), DONE.encode()]
    parts = [b"".join(frames[at : at + cut]) for at in range(0, len(frames), cut)]
    out, found = await passed(parts)
    assert out == b"".join(frame.encode() for frame in FRAMES) + text + DONE.encode()
    assert found == Used(7, 3)


async def test_a_stream_that_is_cut_counts_its_prompt_and_its_events() -> None:
    assert (await passed([comment(7, 0), *(frame.encode() for frame in FRAMES)]))[1] == Used(7, len(FRAMES) - 1)
    assert (await passed([frame.encode() for frame in FRAMES]))[1] == Used(0, len(FRAMES) - 1)
    assert (await passed([]))[1] == Used()


def test_a_month_is_a_calendar_month_in_utc() -> None:
    new_year = datetime(2026, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp()
    assert (month(new_year), month(new_year + 1)) == ("2026-12", "2027-01")
    assert month_ends(new_year) == new_year + 1


async def test_answers_whole_streamed_and_left_are_counted_for_their_key(relay: Relay, gpu: DoubleGpu) -> None:
    gpu.answer = telling
    await relay.openai.chat.completions.create(**CHAT)
    async with relay.http.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as response:
        assert "usage" not in "".join([text async for text in response.aiter_text()])
        assert wire.HEADER_USAGE not in response.headers
    other = (await relay.http.post("/api/keys", json={"name": "second"})).json()
    async with relay.client(other["key"]) as client:
        await client.chat.completions.create(**CHAT)
    found = await used(relay)
    assert (found["prompt_tokens"], found["completion_tokens"], found["tokens"]) == (21, 9, 30)
    by_key = {key["id"]: key["tokens"] for key in found["keys"]}
    assert by_key == {"key-admin": 20, other["id"]: 10}

    async def endless(request: web.Request, _: bytes) -> web.StreamResponse:
        response = await start_stream(request)
        await response.write(comment(7, 0) + FRAMES[0].encode() + FRAMES[1].encode())
        await asyncio.sleep(60)
        return response

    gpu.answer = endless
    async with relay.http.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as response:
        await anext(response.aiter_bytes())

    async def counted() -> bool:
        return bool((await used(relay))["tokens"] == 30 + 7 + 1)

    await until(counted, PATIENCE_S)
    plain = (await relay.http.post("/api/keys", json={"scopes": ["generate"]})).json()
    alone = await relay.http.get("/api/usage", headers={"authorization": f"Bearer {plain['key']}"})
    assert ([key["id"] for key in alone.json()["keys"]], alone.json()["tokens"]) == ([plain["id"]], 0)
    await relay.http.delete(f"/api/keys/{plain['id']}")
    await relay.http.delete(f"/api/keys/{other['id']}")
    kept = {key["id"]: key["revoked"] for key in (await used(relay))["keys"]}
    assert kept == {"key-admin": False, other["id"]: True}


async def test_a_key_whose_month_is_spent_is_refused_until_the_next_and_no_other_key_is(
    start_relay: Callable[..., Any], clock: Clock
) -> None:
    relay: Relay = await start_relay(price_per_million_tokens=1e5, price_per_gpu_hour=3600.0)
    async with relay.gpu() as gpu:
        gpu.answer = telling
        for limit in ({"tokens_per_month": 20}, {"spend_per_month": 2.0}):
            made = (await relay.http.post("/api/keys", json=limit)).raise_for_status().json()
            async with relay.client(made["key"]) as client:
                for _ in range(2):
                    await client.chat.completions.create(**CHAT)
                headers = {"authorization": f"Bearer {made['key']}"}
                for path, body in [
                    ("/v1/chat/completions", CHAT),
                    ("/api/generations", {"kind": "chat", "body": CHAT}),
                    ("/v1/fine_tuning/jobs", {"model": BASE, "training_file": "file-x"}),
                ]:
                    refused = await relay.http.post(path, json=body, headers=headers)
                    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "insufficient_quota"), path
                    left_s = month_ends(clock()) - clock()
                    assert int(refused.headers["retry-after"]) == pytest.approx(left_s, abs=2)
                    assert refused.headers["x-should-retry"] == "false"
                await relay.openai.chat.completions.create(**CHAT)
                assert [m.id async for m in client.models.list()] == [BASE]
        shown = {key["id"]: key for key in (await used(relay))["keys"]}[made["id"]]
        assert (shown["tokens"], shown["spend"], shown["spend_per_month"]) == (20, 2.0, 2.0)


async def test_a_new_month_begins_with_nothing(tmp_path: Path, clock: Clock, database: str) -> None:
    clock.now = datetime(2026, 11, 30, 23, 59, tzinfo=UTC).timestamp()
    async with running_relay(tmp_path, clock, database_url=database) as relay, relay.gpu() as gpu:
        gpu.answer = telling
        made = (await relay.http.post("/api/keys", json={"tokens_per_month": 10})).json()
        async with relay.client(made["key"]) as client:
            await client.chat.completions.create(**CHAT)
            with pytest.raises(openai.RateLimitError):
                await client.chat.completions.create(**CHAT)
            clock.advance(60)
            await gpu.beat()
            await client.chat.completions.create(**CHAT)
        assert (await used(relay))["month"] == "2026-12"
        assert (await used(relay))["tokens"] == 10
    async with running_relay(tmp_path, clock, database_url=database) as relay:  # and it outlives the process
        assert (await used(relay))["tokens"] == 10


async def test_a_job_counts_the_gpus_time_of_each_lease_and_the_tokens_it_trained(
    relay: Relay, gpu: DoubleGpu, clock: Clock
) -> None:
    made = (await relay.http.post("/api/keys", json={"name": "trains"})).json()
    async with relay.client(made["key"]) as client:
        file = await client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
        await client.fine_tuning.jobs.create(model=BASE, training_file=file.id)
    grant = await gpu.next_grant()
    clock.advance(10)
    await gpu.call("POST", f"/gpu/jobs/{grant.job.job_id}/release", wire.Release(fence=grant.fence, reason="leaving"))
    grant = await gpu.next_grant()
    clock.advance(5)
    await gpu.succeed(grant)
    found = await used(relay)
    key = next(key for key in found["keys"] if key["id"] == made["id"])
    assert key["gpu_s"] == pytest.approx(15, abs=0.5)
    assert key["trained_tokens"] == found["trained_tokens"] > 0
