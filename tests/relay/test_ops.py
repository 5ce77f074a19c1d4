"""What whoever runs the relay asks it: is it there, can it do its work."""

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import httpx2

from relay.blobs import FolderBlobs
from relay.health import Health
from relay.settings import Settings
from relay.store import Store
from tests.relay.conftest import Relay, until


def execute(relay: Relay, statement: str) -> None:
    with closing(sqlite3.connect(relay.settings.data_dir / "relay.db")) as db:
        db.execute(statement)


async def asked(relay: Relay, path: str) -> httpx2.Response:
    async with httpx2.AsyncClient(base_url=relay.url, trust_env=False, verify=False) as stranger:
        return await stranger.get(path)


async def test_readyz_is_503_while_the_database_does_not_answer_and_healthz_goes_on(relay: Relay) -> None:
    execute(relay, "ALTER TABLE users RENAME TO taken_away")
    response = await asked(relay, "/readyz")
    assert response.status_code == 503
    assert response.headers["cache-control"] == "no-store"
    assert [reason["code"] for reason in response.json()["reasons"]] == ["database"]
    assert response.json()["error"]["code"] == "not_ready"
    assert "users" not in response.text  # what is wrong in the inside is for the log
    assert (await asked(relay, "/healthz")).status_code == 200

    execute(relay, "ALTER TABLE taken_away RENAME TO users")

    async def ready() -> bool:
        return bool((await asked(relay, "/readyz")).json() == {"status": "ready", "reasons": []})

    await until(ready)


async def test_every_reason_is_told_and_nothing_that_a_stranger_should_not_know(tmp_path: Path) -> None:
    folder, stopping = tmp_path / "data", asyncio.Event()
    store = Store(f"sqlite+aiosqlite:///{folder / 'relay.db'}")
    try:
        health = Health(store, FolderBlobs(folder), Settings(data_dir=folder), stopping)
        assert [r.code for r in await health.reasons()] == ["database", "disk"]  # the folder is not there
        folder.mkdir()
        await store.open()
        assert await Health(store, FolderBlobs(folder), Settings(data_dir=folder), stopping).reasons() == []
        full = Health(store, FolderBlobs(folder), Settings(data_dir=folder, min_free_bytes=2**62), stopping)
        assert [r.code for r in await full.reasons()] == ["disk"]
        stopping.set()
        assert [r.code for r in await full.reasons()] == ["stopping", "disk"]
        assert str(folder) not in " ".join(r.message for r in [*await health.reasons(), *await full.reasons()])
    finally:
        await store.close()


async def test_many_who_ask_at_once_cost_one_look(tmp_path: Path) -> None:
    store = Store(f"sqlite+aiosqlite:///{tmp_path / 'relay.db'}")
    try:
        await store.open()
        health = Health(store, FolderBlobs(tmp_path), Settings(data_dir=tmp_path), asyncio.Event())
        found = await asyncio.gather(*(health.reasons() for _ in range(100)))
        assert all(reasons is found[0] for reasons in found)
    finally:
        await store.close()
