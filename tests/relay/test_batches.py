"""A batch's life, as its owner and its gpus see it: a job that answers the rows of a file."""

import hashlib
import json
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import openai
import pytest
from sqlalchemy import select

import batchfile
import wire
from relay import batch_files, fairness
from relay.batches import LOST_AFTER_S
from relay.leases import MAX_ATTEMPTS
from relay.store import Store
from relay.tables import jobs
from tests.relay.conftest import CHAT_ROW, Clock, Relay, running_relay, until
from tests.relay.double_gpu import BASE, DoubleGpu, answer_to, failed, held, result_of

CHAT: Any = "/v1/chat/completions"
ENDED = ("completed", "failed", "expired", "cancelled")
ON_BOTH_DATABASES = {  # the others are about the file, or about HTTP
    "test_a_batch_goes_from_a_file_to_two_files_in_the_order_of_its_rows",
    "test_rows_that_were_answered_before_a_loss_are_kept_and_no_other_gpu_gets_them",
    "test_whatever_gpus_say_and_when_each_row_stands_in_the_files_once",
    "test_leases_that_are_lost_without_a_row_fail_the_batch_which_keeps_what_it_has",
    "test_a_part_is_counted_once_however_often_it_is_told",
    "test_cancelling_keeps_what_is_answered_and_says_so_of_the_rest",
    "test_when_its_window_is_over_a_batch_has_expired_with_what_is_done",
    "test_a_batch_is_paused_and_goes_on_behind_its_rows",
    "test_batches_and_fine_tunes_are_listed_apart_and_each_is_its_owners",
    "test_the_tokens_of_its_answers_count_for_the_key_that_made_it_and_no_gpu_time",
    "test_a_batch_ends_when_the_month_of_its_key_is_spent",
    "test_a_batch_pays_for_the_answers_that_it_may_have_and_not_again_for_those_that_came",
    "test_its_file_may_be_deleted_and_its_answers_count_towards_the_quota",
    "test_a_user_who_is_deleted_takes_batches_and_their_blobs_along",
    "test_files_that_a_relay_did_not_come_to_write_are_written_by_the_next",
    "test_webhooks_hear_of_a_batch_when_its_files_are_there",
}


def row(number: int, **changes: Any) -> dict[str, Any]:
    body = {"model": BASE, "messages": [{"role": "user", "content": f"Say {number}"}]}
    return {"custom_id": f"row-{number}", "method": "POST", "url": CHAT, "body": body, **changes}


def file_of(*rows: object) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in rows).encode()


async def upload(relay: Relay, content: bytes) -> str:
    return (await relay.openai.files.create(file=("rows.jsonl", content), purpose="batch")).id


async def create(relay: Relay, n: int = 5, **more: Any) -> Any:
    file_id = await upload(relay, file_of(*(row(number) for number in range(n))))
    return await relay.openai.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h", **more)


async def ended(relay: Relay, batch: Any) -> Any:
    """The batch, once its files are written."""
    found: list[Any] = []

    async def over() -> bool:
        found[:] = [await relay.openai.batches.retrieve(batch.id)]
        return found[0].status in ENDED

    await until(over)
    return found[0]


