"""Jobs whose gpu, network or owner does the worst: each ends once, with what it would have had anyway."""

import hashlib
import json
import signal
from typing import Any

from safetensors.torch import load_file

from tests.chaos.world import Way, World
from tests.conftest import TINY
from tests.end_to_end.test_kills import ROWS

OVER = ("succeeded", "failed", "cancelled")


async def start_job(world: World, n_epochs: int, key: str | None = None) -> str:
    """20 steps an epoch."""
    client = world.openai
    file = await client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    job = await client.fine_tuning.jobs.create(
        model=TINY,
        training_file=file.id,
        seed=3,
        hyperparameters={"n_epochs": n_epochs, "batch_size": 2},
        extra_body={"layers": {"method": "lora", "parts": ["attn", "mlp"], "rank": 4}},
    )
    return job.id


async def job_of(world: World, job_id: str) -> Any:
    return await world.openai.fine_tuning.jobs.retrieve(job_id)


async def until_status(world: World, job_id: str, *statuses: str) -> Any:
    async def there() -> bool:
        return (await job_of(world, job_id)).status in statuses

    await world.eventually(there)
    return await job_of(world, job_id)


async def until_step(world: World, job_id: str, step: int) -> None:
    def trained() -> bool:
        return any(at >= step for at in steps(world, job_id))

    await world.eventually(trained)


def events(world: World, job_id: str) -> list[dict[str, Any]]:
    return world.rows("select * from job_events where job_id = ? order by id", job_id)


def steps(world: World, job_id: str) -> list[int]:
    """As metrics tell them, in the order of arrival."""
    found = world.rows(
        "select json_extract(data, '$.step') as step from job_events"
        " where job_id = ? and type = 'metrics' and json_extract(data, '$.train_loss') is not null order by id",
        job_id,
    )
    return [row["step"] for row in found]


def said(world: World, job_id: str, words: str) -> int:
    return sum(words in event["message"] for event in events(world, job_id))


def weights_sha256(world: World, job_id: str) -> str:
    """Of every trained tensor, as the relay keeps them."""
    (model,) = world.rows("select json_extract(adapter, '$.files') as files from models where job_id = ?", job_id)
    files = [world.blob(file["sha256"]) for file in json.loads(model["files"]) if file["name"].endswith(".safetensors")]
    digest = hashlib.sha256()
    for file in files:
        for name, tensor in sorted(load_file(file).items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
    assert files
    return digest.hexdigest()


def ended_once(world: World, job_id: str) -> None:
    """One model, one word of success, each event once."""
    assert len(world.rows("select id from models where job_id = ?", job_id)) == 1
    assert said(world, job_id, "The job has succeeded") == 1
    for fence in {event["fence"] for event in events(world, job_id)}:
        seqs = [e["seq"] for e in events(world, job_id) if e["fence"] == fence and e["seq"] is not None]
        assert sorted(seqs) == list(range(len(seqs))), "an event is missing, or is there twice"


async def test_a_tunnel_that_is_down_while_heartbeats_go_on_restarts_no_job(world: World, way: Way) -> None:
    cable = await world.cable(way)
    await world.gpu("first", way, cable)
    await world.until_reachable("first")
    job_id = await start_job(world, n_epochs=20)
    await until_step(world, job_id, 1)
    cable.unplug()

    async def cut_off() -> bool:
        await world.http.post("/v1/completions", json={"model": TINY, "prompt": "Hi", "max_tokens": 1})
        gpu = await world.listed("first")
        return gpu["alive"] and not gpu["reachable"]

    await world.eventually(cut_off)
    job = await until_status(world, job_id, *OVER)
    assert job.status == "succeeded", job.error
    gpu = await world.listed("first")
    assert gpu["alive"]
    assert not gpu["reachable"]
    cable.plug_in()
    await world.until_reachable("first")
    assert steps(world, job_id) == list(range(1, 401))
    assert said(world, job_id, "Given to gpu") == 1
    ended_once(world, job_id)


async def test_a_gpu_stopped_past_its_lease_and_continued_writes_nothing_more_and_the_job_is_done_once(
    world: World,
) -> None:
    first = await world.gpu("first")
    await world.until_reachable("first")
    job_id = await start_job(world, n_epochs=30)
    await until_step(world, job_id, 1)
    first.signal(signal.SIGSTOP)
    await until_status(world, job_id, "queued")
    await world.gpu("second")
    await world.eventually(lambda: said(world, job_id, "Given to gpu 'second'"))
    fence_of_first, fence_of_second = (
        e["fence"] for e in events(world, job_id) if e["message"].startswith("Given to gpu")
    )
    before = [e["id"] for e in events(world, job_id) if e["fence"] == fence_of_first]
    first.signal(signal.SIGCONT)
    await world.eventually(lambda: "is not ours any more" in first.log())
    job = await until_status(world, job_id, *OVER)
    assert job.status == "succeeded", job.error
    assert fence_of_second > fence_of_first
    assert before == [e["id"] for e in events(world, job_id) if e["fence"] == fence_of_first]
    ended_once(world, job_id)
    refused = [line for line in world.relay.log.splitlines() if f"/gpu/jobs/{job_id}" in line and " 409 " in line]
    assert refused
    assert not list((first.folder / "data/jobs").iterdir()), "what it had of the job is gone"
