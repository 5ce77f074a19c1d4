"""Which gpu gets a job, by its memory too; and a job that waits says for what."""

from typing import Any

import wire
from tests.relay.conftest import Relay
from tests.relay.double_gpu import BASE, DoubleGpu, held

ON_BOTH_DATABASES = True
NEEDED = 8 * 2**30


async def create(relay: Relay) -> str:
    return (await relay.openai.fine_tuning.jobs.create(model=BASE, training_file=await relay.upload())).id


async def shown(relay: Relay, job_id: str) -> dict[str, Any]:
    found: dict[str, Any] = (await relay.http.get(f"/v1/fine_tuning/jobs/{job_id}")).json()
    return found


async def reason(relay: Relay, job_id: str) -> str | None:
    waits = (await shown(relay, job_id))["waiting_for"]
    return waits["reason"] if waits else None


async def enrol(gpu: DoubleGpu, **changes: Any) -> None:
    """Anew, with other facts."""
    asked = gpu.enrol_request()
    if memory := changes.pop("memory_bytes", None):
        changes["device"] = asked.device.model_copy(update={"memory_bytes": memory})
    changed = asked.model_copy(update=changes)
    gpu.enrol_request = lambda *_: changed  # type: ignore[method-assign]
    assert (await gpu.enrol()).status_code == 200


async def does_not_fit(gpu: DoubleGpu, grant: wire.GrantLease, needed: int = NEEDED) -> None:
    error = wire.JobError(message="It needs 8 GiB.", code="out_of_memory", retry=True, needed_bytes=needed)
    assert (await gpu.finish(grant, wire.JobResult(fence=grant.fence, error=error))).status_code == 200


async def test_a_job_that_waits_says_for_what(relay: Relay, gpu: DoubleGpu) -> None:
    running = await create(relay)
    grant = await gpu.next_grant()
    waiting = await create(relay)
    assert await reason(relay, running) is None
    assert await reason(relay, waiting) == "gpus_busy"
    listed = (await relay.http.get("/v1/fine_tuning/jobs")).json()["data"]
    assert {job["id"]: job["waiting_for"] and job["waiting_for"]["reason"] for job in listed} == {
        running: None,
        waiting: "gpus_busy",
    }
    relay.clock.advance(relay.settings.alive_s + 0.1)
    assert await reason(relay, waiting) == "no_gpu"
    async with relay.gpu("another/model"):
        assert await reason(relay, waiting) == "model_not_offered"
        await gpu.beat(held(grant))
        assert await reason(relay, waiting) == "gpus_busy"


async def test_a_job_waits_for_a_gpu_that_lives_long_enough(relay: Relay) -> None:
    async with relay.gpu() as gpu:
        await enrol(gpu, runtime_ends_at=relay.clock() + 60)
        assert await reason(relay, await create(relay)) == "runtime_ends"


async def test_a_gpu_with_too_little_memory_is_not_asked_again_and_a_larger_one_is(
    relay: Relay, gpu: DoubleGpu
) -> None:
    job_id = await create(relay)
    await does_not_fit(gpu, await gpu.next_grant())
    small = await create(relay)
    waits = (await shown(relay, job_id))["waiting_for"]
    assert waits["reason"] == "gpu_memory"
    assert f"{NEEDED:,} bytes" in waits["message"]
    assert (await shown(relay, job_id))["attempts"] == 0
    assert (await gpu.next_grant()).job.job_id == small  # one that does not fit holds nobody up
    async with relay.gpu(enrol=False) as large:
        await enrol(large, memory_bytes=NEEDED)
        assert (await large.next_grant()).job.job_id == job_id


async def test_a_gpu_that_has_what_it_said_was_needed_is_not_asked_twice(relay: Relay, gpu: DoubleGpu) -> None:
    job_id = await create(relay)
    await enrol(gpu, memory_bytes=NEEDED)
    await does_not_fit(gpu, await gpu.next_grant(), needed=1)
    waits = (await shown(relay, job_id))["waiting_for"]
    assert (waits["reason"], f"{NEEDED + 1:,} bytes" in waits["message"]) == ("gpu_memory", True)


async def test_a_job_that_is_paused_and_resumed_may_be_tried_by_any_gpu_again(relay: Relay, gpu: DoubleGpu) -> None:
    job_id = await create(relay)
    await does_not_fit(gpu, await gpu.next_grant())
    await relay.http.post(f"/v1/fine_tuning/jobs/{job_id}/pause")
    assert await reason(relay, job_id) is None
    await relay.http.post(f"/v1/fine_tuning/jobs/{job_id}/resume")
    assert (await gpu.next_grant()).job.job_id == job_id
