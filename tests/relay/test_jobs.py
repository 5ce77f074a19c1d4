"""A fine-tuning job's life, as its owner and its gpu see it."""

import asyncio
import hashlib
import os
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import web
from openai.types.fine_tuning import FineTuningJob
from sqlalchemy import select

import wire
from relay.dispatcher import HandOut
from relay.leases import KEPT_S, Leases
from relay.metrics import Metrics
from relay.peers import Peers
from relay.storage import blobs_of
from relay.store import Store
from relay.tables import jobs
from tests.relay.conftest import CHAT_ROW, Clock, Relay, running_relay, until
from tests.relay.double_gpu import BASE, DoubleGpu, failed, held, result_of

ON_BOTH_DATABASES = True


async def create(relay: Relay, **more: Any) -> FineTuningJob:
    file = await relay.upload()
    extra = more.pop("extra_body", {"layers": {"method": "lora", "layers": "last:2"}})
    return await relay.openai.fine_tuning.jobs.create(model=BASE, training_file=file, extra_body=extra, **more)


async def is_over(relay: Relay, job: FineTuningJob) -> bool:
    return (await status_of(relay, job)) not in ("queued", "running")


async def status_of(relay: Relay, job: FineTuningJob) -> str:
    return (await relay.openai.fine_tuning.jobs.retrieve(job.id)).status


def metrics(seq: int, **data: Any) -> wire.JobEvent:
    return wire.JobEvent(seq=seq, at=1_700_000_000.0, type="metrics", message=f"step {seq}", data=data)


async def test_a_job_goes_from_a_file_to_a_model_that_answers(relay: Relay, gpu: DoubleGpu) -> None:
    job = await create(relay, suffix="mine", seed=7, hyperparameters={"n_epochs": 2})
    assert job.status == "queued"
    assert job.seed == 7
    grant = await gpu.next_grant()
    assert grant.job.base_model == BASE
    assert grant.job.layers == [wire.LayerSpec(method="lora", layers="last:2")]
    assert grant.job.hyperparameters.n_epochs == 2
    blob = await gpu.call("GET", f"/gpu/blobs/{grant.job.training_file.sha256}")
    assert len(blob.content) == grant.job.training_file.bytes

    assert (await gpu.report(grant, metrics(0, loss=2.5, eta_s=60))).status_code == 200
    running = await relay.openai.fine_tuning.jobs.retrieve(job.id)
    assert running.status == "running"
    assert running.estimated_finish == 1_700_000_060
    assert running.fine_tuned_model is None

    assert (await gpu.upload(grant, b"the trained tensors")).status_code == 200
    assert await status_of(relay, job) == "running"  # finalizing is a word of ours
    assert (await gpu.succeed(grant)).status_code == 200
    done = await relay.openai.fine_tuning.jobs.retrieve(job.id)
    assert done.status == "succeeded"
    assert done.trained_tokens == 123
    assert done.hyperparameters.batch_size == 4
    assert done.error is None
    assert done.fine_tuned_model
    assert done.fine_tuned_model == f"ft:{BASE}:mine:{job.id.removeprefix('ftjob-')[:12]}"

    model = await relay.openai.models.retrieve(done.fine_tuned_model)
    assert (model.owned_by, model.model_dump()["parent"]) == ("admin", BASE)
    await relay.openai.chat.completions.create(model=done.fine_tuned_model, messages=[])
    assert done.fine_tuned_model.encode() in gpu.prompts[-1]
    tuned = await gpu.call("GET", f"/gpu/models/{done.fine_tuned_model}")
    assert (
        wire.TunedModel.model_validate_json(tuned.content).adapter == result_of(grant, b"the trained tensors").adapter
    )


async def test_the_layers_of_a_tuned_model_are_those_of_its_base(relay: Relay, gpu: DoubleGpu) -> None:
    model = await tuned_model(relay, gpu)
    assert (await relay.http.get(f"/v1/models/{model}/layers")).json()["path"] == f"/v1/models/{BASE}/layers"
    preview = await relay.http.post("/v1/layers/preview", json={"model": model, "layers": []})
    assert preview.json()["asked"] == {"model": BASE, "layers": []}


