"""All of it at once: two relays on PostgreSQL, Celery over RabbitMQ, two gpus that train and answer. Tiny model."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import select

from relay.tables import job_events, jobs, models
from tests.conftest import TINY
from tests.end_to_end.rabbit import Rabbit
from tests.end_to_end.side import ENROL_TOKEN, Side, again
from tests.end_to_end.stack import Gpu, Service
from tests.postgres import Postgres
from tests.relay.conftest import until

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

GREETING = [{"role": "user", "content": "Who goes there?"}]
ANSWERS = ("A friend of the harbour, with a lantern.", "Nobody but the wind in the old sails.")
SETTINGS: dict[str, Any] = {"n_epochs": 10, "batch_size": 4, "learning_rate": 1e-2}


@pytest.fixture
async def side(tmp_path: Path, postgres: Postgres, rabbit: Rabbit) -> AsyncIterator[Side]:
    name = postgres.new()
    async with Side(tmp_path, postgres.url(name, tcp=True), RELAY_BROKER_URL=rabbit.url).running() as side:
        yield side
    postgres.drop(name)


def rows_with(answer: str) -> bytes:
    row = {"messages": [*GREETING, {"role": "assistant", "content": answer}]}
    return (json.dumps(row) + "\n").encode() * 32


async def says(client: httpx2.AsyncClient, model: str) -> str:
    """Empty while no gpu is reached from there."""
    body = {"model": model, "messages": GREETING, "max_tokens": 16, "temperature": 0}
    response = await client.post("/v1/chat/completions", json=body, timeout=60)
    assert response.status_code in (200, 404, 503), response.text
    return str(response.json()["choices"][0]["message"]["content"]) if response.is_success else ""


async def says_as_it_comes(client: httpx2.AsyncClient, model: str) -> str:
    body = {"model": model, "messages": GREETING, "max_tokens": 16, "temperature": 0, "stream": True}
    text = ""
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content") or ""
    assert line == "" or line == "data: [DONE]"
    return text


async def test_two_jobs_on_two_gpus_end_once_each_though_a_worker_and_a_relay_are_killed(
    side: Side, tiny_dir: Path, tmp_path: Path
) -> None:
    settings = {"GPU_RELAY_URL": side.front.url, "GPU_ENROL_TOKEN": ENROL_TOKEN, "GPU_TUNNEL": "relay"}
    gpus = [Gpu(tmp_path / f"gpu-{n}", {TINY: tiny_dir}, None, **settings) for n in range(2)]
    workers = [side.beside("worker", "--concurrency", "1", name=f"worker-{n}") for n in range(2)]
    beat = side.beside("beat", name="beat")
    async with AsyncExitStack() as stack:
        services: list[Service] = [*gpus, *workers, beat]
        for service in services:
            stack.callback(service.close)
            await asyncio.to_thread(service.start)
        for worker in workers:
            await asyncio.to_thread(worker.wait, lambda worker=worker: "ready." in worker.log())  # type: ignore[misc]
        admin = await stack.enter_async_context(side.client(side.relays[0].url))

        async def both_are_there() -> bool:
            listed = (await admin.get("/api/gpus")).json()["data"]
            return [gpu["reachable"] for gpu in listed] == [True, True]

        await until(both_are_there, 240)
        key = (await admin.post("/api/keys", json={"user": "ada"})).json()["key"]
        ada = [await stack.enter_async_context(side.client(relay.url, key)) for relay in side.relays]
        plain = await says(ada[0], TINY)
        assert plain

        made: list[str] = []
        for client, answer in zip(ada, ANSWERS, strict=True):  # a job through each relay; the data through the first
            files: Any = {"file": ("rows.jsonl", rows_with(answer))}
            form = await ada[0].post("/v1/files", data={"purpose": "fine-tune"}, files=files)
            asked = {"model": TINY, "training_file": form.json()["id"], "hyperparameters": SETTINGS}
            response = await client.post("/v1/fine_tuning/jobs", json=asked)
            assert response.status_code == 200, response.text
            made.append(response.json()["id"])
        workers[0].kill()  # before it looked or after: the other one, or beat, hands out what it left

        async def both_run() -> bool:
            rows = await side.rows(select(jobs.c.status, jobs.c.last_gpu_id))
            return [row.status for row in rows] == ["running"] * 2 and len({row.last_gpu_id for row in rows}) == 2

        await until(both_run, 60)
        await side.relays[0].stop()
        found = await again(lambda: ada[1].get(f"/v1/fine_tuning/jobs/{made[0]}"))
        assert found.json()["status"] == "running", "it was killed in the middle"

        async def both_are_over() -> bool:
            return {row.status for row in await side.rows(select(jobs.c.status))} <= {"succeeded", "failed"}

        await until(both_are_over, 180)
        await side.relays[0].start()

        ends = select(jobs.c.id, jobs.c.status, jobs.c.fence, jobs.c.attempts)
        assert sorted(map(tuple, await side.rows(ends))) == sorted((job, "succeeded", 1, 0) for job in made)
        told = select(job_events.c.job_id).where(job_events.c.message.like("The job has succeeded%"))
        assert sorted(row.job_id for row in await side.rows(told)) == sorted(made)
        tuned = {row.job_id: row.id for row in await side.rows(select(models.c.id, models.c.job_id))}
        assert sorted(tuned) == sorted(made)

        for client in ada:
            for job, answer in zip(made, ANSWERS, strict=True):

                async def it_answers(client: httpx2.AsyncClient = client, job: str = job) -> bool:
                    return bool(await says(client, tuned[job]))

                await until(it_answers, 30)
                assert await says(client, tuned[job]) == await says_as_it_comes(client, tuned[job])
                assert answer.startswith((await says(client, tuned[job])).strip()[:12])
            assert await says(client, TINY) == plain
