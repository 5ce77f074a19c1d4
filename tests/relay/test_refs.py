"""A blob lives as long as something names it, and goes only once it stands that nothing does."""

import asyncio
import hashlib
import math
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select

from relay import errors, refs
from relay.blobs import Bound, FolderBlobs
from relay.storage import blobs_of
from relay.store import Store
from relay.sweep import YOUNG_S, letting_go, remove_unnamed, sweep
from relay.tables import blob_refs, users
from tests.relay.conftest import Clock, Relay
from tests.relay.double_gpu import BASE, DoubleGpu, result_of
from tests.s3 import settings_of

ON_BOTH_DATABASES = ON_BOTH_STORES = True
OWNER = "user-1"


class Kept:
    """A database and blobs, and who names what in them; no relay."""

    def __init__(self, folder: Path, database: str, bucket: dict[str, str]) -> None:
        self.settings = settings_of(folder, bucket)
        self.store = Store(database or f"sqlite+aiosqlite:///{folder / 'relay.db'}")
        self.blobs = blobs_of(self.settings)

    @property
    def in_bucket(self) -> bool:
        return bool(self.settings.blobs_url)

    async def open(self) -> "Kept":
        await self.store.open()
        (self.settings.data_dir).mkdir(exist_ok=True)
        self.blobs.open()
        async with self.store.write() as db:
            await db.execute(insert(users).values(id=OWNER, name="ada", created_at=0.0))
        return self

    async def close(self) -> None:
        self.blobs.close()
        await self.store.close()

    async def put(self, content: bytes, holder: str) -> str:
        """As an upload does it: the blob and its name in one transaction."""
        async with self.blobs.incoming(Bound(1000, errors.TooLarge("too large"))) as incoming:
            await incoming.write(content)
            await incoming.finish()
            async with self.store.write() as db:
                await self.blobs.keep(incoming)
                await refs.name(db, "file", holder, OWNER, {incoming.sha256: incoming.bytes})
            return incoming.sha256

    async def drop(self, holder: str) -> None:
        async with letting_go(self.store, self.blobs) as (db, gone):
            gone |= await refs.unname(db, "file", holder)

    async def lost(self) -> set[str]:
        """Named, and not here."""
        async with self.store.read() as db:
            named = await refs.all_named(db)
        return named - set(await self.blobs.sizes(named))


@pytest.fixture
async def kept(tmp_path: Path, database: str, bucket: dict[str, str]) -> AsyncIterator[Kept]:
    found = await Kept(tmp_path, database, bucket).open()
    yield found
    await found.close()


async def test_a_blob_goes_with_the_last_that_names_it(kept: Kept) -> None:
    sha256 = await kept.put(b"rows", "file-1")
    assert await kept.put(b"rows", "file-2") == sha256
    await kept.drop("file-1")
    assert await kept.blobs.size_bytes(sha256) == 4
    await kept.drop("file-2")
    assert await kept.blobs.size_bytes(sha256) is None


async def test_a_power_cut_before_the_commit_leaves_the_blob_of_what_is_still_named(kept: Kept) -> None:
    sha256 = await kept.put(b"rows", "file-1")

    async def cut_short() -> None:
        async with letting_go(kept.store, kept.blobs) as (db, gone):
            gone |= await refs.unname(db, "file", "file-1")
            assert gone == {sha256}
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await cut_short()
    assert await kept.lost() == set()
    assert await kept.blobs.size_bytes(sha256) == 4


async def test_a_power_cut_after_the_commit_leaves_a_blob_to_the_sweep(kept: Kept) -> None:
    sha256 = await kept.put(b"rows", "file-1")
    async with kept.store.write() as db:
        await refs.unname(db, "file", "file-1")
    clock = Clock()
    assert await sweep(kept.store, kept.blobs, clock) == 0
    clock.advance(2 * YOUNG_S)
    assert await sweep(kept.store, kept.blobs, clock) == 1
    assert await kept.blobs.size_bytes(sha256) is None