async def tuned_model(relay: Relay, gpu: DoubleGpu) -> str:
    job = await create(relay)
    await gpu.succeed(await gpu.next_grant())
    model = (await relay.openai.fine_tuning.jobs.retrieve(job.id)).fine_tuned_model
    assert model
    return model


async def test_a_deleted_model_is_gone_with_its_blobs_and_bases_stay(relay: Relay, gpu: DoubleGpu) -> None:
    model = await tuned_model(relay, gpu)
    before = len(relay.stored())
    assert (await relay.openai.models.delete(model)).deleted
    assert len(relay.stored()) == before - 1
    assert [m.id async for m in relay.openai.models.list()] == [BASE]
    with pytest.raises(openai.BadRequestError):
        await relay.openai.models.delete(BASE)
    with pytest.raises(openai.NotFoundError):
        await relay.openai.chat.completions.create(model=model, messages=[])


async def test_a_blob_that_a_gpu_was_just_promised_outlives_its_model(relay: Relay, gpu: DoubleGpu) -> None:
    model = await tuned_model(relay, gpu)
    job = await create(relay)
    grant = await gpu.next_grant()
    result = result_of(grant, b"the trained tensors")
    assert result.adapter
    target = gpu.blob_target(grant, result.adapter.files[0].sha256)
    for path in relay.stored():
        os.utime(path, (0, 0))
    assert (await gpu.call("HEAD", target)).status_code == 200
    assert (await relay.openai.models.delete(model)).deleted
    assert (await gpu.finish(grant, result)).status_code == 200
    assert await status_of(relay, job) == "succeeded"


@pytest.mark.parametrize("end", ["succeeds", "fails", "is cancelled"])
async def test_data_whose_file_is_deleted_goes_when_the_job_is_over(relay: Relay, gpu: DoubleGpu, end: str) -> None:
    job = await create(relay)
    grant = await gpu.next_grant()
    await relay.openai.files.delete(job.training_file)
    data = grant.job.training_file.sha256
    assert data in [path.name for path in relay.stored()]
    match end:
        case "succeeds":
            assert (await gpu.succeed(grant)).status_code == 200
        case "fails":
            assert (await gpu.finish(grant, failed(grant, retry=False))).status_code == 200
        case _:
            await relay.openai.fine_tuning.jobs.cancel(job.id)
    assert data not in [path.name for path in relay.stored()]


async def test_a_start_sweeps_up_old_blobs_that_nothing_names(tmp_path: Path, clock: Clock, database: str) -> None:
    async with running_relay(tmp_path, clock, database_url=database) as relay, relay.gpu() as gpu:
        await tuned_model(relay, gpu)
        await relay.upload(CHAT_ROW * 5)
        lost = await create(relay)
        grant = await gpu.next_grant()
        await relay.openai.files.delete(lost.training_file)  # the job needs its data still
        kept = set(relay.stored())
        assert (await gpu.upload(grant, b"a result that nobody finishes")).status_code == 200
        left = set(relay.stored()) - kept
        for path in relay.stored():
            os.utime(path, (0, 0))
        assert (await gpu.upload(grant, b"a young one")).status_code == 200
        young = set(relay.stored()) - kept - left
        assert len(left) == len(young) == 1
        await gpu.enrol()  # it holds the job no more
    async with running_relay(tmp_path, clock, database_url=database) as relay:
        await until(lambda: set(relay.stored()) == kept | young)
        await asyncio.sleep(0.1)
        assert set(relay.stored()) == kept | young


NONSENSE: list[tuple[dict[str, Any], str, str]] = [
    ({"model": "nope"}, "model", BASE),
    ({"training_file": "file-nope"}, "training_file", "no file"),
    ({"validation_file": "file-nope"}, "validation_file", "no file"),
    ({"n_epochs": 3}, "n_epochs", "Extra inputs"),
    ({"layers": {"method": "loar"}}, "layers", "method"),
    ({"layers": {"layers": "top:3"}}, "layers", "'top:3' is no layer range"),
    ({"layers": []}, "layers", "at least 1"),
    ({"suffix": "a b"}, "suffix", "letters"),
    ({"suffix": "x" * 65}, "suffix", "64"),
    ({"seed": -1}, "seed", "0"),
    ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters", "n_epochs"),
    ({"method": {"type": "dpo"}}, "method", "supervised"),
    ({"metadata": {"a": "b"}}, "metadata", "None"),
]


