"""Real processes: a gpu that dials out, loses its network, changes its tunnel and stops, while it trains."""

import stat
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.cable import Cable
from tests.conftest import ROOT, TINY
from tests.end_to_end.stack import Gpu, Relay, ended, follow, gather, running

ASK: Any = {"model": TINY, "messages": [{"role": "user", "content": "How are you?"}], "max_tokens": 8}
pytestmark = pytest.mark.timeout(280)


def train(relay: Relay, n_epochs: int) -> str:
    client = relay.client()
    with (ROOT / "demo/captain.jsonl").open("rb") as rows:
        file = client.files.create(file=rows, purpose="fine-tune")
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": n_epochs}}}
    layers = {"method": "lora", "parts": ["attn"], "layers": "all", "rank": 4}
    job = client.fine_tuning.jobs.create(
        model=TINY, training_file=file.id, method=method, extra_body={"layers": layers}
    )
    return job.id


def messages(relay: Relay, job_id: str) -> str:
    return "\n".join(e.message for e in relay.client().fine_tuning.jobs.list_events(job_id, limit=100).data)


def answers(relay: Relay) -> bool:
    response = httpx2.post(f"{relay.url}/v1/chat/completions", json=ASK, headers=relay.headers, timeout=60)
    return response.status_code == 200


def dialling(folder: Path, tiny_dir: Path, relay: Relay, relay_url: str | None = None) -> Gpu:
    settings = {"GPU_TUNNEL": "relay", "GPU_PUBLIC_URL": "", "GPU_RELAY_URL": relay_url or relay.url}
    return Gpu(folder, {TINY: tiny_dir}, relay, **settings)


async def test_streams_come_back_by_the_gpus_own_socket_and_a_cut_stops_no_job(tiny_dir: Path, tmp_path: Path) -> None:
    relay = Relay(tmp_path / "relay")
    with running(relay):
        async with Cable.to(relay.url) as cable:
            gpu = dialling(tmp_path / "gpu", tiny_dir, relay, cable.url)
            with running(gpu):
                (job_id,) = await gather(lambda: (relay.wait(lambda: answers(relay)), train(relay, 3))[1])
                await gather(lambda: follow(relay, job_id, lambda job: job.status == "running"))

                def stream() -> str:
                    chunks = relay.client().chat.completions.create(**ASK, stream=True)
                    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

                first, second = await gather(stream, stream)
                assert first
                assert second
                cable.cut()
                began = time.monotonic()
                await gather(lambda: relay.wait(lambda: answers(relay), 5))
                assert time.monotonic() - began < 5
                (job,) = await gather(lambda: follow(relay, job_id, ended))
                assert job.status == "succeeded"
                assert "waits for a gpu again" not in messages(relay, job_id)


def test_a_gpu_that_is_asked_to_stop_hands_its_job_to_another_at_once(tiny_dir: Path, tmp_path: Path) -> None:
    relay = Relay(tmp_path / "relay", RELAY_LEASE_S="120")  # far longer than this test waits
    with running(relay):
        one, other = (dialling(tmp_path / name, tiny_dir, relay) for name in ("one", "other"))
        with running(one):
            relay.wait(lambda: answers(relay))
            job_id = train(relay, 100)
            follow(relay, job_id, lambda job: job.status == "running")
            assert one.stop() == 0
            assert relay.client().fine_tuning.jobs.retrieve(job_id).status == "queued"
            assert not answers(relay)
        with running(other):
            follow(relay, job_id, lambda job: job.status == "running")
            relay.client().fine_tuning.jobs.cancel(job_id)
        said = messages(relay, job_id)
        assert "The gpu stops. The job waits for a gpu again" in said
        assert "Attempt" not in said


def test_a_tunnel_that_dies_and_comes_back_elsewhere_stops_no_job(tiny_dir: Path, tmp_path: Path) -> None:
    program, told = tmp_path / "bin/cloudflared", tmp_path / "told"
    program.parent.mkdir()
    told.mkdir()
    (told / "die_after_s").write_text("1.5")
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/tests/doubles/cloudflared.py" "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    relay = Relay(tmp_path / "relay")
    with running(relay):
        settings = {"GPU_TUNNEL": "cloudflared", "GPU_PUBLIC_URL": "", "CLOUDFLARED_DOUBLE": str(told)}
        gpu = Gpu(tmp_path / "gpu", {TINY: tiny_dir}, relay, **settings, PATH=f"{program.parent}:/usr/bin:/bin")
        with running(gpu):
            relay.wait(lambda: TINY in [m.id for m in relay.client().models.list()])
            job_id = train(relay, 3)  # training needs no tunnel, and this one leads nowhere
            job = follow(relay, job_id, ended)
            assert job.status == "succeeded"
            assert "waits for a gpu again" not in messages(relay, job_id)
            n_epochs_of_gpu = relay.log().count("enrolled, epoch")
            assert n_epochs_of_gpu >= 3  # it moved while the job ran
