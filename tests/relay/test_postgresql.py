"""What only PostgreSQL can do wrong: several processes write, a server goes and comes, values do not fit."""

import asyncio
import signal
from collections.abc import AsyncIterator, Collection, Iterator
from pathlib import Path

import pytest
from sqlalchemy import insert, select, update

import wire
from relay import errors
from relay.blobs import Bound, FolderBlobs
from relay.leases import Leases
from relay.settings import Settings
from relay.store import Store
from relay.sweep import remove_unnamed
from relay.tables import gpus, jobs, users
from tests.postgres import Postgres
from tests.relay.conftest import ENROL_TOKEN, Clock, running_relay, until
from tests.relay.double_gpu import BASE

ADA = "user-1"


@pytest.fixture
def url(postgres: Postgres) -> Iterator[str]:
    name = postgres.new()
    yield postgres.url(name)
    postgres.drop(name)


@pytest.fixture
async def stores(url: str) -> AsyncIterator[tuple[Store, Store]]:
    """Of two processes."""
    both = Store(url), Store(url)
    async with both[0].write() as db:
        await db.execute(insert(users).values(id=ADA, name="ada", created_at=0.0))
    yield both
    for store in both:
        await store.close()


async def credit(store: Store) -> float:
    async with store.read() as db:
        return float((await db.execute(select(users.c.credit_s).where(users.c.id == ADA))).scalar_one())


async def test_what_a_write_has_read_stays_so_until_it_has_written(stores: tuple[Store, Store]) -> None:
    async def one_more(store: Store) -> None:
        async with store.write() as db:
            had = (await db.execute(select(users.c.credit_s).where(users.c.id == ADA))).scalar_one()
            await asyncio.sleep(0)
            await db.execute(update(users).where(users.c.id == ADA).values(credit_s=had + 1))

    await asyncio.gather(*(one_more(stores[n % 2]) for n in range(60)))
    assert await credit(stores[0]) == 60


async def test_a_read_is_one_view_and_does_not_wait_for_a_write(stores: tuple[Store, Store]) -> None:
    reads, writes = stores
    async with reads.read() as db:
        query = select(users.c.credit_s).where(users.c.id == ADA)
        before = (await db.execute(query)).scalar_one()
        async with writes.write() as other:
            await other.execute(update(users).values(credit_s=7.0))
        assert (await db.execute(query)).scalar_one() == before
    assert await credit(reads) == 7


async def test_a_block_that_fails_leaves_nothing_and_lets_the_next_write(stores: tuple[Store, Store]) -> None:
    async def write_and_fail() -> None:
        async with stores[0].write() as db:
            await db.execute(update(users).values(credit_s=1.0))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await write_and_fail()
    async with asyncio.timeout(5), stores[1].write() as db:
        await db.execute(update(users).values(credit_s=users.c.credit_s + 2))
    assert await credit(stores[0]) == 2