async def test_a_job_that_asks_for_nonsense_is_refused_by_name(relay: Relay, gpu: DoubleGpu) -> None:
    file = await relay.upload()
    for change, param, says in NONSENSE:
        response = await relay.http.post("/v1/fine_tuning/jobs", json={"model": BASE, "training_file": file, **change})
        assert response.status_code in (400, 404), change
        assert response.json()["error"]["param"] == param
        assert says in response.json()["error"]["message"]
    assert (await relay.openai.fine_tuning.jobs.list()).data == []


async def test_hyperparameters_layers_and_a_validation_file_reach_the_gpu(relay: Relay, gpu: DoubleGpu) -> None:
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": "auto"}}}
    layers = [{"layers": "0-1", "rank": 4}, {"method": "full", "parts": ["norm"]}]
    job = await create(relay, method=method, validation_file=await relay.upload(), extra_body={"layers": layers})
    assert job.validation_file
    assert job.method
    assert job.method.type == "supervised"
    asked = (await gpu.next_grant()).job
    assert asked.hyperparameters == wire.Hyperparameters(n_epochs=3)
    assert asked.layers == [wire.LayerSpec(layers="0-1", rank=4), wire.LayerSpec(method="full", parts=["norm"])]
    assert asked.validation_file
    assert job.seed == asked.seed


async def test_what_a_gpu_says_about_the_layers_is_said_at_creation(relay: Relay, gpu: DoubleGpu) -> None:
    body = {"error": {"message": "layers 0-3 exist", "type": "invalid_request_error", "param": "layers", "code": "x"}}

    async def refuse(request: web.Request, _: bytes) -> web.StreamResponse:
        return web.json_response(body, status=400)

    gpu.layers = refuse
    with pytest.raises(openai.BadRequestError, match="layers 0-3 exist"):
        await create(relay)
    assert (await relay.openai.fine_tuning.jobs.list()).data == []


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
async def test_a_file_deleted_while_the_layers_are_judged_is_unknown(relay: Relay, gpu: DoubleGpu, param: str) -> None:
    asked = {"training_file": await relay.upload(), "validation_file": await relay.upload(CHAT_ROW * 4)}

    async def delete_meanwhile(request: web.Request, _: bytes) -> web.StreamResponse:
        await relay.openai.files.delete(asked[param])
        return web.json_response({})

    gpu.layers = delete_meanwhile
    response = await relay.http.post("/v1/fine_tuning/jobs", json={"model": BASE, **asked})
    assert response.status_code == 404
    assert response.json()["error"]["param"] == param
    assert (await relay.openai.fine_tuning.jobs.list()).data == []


async def test_without_a_gpu_a_job_is_accepted_and_waits(relay: Relay, gpu: DoubleGpu) -> None:
    relay.clock.advance(relay.settings.alive_s + 1)
    job = await create(relay)
    await asyncio.sleep(0.1)
    assert await status_of(relay, job) == "queued"
    await gpu.enrol()
    assert (await gpu.next_grant()).job.job_id == job.id


async def test_a_cut_tunnel_keeps_no_job_from_a_gpu(relay: Relay) -> None:
    async with relay.gpu(enrol=False) as gpu:
        gpu.proves = False
        await gpu.enrol()
        job = await create(relay)
        assert (await gpu.next_grant()).job.job_id == job.id


async def test_a_gpu_gets_one_job_at_a_time_the_oldest_first(relay: Relay, gpu: DoubleGpu) -> None:
    first = await create(relay)
    relay.clock.advance(0.1)
    second = await create(relay)
    grant = await gpu.next_grant()
    assert grant.job.job_id == first.id
    assert (await gpu.beat(held(grant))).commands == []
    await gpu.succeed(grant)
    assert (await gpu.next_grant()).job.job_id == second.id


