"""A gpu that stops says so: its jobs wait again at once, and nothing is sent to it any more."""

import wire
from relay.blobs import FolderBlobs
from relay.leases import Leases, Match
from relay.store import Store
from tests.relay.conftest import Relay
from tests.relay.double_gpu import BASE, DoubleGpu, held


async def start_job(relay: Relay, gpu: DoubleGpu) -> wire.GrantLease:
    file_id = await relay.upload()
    await relay.openai.fine_tuning.jobs.create(model=BASE, training_file=file_id)
    grant = await gpu.next_grant()
    assert (await gpu.report(grant)).status_code == 200
    return grant


async def test_its_leases_go_back_at_once_and_cost_no_attempt(relay: Relay, gpu: DoubleGpu) -> None:
    grant = await start_job(relay, gpu)
    response = await gpu.call("POST", "/gpu/goodbye", wire.Goodbye(reason="stopped by its owner"))
    assert response.json() == {"handed_back": 1}
    async with relay.gpu() as other:
        again = await other.next_grant()
        assert again.job == grant.job
        assert again.fence == grant.fence + 1
        assert (await gpu.report(grant)).status_code == 409  # it said goodbye, and may not go on
        for _ in range(4):  # more often than a job may be lost
            await other.call("POST", "/gpu/goodbye", wire.Goodbye(reason="again"))
            assert (await other.enrol()).status_code == 200
            again = await other.next_grant()
    events = await relay.openai.fine_tuning.jobs.list_events(grant.job.job_id)
    assert "The gpu handed the job back: stopped by its owner. The job waits for a gpu again." in [
        event.message for event in events.data
    ]


async def test_a_match_seen_before_the_goodbye_is_not_claimed_after_it(relay: Relay, gpu: DoubleGpu) -> None:
    await gpu.call("POST", "/gpu/goodbye", wire.Goodbye(reason="stopped by its owner"))
    job = await relay.openai.fine_tuning.jobs.create(model=BASE, training_file=await relay.upload())
    store = Store(relay.settings.database)  # as another process of the relay would
    leases = Leases(store, FolderBlobs(relay.settings.data_dir / "blobs"), relay.settings, relay.clock)
    assert await leases.claim(Match(job.id, gpu.by.gpu_id, gpu.by.epoch)) is None
    await store.close()
    assert (await relay.openai.fine_tuning.jobs.retrieve(job.id)).status == "queued"


async def test_nothing_is_sent_to_it_any_more_until_it_is_back(relay: Relay, gpu: DoubleGpu) -> None:
    ask = {"model": BASE, "messages": [{"role": "user", "content": "How are you?"}]}
    await gpu.call("POST", "/gpu/goodbye", wire.Goodbye(reason="stopped by its owner"))
    assert (await relay.http.post("/v1/chat/completions", json=ask)).status_code == 503
    assert (await gpu.enrol()).status_code == 200
    await gpu.until_reachable()
    assert (await relay.http.post("/v1/chat/completions", json=ask)).status_code == 200


async def test_only_the_gpu_itself_can_say_it(relay: Relay, gpu: DoubleGpu) -> None:
    grant = await start_job(relay, gpu)
    body = wire.Goodbye(reason="somebody else").model_dump_json()
    assert (await relay.http.post("/gpu/goodbye", content=body)).status_code == 401
    assert (await gpu.beat(held(grant))).commands == []
