"""Jobs whose gpu, network or owner does the worst: each ends once, with what it would have had anyway."""

import asyncio
import hashlib
import json
import random
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from safetensors.torch import load_file

import wire
from tests.chaos.world import PATIENCE_S, Way, World
from tests.conftest import TINY
from tests.end_to_end.test_kills import ROWS
from tests.relay.double_gpu import BASE, DONE, FRAMES, held, result_of

OVER = ("succeeded", "failed", "cancelled")


async def start_job(world: World, n_epochs: int, model: str = TINY) -> str:
    """20 steps an epoch."""
    client = world.openai
    file = await client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    job = await client.fine_tuning.jobs.create(
        model=model,
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
    world: World, way: Way
) -> None:
    first = await world.gpu("first", way)
    await world.until_reachable("first")
    job_id = await start_job(world, n_epochs=15)
    await until_step(world, job_id, 1)
    first.signal(signal.SIGSTOP)
    await until_status(world, job_id, "queued")
    await world.gpu("second", way)
    await world.eventually(lambda: said(world, job_id, "Given to gpu 'second'"))
    fence_of_first, fence_of_second = (
        e["fence"] for e in events(world, job_id) if e["message"].startswith("Given to gpu")
    )
    before = [e["id"] for e in events(world, job_id) if e["fence"] == fence_of_first]
    first.signal(signal.SIGCONT)
    # It hears of it in answer to a report, or by a command that comes before it has reported.
    await world.eventually(lambda: not list((first.folder / "data/jobs").iterdir()))
    refused = [
        await said_late(world, "first", method, path, body) for method, path, body in late(job_id, fence_of_first)
    ]
    assert refused == [409] * len(refused)
    job = await until_status(world, job_id, *OVER)
    assert job.status == "succeeded", job.error
    assert fence_of_second > fence_of_first
    assert before == [e["id"] for e in events(world, job_id) if e["fence"] == fence_of_first]
    ended_once(world, job_id)


def late(job_id: str, fence: int) -> list[tuple[str, str, bytes]]:
    """Everything that a gpu may write of a job."""
    job, sha256 = f"/gpu/jobs/{job_id}", hashlib.sha256(b"late").hexdigest()
    event = wire.JobEvent(seq=10_000, at=time.time(), message="late")
    error = wire.JobError(message="late", code="late")
    messages = {
        "events": wire.JobEvents(fence=fence, events=[event]),
        "release": wire.Release(fence=fence, reason="drained"),
        "reserve": wire.Reservation(fence=fence, checkpoint_bytes=1, result_bytes=1, estimated_s=1),
        "finish": wire.JobResult(fence=fence, error=error),
    }
    posts = [("POST", f"{job}/{what}", message.model_dump_json().encode()) for what, message in messages.items()]
    return [*posts, *(("PUT", f"{job}/{kind}/{sha256}?fence={fence}", b"late") for kind in ("blobs", "chunks"))]


async def said_late(world: World, name: str, method: str, target: str, body: bytes) -> int:
    """What the relay answers to the gpu of that name."""
    (gpu,) = world.rows("select id, epoch, signing_key from gpus where name = ?", name)
    by = wire.SignedBy(gpu_id=gpu["id"], epoch=gpu["epoch"])
    headers = wire.sign(gpu["signing_key"], by, method, target, wire.body_sha256(body), time.time())
    return (await world.http.request(method, target, content=body, headers=headers)).status_code


KILLS = 10
EPOCHS_OF_KILLED = 50  # 1,000 steps: on a busy machine a lease takes forty before it is killed


@pytest.mark.long
@pytest.mark.timeout(900)
async def test_training_killed_at_random_steps_across_gpus_ends_with_the_same_weights(world: World, way: Way) -> None:
    """Each lease gets as far as a checkpoint, so none of the ten costs an attempt that could end the job."""
    gpus = [await world.gpu(name, way, GPU_CHECKPOINT_EVERY_S="0.05") for name in ("first", "second")]
    await world.until_reachable("first", "second")
    never_killed = await start_job(world, n_epochs=EPOCHS_OF_KILLED)
    await until_status(world, never_killed, *OVER)
    chance = random.Random(11)
    job_id = await start_job(world, n_epochs=EPOCHS_OF_KILLED)
    for _ in range(KILLS):
        await until_saved_after(world, job_id, saved_step(world, job_id))
        aim = saved_step(world, job_id) + chance.randint(0, 8)
        holder: list[dict[str, Any]] = []

        def has_come_so_far(step: int = aim, found: list[dict[str, Any]] = holder) -> bool:
            query = "select gpus.name from jobs join gpus on gpus.id = jobs.gpu_id where jobs.id = ?"
            found[:] = world.rows(query, job_id)
            return bool(found) and max(steps(world, job_id), default=0) >= step

        await world.eventually(has_come_so_far)
        (gpu,) = (gpu for gpu in gpus if gpu.name == holder[0]["name"])
        await gpu.kill()
        await gpu.start()
    job = await until_status(world, job_id, *OVER)
    assert (job.status, job.attempts) == ("succeeded", 0), job.error
    assert said(world, job_id, "Given to gpu") > KILLS
    assert weights_sha256(world, job_id) == weights_sha256(world, never_killed)
    ended_once(world, job_id)