async def test_a_grant_comes_while_the_heartbeat_is_held(start_relay: Any) -> None:
    relay = await start_relay(heartbeat_s=10.0)
    async with relay.gpu() as gpu:
        beating = asyncio.create_task(gpu.beat())
        await asyncio.sleep(0.1)
        assert not beating.done()
        job = await create(relay)
        reply = await asyncio.wait_for(beating, 1)
        grant = reply.commands[0]
        assert isinstance(grant, wire.GrantLease)
        beating = asyncio.create_task(gpu.beat(held(grant)))
        await asyncio.sleep(0.1)
        assert not beating.done()
        await relay.openai.fine_tuning.jobs.cancel(job.id)
        reply = await asyncio.wait_for(beating, 1)
        assert reply.commands == [wire.CancelLease(job_id=job.id, fence=grant.fence)]


async def test_a_lost_reply_loses_no_command(relay: Relay, gpu: DoubleGpu) -> None:
    await create(relay)
    grant = await gpu.next_grant()
    assert await gpu.next_grant() == grant  # until the gpu says that it holds it
    assert (await gpu.beat(held(grant))).commands == []


async def test_events_sent_twice_are_stored_once_and_listed_newest_first(relay: Relay, gpu: DoubleGpu) -> None:
    job = await create(relay)
    grant = await gpu.next_grant()
    for _ in range(2):
        await gpu.report(grant, *(metrics(n, step=n) for n in range(3)))
    await gpu.report(grant, metrics(2, step=2), metrics(3, step=3))
    events = [e async for e in relay.openai.fine_tuning.jobs.list_events(job.id, limit=2)]
    assert [e.message for e in events if e.type == "metrics"] == ["step 3", "step 2", "step 1", "step 0"]
    assert events[0].data == {"step": 3}
    assert events[0].object == "fine_tuning.job.event"
    assert events[-1].message == "Job created and queued."


async def test_a_cancelled_job_is_over_at_once_and_its_gpu_hears_409(relay: Relay, gpu: DoubleGpu) -> None:
    job = await create(relay)
    grant = await gpu.next_grant()
    await gpu.report(grant)
    assert (await relay.openai.fine_tuning.jobs.cancel(job.id)).status == "cancelled"
    late = [await gpu.report(grant), await gpu.upload(grant, b"x"), await gpu.finish(grant, result_of(grant, b"x"))]
    assert [r.status_code for r in late] == [409, 409, 409]
    assert {r.json()["error"]["code"] for r in late} == {"lease_lost"}
    assert await status_of(relay, job) == "cancelled"
    with pytest.raises(openai.ConflictError) as caught:
        await relay.openai.fine_tuning.jobs.cancel(job.id)
    assert caught.value.response.headers["x-should-retry"] == "false"


async def test_a_job_whose_gpu_went_silent_is_done_once_by_another(relay: Relay, gpu: DoubleGpu) -> None:
    job = await create(relay)
    lost = await gpu.next_grant()
    await gpu.report(lost)
    relay.clock.advance(relay.settings.lease_s + 0.1)
    async with relay.gpu() as other:
        grant = await other.next_grant()
        assert (grant.job.job_id, grant.fence) == (job.id, lost.fence + 1)
        # The first gpu wakes up and hands in what it has.
        assert (await gpu.report(lost)).status_code == 409
        assert (await gpu.finish(lost, result_of(lost, b"late"))).status_code == 409
        cancel = wire.CancelLease(job_id=job.id, fence=lost.fence)
        assert (await gpu.beat(held(lost))).commands == [cancel]
        assert (await other.succeed(grant)).status_code == 200
    models = [m.id async for m in relay.openai.models.list()]
    assert len(models) == 2
    assert (await relay.openai.fine_tuning.jobs.retrieve(job.id)).model_dump()["attempts"] == 1


async def test_heartbeats_and_reports_renew_the_lease(relay: Relay, gpu: DoubleGpu) -> None:
    await create(relay)
    grant = await gpu.next_grant()
    for _ in range(3):
        relay.clock.advance(relay.settings.lease_s * 0.8)
        await gpu.beat(held(grant))
        relay.clock.advance(relay.settings.lease_s * 0.8)
        assert (await gpu.report(grant)).status_code == 200


async def test_a_finished_job_may_be_finished_again_with_the_same_result_only(relay: Relay, gpu: DoubleGpu) -> None:
    job = await create(relay)
    grant = await gpu.next_grant()
    first = await gpu.succeed(grant)
    again = await gpu.finish(grant, result_of(grant, b"the trained tensors"))
    assert (again.status_code, again.json()) == (200, first.json())
    assert (await gpu.finish(grant, result_of(grant, b"something else"))).status_code == 409
    assert await status_of(relay, job) == "succeeded"
    assert len([m async for m in relay.openai.models.list()]) == 2