async def lines(relay: Relay, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    return [json.loads(line) for line in (await relay.openai.files.content(file_id)).text.splitlines()]


async def finish(gpu: DoubleGpu, grant: wire.GrantBatch) -> Any:
    return await gpu.finish(grant, wire.JobResult(fence=grant.fence))


def spans(grant: wire.GrantBatch) -> list[tuple[int, int]]:
    return [(span.first, span.last) for span in grant.job.done]


async def test_a_batch_goes_from_a_file_to_two_files_in_the_order_of_its_rows(relay: Relay, gpu: DoubleGpu) -> None:
    batch = await create(relay, metadata={"run": "7"})
    assert (batch.status, batch.model, batch.metadata) == ("validating", BASE, {"run": "7"})
    assert batch.expires_at - batch.created_at == 86400
    grant = await gpu.next_batch()
    assert (grant.job.base_model, grant.job.endpoint, grant.job.total, grant.job.done) == (BASE, CHAT, 5, [])
    assert (await gpu.answer_rows(grant, 3, 0)).json() == {"done": 2, "total": 5}
    assert (await gpu.answer_rows(grant, 4, status_code=400)).status_code == 200
    under_way: Any = await relay.openai.batches.retrieve(batch.id)
    assert under_way.status == "in_progress"
    assert under_way.request_counts.model_dump() == {"total": 5, "completed": 2, "failed": 1}
    early = await finish(gpu, grant)
    assert early.status_code == 400
    assert "2 rows are not answered" in early.text
    assert (await gpu.answer_rows(grant, 1, 2)).status_code == 200
    assert (await finish(gpu, grant)).status_code == 200
    assert (await finish(gpu, grant)).status_code == 200, "said again it is no conflict"

    done = await ended(relay, batch)
    assert done.status == "completed"
    assert done.in_progress_at <= done.finalizing_at <= done.completed_at
    assert done.usage.model_dump() == {
        "input_tokens": 28,
        "input_tokens_details": {"cached_tokens": 8},
        "output_tokens": 12,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 40,
    }
    answers, refused = await lines(relay, done.output_file_id), await lines(relay, done.error_file_id)
    assert [line["custom_id"] for line in answers] == ["row-0", "row-1", "row-2", "row-3"]
    assert len({line["id"] for line in answers}) == 4
    assert answers[3]["error"] is None
    assert answers[3]["response"] == answer_to(3).model_dump(exclude={"row"})
    assert [(line["custom_id"], line["response"]["status_code"]) for line in refused] == [("row-4", 400)]
    files = {file.id: file for file in (await relay.openai.files.list()).data}
    assert files[done.output_file_id].purpose == "batch_output"
    assert files[done.output_file_id].filename == f"{batch.id}_output.jsonl"


async def test_rows_that_were_answered_before_a_loss_are_kept_and_no_other_gpu_gets_them(
    tmp_path: Path, clock: Clock, database: str
) -> None:
    async with running_relay(tmp_path, clock, database_url=database, lease_s=30.0) as relay, relay.gpu() as first:
        batch = await create(relay, 9)
        grant = await first.next_batch()
        await first.answer_rows(grant, 0, 1, 3)
        async with relay.gpu() as second:
            for number in range(MAX_ATTEMPTS + 1):  # a row comes in each lease, so none of the losses costs an attempt
                clock.advance(31)
                grant, lost = await second.next_batch(), grant
                assert (await first.answer_rows(lost, 8)).status_code == 409
                first, second = second, first
                assert (await first.answer_rows(grant, 4 + number)).status_code == 200
            assert spans(grant) == [(0, 1), (3, 6)]
            again = await first.answer_rows(grant, 8, 3)
            assert (again.status_code, again.json()["error"]["code"]) == (400, "row_answered")
            await first.answer_rows(grant, 2, 8)
            await finish(first, grant)
        done: Any = await ended(relay, batch)
        assert [line["custom_id"] for line in await lines(relay, done.output_file_id)] == [f"row-{n}" for n in range(9)]
        shown = (await relay.http.get(f"/v1/batches/{batch.id}")).json()
        assert shown["attempts"] == 0


@pytest.mark.parametrize("seed", range(2))
async def test_whatever_gpus_say_and_when_each_row_stands_in_the_files_once(
    tmp_path: Path, clock: Clock, database: str, seed: int
) -> None:
    """Parts that overlap, old leases, losses, pauses and give-backs, in an order that chance gives."""
    chance, n = random.Random(seed), 24
    async with running_relay(tmp_path, clock, database_url=database, lease_s=30.0) as relay, relay.gpu() as gpu:
        batch = await create(relay, n)
        grants, answered = [await gpu.next_batch()], set[int]()
        for _ in range(40):
            now, then = grants[-1], chance.choice(grants)
            deed = chance.choice(["answer", "answer", "answer", "again", "stale", "lose", "pause", "release"])
            left = sorted(set(range(n)) - answered)
            if len(left) < 4:
                break
            if deed in ("answer", "again"):
                rows = chance.sample(left if deed == "answer" else range(n), 2)
                status = (await gpu.answer_rows(now, *rows)).status_code
                assert status == (400 if answered & set(rows) else 200)
                answered |= set(rows) if status == 200 else set()
            elif deed == "stale":
                expected = 200 if then.fence == now.fence else 409
                assert (await gpu.answer_rows(then, left[0])).status_code == expected
                answered |= {left[0]} if expected == 200 else set()
            else:
                if deed == "lose":
                    clock.advance(31)
                elif deed == "pause":
                    await relay.http.post(f"/v1/batches/{batch.id}/pause")
                if deed != "lose":
                    release = wire.Release(fence=now.fence, reason="paused" if deed == "pause" else "drained")
                    assert (await gpu.call("POST", f"/gpu/jobs/{batch.id}/release", release)).status_code == 200
                if deed == "pause":
                    await relay.http.post(f"/v1/batches/{batch.id}/resume")
                if (await relay.openai.batches.retrieve(batch.id)).status == "failed":
                    break
                while (following := await gpu.next_batch()).fence == now.fence:
                    pass  # nobody has noticed yet that the lease is over
                grants.append(following)
                assert batchfile.members(spans(grants[-1])) == answered
        found: Any = await relay.openai.batches.retrieve(batch.id)
        if found.status not in ENDED and seed % 2:
            assert (await gpu.answer_rows(grants[-1], *(set(range(n)) - answered))).status_code == 200
            answered = set(range(n))
            assert (await finish(gpu, grants[-1])).status_code == 200
        elif found.status not in ENDED:
            await relay.openai.batches.cancel(batch.id)
        done = await ended(relay, batch)
        good, bad = await lines(relay, done.output_file_id), await lines(relay, done.error_file_id)
        assert [line["custom_id"] for line in good] == [f"row-{number}" for number in sorted(answered)]
        assert sorted(line["custom_id"] for line in [*good, *bad]) == sorted(f"row-{number}" for number in range(n))
        assert (done.request_counts.completed, done.usage.output_tokens) == (len(answered), 3 * len(answered))


async def test_leases_that_are_lost_without_a_row_fail_the_batch_which_keeps_what_it_has(
    tmp_path: Path, clock: Clock, database: str
) -> None:
    async with running_relay(tmp_path, clock, database_url=database, lease_s=30.0) as relay, relay.gpu() as gpu:
        batch = await create(relay, 3)
        await gpu.answer_rows(await gpu.next_batch(), 1)
        for _ in range(MAX_ATTEMPTS + 1):
            clock.advance(31)
            assert (await gpu.enrol()).status_code == 200
            if (await relay.openai.batches.retrieve(batch.id)).status != "in_progress":
                break
            assert (await gpu.report(await gpu.next_batch())).status_code == 200
        done = await ended(relay, batch)
        assert (done.status, done.errors.data[0].code) == ("failed", "gpu_lost")
        assert done.failed_at
        assert [line["custom_id"] for line in await lines(relay, done.output_file_id)] == ["row-1"]
        errors = await lines(relay, done.error_file_id)
        assert [line["error"]["code"] for line in errors] == ["batch_failed"] * 2


async def test_a_part_is_counted_once_however_often_it_is_told(relay: Relay, gpu: DoubleGpu) -> None:
    batch = await create(relay)
    grant = await gpu.next_batch()
    for _ in range(3):
        assert (await gpu.answer_rows(grant, 0, 1)).json() == {"done": 2, "total": 5}
    found: Any = await relay.openai.batches.retrieve(batch.id)
    assert found.request_counts.completed == 2
    assert found.usage.total_tokens == 20


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (b'{"row": 1}\n', "line 1 of the part is no answer"),
        (b"not json\n", "line 1 of the part is no answer"),
        (answer_to(1).model_dump_json().encode() * 1 + b"\n" + answer_to(1).model_dump_json().encode(), "twice"),
        (answer_to(5).model_dump_json().encode(), "row 5 is none of the batch's 5"),
    ],
)
async def test_what_is_no_part_changes_nothing(relay: Relay, gpu: DoubleGpu, part: bytes, says: str) -> None:
    batch = await create(relay)
    grant = await gpu.next_batch()
    refused = await gpu.send_part(grant, part)
    assert (refused.status_code, says in refused.text) == (400, True), refused.text
    found: Any = await relay.openai.batches.retrieve(batch.id)
    assert found.request_counts.completed == 0


