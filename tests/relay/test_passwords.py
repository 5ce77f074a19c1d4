"""Signing in with a name and a password."""

import asyncio
import unicodedata
from collections.abc import AsyncIterator

import httpx2
import pytest
from sqlalchemy import select

from relay import errors
from relay.accounts import Accounts
from relay.passwords import MOST_WAITING, TRIES_PER_ADDRESS, TRIES_PER_NAME, Passwords
from relay.sessions import PAGE_HEADER
from relay.store import Store
from relay.tables import passwords as table
from tests.relay.conftest import ADMIN_KEY, Clock, Relay

WORD = "한글 비밀번호 열 자 이상"


@pytest.fixture
async def store(relay: Relay) -> AsyncIterator[Store]:
    store = Store(relay.settings.database)
    yield store
    await store.close()


@pytest.fixture
async def passwords(store: Store, clock: Clock) -> Passwords:
    """As the command line has them."""
    passwords = Passwords(store, Accounts(store, clock), clock)
    await passwords.set("bora", WORD)
    return passwords


@pytest.fixture
async def browser(relay: Relay) -> AsyncIterator[httpx2.AsyncClient]:
    headers = {PAGE_HEADER: "1"}
    async with httpx2.AsyncClient(base_url=relay.url, headers=headers, trust_env=False, verify=False) as http:
        yield http


async def sign_in(http: httpx2.AsyncClient, password: str = WORD, name: str = "bora") -> httpx2.Response:
    return await http.post("/api/session", json={"name": name, "password": password})


async def test_a_password_opens_a_session_and_is_kept_as_its_argon2id_hash(
    store: Store, passwords: Passwords, browser: httpx2.AsyncClient
) -> None:
    assert (await sign_in(browser)).json() == {"user": (await browser.get("/api/me")).json()["user"], "admin": False}
    async with store.read() as db:
        stored = (await db.execute(select(table.c.argon2))).scalar_one()
    assert stored.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert (await browser.post("/api/keys", json={})).status_code == 200


async def test_a_password_is_the_same_however_the_keyboard_composed_it(
    passwords: Passwords, browser: httpx2.AsyncClient
) -> None:
    assert (await sign_in(browser, unicodedata.normalize("NFD", WORD))).status_code == 200


async def test_a_wrong_name_is_answered_as_a_wrong_password_is(
    passwords: Passwords, browser: httpx2.AsyncClient
) -> None:
    answers = [await sign_in(browser, "wrong password"), await sign_in(browser, name="nobody")]
    answers.append(await sign_in(browser, name="admin"))  # there, without a password
    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.text for answer in answers}) == 1
    assert (await browser.get("/api/me")).status_code == 401


async def test_another_site_can_sign_nobody_in(passwords: Passwords, browser: httpx2.AsyncClient) -> None:
    browser.headers["origin"] = "https://evil.example"
    assert (await sign_in(browser)).status_code == 403


async def test_changing_a_password_takes_the_old_one_and_ends_its_sessions(
    passwords: Passwords, browser: httpx2.AsyncClient
) -> None:
    await sign_in(browser)
    new = {"password": "another good password"}
    assert (await browser.put("/api/me/password", json=new)).json()["error"]["param"] == "current"
    assert (await browser.put("/api/me/password", json={**new, "current": "wrong"})).status_code == 403
    assert (await browser.put("/api/me/password", json={"password": "short", "current": WORD})).status_code == 400
    assert (await browser.put("/api/me/password", json={**new, "current": WORD})).status_code == 200
    assert (await browser.get("/api/me")).status_code == 401
    assert (await sign_in(browser)).status_code == 401
    assert (await sign_in(browser, new["password"])).status_code == 200


async def test_revoking_what_a_password_stands_for_signs_out_everywhere_and_the_password_goes_on(
    relay: Relay, passwords: Passwords, browser: httpx2.AsyncClient
) -> None:
    await sign_in(browser)
    hidden = next(key for key in (await browser.get("/api/keys")).json()["data"] if key["prefix"] == "password")
    old = dict(browser.cookies)
    assert (await browser.delete(f"/api/keys/{hidden['id']}")).status_code == 200
    assert (await browser.get("/api/me")).status_code == 401
    assert (await sign_in(browser)).status_code == 200
    browser.cookies.clear()
    browser.cookies.update(old)
    assert (await browser.get("/api/me")).status_code == 401  # the old session stays over


async def test_guessing_is_slowed_by_name_and_by_address_and_a_key_still_signs_in(
    passwords: Passwords, browser: httpx2.AsyncClient, clock: Clock
) -> None:
    for _ in range(TRIES_PER_NAME):
        assert (await sign_in(browser, "wrong password")).status_code == 401
    refused = await sign_in(browser)
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "6"
    for number in range(TRIES_PER_ADDRESS - TRIES_PER_NAME):
        assert (await sign_in(browser, name=f"nobody-{number}")).status_code == 401
    assert (await sign_in(browser, name="somebody")).status_code == 429
    assert (await browser.post("/api/session", json={"key": ADMIN_KEY})).status_code == 200
    clock.advance(6)
    assert (await sign_in(browser)).status_code == 200


async def test_a_flood_waits_in_a_short_line_and_the_rest_is_told_so(passwords: Passwords) -> None:
    tries = [passwords.check(f"name-{n}", WORD, f"10.0.{n}.1") for n in range(MOST_WAITING + 5)]
    ends = await asyncio.gather(*tries, return_exceptions=True)
    assert {type(end) for end in ends} == {errors.InvalidKey, errors.TooMany}
    with pytest.raises(errors.InvalidKey):  # the line is empty again
        await passwords.check("name", WORD, "10.1.0.1")
