"""Users and keys: what costs a query, what is written when, and how soon a revoked key is refused."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import event

from relay import errors
from relay.accounts import LAST_USED_EVERY_S, REMEMBERED_S, Accounts
from relay.store import Store
from tests.relay.conftest import ADMIN_KEY, Clock

ON_BOTH_DATABASES = True
ADMIN = f"Bearer {ADMIN_KEY}"


@pytest.fixture
async def store(tmp_path: Path, database: str) -> AsyncIterator[Store]:
    store = Store(database or f"sqlite+aiosqlite:///{tmp_path / 'relay.db'}")
    await store.open()
    yield store
    await store.close()


@pytest.fixture
async def accounts(store: Store, clock: Clock) -> Accounts:
    accounts = Accounts(store, clock)
    await accounts.open(ADMIN_KEY)
    return accounts


def statements(store: Store) -> list[str]:
    """Fills with what the database is asked from now on."""
    asked: list[str] = []
    event.listen(store._engine.sync_engine, "before_cursor_execute", lambda _c, _u, sql, *_: asked.append(sql))
    return asked


async def test_a_busy_key_asks_the_database_once_a_second(store: Store, accounts: Accounts, clock: Clock) -> None:
    await accounts.user_of(ADMIN)
    asked = statements(store)
    for _ in range(100):
        assert (await accounts.user_of(ADMIN)).is_admin
    assert asked == []
    clock.advance(REMEMBERED_S)
    await accounts.user_of(ADMIN)
    assert sum(sql.startswith("SELECT") for sql in asked) == 1


async def test_a_revoked_key_is_refused_at_once_here_and_within_a_second_elsewhere(
    store: Store, accounts: Accounts, clock: Clock
) -> None:
    elsewhere = Accounts(store, clock)  # as another process has it
    key_id, key = await accounts.create_key("bora")
    for process in (accounts, elsewhere):
        assert (await process.user_of(f"Bearer {key}")).name == "bora"
    await accounts.revoke(key_id)
    with pytest.raises(errors.InvalidKey):
        await accounts.user_of(f"Bearer {key}")
    clock.advance(REMEMBERED_S)
    with pytest.raises(errors.InvalidKey):
        await elsewhere.user_of(f"Bearer {key}")


async def test_a_look_that_was_under_way_when_a_key_was_revoked_is_not_remembered(
    store: Store, accounts: Accounts
) -> None:
    key_id, key = await accounts.create_key("bora")
    looks = [asyncio.create_task(accounts.user_of(f"Bearer {key}")) for _ in range(5)]
    await asyncio.sleep(0)  # each has begun
    await accounts.revoke(key_id)
    await asyncio.gather(*looks, return_exceptions=True)
    with pytest.raises(errors.InvalidKey):
        await accounts.user_of(f"Bearer {key}")


async def test_a_clock_that_was_set_back_makes_no_key_last_longer(
    store: Store, accounts: Accounts, clock: Clock
) -> None:
    elsewhere = Accounts(store, clock)
    key_id, key = await accounts.create_key("bora")
    await elsewhere.user_of(f"Bearer {key}")
    await accounts.revoke(key_id)
    clock.advance(-3600)
    with pytest.raises(errors.InvalidKey):
        await elsewhere.user_of(f"Bearer {key}")


async def test_when_a_key_was_used_is_written_in_batches(store: Store, accounts: Accounts, clock: Clock) -> None:
    asked = statements(store)
    first_at = clock()
    await accounts.user_of(ADMIN)
    clock.advance(REMEMBERED_S)
    await accounts.user_of(ADMIN)
    assert not [sql for sql in asked if sql.startswith("UPDATE")]
    await accounts.fold()
    await accounts.fold()  # nothing is left to write
    assert len([sql for sql in asked if sql.startswith("UPDATE")]) == 1
    assert [key.last_used_at for key in await accounts.list_keys()] == [first_at]
    clock.advance(LAST_USED_EVERY_S + 1)
    await accounts.user_of(ADMIN)
    await accounts.fold()
    assert [key.last_used_at for key in await accounts.list_keys()] == [clock()]