async def test_a_part_that_never_arrived_is_asked_for(relay: Relay, gpu: DoubleGpu) -> None:
    await create(relay)
    grant = await gpu.next_batch()
    said = wire.PartStored(fence=grant.fence, sha256="a" * 64, bytes=10)
    refused = await gpu.call("POST", f"/gpu/jobs/{grant.job.job_id}/parts", said)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "blob_missing")


async def test_cancelling_keeps_what_is_answered_and_says_so_of_the_rest(relay: Relay, gpu: DoubleGpu) -> None:
    batch = await create(relay, 3)
    grant = await gpu.next_batch()
    await gpu.answer_rows(grant, 2)
    assert (await relay.openai.batches.cancel(batch.id)).status in ("cancelling", "cancelled")
    cancel = wire.CancelLease(job_id=batch.id, fence=grant.fence)
    assert (await gpu.beat(held(grant))).commands == [cancel]
    assert (await gpu.answer_rows(grant, 0)).status_code == 409
    done = await ended(relay, batch)
    assert done.status == "cancelled"
    assert done.cancelling_at <= done.cancelled_at
    assert [line["custom_id"] for line in await lines(relay, done.output_file_id)] == ["row-2"]
    assert [line["error"]["code"] for line in await lines(relay, done.error_file_id)] == ["batch_cancelled"] * 2
    with pytest.raises(openai.ConflictError, match="already been cancelled"):
        await relay.openai.batches.cancel(batch.id)