async def test_a_result_whose_blobs_are_not_here_is_refused(relay: Relay, gpu: DoubleGpu) -> None:
    await create(relay)
    grant = await gpu.next_grant()
    response = await gpu.finish(grant, result_of(grant, b"never sent"))
    assert (response.status_code, response.json()["error"]["code"]) == (400, "blob_missing")
    assert (await gpu.succeed(grant)).status_code == 200


async def test_an_error_of_the_jobs_own_fails_it_at_once(relay: Relay, gpu: DoubleGpu) -> None:
    job = await create(relay)
    grant = await gpu.next_grant()
    assert (await gpu.finish(grant, failed(grant, retry=False))).status_code == 200
    over = await relay.openai.fine_tuning.jobs.retrieve(job.id)
    assert over.status == "failed"
    assert over.finished_at
    assert over.error
    assert (over.error.code, over.error.message, over.error.param) == ("out_of_memory", "out of memory", None)


async def test_the_third_lost_attempt_fails_the_job_and_says_why(relay: Relay, gpu: DoubleGpu) -> None:
    job = await create(relay)
    for _ in range(2):
        grant = await gpu.next_grant()
        assert (await gpu.finish(grant, failed(grant, retry=True))).status_code == 200
        assert (await gpu.finish(grant, failed(grant, retry=True))).status_code in (200, 409)  # counts once
    grant = await gpu.next_grant()
    assert grant.fence == 3
    await gpu.report(grant)
    relay.clock.advance(relay.settings.lease_s + 0.1)
    await until(lambda: is_over(relay, job))
    over = await relay.openai.fine_tuning.jobs.retrieve(job.id)
    assert over.error
    assert over.error.code == "gpu_lost"
    assert "attempt 3 of 3" in over.error.message


async def test_a_gpu_that_starts_anew_gives_its_job_back_at_once(relay: Relay, gpu: DoubleGpu) -> None:
    job = await create(relay)
    lost = await gpu.next_grant()
    await gpu.report(lost)
    await gpu.enrol()
    grant = await gpu.next_grant()
    assert (grant.job.job_id, grant.fence) == (job.id, lost.fence + 1)


async def test_a_gpu_that_enrols_again_keeps_the_lease_it_names(relay: Relay, gpu: DoubleGpu) -> None:
    await create(relay)
    grant = await gpu.next_grant()
    await gpu.report(grant)
    epoch = gpu.by.epoch
    await gpu.enrol([held(grant)])
    assert gpu.by.epoch == epoch + 1
    assert (await gpu.beat(held(grant))).commands == []
    assert (await gpu.succeed(grant)).status_code == 200


async def test_the_relays_own_absence_costs_nobody_a_lease(tmp_path: Path, clock: Clock, database: str) -> None:
    async with running_relay(tmp_path / "data", clock, database_url=database) as relay, relay.gpu() as gpu:
        job = await create(relay)
        grant = await gpu.next_grant()
        await gpu.report(grant)
        reply = gpu.reply
    clock.advance(3600)
    async with running_relay(tmp_path / "data", clock, database_url=database) as relay, relay.gpu(enrol=False) as gpu:
        gpu.reply = reply
        assert (await gpu.beat(held(grant))).commands == []
        assert (await gpu.succeed(grant)).status_code == 200
        assert await status_of(relay, job) == "succeeded"


async def test_a_job_keeps_the_file_that_its_owner_deletes(relay: Relay, gpu: DoubleGpu) -> None:
    job = await create(relay)
    await relay.openai.files.delete(job.training_file)
    grant = await gpu.next_grant()
    blob = await gpu.call("GET", f"/gpu/blobs/{grant.job.training_file.sha256}")
    assert blob.status_code == 200


async def test_pages_of_jobs_cover_all_of_them_newest_first(relay: Relay, gpu: DoubleGpu) -> None:
    ids = [(await create(relay)).id for _ in range(5)]
    listed = [j.id async for j in relay.openai.fine_tuning.jobs.list(limit=2)]
    assert sorted(listed) == sorted(ids)
    assert len(set(listed)) == 5
    response = await relay.http.get("/v1/fine_tuning/jobs?limit=0")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "limit")


