"""The audit log: who did what, and what it must not hold."""

from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

from relay.accounts import Accounts
from relay.audit import KEPT_S, Audit, By
from relay.passwords import Passwords
from relay.sessions import PAGE_HEADER
from relay.store import Store
from tests.relay.conftest import ADMIN_KEY, Clock, Relay
from tests.relay.double_gpu import DoubleGpu

WORD = "ten letters or more"


@pytest.fixture
async def store(relay: Relay) -> AsyncIterator[Store]:
    store = Store(relay.settings.database)
    yield store
    await store.close()


@pytest.fixture
async def browser(relay: Relay) -> AsyncIterator[httpx2.AsyncClient]:
    headers = {PAGE_HEADER: "1"}
    async with httpx2.AsyncClient(base_url=relay.url, headers=headers, trust_env=False, verify=False) as http:
        yield http


async def entries(relay: Relay, **query: Any) -> list[dict[str, Any]]:
    found = (await relay.http.get("/api/audit", params=query)).raise_for_status().json()
    data: list[dict[str, Any]] = found["data"]
    return data


async def told(relay: Relay) -> list[tuple[str, str, str]]:
    """Who, what and on what, the oldest first."""
    return [(e["who"], e["action"], e["target"]) for e in reversed(await entries(relay, limit=100))]


async def test_what_is_done_through_the_api_is_told_with_its_address(relay: Relay, gpu: DoubleGpu) -> None:
    key = (await relay.http.post("/api/keys", json={"user": "bora"})).json()
    token = (await relay.http.post("/api/enrol-tokens", json={})).json()
    await relay.http.delete(f"/api/keys/{key['id']}")
    await relay.http.delete(f"/api/enrol-tokens/{token['id']}")
    for method in ("POST", "DELETE"):
        assert (await relay.http.request(method, f"/api/gpus/{gpu.by.gpu_id}/drain")).status_code == 200
    assert await told(relay) == [
        ("relay", "user.create", "admin"),
        ("admin", "user.create", "bora"),
        ("admin", "key.create", f"{key['id']} of bora"),
        ("admin", "enrol_token.create", token["id"]),
        ("admin", "key.revoke", key["id"]),
        ("admin", "enrol_token.revoke", token["id"]),
        ("admin", "gpu.drain", gpu.by.gpu_id),
        ("admin", "gpu.undrain", gpu.by.gpu_id),
    ]
    assert {e["address"] for e in (await entries(relay))[:-1]} == {"127.0.0.1"}
    assert {e["at"] for e in await entries(relay)} == {relay.clock()}


async def test_sign_ins_are_told_whether_they_succeed_or_not_and_hold_no_secret(
    relay: Relay, store: Store, browser: httpx2.AsyncClient
) -> None:
    await Passwords(store, Accounts(store, relay.clock), relay.clock).set("bora", WORD)
    for body, status in [
        ({"name": "bora", "password": "wrong-secret"}, 401),
        ({"name": "a-password-in-the-wrong-field", "password": "wrong-secret"}, 401),
        ({"key": "sk-fine-wrong-secret"}, 401),
        ({"name": "bora", "password": WORD}, 200),
        ({"key": ADMIN_KEY}, 200),
    ]:
        assert (await browser.post("/api/session", json=body)).status_code == status
    said = await told(relay)
    assert said[1:3] == [("command line", "user.create", "bora"), ("command line", "password.set", "bora")]
    assert said[3:6] == [
        ("bora", "session.refused", "by password"),
        ("unknown", "session.refused", "by password"),
        ("unknown", "session.refused", "by key"),
    ]
    assert [entry[:2] for entry in said[6:]] == [("bora", "session.open"), ("admin", "session.open")]
    shown = (await relay.http.get("/api/audit")).text
    for secret in (WORD, "secret", "wrong-field", ADMIN_KEY):
        assert secret not in shown


async def test_a_flood_of_refused_sign_ins_is_noted_in_part(relay: Relay, browser: httpx2.AsyncClient) -> None:
    for _ in range(40):
        assert (await browser.post("/api/session", json={"key": "sk-fine-wrong"})).status_code == 401
    assert len([e for e in await told(relay) if e[1] == "session.refused"]) == 30


async def test_pages_follow_each_other_and_are_the_admins_alone(relay: Relay, store: Store) -> None:
    audit = Audit(store, relay.clock)
    for number in range(5):
        await audit.write(By("bora"), "gpu.drain", f"gpu-{number}")
    first = (await relay.http.get("/api/audit", params={"limit": 3})).json()
    assert ([e["target"] for e in first["data"]], first["has_more"]) == (["gpu-4", "gpu-3", "gpu-2"], True)
    rest = await entries(relay, after=first["last_id"])
    assert [e["target"] for e in rest] == ["gpu-1", "gpu-0", "admin"]
    assert [e["target"] for e in await entries(relay, who="bora", action="gpu.drain", limit=2)] == ["gpu-4", "gpu-3"]
    assert [e["action"] for e in await entries(relay, who="relay")] == ["user.create"]
    for query in ({"limit": 0}, {"after": 2**64}, {"after": "x"}, {"action": "no.such"}):
        assert (await relay.http.get("/api/audit", params=query)).status_code == 400
    _, key = await Accounts(store, relay.clock).create_key("bora")
    theirs = await relay.http.get("/api/audit", headers={"authorization": f"Bearer {key}"})
    assert theirs.status_code == 403


async def test_entries_go_after_90_days(relay: Relay, store: Store, clock: Clock) -> None:
    audit = Audit(store, clock)
    clock.advance(KEPT_S)
    await audit.write(By("bora"), "gpu.drain", "gpu-1")
    assert await audit.sweep() == 0
    clock.advance(1)
    assert await audit.sweep() == 1
    assert await told(relay) == [("bora", "gpu.drain", "gpu-1")]
