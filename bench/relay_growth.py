"""How the database's times grow with gpus and jobs, measured through the relay's own classes on SQLite in a file.

Every job that succeeded has a model, so that what is removed is one of as many.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from sqlalchemy import insert

import wire
from relay.blobs import FolderBlobs
from relay.gpu_client import GpuClient
from relay.gpus import Gpus
from relay.jobs import Jobs
from relay.leases import Leases
from relay.models import Models
from relay.settings import Settings
from relay.store import Store
from relay.tables import base_models, blob_refs, gpus, jobs, models, offers, users
from relay.transport import TunnelTransport

N_MODELS, N_USERS = 10, 50
QUEUED_EVERY = 100  # one job in so many still waits; as many again run, up to one a gpu
TIMES = 40


def _model(number: int) -> str:
    return f"lab/model-{number % N_MODELS}"


async def _fill(store: Store, n_gpus: int, n_jobs: int, now: float) -> None:
    device = {"kind": "cuda", "name": "T4", "memory_bytes": 1, "free_bytes": 1, "precision": "fp16"}
    people = [{"id": f"user-{u}", "name": f"user{u}", "created_at": now} for u in range(N_USERS)]
    bases = [
        {"id": _model(m), "family": "llama", "n_layers": 8, "context_tokens": 1024, "created_at": now}
        for m in range(N_MODELS)
    ]
    machines = [
        {
            "id": f"gpu-{g}",
            "instance_sha256": f"{g:064}",
            "epoch": 1,
            "signing_key": "k",
            "process": "p" * 16,
            "name": f"gpu {g}",
            "url": None,  # nothing is to be challenged
            "tunnel": "none",
            "device": device,
            "families": ["llama"],
            "free_bytes": 2**34,
            "enrolled_at": now,
            "last_seen_at": now + 3600,  # throughout, however long this takes
        }
        for g in range(n_gpus)
    ]
    offered = [{"gpu_id": f"gpu-{g}", "model_id": _model(g), "loaded": True} for g in range(n_gpus)]
    blob = {"name": "rows.jsonl", "sha256": "0" * 64, "bytes": 1}
    work: list[dict[str, Any]] = [
        {
            "id": f"ftjob-{j}",
            "owner": f"user-{j % N_USERS}",
            "status": "queued" if j % QUEUED_EVERY == 0 else "succeeded",
            "base_model": _model(j // QUEUED_EVERY),
            "layers": [{"layers": "all"}],
            "hyperparameters": {},
            "seed": 1,
            "training_file": "file-1",
            "training_blob": blob,
            "created_at": now - n_jobs + j,
        }
        for j in range(n_jobs)
    ]
    tuned = [_tuned(job, number) for number, job in enumerate(work) if job["status"] == "succeeded"]
    names = [
        {"kind": "model", "holder": model["id"], "owner": model["owner"], "sha256": file["sha256"], "bytes": 1}
        for model in tuned
        for file in model["adapter"]["files"]
    ]
    async with store.write() as db:
        for table, rows in (
            (users, people),
            (base_models, bases),
            (gpus, machines),
            (offers, offered),
            (jobs, work),
            (models, tuned),
            (blob_refs, names),
        ):
            await db.execute(insert(table), rows)


def _tuned(job: dict[str, Any], number: int) -> dict[str, Any]:
    files = [{"name": f"adapter.{part}", "sha256": f"{part}{number:063}", "bytes": 1} for part in range(2)]
    adapter = {"base_model": job["base_model"], "base_revision": "r", "files": files}
    shared = {field: job[field] for field in ("owner", "base_model", "created_at")}
    return {"id": f"ft:{number}", "job_id": job["id"], "adapter": adapter, **shared}


async def _median_ms(do: Callable[[int], Awaitable[object]]) -> float:
    await do(0)
    took = []
    for number in range(1, TIMES + 1):
        began = time.perf_counter()
        await do(number)
        took.append(1000 * (time.perf_counter() - began))
    return statistics.median(took)


async def _times_ms(folder: Path, n_gpus: int, n_jobs: int) -> dict[str, float]:
    settings, clock = Settings(data_dir=folder), time.time
    store, blobs = Store(settings.database), FolderBlobs(folder / "blobs")
    await store.open()
    blobs.open()
    try:
        await _fill(store, n_gpus, n_jobs, clock())
        known = Gpus(store, GpuClient(TunnelTransport(allow_loopback=True), clock), settings, clock)
        leases, listed = Leases(store, blobs, settings, clock), Jobs(store, blobs, clock)

        async def claim(_: int) -> None:
            match = await leases.next_match()
            assert match is not None
            assert await leases.claim(match) is not None

        async def heartbeat(number: int) -> None:
            which = number * 7 % n_gpus
            model = wire.OfferedModel(id=_model(which), family="llama", n_layers=8, context_tokens=1024, loaded=True)
            by = wire.SignedBy(gpu_id=f"gpu-{which}", epoch=1)
            await known.heard(by, wire.Heartbeat(free_bytes=1, models=[model], leases=[], active_requests=0))
            await leases.renew(by, [])
            await leases.commands(by, [])

        async def list_jobs(number: int) -> None:
            rows, _ = await listed.page(f"user-{number % N_USERS}", None, 20)
            assert len(rows) == 20
            await listed.page(f"user-{number % N_USERS}", rows[-1].id, 20)

        async def list_gpus(_: int) -> None:
            assert await known.known()
            await listed.on_gpus()

        tuned = Models(store, blobs, settings, clock, list)

        async def remove_model(number: int) -> None:
            which = 1 + number * QUEUED_EVERY  # a job that did not wait
            await tuned.delete(f"user-{which % N_USERS}", f"ft:{which}")

        return {
            "removal": await _median_ms(remove_model),
            "claim": await _median_ms(claim),
            "heartbeat": await _median_ms(heartbeat),
            "list of jobs": await _median_ms(list_jobs),
            "list of gpus": await _median_ms(list_gpus),
        }
    finally:
        blobs.close()
        await store.close()


async def _growth(folder: Path) -> tuple[float, float]:
    for name in ("large", "gpus", "jobs"):
        (folder / name).mkdir()
    large = await _times_ms(folder / "large", 1000, 100_000)
    tenth_gpus = await _times_ms(folder / "gpus", 100, 100_000)
    tenth_jobs = await _times_ms(folder / "jobs", 1000, 10_000)
    for what, ms in large.items():
        print(
            f"  {what:12} {ms:7.2f} ms with 1,000 gpus and 100,000 jobs; "
            f"{tenth_gpus[what]:7.2f} ms with 100 gpus, {tenth_jobs[what]:7.2f} ms with 10,000 jobs"
        )
    gpu_ratio, job_ratio = (max(large[what] / few[what] for what in large) for few in (tenth_gpus, tenth_jobs))
    return round(gpu_ratio, 2), round(job_ratio, 2)


def growth() -> tuple[float, float]:
    """The worst of the operations' ratios: 1,000 gpus to 100, and 100,000 jobs to 10,000."""
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(_growth(Path(folder)))