async def reported(relay: Relay, gpu: DoubleGpu) -> tuple[str, str]:
    """A job with both reports, and its model."""
    job = await create(relay)
    grant = await gpu.next_grant()
    reports = []
    for name, content in ((wire.REPORT_JSON, b'{"losses": []}'), (wire.REPORT_HTML, b"<!doctype html><p>Losses")):
        await gpu.upload(grant, content)
        reports.append(wire.FileRef(name=name, sha256=hashlib.sha256(content).hexdigest(), bytes=len(content)))
    await gpu.upload(grant, b"the trained tensors")
    await gpu.finish(grant, result_of(grant, b"the trained tensors").model_copy(update={"reports": reports}))
    model = (await relay.openai.fine_tuning.jobs.retrieve(job.id)).fine_tuned_model
    assert model
    return job.id, model


async def test_a_report_is_read_as_data_and_as_a_page_that_runs_nothing(relay: Relay, gpu: DoubleGpu) -> None:
    job_id, _ = await reported(relay, gpu)
    report = await relay.http.get(f"/v1/fine_tuning/jobs/{job_id}/report")
    assert (report.status_code, report.json()) == (200, {"losses": []})
    page = await relay.http.get(f"/v1/fine_tuning/jobs/{job_id}/report.html")
    assert page.content.endswith(b"<p>Losses")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["content-disposition"].startswith("attachment")
    assert "sandbox" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"


async def test_a_report_outlives_the_sweep_and_goes_with_its_model(tmp_path: Path, clock: Clock, database: str) -> None:
    async with running_relay(tmp_path, clock, database_url=database) as relay, relay.gpu() as gpu:
        job_id, model = await reported(relay, gpu)
        await create(relay)
        await gpu.upload(await gpu.next_grant(), b"a result that nobody finishes")
        await gpu.enrol()  # it holds the job no more
        before = len(relay.stored())
        for path in relay.stored():
            os.utime(path, (0, 0))
    async with running_relay(tmp_path, clock, database_url=database) as relay:
        await until(lambda: len(relay.stored()) == before - 1)
        await report_goes_with(relay, job_id, model)


async def report_goes_with(relay: Relay, job_id: str, model: str) -> None:
    assert (await relay.http.get(f"/v1/fine_tuning/jobs/{job_id}/report")).status_code == 200
    before = len(relay.stored())
    await relay.openai.models.delete(model)
    assert len(relay.stored()) == before - 3
    gone = await relay.http.get(f"/v1/fine_tuning/jobs/{job_id}/report.html")
    assert (gone.status_code, "went with its model" in gone.text) == (404, True)


async def test_a_job_without_a_report_says_why(relay: Relay, gpu: DoubleGpu) -> None:
    job = await create(relay)
    answer = await relay.http.get(f"/v1/fine_tuning/jobs/{job.id}/report")
    assert (answer.status_code, "written when the job ends" in answer.text) == (404, True)


async def test_a_job_that_begins_at_a_tuned_model_keeps_what_it_needs_of_it(relay: Relay, gpu: DoubleGpu) -> None:
    model = await tuned_model(relay, gpu)
    file = await relay.upload()
    job = await relay.openai.fine_tuning.jobs.create(
        model=model, training_file=file, extra_body={"sample_prompts": ["Hello?"]}
    )
    assert job.model == model
    await relay.openai.models.delete(model)
    grant = await gpu.next_grant()
    assert grant.job.base_model == BASE
    assert grant.job.sample_prompts == ["Hello?"]
    assert grant.job.continue_from
    assert grant.job.continue_from.id == model
    files = grant.job.continue_from.adapter.files
    assert [(await gpu.call("GET", f"/gpu/blobs/{f.sha256}")).status_code for f in files] == [200] * len(files)
    await gpu.finish(grant, failed(grant, retry=False))
    assert [(await gpu.call("GET", f"/gpu/blobs/{f.sha256}")).status_code for f in files] == [404] * len(files)


async def test_too_many_or_too_long_sample_prompts_are_refused(relay: Relay, gpu: DoubleGpu) -> None:
    for prompts in (["?"] * 9, ["?" * 2001], [""]):
        with pytest.raises(openai.BadRequestError, match="sample_prompts"):
            await create(relay, extra_body={"sample_prompts": prompts})