async def test_when_its_window_is_over_a_batch_has_expired_with_what_is_done(
    relay: Relay, gpu: DoubleGpu, clock: Clock
) -> None:
    batch, waiting = await create(relay, 3), await create(relay, 2)
    grant = await gpu.next_batch()
    await gpu.answer_rows(grant, 0)
    clock.advance(86401)
    done, never_begun = await ended(relay, batch), await ended(relay, waiting)
    assert (done.status, never_begun.status) == ("expired", "expired")
    assert done.expired_at
    assert [line["custom_id"] for line in await lines(relay, done.output_file_id)] == ["row-0"]
    assert [line["error"]["code"] for line in await lines(relay, done.error_file_id)] == ["batch_expired"] * 2
    assert never_begun.output_file_id is None
    assert len(await lines(relay, never_begun.error_file_id)) == 2
    assert (await gpu.answer_rows(grant, 1)).status_code == 409


async def test_a_batch_is_paused_and_goes_on_behind_its_rows(relay: Relay, gpu: DoubleGpu) -> None:
    batch = await create(relay, 3)
    grant = await gpu.next_batch()
    pausing = (await relay.http.post(f"/v1/batches/{batch.id}/pause")).json()
    assert (pausing["status"], pausing["pausing"]) == ("in_progress", True)
    assert (await gpu.beat(held(grant))).commands == [wire.PauseLease(job_id=batch.id, fence=grant.fence)]
    await gpu.answer_rows(grant, 1)
    release = wire.Release(fence=grant.fence, reason="paused")
    assert (await gpu.call("POST", f"/gpu/jobs/{batch.id}/release", release)).status_code == 200
    paused = (await relay.http.get(f"/v1/batches/{batch.id}")).json()
    assert (paused["paused"], paused["attempts"]) == (True, 0)
    assert not (await gpu.beat()).commands
    resumed = (await relay.http.post(f"/v1/batches/{batch.id}/resume")).json()
    assert not resumed["paused"]
    assert spans(await gpu.next_batch()) == [(1, 1)]
    events = (await relay.http.get(f"/v1/batches/{batch.id}/events")).json()["data"]
    assert {event["object"] for event in events} == {"batch.event"}
    assert any("Job resumed" in event["message"] for event in events)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"custom_id": "row-0"}, "line 2: custom_id 'row-0' stands in line 1 already"),
        ({"custom_id": 7}, "line 2: custom_id"),
        ({"method": "GET"}, "line 2: method"),
        ({"url": "/v1/completions", "body": {"model": BASE, "prompt": "x"}}, "line 2: url is '/v1/completions'"),
        ({"url": "/v1/embeddings"}, "line 2: url"),
        ({"url": ["/v1/completions"]}, "line 2: url"),
        ({"body": {"model": "other", "messages": [1]}}, "line 2: model is 'other'"),
        ({"body": {"model": BASE}}, "line 2: body.messages"),
        ({"body": {"messages": [1]}}, "line 2: body.model"),
        ({"body": {"model": BASE, "messages": [1], "stream": True}}, "line 2: body.stream"),
        ({"body": "text"}, "line 2: body"),
        ({"more": 1}, "line 2: 'more' is no field"),
    ],
)
async def test_a_file_with_a_bad_line_is_refused_with_its_number(relay: Relay, changes: Any, says: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await upload(relay, file_of(row(0), row(1, **changes)))
    assert caught.value.code == "invalid_batch_file"
    assert says in caught.value.message
    assert not relay.stored()


async def test_a_file_that_is_no_json_or_empty_is_refused(relay: Relay) -> None:
    with pytest.raises(openai.BadRequestError, match="line 2: not JSON"):
        await upload(relay, file_of(row(0)) + b"{nothing\n")
    with pytest.raises(openai.BadRequestError, match="has no rows"):
        await upload(relay, b"\n\n")


async def test_what_a_batch_asks_for_is_checked_when_it_is_made(relay: Relay, gpu: DoubleGpu) -> None:
    batches, good = relay.openai.batches, await upload(relay, file_of(row(0)))
    completions: Any = "/v1/completions"
    with pytest.raises(openai.BadRequestError, match="url '/v1/chat/completions'"):
        await batches.create(input_file_id=good, endpoint=completions, completion_window="24h")
    with pytest.raises(openai.BadRequestError, match="completion_window"):
        await batches.create(input_file_id=good, endpoint=CHAT, completion_window="1 day")  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError) as caught:
        await batches.create(input_file_id=good, endpoint="/v1/images/generations", completion_window="24h")
    assert caught.value.code == "not_supported_yet"
    with pytest.raises(openai.NotFoundError, match="no file"):
        await batches.create(input_file_id="file-none", endpoint=CHAT, completion_window="24h")
    training = await relay.upload(CHAT_ROW)
    with pytest.raises(openai.BadRequestError, match="purpose 'fine-tune'"):
        await batches.create(input_file_id=training, endpoint=CHAT, completion_window="24h")
    with pytest.raises(openai.BadRequestError, match="purpose 'batch'"):
        await relay.openai.fine_tuning.jobs.create(model=BASE, training_file=good)
    other = await upload(relay, file_of(row(0, body={"model": "other", "messages": [1]})))
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        await batches.create(input_file_id=other, endpoint=CHAT, completion_window="24h")


