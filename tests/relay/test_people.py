"""Users are disabled and deleted: what ends at once, what goes, and what a cut-off deletion leaves to do."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest
from sqlalchemy import func, select

import wire
from relay import errors
from relay.accounts import Accounts
from relay.blobs import FolderBlobs
from relay.passwords import Passwords
from relay.people import People
from relay.sessions import PAGE_HEADER
from relay.store import Store
from relay.tables import audit, base_models, enrol_tokens, gpus, metadata, offers
from tests.relay.conftest import CHAT_ROW, Clock, Relay, running_relay, until
from tests.relay.double_gpu import DoubleGpu, held
from tests.relay.test_jobs import create, tuned_model

ON_BOTH_DATABASES = True
WORD = "ten letters or more"
NOBODYS = (audit, base_models, enrol_tokens, gpus, offers)


@pytest.fixture
async def store(relay: Relay) -> AsyncIterator[Store]:
    store = Store(relay.settings.database)
    yield store
    await store.close()


async def rows(store: Store) -> dict[str, int]:
    """How many, of every table that holds what is a user's."""
    async with store.read() as db:
        return {
            table.name: (await db.execute(select(func.count()).select_from(table))).scalar_one()
            for table in metadata.sorted_tables
            if table not in NOBODYS
        }


async def bora(relay: Relay) -> Relay:
    """The same relay, as the user bora has it."""
    key = (await relay.http.post("/api/keys", json={"user": "bora"})).json()["key"]
    theirs = Relay(relay.url, relay.settings, relay.clock)
    theirs.http.headers["authorization"] = f"Bearer {key}"
    await theirs.openai.close()
    theirs.openai = theirs.client(key)
    return theirs


async def test_all_that_is_a_users_goes_and_what_is_anothers_stays(relay: Relay, gpu: DoubleGpu, store: Store) -> None:
    await tuned_model(relay, gpu)
    before, blobs = await rows(store), sorted(relay.stored())
    theirs = await bora(relay)
    await tuned_model(theirs, gpu)
    await theirs.upload(CHAT_ROW * 7)
    job = await create(theirs)
    grant = await gpu.next_grant()
    limited = (await theirs.http.post("/api/keys", json={"scopes": ["train"]})).status_code
    assert limited == 200
    assert (await theirs.http.put("/api/me/password", json={"password": WORD})).status_code == 200
    assert (await theirs.http.delete("/api/me")).json()["deleted"]
    assert (await theirs.http.get("/api/me")).status_code == 401

    async def gone() -> bool:
        return await rows(store) == before and sorted(relay.stored()) == blobs

    await until(gone)
    cancel = wire.CancelLease(job_id=job.id, fence=grant.fence)
    assert (await gpu.beat(held(grant))).commands == [cancel]
    assert (await gpu.report(grant)).status_code == 409
    await theirs.http.aclose()
    await theirs.openai.close()


async def test_a_deletion_that_was_cut_off_is_finished_after_the_start(
    tmp_path: Path, clock: Clock, database: str
) -> None:
    async with running_relay(tmp_path / "data", clock, database_url=database) as relay:
        theirs = await bora(relay)
        await theirs.upload()
        await theirs.http.aclose()
        await theirs.openai.close()
    store = Store(relay.settings.database)
    people = People(store, FolderBlobs(tmp_path / "data" / "blobs", 0), Accounts(store, clock), clock)
    await people.delete("bora")  # and the power fails
    assert (await rows(store))["files"] == 1
    async with running_relay(tmp_path / "data", clock, database_url=database) as relay:

        async def gone() -> bool:
            return (await rows(store))["users"] == 1 and not relay.stored()

        await until(gone)
    await store.close()


async def test_a_session_deletes_the_account_only_with_a_password_or_key(relay: Relay, store: Store) -> None:
    accounts = Accounts(store, relay.clock)
    await Passwords(store, accounts, relay.clock).set("bora", WORD)
    _, others = await accounts.create_key("chun")
    headers = {PAGE_HEADER: "1"}
    async with httpx2.AsyncClient(base_url=relay.url, headers=headers, trust_env=False, verify=False) as browser:
        await browser.post("/api/session", json={"name": "bora", "password": WORD})
        for given in ({}, {"password": "wrong password"}, {"key": others}):
            assert (await browser.request("DELETE", "/api/me", json=given)).status_code == 403
        assert (await browser.request("DELETE", "/api/me", json={"password": WORD})).status_code == 200
        assert (await browser.get("/api/me")).status_code == 401