async def diverged(relay: Relay, gpu: DoubleGpu) -> tuple[str, wire.GrantLease]:
    """A job that failed so at step 9, with a checkpoint of step 5."""
    job = await create(relay)
    grant = await gpu.next_grant()
    content = b"a state"
    chunk = wire.ChunkRef(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    await gpu.call("PUT", f"/gpu/jobs/{job.id}/chunks/{chunk.sha256}?fence={grant.fence}", content)
    file = wire.ChunkedFile(name="state", sha256=chunk.sha256, bytes=chunk.bytes, chunks=[chunk])
    checkpoint = wire.Checkpoint(step=5, total_steps=20, made_on="cpu fp32", files=[file])
    stored = wire.CheckpointStored(fence=grant.fence, checkpoint=checkpoint)
    assert (await gpu.call("POST", f"/gpu/jobs/{job.id}/checkpoints", stored)).status_code == 200
    error = wire.JobError(message="The loss is nan at step 9: lower the learning rate", code="training_diverged")
    await gpu.finish(grant, wire.JobResult(fence=grant.fence, error=error))
    assert await status_of(relay, job) == "failed"
    return job.id, grant


async def test_a_job_that_diverged_goes_on_from_its_checkpoint_with_a_lower_rate(relay: Relay, gpu: DoubleGpu) -> None:
    job_id, grant = await diverged(relay, gpu)
    resume = f"/v1/fine_tuning/jobs/{job_id}/resume"
    refused = await relay.http.post(resume)
    assert (refused.status_code, "0.5" in refused.text) == (400, True)
    resumed = (await relay.http.post(resume, json={"learning_rate_factor": 0.5})).json()
    assert (resumed["status"], resumed["error"], resumed["finished_at"]) == ("queued", None, None)
    again = await gpu.next_grant()
    assert again.fence > grant.fence
    assert [checkpoint.step for checkpoint in again.job.checkpoints] == [5]
    assert again.job.rate_factor == 0.5
    data = await gpu.call("GET", f"/gpu/blobs/{again.job.training_file.sha256}")
    assert data.status_code == 200


async def test_what_a_diverged_job_keeps_goes_when_it_is_cancelled_or_after_a_week(
    relay: Relay, gpu: DoubleGpu
) -> None:
    job_id, _ = await diverged(relay, gpu)
    (kept,) = (await relay.http.get(f"/v1/fine_tuning/jobs/{job_id}/checkpoints")).json()["data"]
    assert kept["step_number"] == 5
    await relay.http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
    assert (await relay.http.get(f"/v1/fine_tuning/jobs/{job_id}/checkpoints")).json()["data"] == []

    other, _ = await diverged(relay, gpu)
    relay.clock.advance(KEPT_S + 1)
    await gpu.enrol()

    async def gone() -> bool:
        return not (await relay.http.get(f"/v1/fine_tuning/jobs/{other}/checkpoints")).json()["data"]

    await until(gone)
    assert (await relay.http.post(f"/v1/fine_tuning/jobs/{other}/resume")).status_code == 409


async def test_no_lease_is_over_that_nobody_could_renew(tmp_path: Path, clock: Clock, database: str) -> None:
    async with running_relay(tmp_path, clock, database_url=database) as relay, relay.gpu() as gpu:
        await create(relay)
        await gpu.next_grant()
        settings = relay.settings
    store = Store(settings.database)
    peers = Peers(store, settings, clock)
    hand_out = HandOut(Leases(store, blobs_of(settings), settings, clock), Metrics(), peers.is_watching)

    async def lease() -> Any:
        async with store.read() as db:
            return (await db.execute(select(jobs.c.status, jobs.c.lease_until))).one()

    clock.advance(settings.lease_s + 1)  # meanwhile no relay was here
    await hand_out.round()
    assert (await lease()).status == "leased"
    await peers.join()
    assert (await lease()).lease_until == clock() + settings.lease_s, "a full term again"
    await hand_out.round()
    assert (await lease()).status == "leased"
    clock.advance(settings.lease_s + 1)  # now one watches, and the gpu has not been heard
    await hand_out.round()
    assert (await lease()).status == "queued"
    await store.close()
