"""Jobs handed out by Celery over RabbitMQ: real processes, of which any may die."""

import asyncio
import contextlib
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import pytest

import wire
from tests.end_to_end.rabbit import Rabbit
from tests.end_to_end.stack import Relay, Service, free_port, running
from tests.postgres import Postgres
from tests.relay.double_gpu import BASE, DoubleGpu, held

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

COUNT = count()
ROW = b'{"prompt": "2 + 2 =", "completion": " 4"}\n'


@pytest.fixture(scope="module")
def relay(rabbit: Rabbit, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    relay = Relay(tmp_path_factory.mktemp("relay"), RELAY_BROKER_URL=rabbit.url)
    with running(relay):
        yield relay


def beside(relay: Relay, *command: str) -> Service:
    """Another process on the relay's data and broker."""
    return Service(["relay", *command], relay.folder / f"{command[0]}-{next(COUNT)}", relay._env)


@contextmanager
def working(relay: Relay) -> Iterator[Service]:
    worker = beside(relay, "worker", "--concurrency", "2")
    with running(worker):
        worker.wait(lambda: "ready." in worker.log())
        yield worker


@pytest.fixture
def worker(relay: Relay) -> Iterator[Service]:
    with working(relay) as worker:
        yield worker


@pytest.fixture(scope="module")
def beat(relay: Relay) -> Iterator[Service]:
    beat = beside(relay, "beat")
    with running(beat):
        yield beat


@asynccontextmanager
async def enrolled(relay: Relay) -> AsyncIterator[DoubleGpu]:
    gpu = DoubleGpu(relay.url, relay.enrol_token, time.time, [BASE])
    async with gpu.serving():
        assert (await gpu.enrol()).status_code == 200
        await gpu.until_reachable()
        yield gpu


def start_job(relay: Relay) -> str:
    client = relay.client()
    file = client.files.create(file=("rows.jsonl", ROW * 4), purpose="fine-tune")
    return client.fine_tuning.jobs.create(model=BASE, training_file=file.id).id


def job(relay: Relay, job_id: str) -> Any:
    return relay.http().get(f"/v1/fine_tuning/jobs/{job_id}").raise_for_status().json()


async def finished(relay: Relay, gpu: DoubleGpu, grant: wire.GrantLease) -> None:
    assert (await gpu.succeed(grant)).status_code == 200
    assert job(relay, grant.job.job_id)["status"] == "succeeded"


async def nothing(gpu: DoubleGpu, *leases: wire.HeldLease) -> None:
    assert not [c for c in (await gpu.beat(*leases)).commands if isinstance(c, wire.GrantLease)]


async def test_a_job_waits_for_a_worker_and_is_given_once(relay: Relay) -> None:
    """No beat runs here: the message that the relay sent is what the worker wakes by."""
    async with enrolled(relay) as gpu:
        job_id = await asyncio.to_thread(start_job, relay)
        await nothing(gpu)
        with working(relay):
            grant = await gpu.next_grant()
            assert grant.job.job_id == job_id
            await nothing(gpu, held(grant))
            await finished(relay, gpu, grant)
    assert job(relay, job_id)["attempts"] == 0, "none was in vain"


async def test_workers_hand_out_what_is_in_postgresql_too(rabbit: Rabbit, tmp_path: Path) -> None:
    server = Postgres(port=free_port())
    try:
        server.start()
        server.make_template()
        url = server.url(server.new(), tcp=True)
        relay = Relay(tmp_path / "relay", RELAY_BROKER_URL=rabbit.url, RELAY_DATABASE_URL=url)
        with running(relay):
            async with enrolled(relay) as gpu:
                job_id = await asyncio.to_thread(start_job, relay)
                with working(relay):
                    grant = await gpu.next_grant()
                    assert grant.job.job_id == job_id
                    await finished(relay, gpu, grant)
    finally:
        server.close()


async def test_a_worker_that_is_killed_leaves_its_work_to_the_next(relay: Relay, beat: Service) -> None:
    async with enrolled(relay) as gpu:
        for _ in range(2):
            with working(relay) as worker:
                job_id = await asyncio.to_thread(start_job, relay)
                worker.kill()  # maybe before it looked, maybe after
        with working(relay):
            first = await gpu.next_grant()
            await finished(relay, gpu, first)
            second = await gpu.next_grant()
            await finished(relay, gpu, second)
        assert job_id in (first.job.job_id, second.job.job_id)
        assert first.job.job_id != second.job.job_id


async def test_a_job_made_while_the_broker_is_away_is_found_when_it_is_back(
    relay: Relay, rabbit: Rabbit, beat: Service, worker: Service
) -> None:
    async with enrolled(relay) as gpu:
        await asyncio.to_thread(rabbit.stop)
        began = time.monotonic()
        job_id = await asyncio.to_thread(start_job, relay)
        assert time.monotonic() - began < 5, "a broker that is away holds nobody up"
        await nothing(gpu)
        starting = asyncio.create_task(asyncio.to_thread(rabbit.start))
        grant: wire.GrantLease | None = None
        async with asyncio.timeout(120):
            while grant is None:
                with contextlib.suppress(TimeoutError):
                    grant = await gpu.next_grant()  # it goes on beating, or the relay would take it for gone
        await starting
        assert grant.job.job_id == job_id
        await finished(relay, gpu, grant)


async def test_a_broker_that_stands_still_holds_neither_gpus_up_nor_the_relays_end(
    rabbit: Rabbit, tmp_path: Path
) -> None:
    relay = Relay(tmp_path / "relay", RELAY_BROKER_URL=rabbit.url)
    with running(relay):
        async with enrolled(relay):
            await asyncio.to_thread(start_job, relay)  # it has spoken to the broker, and does so by that connection
            with rabbit.standing_still():
                await asyncio.to_thread(start_job, relay)
                async with enrolled(relay):  # whose URL the rounds prove
                    pass
                began = time.monotonic()
                assert await asyncio.to_thread(relay.stop) == 0
                assert time.monotonic() - began < 5


async def test_leases_outlive_a_relay_that_was_away_while_workers_went_on(rabbit: Rabbit, tmp_path: Path) -> None:
    relay = Relay(tmp_path / "relay", RELAY_BROKER_URL=rabbit.url, RELAY_HEARTBEAT_S="1", RELAY_LEASE_S="3")
    with running(relay), running(beside(relay, "beat")), working(relay) as worker:
        async with enrolled(relay) as gpu:
            job_id = await asyncio.to_thread(start_job, relay)
            grant = await gpu.next_grant()
            relay.kill()
            await asyncio.sleep(4)  # longer than the lease
            relay.start()
            await asyncio.to_thread(relay.wait, lambda: job(relay, job_id))
            await finished(relay, gpu, grant)
            assert job(relay, job_id)["attempts"] == 0
        assert "leases were over" not in worker.log()


def test_flower_wants_its_password(relay: Relay, worker: Service) -> None:
    port = free_port()
    flower = beside(relay, "flower", "--port", str(port))
    with running(flower):
        url = f"http://127.0.0.1:{port}/flower/"
        assert flower.wait(lambda: httpx2.get(url).status_code) == 401
        password = (relay.folder / "data/flower.password").read_text().strip()
        assert httpx2.get(url, auth=("admin", "wrong")).status_code == 401
        shown = httpx2.get(url, auth=("admin", password), follow_redirects=True)
        assert shown.status_code == 200
        command = subprocess.run(["ps", "-o", "args=", "-p", str(flower.process.pid)], capture_output=True, text=True)  # type: ignore[union-attr]
        assert password not in command.stdout
