"""What relays carry behind nginx: one process on SQLite, one on PostgreSQL, two on PostgreSQL.

Whole answers, streams and memory by the stub gpu and the load of `bench.relay`. Jobs by gpus that enrol, beat and
upload over the real protocol and train nothing: what a relay does for a job, not what a gpu needs for one. All three
set-ups run at the same time, and are loaded in turn.

How many times one process's requests/s two have at most is bounded by the cores: it is computed from the CPU time that
a request took of all processes together, PostgreSQL's, nginx's, the stub's and the load's own included.
"""

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import psutil

import wire
from bench.relay_load import Target
from bench.relay_stub import MODEL
from bench.relay_ways import ADMIN_KEY, CONNECTIONS, ENROL_TOKEN, answers, load, nginx, relay, resident_mb, stub, until
from tests.end_to_end.stack import free_port
from tests.postgres import Postgres
from tests.relay.conftest import CHAT_ROW
from tests.relay.double_gpu import BASE, DoubleGpu, result_of

N_GPUS, N_USERS, JOBS_EACH = 12, 20, 10
STREAMS = (200, 500, 1000)
NOWHERE = "http://127.0.0.1:9"  # alive is enough for jobs; nobody can reach these gpus


@dataclass(frozen=True)
class SetUp:
    name: str
    target: Target  # nginx
    relays: list[int]  # process ids
    others: list[int]  # of all else that a request is worked on by, without the load


def cpu_s(pids: list[int]) -> float:
    """Of these processes and of their children that still run."""
    trees = [[process, *process.children(recursive=True)] for process in map(psutil.Process, pids)]
    times = [process.cpu_times() for tree in trees for process in tree]
    return float(sum(spent.user + spent.system for spent in times))


@contextmanager
def set_up(folder: Path, name: str, n_relays: int, database: Postgres | None) -> Iterator[SetUp]:
    folder.mkdir()
    with ExitStack() as stack:
        others, urls, pids = list[int](), list[str](), list[int]()
        shared = {"RELAY_DATABASE_URL": database.url(database.new())} if database else {}
        if database:
            assert database.process
            others.append(database.process.pid)
        for number in range(n_relays):
            port = str(free_port())
            own = {"RELAY_PORT": port, "RELAY_INTERNAL_URL": f"http://127.0.0.1:{port}"} if database else {}
            url, pid = stack.enter_context(relay(folder, f"relay-{number}", **shared, **own))
            urls.append(url)
            pids.append(pid)
        _, pid = stack.enter_context(stub(folder, urls[0]))
        others.append(pid)
        for number, url in enumerate(urls):
            until(partial(answers, Target(url, ADMIN_KEY, MODEL)), folder / f"relay-{number}.log")
        target, pid = stack.enter_context(nginx(folder, "nginx", ADMIN_KEY, *urls))
        yield SetUp(name, target, pids, [*others, pid])


