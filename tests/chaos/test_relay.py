"""The relay itself: killed, restarted, starved of its database, and used by too many."""

import asyncio
import os
import random
import signal
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

import wire
from tests.chaos.test_jobs import OVER, ended_once, events, job_of, said, start_job, until_status, until_step
from tests.chaos.world import LEASE_S, PATIENCE_S, Way, World
from tests.conftest import TINY
from tests.relay.conftest import CHAT_ROW
from tests.relay.dialler import DiallingGpu
from tests.relay.double_gpu import BASE, DONE, FRAMES, DoubleGpu, held

ASK: Any = {"model": TINY, "prompt": "Once upon a time", "max_tokens": 20, "temperature": 0}


async def fine(body: bytes) -> AsyncIterator[str]:
    for frame in (*FRAMES, DONE):
        yield frame


class Load:
    """Callers who ask and upload all the time; what was acknowledged to them, they count on."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.answers: list[str] = []
        self.files: dict[str, str] = {}
        self.more = asyncio.Condition()

    async def ask(self) -> None:
        while True:
            with suppress(httpx2.TransportError):
                response = await self._world.http.post("/v1/completions", json=ASK)
                assert response.status_code in (200, 503), response.text
                if response.status_code == 200:
                    self.answers.append(response.json()["choices"][0]["text"])
                    await self._acknowledged()
                    continue
            await asyncio.sleep(0.05)

    async def upload(self, who: int) -> None:
        n = 0
        while True:
            n += 1
            rows = CHAT_ROW.replace("Fine.", f"Fine, {who} {n}.") * 3
            with suppress(httpx2.TransportError):
                response = await self._world.http.post(
                    "/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", rows.encode())}
                )
                assert response.status_code in (200, 503), response.text
                if response.status_code == 200:
                    self.files[response.json()["id"]] = rows
                    await self._acknowledged()
            await asyncio.sleep(0.05)

    async def _acknowledged(self) -> None:
        async with self.more:
            self.more.notify_all()

    async def until_more(self, n: int) -> None:
        """An answer and a file at least, and so many of both together."""
        answers, files = len(self.answers), len(self.files)

        def enough() -> bool:
            fresh = len(self.answers) - answers, len(self.files) - files
            return min(fresh) > 0 and sum(fresh) >= n

        async with self.more:
            await asyncio.wait_for(self.more.wait_for(enough), PATIENCE_S)


@pytest.mark.long
async def test_a_relay_killed_at_random_under_load_loses_nothing_that_was_acknowledged(world: World, way: Way) -> None:
    chance = random.Random(7)
    await world.gpu("first", way)
    await world.until_reachable("first")
    job_id = await start_job(world, n_epochs=100)
    await until_step(world, job_id, 1)
    load = Load(world)
    callers = [asyncio.create_task(load.ask()) for _ in range(3)]
    callers += [asyncio.create_task(load.upload(who)) for who in range(2)]
    for _ in range(5):
        await load.until_more(chance.randint(1, 12))
        told = {event["id"]: event["message"] for event in events(world, job_id)}
        await world.relay.stop(signal.SIGKILL)
        await world.relay.start()
        assert told.items() <= {event["id"]: event["message"] for event in events(world, job_id)}.items()
    await load.until_more(10)
    for caller in callers:
        assert not caller.done(), caller.exception()
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    assert len(set(load.answers)) == 1, "an answer that came was not the whole one"
    for file_id, rows in load.files.items():
        assert (await world.http.get(f"/v1/files/{file_id}/content")).text == rows
    job = await until_status(world, job_id, *OVER)
    assert (job.status, job.attempts) == ("succeeded", 0), job.error
    assert said(world, job_id, "Given to gpu") == 1
    ended_once(world, job_id)
    assert world.half_stored() == []


async def test_after_a_restart_every_lease_has_a_full_term_of_grace(world: World, way: Way) -> None:
    gpu = await world.double(way, fine)
    job_id = await start_job(world, n_epochs=1, model=BASE)
    grant = await gpu.next_grant()
    await world.relay.stop(signal.SIGKILL)
    (lease,) = world.rows("select lease_until from jobs where id = ?", job_id)
    await asyncio.sleep(max(0.0, lease["lease_until"] - time.time()))  # by its own clock the lease is over
    began = time.time()
    await world.relay.start()
    (lease,) = world.rows("select lease_until, status, attempts from jobs where id = ?", job_id)
    assert (lease["status"], lease["attempts"]) == ("leased", 0)
    assert lease["lease_until"] >= began + LEASE_S
    assert (await gpu.report(grant)).status_code == 200, "it goes on as if nothing had been"
    assert (await gpu.beat(held(grant))).commands == []
    assert (await gpu.succeed(grant)).status_code == 200
    assert said(world, job_id, "waits for a gpu again") == 0
    ended_once(world, job_id)


async def test_while_another_process_writes_to_the_database_reads_go_on_and_writes_wait(world: World) -> None:
    gpu = await world.double("http", fine)
    job_id = await start_job(world, n_epochs=1, model=BASE)
    grant = await gpu.next_grant()
    await gpu.report(grant)
    lock = sqlite3.connect(world.folder / "relay/relay.db", isolation_level=None)
    lock.execute("begin immediate")
    event = wire.JobEvent(seq=0, at=time.time(), message="written while it was locked")
    writing = asyncio.create_task(gpu.report(grant, event))
    assert (await asyncio.wait_for(job_of(world, job_id), 5)).status == "running"
    response = await asyncio.wait_for(world.http.post("/v1/chat/completions", json={"model": BASE, "messages": []}), 5)
    assert response.status_code == 200
    assert not writing.done()
    lock.execute("commit")
    lock.close()
    assert (await writing).status_code == 200
    assert said(world, job_id, "written while it was locked") == 1


@pytest.mark.long
async def test_a_database_that_stays_locked_is_a_503_and_nothing_is_lost(world: World) -> None:
    gpu = await world.double("http", fine)
    job_id = await start_job(world, n_epochs=1, model=BASE)
    grant = await gpu.next_grant()
    lock = sqlite3.connect(world.folder / "relay/relay.db", isolation_level=None)
    lock.execute("begin immediate")
    event = wire.JobEvent(seq=0, at=time.time(), message="said again")
    refused = await gpu.report(grant, event)
    assert refused.status_code == 503, refused.text
    assert int(refused.headers["retry-after"]) > 0
    assert refused.json()["error"]["code"] == "database_busy"
    lock.execute("rollback")
    lock.close()
    # The lease is over meanwhile, and somebody else's: the relay says so, and the job is not lost.
    assert (await gpu.report(grant, event)).status_code in (200, 409)
    assert (await job_of(world, job_id)).status in ("queued", "leased", "running")
    assert world.relay.process.returncode is None


@pytest.mark.long
async def test_two_hundred_gpus_that_came_and_went_leave_the_relay_as_small_as_before(world: World, way: Way) -> None:
    sizes, series = [], []
    for _ in range(4):
        await asyncio.gather(*(come_and_go(world, way) for _ in range(50)))
        sizes.append(world.memory_bytes())
        series.append(await metric_series(world))
    assert (await world.http.get("/api/gpus")).status_code == 200
    assert sizes[-1] - sizes[0] < 16e6, sizes
    assert sizes[-1] - sizes[-2] < 4e6, sizes
    assert world.rows("select count(*) as n from gpus")[0]["n"] == 200
    assert not [name for name in series[-1] if "gpu-" in name or BASE in name], "a label for each gpu that ever was"
    new = series[-1] - series[0]  # a code of ours that came up late may be among them
    assert len(new) < 20, new
    assert len(series[-1]) < 1000


async def metric_series(world: World) -> set[str]:
    """Names with their labels."""
    text = (await world.http.get("/metrics")).raise_for_status().text
    return {line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")}


async def come_and_go(world: World, way: Way) -> None:
    kind = DiallingGpu if way == "dialled" else DoubleGpu
    gpu = kind(world.relay.url, world.relay.secret("enrol.token"), time.time, [BASE])
    async with gpu.dialling(world.relay.url) if isinstance(gpu, DiallingGpu) else gpu.serving():
        if isinstance(gpu, DiallingGpu):
            await gpu.enrol_and_tell()
        else:
            assert (await gpu.enrol()).status_code == 200
        await gpu.until_reachable()
        await world.http.post("/v1/chat/completions", json={"model": BASE, "messages": []})
        goodbye = await gpu.call("POST", "/gpu/goodbye", wire.Goodbye(reason="the notebook ended"))
        assert goodbye.status_code == 200


async def test_a_gpu_is_drained_under_load_and_no_caller_notices(world: World, way: Way) -> None:
    first, _ = await world.gpu("first", way), await world.gpu("second", way)
    await world.until_reachable("first", "second")
    refused: list[int] = []
    answers: list[str] = []

    async def ask() -> None:
        while True:
            response = await world.http.post("/v1/completions", json={**ASK, "max_tokens": 60})
            if response.status_code == 200:
                answers.append(response.json()["choices"][0]["text"])
            else:
                refused.append(response.status_code)

    async def is_idle() -> bool:
        return bool((await world.listed("first"))["active_requests"] == 0)

    async def both_are_busy() -> bool:
        return all([(await world.listed(name))["active_requests"] for name in ("first", "second")])

    callers = [asyncio.create_task(ask()) for _ in range(8)]
    await world.eventually(both_are_busy)
    gpu_id = (await world.listed("first"))["id"]
    assert (await world.http.post(f"/api/gpus/{gpu_id}/drain")).status_code == 200
    await world.eventually(is_idle)
    assert await first.stop() == 0
    n = len(answers)
    await world.eventually(lambda: len(answers) >= n + 16)
    for caller in callers:
        assert not caller.done(), caller.exception()
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    assert refused == []
    assert len(set(answers)) == 1


async def test_a_modest_user_is_served_beside_a_greedy_one(world: World, way: Way) -> None:
    await world.gpu("only", way)
    await world.until_reachable("only")
    made = (await world.http.post("/api/keys", json={"user": "modest", "name": "modest's"})).json()
    asked = {**ASK, "max_tokens": 100}
    greedy = [asyncio.create_task(world.http.post("/v1/completions", json=asked)) for _ in range(200)]
    await asyncio.wait(greedy, return_when=asyncio.FIRST_COMPLETED)
    async with world.client(made["key"]) as modest:
        for _ in range(2):
            assert (await modest.completions.create(**{**ASK, "max_tokens": 10})).choices[0].text
    ahead = sum(task.done() for task in greedy)
    answers = await asyncio.gather(*greedy)
    assert {answer.status_code for answer in answers} == {200}, "who is greedy waits, and is served too"
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
    assert ahead < len(greedy) / 2, f"{ahead} of the greedy one's requests came first"


def small_disk(folder: Path, mib: int) -> list[str]:
    """A file system of its own for a folder, which goes with the process; outside, nobody sees it."""
    own = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-Urm"]
    return [*own, "sh", "-ec", f'mount -t tmpfs -o size={mib}m none "{folder}"; exec "$@"', "sh"]


def halves(blobs: Path) -> list[Path]:
    return [path for path in blobs.glob("incoming/*/*") if path.name != "lock"]


async def test_a_full_disk_is_a_clear_refusal_and_room_made_is_room_had(
    start_world: Callable[..., Any], tmp_path: Path
) -> None:
    blobs = tmp_path / "relay/blobs"
    blobs.mkdir(parents=True)
    world: World = await start_world(*small_disk(blobs, 2), RELAY_MIN_FREE_BYTES="1")

    async def upload(name: str) -> httpx2.Response:
        rows = CHAT_ROW.replace("Fine.", name * 100) * 1000
        assert 1.0 < len(rows) / 2**20 < 1.9
        files = {"file": ("rows.jsonl", rows.encode())}
        return await world.http.post("/v1/files", data={"purpose": "fine-tune"}, files=files)

    gpu = await world.double("http", fine)
    job_id = await start_job(world, n_epochs=1, model=BASE)
    grant = await gpu.next_grant()
    first = await upload("first word ")
    assert first.status_code == 200
    result = random.Random(1).randbytes(2**20)
    for refused in (await upload("other word "), await gpu.upload(grant, result)):
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, "disk_full")
        assert "disk" in refused.json()["error"]["message"]
        assert "administrator" in refused.json()["error"]["message"]
    assert halves(Path(f"/proc/{world.relay.process.pid}/root{blobs}")) == []
    assert (await job_of(world, job_id)).status == "running"
    assert len((await world.openai.files.list()).data) == 2, "what could not be stored is not listed"
    assert (await world.http.delete(f"/v1/files/{first.json()['id']}")).status_code == 200
    assert (await gpu.succeed(grant, result)).status_code == 200
    ended_once(world, job_id)
