"""Relay processes side by side on one PostgreSQL and one data folder, each a process of its own; some are killed."""

import asyncio
import contextlib
import itertools
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import func, select

import wire
from relay import errors
from relay.tables import job_events, jobs, models
from tests.conftest import TINY
from tests.end_to_end.rabbit import Rabbit
from tests.end_to_end.side import DEAD, ENROL_TOKEN, Side, again, beating
from tests.end_to_end.stack import Gpu, free_port
from tests.postgres import Postgres
from tests.relay.conftest import CHAT_ROW, Clock, until
from tests.relay.dialler import DiallingGpu
from tests.relay.double_gpu import BASE, DONE, FRAMES, DoubleGpu, held, result_of

ASK: dict[str, Any] = {"model": BASE, "messages": [{"role": "user", "content": "How are you?"}]}


class Now(Clock):
    def __call__(self) -> float:
        return time.time()


@pytest.fixture
async def side(tmp_path: Path, postgres: Postgres) -> AsyncIterator[Side]:
    name = postgres.new()
    async with Side(tmp_path, postgres.url(name, tcp=True)).running() as side:
        yield side
    postgres.drop(name)


async def test_the_relay_that_a_gpu_dialled_is_killed_in_mid_load_and_the_other_goes_on(side: Side) -> None:
    gpu = DiallingGpu(side.front.url, ENROL_TOKEN, Now(), [BASE])
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(gpu.dialling(side.front.url))
        await gpu.enrol_and_tell()
        await gpu.until_reachable()
        leases: list[wire.HeldLease] = []
        await stack.enter_async_context(beating(gpu, leases))
        holder = await side.holder()
        (other,) = [relay for relay in side.relays if relay is not holder]
        there = await stack.enter_async_context(side.client(other.url))

        async def answered() -> bool:
            return (await there.post("/v1/chat/completions", json=ASK)).status_code == 200

        await until(answered, 10)  # through the hop
        client = await stack.enter_async_context(side.client())
        upload: dict[str, Any] = {
            "data": {"purpose": "fine-tune"},
            "files": {"file": ("rows.jsonl", CHAT_ROW.encode())},
        }
        file_id = (await client.post("/v1/files", **upload)).json()["id"]
        job = (await client.post("/v1/fine_tuning/jobs", json={"model": BASE, "training_file": file_id})).json()["id"]
        grant = await gpu.next_grant()
        leases.append(held(grant))
        said: list[tuple[float, int | str]] = []

        async def caller(stream: bool) -> None:
            while True:
                response = await there.post("/v1/chat/completions", json={**ASK, "stream": stream})
                whole = response.text == "".join(FRAMES) + DONE if stream else "fine" in response.text
                code = response.json()["error"]["code"] if response.status_code == 503 else response.status_code
                said.append((time.monotonic(), "broke off" if response.is_success and not whole else code))

        callers = [asyncio.create_task(caller(n % 2 == 0)) for n in range(4)]
        await until(lambda: len(said) > 40, 20)
        assert {code for _, code in said} == {200}
        await holder.stop()
        killed_at = time.monotonic()

        def is_back() -> bool:
            return bool(said) and said[-1][0] > killed_at + 0.5 and [code for _, code in said[-20:]] == [200] * 20

        await until(is_back, 20)
        for task in callers:
            task.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
        assert {code for _, code in said} <= {200, "broke off", "gpu_unreachable", "no_gpu"}
        first_good = next(at for at, code in said if at > killed_at + 0.2 and code == 200)
        assert first_good - killed_at < 10
        assert await side.holder() is other
        # the lease has lost nothing: the same fence, at the other process
        assert (await again(lambda: gpu.report(grant, wire.JobEvent(seq=0, at=time.time(), message="on")))).is_success
        assert (await again(lambda: gpu.succeed(grant))).is_success
        leases.clear()
        row = (await side.rows(select(jobs.c.status, jobs.c.fence).where(jobs.c.id == job)))[0]
        assert tuple(row) == ("succeeded", grant.fence)
        await holder.start()
        again_there = await stack.enter_async_context(side.client(holder.url))

        async def answered_there() -> bool:
            return (await again_there.post("/v1/chat/completions", json=ASK)).status_code == 200

        await until(answered_there, 10)  # now it is the one that hops


GPUS = 12
Disturb = Callable[[Callable[[], None]], Awaitable[None]]  # it is given what kills a gpu