async def until_saved_after(world: World, job_id: str, step: int) -> None:
    await world.eventually(lambda: saved_step(world, job_id) > step)


def saved_step(world: World, job_id: str) -> int:
    (row,) = world.rows("select saved_step from jobs where id = ?", job_id)
    step: int = row["saved_step"]
    return step


async def test_a_relay_killed_between_chunk_and_manifest_costs_one_checkpoint_and_no_weight(world: World) -> None:
    """Every chunk of a checkpoint is there, what says so is not: it does not exist, and the training goes on."""
    cable = await world.cable_to_relay()
    await world.gpu("first", GPU_RELAY_URL=cable.url, GPU_CHECKPOINT_EVERY_S="0.05")
    await world.until_reachable("first")
    never_disturbed = await start_job(world, n_epochs=3)
    await until_status(world, never_disturbed, *OVER)
    job_id = await start_job(world, n_epochs=3)
    await world.eventually(lambda: saved_step(world, job_id) > 0)
    cable.cut_in_the_middle("forth", of=f"POST /gpu/jobs/{job_id}/checkpoints".encode())
    await asyncio.wait_for(cable.spoiled.wait(), PATIENCE_S)
    cable.unplug()  # before it can be said again
    await world.relay.stop(signal.SIGKILL)
    before = saved_step(world, job_id)
    kept = world.rows("select step from checkpoints where job_id = ?", job_id)
    assert max(row["step"] for row in kept) == before
    await world.relay.start()
    cable.plug_in()
    assert saved_step(world, job_id) == before, "what had no manifest does not exist"
    job = await until_status(world, job_id, *OVER)
    assert (job.status, job.attempts) == ("succeeded", 0), job.error
    assert said(world, job_id, "Given to gpu") == 1
    assert weights_sha256(world, job_id) == weights_sha256(world, never_disturbed)
    ended_once(world, job_id)
    assert world.half_stored() == []


async def test_a_gpu_that_dies_in_the_middle_of_an_upload_leaves_nothing_half_and_another_ends_the_job(
    world: World, way: Way
) -> None:
    cable = await world.cable_to_relay()
    first = await world.gpu("first", way, GPU_RELAY_URL=cable.url)
    await world.until_reachable("first")
    cable.cut_in_the_middle("forth", of=RESULT)
    job_id = await start_job(world, n_epochs=1)
    await asyncio.wait_for(cable.spoiled.wait(), PATIENCE_S)
    await first.kill()
    await world.gpu("second")
    job = await until_status(world, job_id, *OVER)
    assert job.status == "succeeded", job.error
    ended_once(world, job_id)
    assert world.half_stored() == []
    assert named(world) <= {path.name for path in world.blobs()}
    for path in world.blobs():  # what the first one had sent is whole, and left to the sweep
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name


async def test_an_upload_that_is_cut_goes_on_and_costs_no_attempt(world: World, way: Way) -> None:
    cable = await world.cable_to_relay()
    await world.gpu("first", way, GPU_RELAY_URL=cable.url)
    await world.until_reachable("first")
    cable.cut_in_the_middle("forth", of=RESULT)
    job_id = await start_job(world, n_epochs=1)
    await asyncio.wait_for(cable.spoiled.wait(), PATIENCE_S)
    job = await until_status(world, job_id, *OVER)
    assert (job.status, job.attempts) == ("succeeded", 0)
    assert said(world, job_id, "Given to gpu") == 1
    ended_once(world, job_id)
    assert world.half_stored() == []


async def test_a_byte_flipped_on_its_way_is_noticed_and_sent_again(world: World, way: Way) -> None:
    cable = await world.cable_to_relay()
    await world.gpu("first", way, GPU_RELAY_URL=cable.url)
    await world.until_reachable("first")
    cable.flip("forth", after=RESULT)
    job_id = await start_job(world, n_epochs=1)
    await asyncio.wait_for(cable.spoiled.wait(), PATIENCE_S)
    job = await until_status(world, job_id, *OVER)
    assert job.status == "succeeded", job.error
    ended_once(world, job_id)
    for path in world.blobs():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name


RESULT = b'lora_A.weight":{"'  # in the head of the adapter's file


def named(world: World) -> set[str]:
    """Blobs that something names."""
    found = {row["sha256"] for row in world.rows("select sha256 from files")}
    for row in world.rows("select json_extract(adapter, '$.files') as files from models"):
        found |= {file["sha256"] for file in json.loads(row["files"])}
    return found


