"""What the relay counts: who may read it, that it is true, and that nobody outside chooses a label."""

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
from aiohttp import web

import wire
from tests.relay.conftest import Relay, until
from tests.relay.double_gpu import BASE, FRAMES, DoubleGpu, start_stream

OPERATIONS = Path(__file__).parents[2] / "docs/operations/README.md"
TOKEN = "a-token-for-metrics-alone"
CHAT = {"model": BASE, "messages": [{"role": "user", "content": "How are you?"}]}


async def numbers(relay: Relay) -> dict[str, float]:
    text = (await relay.http.get("/metrics")).raise_for_status().text
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


async def test_metrics_open_with_the_admins_key_or_their_own_token_and_with_nothing_else(
    start_relay: Callable[..., Any],
) -> None:
    relay: Relay = await start_relay(metrics_token=TOKEN)
    other = (await relay.http.post("/api/keys", json={"user": "bob"})).json()["key"]
    mine = (await relay.http.post("/api/keys", json={"scopes": ["generate", "train"]})).json()["key"]
    async with httpx2.AsyncClient(base_url=relay.url, trust_env=False, verify=False) as http:
        for bearer, status in [(None, 401), ("sk-fine-wrong", 401), (other, 403), (mine, 403), (TOKEN, 200)]:
            headers = {"authorization": f"Bearer {bearer}"} if bearer else {}
            assert (await http.get("/metrics", headers=headers)).status_code == status, bearer
        token = {"authorization": f"Bearer {TOKEN}"}
        assert (await http.get("/v1/models", headers=token)).status_code == 401
        assert (await http.get("/api/gpus", headers=token)).status_code == 401
    response = await relay.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert response.headers["cache-control"] == "no-store"


async def test_requests_streams_errors_and_bytes_are_counted_by_route(relay: Relay, gpu: DoubleGpu) -> None:
    go_on = asyncio.Event()

    async def stutter(request: web.Request, _: bytes) -> web.StreamResponse:
        response = await start_stream(request)
        await response.write(FRAMES[0].encode())
        await go_on.wait()
        return response

    gpu.answer = stutter
    async with relay.http.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as response:
        body = response.aiter_bytes()
        await anext(body)
        during = await numbers(relay)
        go_on.set()
        async for _ in body:
            pass
    assert during["relay_live_streams"] == 1
    assert during['relay_gpus{state="ready"}'] == 1
    assert during['relay_breakers{state="closed"}'] == 1
    assert during['relay_jobs{state="queued"}'] == 0
    assert during["relay_first_byte_seconds_count"] == 1
    assert during["relay_disk_free_bytes"] > 0
    assert during["process_resident_memory_bytes"] > 0
    assert (await relay.http.post("/v1/chat/completions", json={**CHAT, "model": "none"})).status_code == 404
    route = 'method="POST",route="/v1/chat/completions"'

    async def counted() -> bool:
        found = await numbers(relay)
        return found.get(f'relay_requests_total{{{route},status="2xx"}}') == 1 and found["relay_live_streams"] == 0

    await until(counted)
    found = await numbers(relay)
    assert found[f'relay_requests_total{{{route},status="4xx"}}'] == 1
    assert found['relay_errors_total{code="model_not_found"}'] == 1
    assert found['relay_request_duration_seconds_count{route="/v1/chat/completions"}'] == 2
    assert found['relay_http_bytes_total{direction="sent"}'] > len(FRAMES[0])
    assert found['relay_http_bytes_total{direction="received"}'] > 0


async def test_no_label_is_chosen_by_a_caller(relay: Relay, gpu: DoubleGpu) -> None:
    async def paths() -> set[str]:
        return {name.partition("{")[0] + str(re.findall(r'\w+="[^"]*"', name)) for name in await numbers(relay)}

    async def call(n: int) -> None:
        for method, path in [
            ("GET", f"/nothing-{n}"),
            ("GET", f"/v1/files/file-{n}"),
            ("GET", f"/v1/models/model-{n}/layers"),
            ("DELETE", f"/api/keys/key-{n}"),
            (f"M{n}", "/v1/files"),
        ]:
            await relay.http.request(method, path)
        await relay.http.post("/v1/chat/completions", json={**CHAT, "model": f"model-{n}"})

    await call(0)
    await paths()
    before = await paths()
    for n in range(1, 6):
        await call(n)
    assert await paths() == before


async def test_a_lost_lease_and_a_stored_checkpoint_are_counted(relay: Relay, gpu: DoubleGpu) -> None:
    await relay.openai.fine_tuning.jobs.create(model=BASE, training_file=await relay.upload())
    grant = await gpu.next_grant()
    chunk = b"weights and moments"
    sha256, path = wire.body_sha256(chunk), f"/gpu/jobs/{grant.job.job_id}"
    assert (await gpu.call("PUT", f"{path}/chunks/{sha256}?fence={grant.fence}", chunk)).status_code == 200
    ref = wire.ChunkRef(sha256=sha256, bytes=len(chunk))
    file = wire.ChunkedFile(name="state", bytes=len(chunk), sha256=sha256, chunks=[ref])
    checkpoint = wire.Checkpoint(step=1, total_steps=2, made_on="cpu fp32", files=[file])
    said = wire.CheckpointStored(fence=grant.fence, checkpoint=checkpoint)
    assert (await gpu.call("POST", f"{path}/checkpoints", said)).status_code == 200
    assert (await numbers(relay))["relay_checkpoints_stored_total"] == 1
    relay.clock.advance(relay.settings.lease_s + 1)

    async def lost() -> bool:
        return (await numbers(relay))["relay_leases_lost_total"] == 1

    await until(lost, 15)


async def test_the_operators_page_names_every_metric_and_no_other(relay: Relay) -> None:
    page = OPERATIONS.read_text(encoding="utf-8")
    found = {re.sub(r"_(bucket|count|sum)$", "", name.partition("{")[0]) for name in await numbers(relay)}
    families = {
        line.split()[2] for line in (await relay.http.get("/metrics")).text.splitlines() if line.startswith("# TYPE")
    }
    assert found <= families | {f"{name}_total" for name in families}
    ours = {name for name in families if name.startswith("relay_")}
    assert set(re.findall(r"^\| `(relay_\w+)`", page, re.MULTILINE)) == ours