@pytest.mark.long
async def test_five_hundred_jobs_end_once_each_while_relays_workers_and_gpus_are_killed(
    tmp_path: Path, postgres: Postgres, rabbit: Rabbit
) -> None:
    dice, name = random.Random(1), postgres.new()
    async with AsyncExitStack() as stack:
        stack.callback(postgres.drop, name)
        side = Side(tmp_path, postgres.url(name, tcp=True), RELAY_BROKER_URL=rabbit.url)
        await stack.enter_async_context(side.running())
        beside = [side.beside("worker", "--concurrency", "1", name=f"worker-{n}") for n in range(2)]
        beside.append(side.beside("beat", name="beat"))
        for service in beside:
            stack.callback(service.close)
            service.start()

        async def kill(kill_gpu: Callable[[], None]) -> None:
            relay, service = dice.choice(side.relays), dice.choice(beside)
            kill_gpu()
            service.kill()
            await relay.stop()
            service.start()
            await relay.start()

        await many_jobs(side, 20, 25, kill, 5)
        lost = await side.rows(select(func.sum(jobs.c.fence - 1)))
        assert lost[0][0] >= 5, "a gpu each time"


@pytest.mark.long
async def test_a_database_that_is_restarted_and_that_crashes_under_load_loses_and_doubles_nothing(
    tmp_path: Path,
) -> None:
    """What it has said is written must be, so it writes in step; that no power fails is all that is assumed."""
    server = Postgres(port=free_port(), synchronous_commit="on")
    try:
        server.start()
        server.make_template()
        how = itertools.cycle((signal.SIGINT, signal.SIGQUIT))

        def restart() -> None:
            server.stop(next(how))
            server.start()

        async def disturb(_: Callable[[], None]) -> None:
            await asyncio.to_thread(restart)

        async with Side(tmp_path, server.url(server.new(), tcp=True)).running() as side:
            await many_jobs(side, 6, 10, disturb, 4)
    finally:
        server.close()


async def many_jobs(side: Side, users: int, jobs_each: int, disturb: Disturb, times: int) -> None:
    """All of them to their end, each once, while something happens so many times, as often as so many more are done."""
    began, all_done = time.monotonic(), asyncio.Event()
    total, told, doomed = users * jobs_each, Counter[str](), list[int]()

    def more_are_done(than: float) -> bool:
        return told.total() > than

    async def keep_disturbing() -> None:
        for number in range(times):
            await until(partial(more_are_done, number * total / times), 200)
            await disturb(partial(doomed.append, number))

    async def train() -> None:
        gpu = DoubleGpu(side.front.url, ENROL_TOKEN, Now(), [BASE])
        gpu.url = "http://127.0.0.1:9"  # alive is enough for jobs; nobody can reach it
        async with gpu.http:
            await learn(gpu)

    async def learn(gpu: DoubleGpu) -> None:
        assert (await again(gpu.enrol)).is_success
        while not all_done.is_set():
            for command in (await again(gpu.beat)).commands:
                if not isinstance(command, wire.GrantLease):
                    continue
                grant, blob = command, f"tensors of {command.job.job_id}".encode()
                event = wire.JobEvent(seq=0, at=time.time(), message="a step")
                await again(lambda grant=grant, event=event: gpu.report(grant, event))  # type: ignore[misc]
                if doomed:  # it is dead in the middle of a job, and the next that comes knows nothing of it
                    doomed.pop()
                    work.create_task(train())
                    return
                await again(lambda grant=grant, blob=blob: gpu.upload(grant, blob))  # type: ignore[misc]
                done = await again(lambda grant=grant, blob=blob: gpu.finish(grant, result_of(grant, blob)))  # type: ignore[misc]
                told[str(done.status_code)] += 1

    async def use(number: int, admin: httpx2.AsyncClient) -> None:
        made = await again(lambda: admin.post("/api/keys", json={"user": f"user-{number}"}))
        async with side.client(key=made.json()["key"]) as client:
            upload: dict[str, Any] = {
                "data": {"purpose": "fine-tune"},
                "files": {"file": ("rows.jsonl", CHAT_ROW.encode())},
            }
            file_id = (await again(lambda: client.post("/v1/files", **upload))).json()["id"]
            for n in range(jobs_each):
                await create(client, file_id, f"job{n}")

    async def create(client: httpx2.AsyncClient, file_id: str, suffix: str) -> None:
        """Once, though whether a request that broke off has come to something is not known."""
        asked = {"model": BASE, "training_file": file_id, "suffix": suffix}
        while True:
            with contextlib.suppress(*DEAD):
                if (await client.post("/v1/fine_tuning/jobs", json=asked)).status_code == 200:
                    return
            await asyncio.sleep(0.2)
            there = await again(lambda: client.get("/v1/fine_tuning/jobs?limit=100"))
            if any(job["user_provided_suffix"] == suffix for job in there.json()["data"]):
                return

    async with side.client() as admin, asyncio.timeout(240), asyncio.TaskGroup() as work:
        for _ in range(GPUS):
            work.create_task(train())
        work.create_task(keep_disturbing())
        async with asyncio.TaskGroup() as users_:
            for number in range(users):
                users_.create_task(use(number, admin))
        created_s = time.monotonic() - began

        async def over() -> bool:
            await asyncio.sleep(0.5)  # to look costs those who work
            query = select(func.count()).where(jobs.c.status == "succeeded")
            with contextlib.suppress(errors.Unavailable):  # the database may be what is disturbed
                return bool((await side.rows(query))[0][0] >= total)
            return False

        await until(over, 200)
        all_done.set()
    took_s = time.monotonic() - began
    print(f"{total} jobs: created in {created_s:.0f} s, over in {took_s:.0f} s, {told}")
    per_user = await side.rows(select(jobs.c.owner, func.count()).group_by(jobs.c.owner))
    assert [n for _, n in per_user] == [jobs_each] * users
    assert {row.status for row in await side.rows(select(jobs.c.status))} == {"succeeded"}
    assert (await side.rows(select(func.count()).select_from(models)))[0][0] == total
    ends = select(job_events.c.job_id).where(job_events.c.message.like("The job has succeeded%"))
    assert sorted(row.job_id for row in await side.rows(ends)) == sorted(
        row.id for row in await side.rows(select(jobs.c.id))
    )


