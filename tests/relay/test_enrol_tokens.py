"""Enrol tokens: who joins with which, who comes back, and what revoking one ends."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx2
import pytest

from tests.relay.conftest import Relay, until
from tests.relay.double_gpu import BASE, DoubleGpu
from tests.relay.test_gpu_api import BEAT, code_of
from tests.relay.test_jobs import create

ON_BOTH_DATABASES = True
Gpus = Callable[[str], DoubleGpu]


async def made(relay: Relay, **asked: Any) -> tuple[str, str]:
    reply = (await relay.http.post("/api/enrol-tokens", json=asked)).raise_for_status().json()
    return reply["id"], reply["token"]


@pytest.fixture
async def gpu_with(relay: Relay) -> AsyncIterator[Callable[[str], DoubleGpu]]:
    """A gpu that comes with this token."""
    async with AsyncExitStack() as stack:

        def make(token: str) -> DoubleGpu:
            gpu = DoubleGpu(relay.url, token, relay.clock, (BASE,))
            stack.push_async_callback(gpu.http.aclose)
            return gpu

        yield make


async def statuses(*gpus: DoubleGpu) -> list[int]:
    return [response.status_code for response in await asyncio.gather(*(gpu.enrol() for gpu in gpus))]


async def test_of_gpus_that_come_at_once_with_a_one_time_token_one_gets_in(relay: Relay, gpu_with: Gpus) -> None:
    _, token = await made(relay)
    gpus = [gpu_with(token) for _ in range(4)]
    assert sorted(await statuses(*gpus)) == [200, 401, 401, 401]
    winner = next(gpu for gpu in gpus if gpu.reply)
    assert await statuses(*(gpu for gpu in gpus if gpu is not winner)) == [401, 401, 401]
    assert await statuses(winner) == [200]  # it may come back
    assert winner.by.epoch == 2


async def test_a_refused_enrolment_does_not_spend_a_one_time_token(relay: Relay, gpu_with: Gpus) -> None:
    _, token = await made(relay)
    gpu = gpu_with(token)
    assert code_of(await gpu.enrol(url="https://evil.example")) == (400, "bad_gpu_url")
    assert await statuses(gpu_with(token)) == [200]


@pytest.mark.parametrize("reusable", [True, False])
async def test_after_its_end_a_token_lets_in_only_who_came_with_it(
    relay: Relay, gpu_with: Gpus, reusable: bool
) -> None:
    _, token = await made(relay, reusable=reusable, expires_in_s=60)
    first, second = gpu_with(token), gpu_with(token)
    assert await statuses(first) == [200]
    if reusable:
        assert await statuses(second) == [200]
    relay.clock.advance(60)
    assert await statuses(first) == [200]
    response = await gpu_with(token).enrol()
    assert code_of(response) == (401, "invalid_enrol_token")
    assert "tokens create" in response.json()["error"]["message"]


async def test_a_revoked_token_lets_nobody_in_and_its_gpus_are_refused(relay: Relay, gpu_with: Gpus) -> None:
    token_id, token = await made(relay, reusable=True)
    async with relay.gpu() as other:
        gpu = gpu_with(token)
        assert await statuses(gpu) == [200]
        assert (await gpu.beat()).relay_time
        await relay.http.delete(f"/api/enrol-tokens/{token_id}")
        assert code_of(await gpu.call("POST", "/gpu/heartbeat", BEAT)) == (401, "unknown_gpu")
        assert code_of(await gpu.enrol()) == (401, "invalid_enrol_token")
        assert code_of(await gpu_with(token).enrol()) == (401, "invalid_enrol_token")
        await other.beat()
        assert code_of(await relay.http.delete(f"/api/enrol-tokens/{token_id}")) == (404, "not_found")


async def test_the_job_of_a_gpu_whose_token_is_revoked_goes_to_another(relay: Relay, gpu_with: Gpus) -> None:
    token_id, token = await made(relay)
    gpu = gpu_with(token)
    assert await statuses(gpu) == [200]
    job = await create(relay)
    assert (await gpu.next_grant()).job.job_id == job.id
    await relay.http.delete(f"/api/enrol-tokens/{token_id}")
    relay.clock.advance(relay.settings.lease_s + 1)
    async with relay.gpu() as other:
        assert (await other.next_grant()).job.job_id == job.id


async def test_a_revoked_gpu_is_sent_no_live_request_within_a_second(relay: Relay) -> None:
    token_id, token = await made(relay)
    async with DoubleGpu(relay.url, token, relay.clock, (BASE,)).serving() as gpu:
        assert (await gpu.enrol()).status_code == 200
        await gpu.until_reachable()
        await relay.http.delete(f"/api/enrol-tokens/{token_id}")
        body = {"model": BASE, "messages": [{"role": "user", "content": "Hello"}]}

        async def refused() -> bool:
            return (await relay.http.post("/v1/chat/completions", json=body)).status_code == 503

        await until(refused)


async def test_lists_show_no_token_and_count_its_gpus(relay: Relay, gpu_with: Gpus) -> None:
    token_id, token = await made(relay, name="lab", reusable=True)
    assert await statuses(gpu_with(token), gpu_with(token)) == [200, 200]
    response = await relay.http.get("/api/enrol-tokens")
    assert token not in response.text
    (shown,) = response.json()["data"]
    assert (shown["id"], shown["name"], shown["gpus"], shown["revoked_at"]) == (token_id, "lab", 2, None)
    assert token.startswith(shown["prefix"])
    assert token.encode() not in b"".join(p.read_bytes() for p in relay.settings.data_dir.glob("relay.db*"))


async def test_only_the_admin_has_to_do_with_enrol_tokens(relay: Relay) -> None:
    made_key = (await relay.http.post("/api/keys", json={"user": "bora"})).json()["key"]
    limited = (await relay.http.post("/api/keys", json={"scopes": ["admin"]})).json()["key"]
    async with httpx2.AsyncClient(base_url=relay.url, trust_env=False, verify=False) as http:
        http.headers["authorization"] = f"Bearer {made_key}"
        assert (await http.get("/api/enrol-tokens")).status_code == 403
        assert (await http.post("/api/enrol-tokens", json={})).status_code == 403
        assert (await http.delete("/api/enrol-tokens/x")).status_code == 403
        http.headers["authorization"] = f"Bearer {limited}"
        assert (await http.post("/api/enrol-tokens", json={})).status_code == 403
