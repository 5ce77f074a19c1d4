"""Processes die without a word, at bad moments; what was acknowledged is still there, and jobs end. Tiny model."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.conftest import TINY
from tests.end_to_end.stack import Gpu, Relay, ended, follow, running

ROW = json.dumps(
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Good day to you!"}]}
)
ROWS = "\n".join([ROW] * 40).encode()


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[Relay]:
    relay = Relay(tmp_path / "relay")
    with running(relay):
        yield relay


def start_job(relay: Relay, n_epochs: int) -> str:
    client = relay.client()
    file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=TINY,
        training_file=file.id,
        seed=3,
        hyperparameters={"n_epochs": n_epochs, "batch_size": 2},
        extra_body={"layers": {"method": "full", "parts": ["attn", "mlp", "norm"]}},
    )
    return job.id


def steps(relay: Relay, job_id: str) -> list[Any]:
    events = relay.client().fine_tuning.jobs.list_events(job_id, limit=100).data
    return [e for e in events if e.type == "metrics"]


def say_hello(client: openai.OpenAI, model: str) -> str:
    return client.completions.create(model=model, prompt="Hello", max_tokens=4, temperature=0).choices[0].text


def test_a_gpu_killed_in_the_middle_of_training_is_replaced_and_the_job_ends_right(
    relay: Relay, tiny_dir: Path, tmp_path: Path
) -> None:
    first = Gpu(tmp_path / "first", {TINY: tiny_dir}, relay)
    with running(first):
        relay.serves(TINY)
        reference = follow(relay, start_job(relay, n_epochs=8), ended)  # never killed
        job_id = start_job(relay, n_epochs=8)
        relay.wait(lambda: steps(relay, job_id), 60)
        first.kill()
    second = Gpu(tmp_path / "second", {TINY: tiny_dir}, relay)
    with running(second):
        job: Any = follow(relay, job_id, ended)
        assert job.status == "succeeded", job.error
        assert job.trained_tokens == reference.trained_tokens
        client = relay.client()
        assert say_hello(client, job.fine_tuned_model) == say_hello(client, reference.fine_tuned_model)
        tuned = [m.id for m in client.models.list() if m.id.startswith("ft:")]
        assert sorted(tuned) == sorted([job.fine_tuned_model, reference.fine_tuned_model]), "each job ended once"


def test_a_relay_killed_while_a_job_trains_loses_nothing_and_the_job_goes_on(
    relay: Relay, tiny_dir: Path, tmp_path: Path
) -> None:
    gpu = Gpu(tmp_path / "gpu", {TINY: tiny_dir}, relay)
    with running(gpu):
        relay.serves(TINY)
        client = relay.client()
        ended_before = follow(relay, start_job(relay, n_epochs=1), ended)
        job_id = start_job(relay, n_epochs=8)
        acknowledged = relay.wait(lambda: steps(relay, job_id), 60)
        files = {f.id for f in client.files.list()}
        key = relay.admin_key
        relay.kill()
        time.sleep(1)
        relay.start()
        assert relay.admin_key == key
        assert {f.id for f in client.files.list()} == files
        assert client.files.content(sorted(files)[0]).read() == ROWS
        assert client.fine_tuning.jobs.retrieve(ended_before.id).fine_tuned_model == ended_before.fine_tuned_model
        job: Any = follow(relay, job_id, ended)
        assert job.status == "succeeded", job.error
        assert job.attempts == 0, "the gpu that trained it was healthy all the time"
        kept = {e.id for e in client.fine_tuning.jobs.list_events(job_id, limit=100)}
        assert {e.id for e in acknowledged} <= kept
        relay.serves(TINY)
        say_hello(client, job.fine_tuned_model)


def test_a_cancelled_job_stops_the_gpu_which_then_takes_the_next(relay: Relay, tiny_dir: Path, tmp_path: Path) -> None:
    gpu = Gpu(tmp_path / "gpu", {TINY: tiny_dir}, relay)
    with running(gpu):
        relay.serves(TINY)
        long = start_job(relay, n_epochs=100)
        waiting = start_job(relay, n_epochs=1)
        relay.wait(lambda: steps(relay, long), 60)
        assert relay.client().fine_tuning.jobs.cancel(long).status == "cancelled"
        assert follow(relay, waiting, ended, 60).status == "succeeded"
        relay.wait(lambda: not list((gpu.folder / "data/jobs").iterdir()))  # nothing half-written stays


def test_a_job_whose_spec_turns_out_wrong_on_the_gpu_fails_at_once_with_its_message(
    relay: Relay, tiny_dir: Path, tmp_path: Path
) -> None:
    """Created while no gpu was there to ask, so nobody could refuse it."""
    first = Gpu(tmp_path / "gpu", {TINY: tiny_dir}, relay)
    with running(first):
        relay.serves(TINY)
        first.kill()
    client = relay.client()
    file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=TINY, training_file=file.id, extra_body={"layers": {"layers": "last:400"}}
    )
    assert job.status == "queued"
    with running(Gpu(tmp_path / "next", {TINY: tiny_dir}, relay)):
        failed: Any = follow(relay, job.id, ended, 60)
    assert failed.status == "failed"
    assert "layers 0-3" in failed.error.message
    assert failed.error.code == "no_such_layer"


def test_ctrl_c_ends_both_quickly_and_cleanly(relay: Relay, tiny_dir: Path, tmp_path: Path) -> None:
    gpu = Gpu(tmp_path / "gpu", {TINY: tiny_dir}, relay)
    with running(gpu):
        relay.serves(TINY)
        start_job(relay, n_epochs=100)
        started = time.monotonic()
        assert gpu.stop() == 0
        assert relay.stop() == 0
        assert time.monotonic() - started < 10
    for service in (gpu, relay):
        assert "Traceback" not in service.log()
        assert relay.admin_key not in service.log()
