"""Room: a user's share, what jobs set aside before they need it, and what is refused past either."""

import hashlib
import shutil
from typing import Any

import httpx2
import openai
import pytest

import wire
from tests.relay.conftest import CHAT_ROW, Relay
from tests.relay.double_gpu import BASE, DoubleGpu, result_of

ON_BOTH_DATABASES = True
BESIDES = 4 * 2**20  # set aside for any job


async def granted(relay: Relay, gpu: DoubleGpu) -> wire.GrantLease:
    await relay.openai.fine_tuning.jobs.create(model=BASE, training_file=await relay.upload())
    return await gpu.next_grant()


async def reserve(gpu: DoubleGpu, grant: wire.GrantLease, checkpoint: int, result: int = 0) -> httpx2.Response:
    message = wire.Reservation(fence=grant.fence, checkpoint_bytes=checkpoint, result_bytes=result, estimated_s=60)
    return await gpu.call("POST", f"/gpu/jobs/{grant.job.job_id}/reserve", message)


async def send_chunk(gpu: DoubleGpu, grant: wire.GrantLease, chunk: bytes) -> httpx2.Response:
    target = f"/gpu/jobs/{grant.job.job_id}/chunks/{hashlib.sha256(chunk).hexdigest()}?fence={grant.fence}"
    return await gpu.call("PUT", target, chunk)


def checkpoint_of(step: int, *chunks: bytes) -> wire.Checkpoint:
    refs = [wire.ChunkRef(sha256=hashlib.sha256(c).hexdigest(), bytes=len(c)) for c in chunks]
    whole = b"".join(chunks)
    sha256 = hashlib.sha256(whole).hexdigest()
    file = wire.ChunkedFile(name="state.safetensors", sha256=sha256, bytes=len(whole), chunks=refs)
    return wire.Checkpoint(step=step, total_steps=9, made_on="cpu float32", files=[file])


async def store(gpu: DoubleGpu, grant: wire.GrantLease, step: int, *chunks: bytes) -> httpx2.Response:
    message = wire.CheckpointStored(fence=grant.fence, checkpoint=checkpoint_of(step, *chunks))
    return await gpu.call("POST", f"/gpu/jobs/{grant.job.job_id}/checkpoints", message)


async def storage(relay: Relay) -> dict[str, Any]:
    found: dict[str, Any] = (await relay.http.get("/api/me")).json()["storage"]
    return found


def code(response: httpx2.Response) -> str:
    return str(response.json()["error"]["code"])


async def test_usage_tells_what_files_models_and_jobs_use(relay: Relay, gpu: DoubleGpu) -> None:
    grant = await granted(relay, gpu)
    size = len(CHAT_ROW * 3)
    assert (await reserve(gpu, grant, 1000, 500)).json() == {"reserved_bytes": 4500 + BESIDES}
    assert await storage(relay) == {
        "quota_bytes": 20 * 2**30,
        "used_bytes": size + 4500 + BESIDES,
        "files_bytes": size,
        "models_bytes": 0,
        "jobs_bytes": 4500 + BESIDES,
    }
    await gpu.succeed(grant, b"the trained tensors")
    after = await storage(relay)
    assert (after["jobs_bytes"], after["models_bytes"]) == (0, 19)


async def test_data_that_only_a_job_keeps_still_counts(relay: Relay, gpu: DoubleGpu) -> None:
    file = await relay.upload()
    await relay.openai.fine_tuning.jobs.create(model=BASE, training_file=file)
    await relay.openai.files.delete(file)
    used = await storage(relay)
    assert (used["files_bytes"], used["jobs_bytes"]) == (0, len(CHAT_ROW * 3))


@pytest.mark.parametrize("told", [True, False])
async def test_a_file_past_the_quota_is_refused_with_what_to_delete(start_relay: Any, told: bool) -> None:
    relay = await start_relay(user_quota_bytes=1000)
    await relay.upload(CHAT_ROW * 3)
    form = httpx2.Request("POST", relay.url, data={"purpose": "fine-tune"}, files={"file": ("a", b"x" * 100_000)})
    body, sent = form.read(), 0

    async def chunks() -> Any:
        nonlocal sent
        for at in range(0, len(body), 1000):
            sent = at
            yield body[at : at + 1000]

    headers = {"content-type": form.headers["content-type"]}
    response = await relay.http.post("/v1/files", content=body if told else chunks(), headers=headers)
    assert (response.status_code, code(response)) == (413, "quota_exceeded")
    assert "Delete files or models" in response.json()["error"]["message"]
    assert len(relay.stored()) == 1