async def test_a_report_on_a_batchs_file_says_whom_its_rows_ask(relay: Relay) -> None:
    file_id = await upload(relay, file_of(row(0), row(1)))
    told = (await relay.http.get(f"/v1/files/{file_id}/report")).json()
    about = {"object": "file.report", "file": file_id, "filename": "rows.jsonl"}
    assert told == about | {"rows": 2, "endpoint": CHAT, "model": BASE}


async def test_batches_and_fine_tunes_are_listed_apart_and_each_is_its_owners(relay: Relay, gpu: DoubleGpu) -> None:
    made = [await create(relay, 1) for _ in range(3)]
    tune = await relay.openai.fine_tuning.jobs.create(model=BASE, training_file=await relay.upload())
    assert {job.id for job in (await relay.openai.fine_tuning.jobs.list()).data} == {tune.id}
    pages = [batch.id async for batch in await relay.openai.batches.list(limit=2)]
    assert sorted(pages) == sorted(batch.id for batch in made)
    with pytest.raises(openai.NotFoundError):
        await relay.openai.fine_tuning.jobs.retrieve(made[0].id)
    with pytest.raises(openai.NotFoundError):
        await relay.openai.batches.retrieve(tune.id)
    key = (await relay.http.post("/api/keys", json={"user": "other", "name": "theirs"})).json()["key"]
    other = relay.client(key)
    assert not (await other.batches.list()).data
    with pytest.raises(openai.NotFoundError):
        await other.batches.cancel(made[0].id)
    await other.close()


