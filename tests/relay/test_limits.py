"""What a key with limits may do, and what it may not."""

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

import httpx2
import openai
import pytest

from relay import errors
from relay.accounts import Rules, User
from relay.limits import MOST_KEPT, Limits
from relay.sessions import PAGE_HEADER
from tests.relay.conftest import Clock, Relay
from tests.relay.double_gpu import BASE, DoubleGpu

Make = Callable[..., Coroutine[Any, Any, httpx2.AsyncClient]]
BY_SCOPE = {
    "generate": [("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("POST", "/api/generations")],
    "train": [
        ("POST", "/v1/files"),
        ("GET", "/v1/files"),
        ("GET", "/v1/files/x/content"),
        ("DELETE", "/v1/files/x"),
        ("POST", "/v1/fine_tuning/jobs"),
        ("GET", "/v1/fine_tuning/jobs"),
        ("POST", "/v1/fine_tuning/jobs/x/cancel"),
        ("GET", "/api/jobs/x/stream"),
        ("POST", "/v1/layers/preview"),
        ("DELETE", f"/v1/models/{BASE}"),
    ],
    "admin": [("GET", "/api/keys"), ("POST", "/api/keys"), ("DELETE", "/api/keys/x")],
}


@pytest.fixture
async def key(relay: Relay) -> AsyncIterator[Make]:
    """Makes a key of bora's with these limits; a client that sends it."""
    async with AsyncExitStack() as stack:

        async def make(**limits: Any) -> httpx2.AsyncClient:
            made = (await relay.http.post("/api/keys", json={"user": "bora", **limits})).json()
            headers = {"authorization": f"Bearer {made['key']}"}
            client = httpx2.AsyncClient(base_url=relay.url, headers=headers, trust_env=False, verify=False)
            return await stack.enter_async_context(client)

        yield make


@pytest.mark.parametrize("scope", BY_SCOPE)
async def test_a_key_reaches_only_what_its_scope_is_for(key: Make, scope: str) -> None:
    http = await key(scopes=[scope])
    for needed, routes in BY_SCOPE.items():
        for method, path in routes:
            error = (await http.request(method, path)).json().get("error") or {"code": None}
            assert (error["code"] == "missing_scope") == (needed != scope), (method, path)
            if needed != scope:
                assert error["param"] == needed
                assert f"'{needed}'" in error["message"]
    assert (await http.get("/v1/models")).status_code == 200


async def test_a_key_of_the_admin_without_the_scope_is_no_admin(relay: Relay) -> None:
    made = (await relay.http.post("/api/keys", json={"scopes": ["generate", "train"]})).json()
    relay.http.headers["authorization"] = f"Bearer {made['key']}"
    assert (await relay.http.get("/api/me")).json()["admin"] is False
    assert (await relay.http.get("/api/enrol-token")).status_code == 403


@pytest.mark.parametrize("limits", [{"scopes": ["admin"]}, {"expires_in_s": 60}, {"requests_per_minute": 60}])
async def test_a_key_with_limits_makes_none_without(key: Make, limits: dict[str, Any]) -> None:
    response = await (await key(**limits)).post("/api/keys", json={})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "forbidden"


async def test_a_key_ends_with_its_time_and_so_does_its_session(relay: Relay, key: Make, clock: Clock) -> None:
    http = await key(expires_in_s=60)
    page = {PAGE_HEADER: "1"}
    secret = http.headers["authorization"].removeprefix("Bearer ")
    async with httpx2.AsyncClient(base_url=relay.url, headers=page, trust_env=False, verify=False) as browser:
        assert (await browser.post("/api/session", json={"key": secret})).status_code == 200
        assert (await browser.get("/api/me")).json()["user"]["name"] == "bora"
        clock.advance(59.9)
        assert (await http.get("/v1/models")).status_code == 200
        clock.advance(0.2)  # less than a key is remembered
        response = await http.get("/v1/models")
        assert response.status_code == 401
        assert "expired" in response.json()["error"]["message"]
        assert (await browser.get("/api/me")).status_code == 401


async def test_more_requests_than_a_minute_has_are_429_until_it_has_more(key: Make, clock: Clock) -> None:
    http = await key(requests_per_minute=3)
    left = [(await http.get("/v1/models")).headers["x-ratelimit-remaining-requests"] for _ in range(3)]
    assert left == ["2", "1", "0"]
    refused = await http.get("/v1/models")
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert refused.headers["retry-after"] == "20"
    assert refused.headers["x-ratelimit-limit-requests"] == "3"
    clock.advance(20)
    assert (await http.get("/v1/models")).status_code == 200
    assert (await http.get("/v1/models")).status_code == 429


async def test_the_official_client_knows_the_limit_as_one(relay: Relay, key: Make, gpu: DoubleGpu) -> None:
    http = await key(requests_per_minute=1)
    client = relay.client(http.headers["authorization"].removeprefix("Bearer "))
    raw = await client.chat.completions.with_raw_response.create(model=BASE, messages=[])
    assert raw.headers["x-ratelimit-remaining-requests"] == "0"
    with pytest.raises(openai.RateLimitError):
        await client.chat.completions.create(model=BASE, messages=[])
    await client.close()


async def test_a_key_without_limits_has_none(relay: Relay) -> None:
    response = await relay.http.get("/v1/models")
    assert not [name for name in response.headers if name.startswith("x-ratelimit")]


async def test_limits_are_listed_and_what_can_not_be_one_is_refused(relay: Relay, key: Make, clock: Clock) -> None:
    await key(scopes=["train", "generate", "train"], expires_in_s=60, requests_per_minute=5)
    listed = next(k for k in (await relay.http.get("/api/keys")).json()["data"] if k["user"] == "bora")
    assert listed["scopes"] == ["generate", "train"]
    assert listed["expires_at"] == pytest.approx(clock() + 60)
    assert listed["requests_per_minute"] == 5
    bad: list[dict[str, Any]] = [{"scopes": []}, {"scopes": ["all"]}, {"expires_in_s": 0}, {"requests_per_minute": 0}]
    for limits in bad:
        assert (await relay.http.post("/api/keys", json=limits)).status_code == 400, limits


def test_a_clock_that_is_set_back_gives_no_requests_and_takes_none(clock: Clock) -> None:
    limits = Limits(clock)
    user = User("user-1", "bora", "key-1", Rules(requests_per_minute=1))
    limits.take(user)
    clock.advance(-3600)
    with pytest.raises(errors.RateLimited):
        limits.take(user)
    clock.advance(60)
    limits.take(user)


def test_what_is_kept_about_keys_is_bounded(clock: Clock) -> None:
    limits = Limits(clock)
    rules = Rules(requests_per_minute=1)
    for number in range(MOST_KEPT + 10):
        limits.take(User("user-1", "bora", f"key-{number}", rules))
    assert len(limits.kept) == MOST_KEPT