async def test_a_full_quota_refuses_the_next_file_and_takes_it_after_a_deletion(start_relay: Any) -> None:
    relay = await start_relay(user_quota_bytes=len(CHAT_ROW * 3) + 10)
    file = await relay.upload(CHAT_ROW * 3)
    with pytest.raises(openai.APIStatusError) as caught:
        await relay.upload(CHAT_ROW)
    assert (caught.value.status_code, caught.value.code) == (413, "quota_exceeded")
    await relay.openai.files.delete(file)
    await relay.upload(CHAT_ROW)


async def test_a_job_that_would_pass_the_quota_is_refused_before_its_first_step(start_relay: Any) -> None:
    relay = await start_relay(user_quota_bytes=BESIDES + 5000)
    async with relay.gpu() as gpu:
        grant = await granted(relay, gpu)
        assert (await reserve(gpu, grant, 1000)).status_code == 200
        assert (await reserve(gpu, grant, 1100)).status_code == 200  # its own does not count twice
        refused = await reserve(gpu, grant, 2000)
        assert (refused.status_code, code(refused)) == (413, "quota_exceeded")


async def test_two_reservations_do_not_count_the_same_free_disk(start_relay: Any) -> None:
    relay = await start_relay(user_quota_bytes=0)
    most = (shutil.disk_usage(relay.settings.data_dir).free - relay.settings.min_free_bytes) * 3 // 4
    async with relay.gpu() as gpu:
        first = await granted(relay, gpu)
        assert (await reserve(gpu, first, most // 4)).status_code == 200
        async with relay.gpu() as other:
            second = await granted(relay, other)
            assert code(await reserve(other, second, most // 4)) == "disk_full"
            assert (await reserve(other, second, 1000)).status_code == 200
            await relay.openai.fine_tuning.jobs.cancel(first.job.job_id)
            assert (await reserve(other, second, most // 4)).status_code == 200


async def test_chunks_past_the_reservation_are_refused_and_cost_one_checkpoint(relay: Relay, gpu: DoubleGpu) -> None:
    grant = await granted(relay, gpu)
    assert (await reserve(gpu, grant, 1000)).status_code == 200
    big = [bytes([n]) * 2**21 for n in range(3)]  # of a checkpoint that is never completed
    assert [(await send_chunk(gpu, grant, chunk)).status_code for chunk in big] == [200, 200, 413]
    assert (await store(gpu, grant, 1, big[0])).status_code == 200  # still here, and named now
    assert (await send_chunk(gpu, grant, b"small")).status_code == 200
    assert (await store(gpu, grant, 2, b"small")).json() == {"kept": [2, 1]}
    assert (await gpu.succeed(grant)).status_code == 200


async def test_a_chunk_past_the_reservation_says_so(relay: Relay, gpu: DoubleGpu) -> None:
    grant = await granted(relay, gpu)
    assert (await reserve(gpu, grant, 1)).status_code == 200
    refused = await send_chunk(gpu, grant, b"x" * (BESIDES + 100))
    assert (refused.status_code, code(refused)) == (413, "over_reservation")
    assert "set 4,194,308 bytes aside and has stored 0" in refused.json()["error"]["message"]


async def test_a_result_past_the_reservation_is_refused(relay: Relay, gpu: DoubleGpu) -> None:
    grant = await granted(relay, gpu)
    assert (await reserve(gpu, grant, 0, 10)).status_code == 200
    refused = await gpu.upload(grant, b"x" * (BESIDES + 11))
    assert (refused.status_code, code(refused)) == (413, "over_reservation")
    assert (await gpu.upload(grant, b"x" * (BESIDES + 10))).status_code == 200
    assert (await gpu.finish(grant, result_of(grant, b"x" * (BESIDES + 10)))).status_code == 200


async def test_without_a_reservation_a_result_is_bound_by_the_owners_quota(start_relay: Any) -> None:
    relay = await start_relay(user_quota_bytes=1000)
    async with relay.gpu() as gpu:
        grant = await granted(relay, gpu)
        refused = await gpu.upload(grant, b"x" * 1000)
        assert (refused.status_code, code(refused)) == (413, "quota_exceeded")
        assert (await gpu.succeed(grant)).status_code == 200