async def test_a_fine_tune_takes_no_parts_and_a_batch_no_adapter(relay: Relay, gpu: DoubleGpu) -> None:
    await relay.openai.fine_tuning.jobs.create(model=BASE, training_file=await relay.upload())
    tune: Any = await gpu.next_grant()
    assert "is no batch" in (await gpu.answer_rows(tune, 0)).text
    await gpu.finish(tune, failed(tune, retry=False))
    await create(relay)
    grant: Any = await gpu.next_batch()
    assert (await gpu.finish(grant, result_of(grant, b"tensors"))).status_code == 400


async def test_the_tokens_of_its_answers_count_for_the_key_that_made_it_and_no_gpu_time(
    relay: Relay, gpu: DoubleGpu, clock: Clock
) -> None:
    batch = await create(relay)
    grant = await gpu.next_batch()
    clock.advance(5)
    await gpu.answer_rows(grant, 0, 1, completion_tokens=10)
    await relay.openai.batches.cancel(batch.id)
    used = (await relay.http.get("/api/usage")).json()
    assert (used["prompt_tokens"], used["completion_tokens"], used["gpu_s"]) == (14, 20, 0.0)


async def test_a_batch_ends_when_the_month_of_its_key_is_spent(relay: Relay, gpu: DoubleGpu) -> None:
    made = (await relay.http.post("/api/keys", json={"user": "ada", "name": "hers", "tokens_per_month": 30})).json()
    ada = relay.client(made["key"])
    file = await ada.files.create(file=("rows.jsonl", file_of(*(row(n) for n in range(5)))), purpose="batch")
    batch = await ada.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    grant = await gpu.next_batch()
    assert (await gpu.answer_rows(grant, 0)).status_code == 200
    assert (await gpu.answer_rows(grant, 1, completion_tokens=20)).json() == {"done": 2, "total": 5}
    assert (await gpu.answer_rows(grant, 2)).status_code == 409

    async def failed_with_files() -> bool:
        return (await ada.batches.retrieve(batch.id)).status == "failed"

    await until(failed_with_files)
    done: Any = await ada.batches.retrieve(batch.id)
    assert (done.errors.data[0].code, done.request_counts.completed) == ("insufficient_quota", 2)
    assert len((await ada.files.content(done.output_file_id)).text.splitlines()) == 2
    await ada.close()


