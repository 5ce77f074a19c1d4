"""What holds for every answer: the one error shape, request ids, who may ask, and who sees what."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from relay.accounts import Accounts
from relay.store import Store
from tests.relay.conftest import Clock, Relay, running_relay
from tests.relay.double_gpu import BASE, DoubleGpu
from tests.relay.test_jobs import create, tuned_model

ROUTES = [
    ("GET", "/v1/models"),
    ("GET", f"/v1/models/{BASE}"),
    ("DELETE", f"/v1/models/{BASE}"),
    ("GET", f"/v1/models/{BASE}/layers"),
    ("POST", "/v1/layers/preview"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/files"),
    ("GET", "/v1/files"),
    ("GET", "/v1/files/x"),
    ("GET", "/v1/files/x/content"),
    ("DELETE", "/v1/files/x"),
    ("POST", "/v1/fine_tuning/jobs"),
    ("GET", "/v1/fine_tuning/jobs"),
    ("GET", "/v1/fine_tuning/jobs/x"),
    ("GET", "/v1/fine_tuning/jobs/x/events"),
    ("POST", "/v1/fine_tuning/jobs/x/cancel"),
    ("GET", "/api/enrol-tokens"),
    ("POST", "/api/enrol-tokens"),
    ("DELETE", "/api/enrol-tokens/x"),
    ("GET", "/api/audit"),
]


@pytest.fixture
async def stranger(relay: Relay) -> AsyncIterator[httpx2.AsyncClient]:
    """Another user, whose key was made beside the running relay, as the command line does it."""
    store = Store(relay.settings.database)
    _, key = await Accounts(store, relay.clock).create_key("bora")
    await store.close()
    headers = {"authorization": f"Bearer {key}"}
    async with httpx2.AsyncClient(base_url=relay.url, headers=headers, trust_env=False, verify=False) as http:
        yield http


@pytest.mark.parametrize("header", ["", "Bearer sk-fine-wrong", "Bearer", "Basic x", "Bearer 열쇠"])
async def test_without_a_good_key_every_route_is_401(relay: Relay, header: str) -> None:
    async with httpx2.AsyncClient(base_url=relay.url, trust_env=False, verify=False) as http:
        for method, path in ROUTES:
            response = await http.request(method, path, headers={b"authorization": header.encode()})
            assert response.status_code == 401, (method, path)
            error: dict[str, Any] = response.json()["error"]
            assert error["code"] == "invalid_api_key"
            assert "keys create" in error["message"]


async def test_every_answer_has_a_request_id_and_every_error_the_one_shape(relay: Relay) -> None:
    for method, path, status in [
        ("GET", "/healthz", 200),
        ("GET", "/", 200),
        ("GET", "/v1/nothing", 404),
        ("PATCH", "/v1/files", 405),
        ("GET", "/v1/files?order=up", 400),
        ("GET", "/v1/fine_tuning/jobs/x/events?after=y", 400),
        ("POST", "/gpu/heartbeat", 401),
    ]:
        response = await relay.http.request(method, path)
        assert response.status_code == status, path
        assert response.headers["x-request-id"].startswith("req-")
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-frame-options"] == "DENY"
        assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
        for name in ("cross-origin-opener-policy", "cross-origin-resource-policy"):
            assert response.headers.get_list(name) == ["same-origin"]
        assert "camera=()" in response.headers["permissions-policy"]
        assert "strict-transport-security" not in response.headers  # it did not come by https
        if status >= 400:
            assert response.json()["error"].keys() == {"message", "type", "param", "code"}


async def test_the_first_page_names_the_api_and_runs_no_script(relay: Relay) -> None:
    response = await relay.http.get("/")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert f"{relay.url}/v1/chat/completions" in response.text
    assert "/v1/fine_tuning/jobs" in response.text
    assert "파인튜닝" in response.text
    assert "<script" not in response.text
    hostile = await relay.http.get("/", headers={"host": '"><script>'})
    assert "<script" not in hostile.text


async def test_a_new_admin_key_ends_the_old_one(tmp_path: Path, clock: Clock) -> None:
    for key in ("sk-fine-the-first-of-two", "sk-fine-the-second-of-two"):
        async with running_relay(tmp_path / "data", clock, admin_key=key) as relay:
            assert [m async for m in relay.openai.models.list()] == []
            old = "sk-fine-the-first-of-two" if "second" in key else "sk-fine-never"
            response = await relay.http.get("/v1/models", headers={"authorization": f"Bearer {old}"})
            assert response.status_code == 401
    assert not (tmp_path / "data" / "admin.key").exists()


async def test_nobody_sees_what_is_anothers(relay: Relay, gpu: DoubleGpu, stranger: httpx2.AsyncClient) -> None:
    model = await tuned_model(relay, gpu)
    job = await create(relay)
    file = job.training_file
    assert [m["id"] for m in (await stranger.get("/v1/models")).json()["data"]] == [BASE]
    for path in ("/v1/files", "/v1/fine_tuning/jobs"):
        assert (await stranger.get(path)).json()["data"] == []
    for method, path in [
        ("GET", f"/v1/models/{model}"),
        ("GET", f"/v1/models/{model}/layers"),
        ("DELETE", f"/v1/models/{model}"),
        ("GET", f"/v1/files/{file}"),
        ("GET", f"/v1/files/{file}/content"),
        ("DELETE", f"/v1/files/{file}"),
        ("GET", f"/v1/files?after={file}"),
        ("GET", f"/v1/fine_tuning/jobs/{job.id}"),
        ("GET", f"/v1/fine_tuning/jobs?after={job.id}"),
        ("GET", f"/v1/fine_tuning/jobs/{job.id}/events"),
        ("POST", f"/v1/fine_tuning/jobs/{job.id}/cancel"),
    ]:
        assert (await stranger.request(method, path)).status_code == 404, (method, path)
    for path, body in [
        ("/v1/chat/completions", {"model": model}),
        ("/v1/layers/preview", {"model": model}),
        ("/v1/fine_tuning/jobs", {"model": BASE, "training_file": file}),
    ]:
        response = await stranger.post(path, json=body)
        assert response.status_code == 404
        assert model not in response.json()["error"]["message"].removeprefix(f"no model '{model}'")
    assert (await stranger.post("/v1/chat/completions", json={"model": BASE})).status_code == 200
    assert (await relay.http.get(f"/v1/models/{model}")).status_code == 200
