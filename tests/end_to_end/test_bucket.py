"""A relay whose blobs are in a bucket, and a real gpu: the bucket goes away while a job trains, and comes back."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cable import Cable
from tests.conftest import TINY
from tests.end_to_end.stack import Gpu, Relay, ended, follow, running
from tests.end_to_end.test_resume import STEPS, Cluster
from tests.s3 import S3Server, environment

pytestmark = pytest.mark.timeout(600)  # it trains


@pytest.fixture
def s3() -> Iterator[S3Server]:
    server = S3Server()
    server.start()
    yield server
    server.stop()


async def test_a_job_trains_on_while_the_bucket_is_away_and_keeps_its_result_there_afterwards(
    tmp_path: Path, tiny_dir: Path, s3: S3Server
) -> None:
    loop, bucket = asyncio.get_running_loop(), s3.new()
    async with Cable.to(s3.url) as cable:
        relay = Relay(tmp_path / "relay", **environment(s3.settings(bucket) | {"s3_endpoint": cable.url}))

        def run() -> None:
            with running(relay):
                gpu = Gpu(tmp_path / "gpu", {TINY: tiny_dir}, relay, GPU_CHECKPOINT_EVERY_S="0.2")
                with running(gpu):
                    relay.serves(TINY)
                    trains_through(
                        Cluster(relay, {"gpu": gpu}),
                        lambda: loop.call_soon_threadsafe(cable.unplug),
                        lambda: loop.call_soon_threadsafe(cable.plug_in),
                    )

        await asyncio.to_thread(run)
    assert s3.keys(bucket)


def trains_through(cluster: Cluster, away: Callable[[], object], back: Callable[[], object]) -> None:
    relay, job_id = cluster.relay, cluster.start_job()
    client, http = relay.client(), relay.http()
    cluster.stores(job_id)
    away()
    relay.wait(lambda: [r["code"] for r in http.get("/readyz").json()["reasons"]] == ["storage"])
    kept, seen = cluster.steps_stored(job_id), max(cluster.losses(job_id), default=0)
    relay.wait(lambda: max(cluster.losses(job_id), default=0) > seen)
    assert cluster.steps_stored(job_id) == kept, "nothing new can be kept"
    back()
    job = follow(relay, job_id, ended, 180)
    assert job.status == "succeeded", cluster.said(job_id)
    assert max(cluster.losses(job_id)) == STEPS
    assert len(cluster.holders(job_id)) == 1, cluster.said(job_id)
    relay.serves(job.fine_tuned_model)
    assert client.completions.create(model=job.fine_tuned_model, prompt="Say 1", max_tokens=4).choices[0].text