async def test_a_batch_pays_for_the_answers_that_it_may_have_and_not_again_for_those_that_came(
    relay: Relay, gpu: DoubleGpu, clock: Clock
) -> None:
    batch = await create(relay, 4)

    store = Store(relay.settings.database)

    async def estimated_s() -> float:
        async with store.read() as db:
            return float((await db.execute(select(jobs.c.estimated_s).where(jobs.c.id == batch.id))).scalar_one())

    whole_s = await estimated_s()
    assert whole_s == pytest.approx(fairness.answers_s(len(file_of(*(row(n) for n in range(4)))), 4 * 256))
    grant = await gpu.next_batch()
    await gpu.answer_rows(grant, 0, 1, 2)
    for _ in range(2):
        release = wire.Release(fence=grant.fence, reason="drained")
        assert (await gpu.call("POST", f"/gpu/jobs/{batch.id}/release", release)).status_code == 200
        assert await estimated_s() == pytest.approx(whole_s / 4)
        grant = await gpu.next_batch()
    await store.close()


async def test_its_file_may_be_deleted_and_its_answers_count_towards_the_quota(relay: Relay, gpu: DoubleGpu) -> None:
    batch = await create(relay, 3)
    await relay.openai.files.delete(batch.input_file_id)
    grant = await gpu.next_batch()
    blob = await gpu.call("GET", f"/gpu/blobs/{grant.job.input_file.sha256}")
    assert len(blob.content) == grant.job.input_file.bytes
    await gpu.answer_rows(grant, 0, 1, 2)
    assert (await relay.http.get("/api/me")).json()["storage"]["jobs_bytes"] > len(blob.content)
    await finish(gpu, grant)
    done = await ended(relay, batch)
    await until(lambda: len(relay.stored()) == 1)  # the input and the parts are gone
    await relay.openai.files.delete(done.output_file_id)
    assert not relay.stored()
    assert (await relay.openai.batches.retrieve(batch.id)).output_file_id == done.output_file_id


async def test_a_quota_that_is_full_refuses_the_part(tmp_path: Path, clock: Clock) -> None:
    async with running_relay(tmp_path, clock, user_quota_bytes=1500) as relay, relay.gpu() as gpu:
        await create(relay)
        grant = await gpu.next_batch()
        refused = await gpu.answer_rows(grant, *range(5))
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "quota_exceeded")


async def test_a_user_who_is_deleted_takes_batches_and_their_blobs_along(relay: Relay, gpu: DoubleGpu) -> None:
    made = (await relay.http.post("/api/keys", json={"user": "ada", "name": "hers"})).json()
    ada = relay.client(made["key"])
    content = file_of(row(0), row(1))
    file = await ada.files.create(file=("rows.jsonl", content), purpose="batch")
    await ada.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    await ada.close()
    await gpu.answer_rows(await gpu.next_batch(), 1)
    users = (await relay.http.get("/api/users")).json()
    ada_id = next(user["id"] for user in users.get("data", users) if user["name"] == "ada")
    assert (await relay.http.delete(f"/api/users/{ada_id}")).status_code == 200
    await until(lambda: not relay.stored())


async def test_files_that_a_relay_did_not_come_to_write_are_written_by_the_next(
    tmp_path: Path, clock: Clock, database: str
) -> None:
    async with running_relay(tmp_path, clock, database_url=database) as relay, relay.gpu() as gpu:
        batch = await create(relay, 2)
        grant = await gpu.next_batch()
        await gpu.answer_rows(grant, 0, 1)
        away = relay.settings.data_dir / "blobs" / grant.job.input_file.sha256[:2]
        away.rename(away.with_name("away"))  # a disk that is not there
        assert (await finish(gpu, grant)).status_code == 200
        assert (await relay.openai.batches.retrieve(batch.id)).status == "finalizing"
        away.with_name("away").rename(away)
    async with running_relay(tmp_path, clock, database_url=database) as relay:
        done = await ended(relay, batch)
        assert done.status == "completed"
        assert len(await lines(relay, done.output_file_id)) == 2