@pytest.mark.parametrize("same", [True, False])
async def test_of_two_results_at_once_one_counts(world: World, same: bool, way: Way) -> None:
    gpu = await world.double(way, fine)
    job_id = await start_job(world, n_epochs=1, model=BASE)
    grant = await gpu.next_grant()
    blobs = [b"the trained tensors", b"the trained tensors" if same else b"others"]
    for blob in blobs:
        assert (await gpu.upload(grant, blob)).status_code == 200
    answers = await asyncio.gather(*(gpu.finish(grant, result_of(grant, blob)) for blob in blobs for _ in range(3)))
    statuses = [answer.status_code for answer in answers]
    if same:
        assert statuses == [200] * 6
        assert len({answer.json()["fine_tuned_model"] for answer in answers}) == 1
    else:
        assert sorted(statuses) == [200] * 3 + [409] * 3
    (model,) = world.rows("select json_extract(adapter, '$.files[0].sha256') as sha256 from models")
    winner = blobs[0] if statuses[0] == 200 else blobs[1]
    assert model["sha256"] == hashlib.sha256(winner).hexdigest()
    assert said(world, job_id, "The job has succeeded") == 1


@pytest.mark.parametrize("state", ["queued", "leased", "running", "finalizing"])
async def test_a_job_is_cancelled_in_every_state_and_its_gpu_is_told_409(world: World, state: str) -> None:
    gpu = await world.double("http", fine)
    busy_with = await start_job(world, n_epochs=1, model=BASE) if state == "queued" else None
    grant = await gpu.next_grant() if busy_with else None
    job_id = await start_job(world, n_epochs=1, model=BASE)
    if grant is None:
        grant = await gpu.next_grant()
        if state in ("running", "finalizing"):
            event = wire.JobEvent(seq=0, at=time.time(), message="a tenth is done")
            assert (await gpu.report(grant, event)).status_code == 200
        if state == "finalizing":
            assert (await gpu.upload(grant, b"half of it")).status_code == 200
    assert world.rows("select status from jobs where id = ?", job_id) == [{"status": state}]
    assert (await world.openai.fine_tuning.jobs.cancel(job_id)).status == "cancelled"
    if state != "queued":
        cancel = wire.CancelLease(job_id=job_id, fence=grant.fence)
        assert cancel in (await gpu.beat(held(grant))).commands
        refused = [
            await gpu.report(grant),
            await gpu.upload(grant, b"more"),
            await gpu.finish(grant, result_of(grant, b"x")),
        ]
        assert [answer.status_code for answer in refused] == [409] * 3
    again = await world.http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
    assert again.status_code == 409
    assert (await job_of(world, job_id)).status == "cancelled"
    assert world.rows("select id from models") == []
    if busy_with:
        assert (await gpu.succeed(grant)).status_code == 200, "the other job is untouched"
    else:
        next_id = await start_job(world, n_epochs=1, model=BASE)
        assert (await gpu.next_grant()).job.job_id == next_id


async def test_a_training_gpu_hears_of_a_cancel_and_takes_the_next_job(world: World) -> None:
    gpu = await world.gpu("first")
    await world.until_reachable("first")
    long, waiting = await start_job(world, n_epochs=100), await start_job(world, n_epochs=1)
    await until_step(world, long, 1)
    assert (await world.openai.fine_tuning.jobs.cancel(long)).status == "cancelled"
    assert (await until_status(world, waiting, *OVER)).status == "succeeded"
    ended_once(world, waiting)
    await world.eventually(lambda: not list((gpu.folder / "data/jobs").iterdir()))  # nothing half stays


async def test_a_modest_users_job_is_not_behind_all_of_a_greedy_ones(world: World) -> None:
    await world.gpu("only")
    await world.until_reachable("only")
    made = (await world.http.post("/api/keys", json={"user": "modest", "name": "modest's"})).json()
    greedy = [await start_job(world, n_epochs=1) for _ in range(6)]
    async with world.client(made["key"]) as client:
        file = await client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
        layers = {"layers": {"method": "lora", "parts": ["attn"], "rank": 4}}
        modest = await client.fine_tuning.jobs.create(
            model=TINY, training_file=file.id, hyperparameters={"n_epochs": 1, "batch_size": 2}, extra_body=layers
        )
    for job_id in greedy:
        assert (await until_status(world, job_id, *OVER)).status == "succeeded", "who is greedy is served too"
    order = [row["id"] for row in world.rows("select id from jobs order by finished_at")]
    assert order.index(modest.id) <= 2, "behind the one that ran and one more at most"
    for job_id in (*greedy, modest.id):
        ended_once(world, job_id)


async def fine(body: bytes) -> AsyncIterator[str]:
    for frame in (*FRAMES, DONE):
        yield frame