async def jobs_per_minute(url: str) -> float:
    """From the first that is created to the last that has succeeded; N_USERS create while N_GPUS work."""
    left, over = N_USERS * JOBS_EACH, asyncio.Event()

    async def train(gpu: DoubleGpu) -> None:
        nonlocal left
        while not over.is_set():
            for command in (await gpu.beat()).commands:
                if isinstance(command, wire.GrantLease):
                    blob = f"tensors of {command.job.job_id}".encode()
                    (
                        await gpu.report(command, wire.JobEvent(seq=0, at=time.time(), message="a step"))
                    ).raise_for_status()
                    (await gpu.upload(command, blob)).raise_for_status()
                    (await gpu.finish(command, result_of(command, blob))).raise_for_status()
                    left -= 1
                    if not left:
                        over.set()

    async def use(admin: httpx2.AsyncClient, number: int) -> None:
        key = (await admin.post("/api/keys", json={"user": f"user-{number}"})).raise_for_status().json()["key"]
        async with client(key) as user:
            form: dict[str, Any] = {
                "data": {"purpose": "fine-tune"},
                "files": {"file": ("rows.jsonl", CHAT_ROW.encode())},
            }
            file_id = (await user.post("/v1/files", **form)).raise_for_status().json()["id"]
            for _ in range(JOBS_EACH):
                order = {"model": BASE, "training_file": file_id}
                (await user.post("/v1/fine_tuning/jobs", json=order)).raise_for_status()

    def client(key: str) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(
            base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=30, trust_env=False, verify=False
        )

    async with AsyncExitStack() as stack:
        admin = await stack.enter_async_context(client(ADMIN_KEY))
        gpus = [DoubleGpu(url, ENROL_TOKEN, time.time, [BASE]) for _ in range(N_GPUS)]
        for gpu in gpus:
            gpu.url = NOWHERE
            stack.push_async_callback(gpu.http.aclose)
            (await gpu.enrol()).raise_for_status()
        working = [asyncio.create_task(train(gpu)) for gpu in gpus]
        began = time.perf_counter()
        async with asyncio.timeout(300):
            await asyncio.gather(*(use(admin, number) for number in range(N_USERS)))
            await over.wait()
        took_s = time.perf_counter() - began
        for task in working:  # their heartbeats are held for seconds
            task.cancel()
        await asyncio.gather(*working, return_exceptions=True)
    return 60 * N_USERS * JOBS_EACH / took_s


def sizes(repetitions: int, seconds: float) -> dict[str, float]:
    """Prints the table; the keys of the bench's last line."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        database = stack.enter_context(closing(Postgres(fsync="on", synchronous_commit="on", full_page_writes="on")))
        database.start()
        database.make_template()
        print("what relays carry behind nginx:", flush=True)
        kinds = (("one, SQLite", 1, None), ("one, PostgreSQL", 1, database), ("two, PostgreSQL", 2, database))
        set_ups = [stack.enter_context(set_up(folder / name.replace(", ", "-"), name, n, on)) for name, n, on in kinds]
        idle_mb = {each.name: max(map(resident_mb, each.relays)) for each in set_ups}
        rps: dict[str, list[float]] = {each.name: [] for each in set_ups}
        cost_ms: dict[str, list[float]] = {each.name: [] for each in set_ups}
        for each in set_ups:
            load("flood", each.target, connections=4, seconds=1)  # warm
        for _ in range(repetitions):
            for each in set_ups:
                before = cpu_s([*each.relays, *each.others])
                run = load("flood", each.target, connections=CONNECTIONS, seconds=seconds)
                spent = cpu_s([*each.relays, *each.others]) - before + run["cpu_s"]
                rps[each.name].append(run["rps"])
                cost_ms[each.name].append(1000 * spent / (run["rps"] * seconds))
        for each in set_ups:
            streams = {n: load("streams", each.target, n=n) for n in STREAMS}
            jobs = asyncio.run(jobs_per_minute(each.target.url))
            late = " ".join(f"{n}: {run['late_p99_ms']:.0f} ms, {run['lost']} lost;" for n, run in streams.items())
            print(
                f"  {each.name:16} {statistics.median(rps[each.name]):6.0f} requests/s of "
                f"{statistics.median(cost_ms[each.name]):.2f} ms CPU, {jobs:5.0f} jobs/minute, frames late at {late} "
                f"{idle_mb[each.name]:.0f} MB idle, {max(map(resident_mb, each.relays)):.0f} MB after",
                flush=True,
            )
        one, two = (statistics.median(rps[each.name]) for each in set_ups[1:])
        allowed = 1000 * (os.cpu_count() or 1) / statistics.median(cost_ms[set_ups[2].name]) / one
        print(f"  two against one: {two / one:.2f}; these {os.cpu_count()} cores allow {allowed:.2f}", flush=True)
    return {"rps_two_vs_one": round(two / one, 2), "rps_two_vs_one_allowed": round(min(2.0, allowed), 2)}