async def test_a_writer_who_is_cancelled_in_the_line_does_not_keep_the_others_waiting(
    stores: tuple[Store, Store],
) -> None:
    async def write(store: Store) -> None:
        async with store.write() as db:
            await db.execute(update(users).values(credit_s=users.c.credit_s + 1))

    async with stores[0].write():
        waiting = [asyncio.create_task(write(stores[1])) for _ in range(3)]
        await asyncio.sleep(0.1)  # the first of them waits in the server
        waiting[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting[0]
    await asyncio.gather(*waiting[1:])
    assert await credit(stores[0]) == 2


async def test_a_connection_that_is_cut_within_a_write_is_told_as_such_and_nothing_stands(
    stores: tuple[Store, Store], postgres: Postgres
) -> None:
    async def write_and_be_cut_off() -> None:
        async with stores[0].write() as db:
            await db.execute(update(users).values(credit_s=5.0))
            mine = (await db.exec_driver_sql("SELECT pg_backend_pid()")).scalar_one()
            await asyncio.to_thread(postgres.execute, f"SELECT pg_terminate_backend({mine})")
            await db.execute(update(users).values(credit_s=6.0))

    with pytest.raises(errors.DatabaseAway):
        await write_and_be_cut_off()
    assert await credit(stores[0]) == 0


async def test_a_blob_whose_removal_lost_its_lock_is_there_again(
    stores: tuple[Store, Store], postgres: Postgres, tmp_path: Path
) -> None:
    """Somebody else may have named it meanwhile."""
    mine, other = stores

    class CutOff(FolderBlobs):
        async def set_aside(self, shas: Collection[str], older_than: float, aside: list[str]) -> None:
            await super().set_aside(shas, older_than, aside)
            postgres.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'")

    async with mine.read() as db:
        database = str((await db.exec_driver_sql("SELECT current_database()")).scalar_one())
    blobs = CutOff(tmp_path / "blobs")
    blobs.open()
    async with blobs.incoming(Bound(10, errors.TooLarge("too large"))) as incoming:
        await incoming.write(b"rows")
        await incoming.finish()
        await blobs.keep(incoming)
    sha256 = incoming.sha256
    with pytest.raises(errors.DatabaseAway):
        await remove_unnamed(mine, blobs, {sha256})
    assert await blobs.size_bytes(sha256) == 4
    assert await remove_unnamed(other, FolderBlobs(tmp_path / "blobs"), {sha256}) == 1
    assert await blobs.size_bytes(sha256) is None
    assert not list((tmp_path / "blobs" / "aside").iterdir())
    blobs.close()


async def test_of_many_who_see_the_same_job_one_gets_it(url: str, tmp_path: Path, clock: Clock) -> None:
    """The claim of a dispatcher beside those of other processes."""
    async with running_relay(tmp_path, clock, database_url=url) as relay, relay.gpu() as gpu:
        await relay.http.post(f"/api/gpus/{gpu.by.gpu_id}/drain")
        job = await relay.openai.fine_tuning.jobs.create(model=BASE, training_file=await relay.upload())
    processes = [Store(url) for _ in range(4)]
    leases = [Leases(store, FolderBlobs(tmp_path / "blobs"), Settings(data_dir=tmp_path), clock) for store in processes]
    async with processes[0].write() as db:
        await db.execute(update(gpus).values(draining=False))
    match = await leases[0].next_match()
    assert match
    assert match.job_id == job.id
    fences = await asyncio.gather(*(one.claim(match) for one in leases * 3))
    assert sorted(fence or 0 for fence in fences) == [0] * 11 + [1]
    for store in processes:
        await store.close()


async def test_what_can_not_be_stored_is_the_callers_mistake(url: str, tmp_path: Path, clock: Clock) -> None:
    async with running_relay(tmp_path, clock, database_url=url) as relay:
        for asked in ("/v1/files/file-%00", "/v1/fine_tuning/jobs/a%00b"):
            response = await relay.http.get(asked)
            assert response.status_code == 400, response.text
            assert "can't be stored" in response.json()["error"]["message"]


async def test_a_nul_in_what_a_gpu_says_stops_nobody(url: str, tmp_path: Path, clock: Clock) -> None:
    """In its name it would make every look at memory fail; in a report it would be refused for ever."""
    async with running_relay(tmp_path, clock, database_url=url) as relay, relay.gpu(enrol=False) as gpu:
        said = gpu.enrol_request().model_dump_json().replace('"test"', '"a\\u0000test"')
        bearer = {"authorization": f"Bearer {ENROL_TOKEN}"}
        reply = await relay.http.post("/gpu/enrol", content=said, headers=bearer)
        assert reply.status_code == 200, reply.text
        gpu.reply = wire.EnrolReply.model_validate_json(reply.content)
        job = await relay.openai.fine_tuning.jobs.create(model=BASE, training_file=await relay.upload())
        grant = await gpu.next_grant()
        event = wire.JobEvent(seq=0, at=clock(), message="a\0b and \\u0000")
        assert (await gpu.report(grant, event)).status_code == 200
        events = await relay.openai.fine_tuning.jobs.list_events(job.id)
        assert events.data[0].message == "a\ufffdb and \\u0000"


async def test_a_relay_outlives_its_database_and_says_so_meanwhile(tmp_path: Path, clock: Clock) -> None:
    server = Postgres()
    try:
        server.start()
        server.make_template()
        async with running_relay(tmp_path, clock, database_url=server.url(server.new())) as relay:

            async def listed() -> int:
                return (await relay.http.get("/v1/files")).status_code

            assert await listed() == 200
            server.stop(signal.SIGQUIT)
            response = await relay.http.get("/v1/files")
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "database_unavailable"
            assert int(response.headers["retry-after"]) > 0
            assert str(server.folder) not in response.text
            ready = await relay.http.get("/readyz")
            assert [reason["code"] for reason in ready.json()["reasons"]] == ["database"]
            assert (await relay.http.get("/healthz")).status_code == 200
            server.start()

            async def is_back() -> bool:
                return await listed() == 200

            await until(is_back, 30)
            server.stop()  # a restart that no request falls into is not even felt
            server.start()
            assert await listed() == 200
            assert (await relay.http.get("/v1/models")).status_code == 200
    finally:
        server.close()


async def test_a_database_that_was_away_for_longer_than_a_lease_costs_no_lease(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    server = Postgres()
    try:
        server.start()
        server.make_template()
        url = server.url(server.new())
        store = Store(url)
        relays = running_relay(tmp_path, clock, database_url=url, lease_s=2.0, heartbeat_s=0.2)
        async with relays as relay, relay.gpu() as gpu:
            await relay.openai.fine_tuning.jobs.create(model=BASE, training_file=await relay.upload())
            grant = await gpu.next_grant()
            server.stop()
            await until(lambda: caplog.text.count("that this process lives") > 4)
            clock.advance(60)
            server.start()

            async def is_renewed() -> bool:
                async with store.read() as db:
                    row = (await db.execute(select(jobs.c.status, jobs.c.attempts, jobs.c.lease_until))).one()
                assert (row.status, row.attempts) == ("leased", 0)
                return float(row.lease_until) > clock()

            await until(is_renewed, 30)
            assert (await gpu.succeed(grant)).status_code == 200
        await store.close()
    finally:
        server.close()


@pytest.mark.long
async def test_a_writer_who_stands_still_makes_others_say_that_the_database_is_busy(
    stores: tuple[Store, Store],
) -> None:
    async with stores[0].write():
        with pytest.raises(errors.DatabaseBusy):
            async with stores[1].write():
                pass