async def test_the_admin_deletes_others_and_stays(relay: Relay) -> None:
    theirs = await bora(relay)
    users = {u["name"]: u["id"] for u in (await relay.http.get("/api/users")).json()["data"]}
    assert (await theirs.http.get("/api/users")).status_code == 403
    assert (await theirs.http.delete(f"/api/users/{users['admin']}")).status_code == 403
    assert (await relay.http.delete(f"/api/users/{users['admin']}")).status_code == 400
    assert (await relay.http.delete("/api/users/user-x")).status_code == 404
    assert (await relay.http.delete(f"/api/users/{users['bora']}")).status_code == 200
    assert (await theirs.http.get("/api/me")).status_code == 401
    await theirs.http.aclose()
    await theirs.openai.close()


async def test_who_is_disabled_is_not_let_in_until_enabled_again(store: Store, relay: Relay, clock: Clock) -> None:
    accounts = Accounts(store, clock)
    _, key = await accounts.create_key("bora")
    people = People(store, FolderBlobs(relay.settings.data_dir / "blobs", 0), accounts, clock)
    await people.disable("bora")
    with pytest.raises(errors.InvalidKey):
        await accounts.user_of(f"Bearer {key}")
    await people.disable("bora", on=False)
    assert (await accounts.user_of(f"Bearer {key}")).name == "bora"
    for name, error in (("admin", errors.InvalidRequest), ("nobody", errors.NotFound)):
        with pytest.raises(error):
            await people.disable(name)


async def test_the_admin_makes_users_gives_them_passwords_and_shuts_them_out(relay: Relay) -> None:
    http = relay.http
    made = (await http.post("/api/users", json={"name": "bora", "password": WORD})).raise_for_status().json()
    chun = (await http.post("/api/users", json={"name": "chun"})).raise_for_status().json()
    assert (await http.post("/api/users", json={"name": "bora"})).status_code == 400  # whose password it would change
    assert (await http.post("/api/users", json={"name": "dal", "password": "short"})).status_code == 400
    users = {u["name"]: u for u in (await http.get("/api/users")).json()["data"]}
    assert {name: u["has_password"] for name, u in users.items()} == {"admin": False, "bora": True, "chun": False}
    theirs = {"name": "bora", "password": WORD}
    async with httpx2.AsyncClient(base_url=relay.url, headers={PAGE_HEADER: "1"}, trust_env=False) as browser:
        assert (await browser.post("/api/session", json=theirs)).is_success
        assert (await browser.get("/api/me")).json()["has_password"]
        assert (await browser.post("/api/users", json={"name": "dal"})).status_code == 403
        assert (await http.post(f"/api/users/{made['id']}/disable")).is_success
        assert (await browser.get("/api/me")).status_code == 401
        assert (await http.delete(f"/api/users/{made['id']}/disable")).is_success
        assert (await browser.get("/api/me")).is_success
        assert (await http.put(f"/api/users/{made['id']}/password", json={"password": WORD + "!"})).is_success
        assert (await browser.get("/api/me")).status_code == 401
        assert (await browser.post("/api/session", json=theirs)).status_code == 401
    admin = users["admin"]["id"]
    assert (await http.put(f"/api/users/{admin}/password", json={"password": WORD})).status_code == 400
    assert (await http.post(f"/api/users/{admin}/disable")).status_code == 400
    assert (await http.put("/api/users/user-x/password", json={"password": WORD})).status_code == 404
    limited = (await http.post("/api/keys", json={"requests_per_minute": 9})).json()["key"]
    by_key = {"authorization": f"Bearer {limited}"}
    for method, path in (("POST", "/api/users"), ("DELETE", f"/api/users/{chun['id']}")):
        assert (await http.request(method, path, headers=by_key, json={"name": "x"})).status_code == 403