@pytest.mark.parametrize("what", ["input", "part"])
async def test_what_is_lost_for_good_is_said_and_does_not_keep_a_batch_from_its_end(
    relay: Relay, gpu: DoubleGpu, what: str
) -> None:
    batch = await create(relay, 3)
    grant = await gpu.next_batch()
    before = set(relay.stored())
    await gpu.answer_rows(grant, 0)
    (lost,) = set(relay.stored()) - before
    await gpu.answer_rows(grant, 1, 2)
    if what == "input":
        (lost,) = (path for path in before if path.name == grant.job.input_file.sha256)
    lost.unlink()
    assert (await finish(gpu, grant)).status_code == 200
    assert (await relay.openai.batches.retrieve(batch.id)).status == "finalizing", "a disk may only be away"
    relay.clock.advance(LOST_AFTER_S)
    done = await ended(relay, batch)
    assert done.status == "completed"
    answers, missing = await lines(relay, done.output_file_id), await lines(relay, done.error_file_id)
    if what == "part":
        assert [line["custom_id"] for line in answers] == ["row-1", "row-2"]
        assert [(line["custom_id"], line["error"]["code"]) for line in missing] == [("row-0", "answer_lost")]
    else:
        assert (answers, missing) == ([], [])
        assert [(error.code, error.param) for error in done.errors.data] == [("input_lost", "input_file_id")]


async def test_webhooks_hear_of_a_batch_when_its_files_are_there(relay: Relay, gpu: DoubleGpu) -> None:
    hook = await relay.openai.webhooks.create(name="", url="http://127.0.0.1:9/x", event_types=["batch.completed"])
    batch = await create(relay, 1)
    grant = await gpu.next_batch()
    await gpu.answer_rows(grant, 0)
    await finish(gpu, grant)
    await ended(relay, batch)
    told = (await relay.http.get(f"/v1/webhook_endpoints/{hook.id}/deliveries")).json()["data"]
    assert [(entry["event_type"], entry["job_id"]) for entry in told] == [("batch.completed", batch.id)]


def test_both_files_are_the_same_to_the_byte_however_the_parts_are_cut(tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    rows.write_bytes(file_of(*(row(n) for n in range(200))))
    made = []
    for size in (1, 7, 200):
        order = sorted(range(190), key=lambda n: hashlib.sha256(b"%d" % n).digest())
        parts = []
        for at in range(0, len(order), size):
            parts.append(tmp_path / f"{size}-{at}")
            said = (answer_to(n, 200 if n % 3 else 400).model_dump_json() + "\n" for n in order[at : at + size])
            parts[-1].write_text("".join(said))
        answers, refused = list[bytes](), list[bytes]()
        missing = ("batch_expired", "over")
        reach = [nullcontext(part) for part in parts].__getitem__
        counts = batch_files.write("batch_1", rows, len(parts), reach, missing, answers.append, refused.append)
        assert counts == (len(answers), len(refused)) == (126, 74)
        made.append((answers, refused))
    assert made[0] == made[1] == made[2]


def test_the_file_and_the_messages_know_the_same_endpoints_and_as_many_rows() -> None:
    assert set(batchfile.NEEDS) == set(get_args(wire.BatchEndpoint))
    assert batchfile.MAX_ROWS == wire.MAX_BATCH_ROWS


def test_ranges_of_rows_hold_exactly_the_rows() -> None:
    for numbers in (set[int](), {0}, {0, 1, 2, 9, 4, 5}):
        assert batchfile.members(batchfile.spans(numbers)) == numbers
    assert batchfile.spans({0, 1, 2, 9, 4, 5}) == [(0, 2), (4, 5), (9, 9)]


def test_a_file_may_have_so_many_rows_and_no_more(tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    rows.write_bytes(file_of(*(row(n) for n in range(batchfile.MAX_ROWS + 1))))
    report = batchfile.check(rows)
    assert not report.ok
    assert "50,000 rows at most" in report.summary()