async def test_a_power_cut_in_the_middle_of_a_removal_leaves_the_blob_to_the_next_start(kept: Kept) -> None:
    sha256 = await kept.put(b"rows", "file-1")
    await kept.blobs.set_aside([sha256], math.inf, [])
    assert await kept.blobs.size_bytes(sha256) is None
    assert b"".join([chunk async for chunk in await kept.blobs.read(sha256)]) == b"rows" if kept.in_bucket else True
    kept.blobs.close()
    kept.blobs.open()
    if kept.in_bucket:  # others may be running: the sweep sees to it, when nobody living can have set it aside
        clock = Clock()
        clock.advance(2 * YOUNG_S)
        assert await sweep(kept.store, kept.blobs, clock) == 0
    assert await kept.blobs.size_bytes(sha256) == 4


async def test_the_same_content_named_between_commit_and_removal_stays(kept: Kept) -> None:
    sha256 = await kept.put(b"rows", "file-1")
    async with kept.store.write() as db:
        gone = await refs.unname(db, "file", "file-1")
    await kept.put(b"rows", "file-2")  # in between
    assert await remove_unnamed(kept.store, kept.blobs, gone) == 0
    assert await kept.blobs.size_bytes(sha256) == 4


async def test_contents_that_come_and_go_at_once_are_never_lost_while_named(kept: Kept) -> None:
    contents = [b"one", b"two", b"three"]

    async def comes_and_goes(who: int) -> None:
        for number in range(12):
            holder = f"file-{who}-{number}"
            sha256 = await kept.put(contents[(who + number) % 3], holder)
            assert await kept.blobs.size_bytes(sha256) is not None
            await kept.drop(holder)

    await asyncio.gather(*(comes_and_goes(who) for who in range(6)))
    assert await kept.lost() == set()
    last = await kept.put(b"one", "file-last")
    assert await kept.blobs.size_bytes(last) == 3
    assert await kept.blobs.sizes([hashlib.sha256(content).hexdigest() for content in contents[1:]]) == {}


async def test_every_kind_of_a_users_names_goes_with_the_user(kept: Kept) -> None:
    async with kept.store.write() as db:
        await refs.name(db, "model", "m", OWNER, {"a" * 64: 1})
        await refs.name(db, "job", "j", OWNER, {"b" * 64: 2})
        assert await refs.unname_owned(db, OWNER) == {"a" * 64, "b" * 64}
        assert (await db.execute(select(blob_refs))).all() == []


async def test_a_result_that_takes_longer_than_the_sweep_allows_is_kept_while_its_lease_stands(
    relay: Relay, gpu: DoubleGpu
) -> None:
    job = await relay.openai.fine_tuning.jobs.create(model=BASE, training_file=await relay.upload())
    grant = await gpu.next_grant()
    assert (await gpu.upload(grant, b"the first of many blobs")).status_code == 200
    for path in relay.stored():
        os.utime(path, (0, 0))
    store, blobs = Store(relay.settings.database), FolderBlobs(relay.settings.data_dir / "blobs")
    try:
        assert await sweep(store, blobs, relay.clock) == 0
        assert (await gpu.finish(grant, result_of(grant, b"the first of many blobs"))).status_code == 200
    finally:
        await store.close()
    assert (await relay.openai.fine_tuning.jobs.retrieve(job.id)).status == "succeeded"


@pytest.mark.parametrize("end", ["lost", "cancelled"])
async def test_what_a_lost_lease_sent_is_left_to_the_sweep_and_of_a_cancelled_job_goes_at_once(
    relay: Relay, gpu: DoubleGpu, end: str
) -> None:
    job = await relay.openai.fine_tuning.jobs.create(model=BASE, training_file=await relay.upload())
    grant = await gpu.next_grant()
    assert (await gpu.upload(grant, b"half of a result")).status_code == 200
    sha256 = hashlib.sha256(b"half of a result").hexdigest()
    is_here: Callable[[], Any] = lambda: sha256 in [path.name for path in relay.stored()]  # noqa: E731
    assert is_here()
    if end == "lost":
        await gpu.enrol()
        assert is_here()
        store, blobs = Store(relay.settings.database), FolderBlobs(relay.settings.data_dir / "blobs")
        for path in relay.stored():
            os.utime(path, (0, 0))
        assert await sweep(store, blobs, relay.clock) == 1
        await store.close()
    else:
        await relay.openai.fine_tuning.jobs.cancel(job.id)
    assert not is_here()
