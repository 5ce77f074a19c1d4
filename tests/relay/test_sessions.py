"""The page's session: what a cookie may do, and what another site may not do with it."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from relay.sessions import COOKIE, PAGE_HEADER, SESSION_S
from tests.relay.conftest import ADMIN_KEY, Clock, Relay, running_relay

PAGE = {PAGE_HEADER: "1"}


@pytest.fixture
async def browser(relay: Relay) -> AsyncIterator[httpx2.AsyncClient]:
    """Signed in; keeps the cookie and sends the page's header."""
    async with httpx2.AsyncClient(base_url=relay.url, headers=PAGE, trust_env=False, verify=False) as http:
        response = await http.post("/api/session", json={"key": ADMIN_KEY})
        assert response.json()["admin"] is True
        yield http


async def test_the_cookie_is_out_of_reach_of_scripts_and_of_other_sites(relay: Relay) -> None:
    response = await relay.http.post("/api/session", json={"key": ADMIN_KEY}, headers=PAGE)
    cookie = response.headers["set-cookie"]
    assert cookie.startswith(f"{COOKIE}_{relay.http.base_url.port}=")
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert ADMIN_KEY not in cookie


async def test_a_session_works_for_the_page_and_for_the_api(browser: httpx2.AsyncClient) -> None:
    assert (await browser.get("/api/me")).json()["user"]["name"] == "admin"
    assert (await browser.get("/v1/models")).status_code == 200
    assert (await browser.post("/v1/fine_tuning/jobs", json={})).json()["error"]["param"] == "model"


@pytest.mark.parametrize("path", ["/api/me", "/api/keys", "/v1/models", "/v1/files"])
async def test_without_the_pages_header_the_cookie_counts_for_nothing(browser: httpx2.AsyncClient, path: str) -> None:
    del browser.headers[PAGE_HEADER]
    assert (await browser.get(path)).status_code == 401


@pytest.mark.parametrize(
    "foreign",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"origin": "http://127.0.0.1:1"},
    ],
)
async def test_what_another_site_sends_is_refused(browser: httpx2.AsyncClient, foreign: dict[str, str]) -> None:
    for method, path in [
        ("GET", "/api/me"),
        ("POST", "/v1/files"),
        ("DELETE", "/api/keys/x"),
        ("DELETE", "/api/session"),
    ]:
        response = await browser.request(method, path, headers=foreign)
        assert response.status_code == 403, (method, path)
        assert response.json()["error"]["code"] == "forbidden"
    signing_in = await browser.post("/api/session", json={"key": ADMIN_KEY}, headers=foreign)
    assert signing_in.status_code == 403
    assert (await browser.get("/api/me")).status_code == 200  # nobody was signed out


async def test_its_own_origin_is_let_in(relay: Relay, browser: httpx2.AsyncClient) -> None:
    own = {"origin": relay.url, "sec-fetch-site": "same-origin"}
    assert (await browser.post("/api/keys", json={}, headers=own)).status_code == 200


async def test_signing_out_ends_the_session_for_good(relay: Relay, browser: httpx2.AsyncClient) -> None:
    again = {**PAGE, "cookie": "; ".join(f"{name}={token}" for name, token in browser.cookies.items())}
    assert (await browser.delete("/api/session")).status_code == 200
    del relay.http.headers["authorization"]
    assert (await relay.http.get("/api/me", headers=again)).status_code == 401


async def test_a_session_ends_with_its_time(relay: Relay, browser: httpx2.AsyncClient, clock: Clock) -> None:
    clock.advance(SESSION_S + 1)
    assert (await browser.get("/api/me")).status_code == 401


async def test_a_session_ends_with_its_key(relay: Relay, browser: httpx2.AsyncClient) -> None:
    made = (await browser.post("/api/keys", json={"name": "laptop", "user": "bora"})).json()
    async with httpx2.AsyncClient(base_url=relay.url, headers=PAGE, trust_env=False, verify=False) as bora:
        await bora.post("/api/session", json={"key": made["key"]})
        assert (await bora.get("/api/me")).json()["user"]["name"] == "bora"
        assert [key["name"] for key in (await bora.get("/api/keys")).json()["data"]] == ["laptop"]
        assert (await bora.get("/api/enrol-token")).status_code == 403
        assert (await bora.post("/api/keys", json={"user": "admin"})).status_code == 403
        assert (await bora.delete("/api/keys/key-admin")).status_code == 404
        assert (await browser.delete(f"/api/keys/{made['id']}")).status_code == 200
        assert (await bora.get("/api/me")).status_code == 401


async def test_a_new_admin_key_ends_the_sessions_of_the_old_one(
    tmp_path: object, relay: Relay, browser: httpx2.AsyncClient
) -> None:
    (token,) = browser.cookies.values()
    async with running_relay(
        relay.settings.data_dir, relay.clock, admin_key="sk-fine-another-key-of-the-admin"
    ) as after:
        del after.http.headers["authorization"]
        cookie = f"{COOKIE}_{after.http.base_url.port}={token}"
        response = await after.http.get("/api/me", headers={**PAGE, "cookie": cookie})
        assert response.status_code == 401


async def test_the_admin_sees_what_a_gpu_needs_to_join(relay: Relay, browser: httpx2.AsyncClient) -> None:
    answer = (await browser.get("/api/enrol-token")).json()
    assert answer == {"relay_url": relay.url, "token": relay.settings.enrol_token}


async def test_two_relays_on_one_host_do_not_sign_each_other_out(
    tmp_path: Path, relay: Relay, browser: httpx2.AsyncClient
) -> None:
    async with running_relay(tmp_path / "other", relay.clock) as other:
        await browser.post(f"{other.url}/api/session", json={"key": ADMIN_KEY})
        assert len(browser.cookies) == 2
        for url in (relay.url, other.url):
            assert (await browser.get(f"{url}/api/me")).status_code == 200
        await browser.delete(f"{other.url}/api/session")
        assert (await browser.get("/api/me")).status_code == 200


async def test_by_https_the_cookie_has_the_hosts_prefix_and_only_that_one_counts(relay: Relay) -> None:
    https = {**PAGE, "x-forwarded-proto": "https", "host": "fine.example", "origin": "https://fine.example"}
    response = await relay.http.post("/api/session", json={"key": ADMIN_KEY}, headers=https)
    cookie = response.headers["set-cookie"]
    assert cookie.startswith(f"__Host-{COOKIE}=")
    assert "Secure" in cookie
    assert "Path=/;" in cookie
    assert "domain" not in cookie.lower()
    assert response.headers["strict-transport-security"] == "max-age=31536000"
    token = cookie.partition("=")[2].partition(";")[0]
    del relay.http.headers["authorization"]
    for name, status in ((f"__Host-{COOKIE}", 200), (COOKIE, 401)):
        answer = await relay.http.get("/api/me", headers={**https, "cookie": f"{name}={token}"})
        assert answer.status_code == status