@pytest.mark.long
async def test_a_real_gpu_that_dials_out_trains_and_answers_while_relays_are_killed_in_turn(
    side: Side, tiny_dir: Path, tmp_path: Path
) -> None:
    settings = {"GPU_RELAY_URL": side.front.url, "GPU_ENROL_TOKEN": ENROL_TOKEN, "GPU_TUNNEL": "relay"}
    service = Gpu(tmp_path / "gpu", {TINY: tiny_dir}, None, **settings)
    async with AsyncExitStack() as stack:
        stack.callback(service.close)
        await asyncio.to_thread(service.start)
        client = await stack.enter_async_context(side.client())

        async def asked(path: str, **body: Any) -> httpx2.Response:
            return await again(lambda: client.post(path, json=body))

        async def says() -> str:
            """Through whichever relay; empty while the gpu is not reached from there."""
            body = {"model": TINY, "prompt": "Hello", "max_tokens": 4, "temperature": 0}
            response = await asked("/v1/completions", **body)
            assert response.status_code in (200, 404, 429, 503), response.text
            return str(response.json()["choices"][0]["text"]) if response.is_success else ""

        answers = set[str]()

        async def answered() -> bool:
            answers.add(await says())
            return answers != {""}

        await until(answered, 240)
        rows = CHAT_ROW.encode() * 40
        form: dict[str, Any] = {"data": {"purpose": "fine-tune"}, "files": {"file": ("rows.jsonl", rows)}}
        file_id = (await client.post("/v1/files", **form)).json()["id"]
        chosen = {"n_epochs": 20, "batch_size": 2}
        made = await asked("/v1/fine_tuning/jobs", model=TINY, training_file=file_id, hyperparameters=chosen)
        path = f"/v1/fine_tuning/jobs/{made.json()['id']}"

        async def status() -> str:
            return str((await again(lambda: client.get(path))).json()["status"])

        async def runs() -> bool:
            return await status() == "running"

        await until(runs, 60)
        for relay in side.relays:
            await relay.stop()
            answers.add(await says())
            await relay.start()
            await until(says, 30)
            answers.add(await says())
        assert len(answers - {""}) == 1, "the same words through whichever relay"

        async def over() -> bool:
            return await status() not in ("queued", "running", "validating_files")

        await until(over, 240)
        job = (await again(lambda: client.get(path))).json()
        assert job["status"] == "succeeded", job
        row = (await side.rows(select(jobs.c.fence, jobs.c.attempts)))[0]
        assert tuple(row) == (1, 0), "no lease was lost"
