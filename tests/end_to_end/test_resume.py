"""A job that is torn from its gpu goes on elsewhere from its last checkpoint, and ends as if nothing had happened."""

import json
import re
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY
from tests.end_to_end.stack import Gpu, Relay, ended, follow, running
from tests.end_to_end.test_pictures import a_dozen
from tests.gpu_service import tiny_sd

REPLIES = ("Good day to you!", "Not now.", "It is blue, as far as I can see.", "Seven.")
ROWS = "\n".join(
    json.dumps({"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": reply}]})
    for n in range(10)
    for reply in REPLIES
).encode()
STEPS = 300
# Steps of two slices, over a frozen prefix on the disk of whichever gpu it is.
HYPERPARAMETERS = {"n_epochs": 15, "batch_size": 2, "micro_batch_rows": 1, "prefix_cache": True}
pytestmark = pytest.mark.timeout(600)  # it trains; a busy machine takes its time


@dataclass
class Cluster:
    """A relay and two gpus with disks of their own. A job that one of them gives up goes to the other."""

    relay: Relay
    gpus: dict[str, Gpu]
    straight: Any = None  # a job that was never disturbed

    def start_job(self) -> str:
        client = self.relay.client()
        file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model=TINY,
            training_file=file.id,
            seed=3,
            extra_body={
                "layers": {"parts": ["attn", "mlp"], "layers": "last:2", "rank": 4},
                "method": {"type": "supervised", "supervised": {"hyperparameters": HYPERPARAMETERS}},
            },
        )
        return job.id

    def start_picture_job(self) -> str:
        """With pictures of a class, which each gpu has to make for itself, and with captions left out."""
        client = self.relay.client()
        file = client.files.create(file=("zorbs.zip", a_dozen()), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model=tiny_sd.NAME,
            training_file=file.id,
            seed=3,
            extra_body={
                "concept": {"prompt": "a zorb", "class_prompt": "a ball", "class_pictures": 2},
                "layers": {"parts": ["attn"], "rank": 4},
                "hyperparameters": {"n_epochs": 12, "batch_size": 4, "micro_batch_rows": 2, "caption_dropout": 0.2},
                "sample_prompts": ["a zorb"],
            },
        )
        return job.id

    def both_are_up(self) -> None:
        for gpu in self.gpus.values():
            if not gpu.process or gpu.process.poll() is not None:
                gpu.start()
        for gpu in self.gpus.values():
            gpu.is_up()
        http = self.relay.http()

        def alive() -> bool:
            return len([gpu for gpu in http.get("/api/gpus").json()["data"] if gpu["alive"]]) == len(self.gpus)

        self.relay.wait(alive)

    def post(self, job_id: str, what: str) -> Any:
        return self.relay.http().post(f"/v1/fine_tuning/jobs/{job_id}/{what}").raise_for_status().json()

    def steps_stored(self, job_id: str) -> list[int]:
        """The newest first."""
        found = self.relay.http().get(f"/v1/fine_tuning/jobs/{job_id}/checkpoints").raise_for_status()
        return [checkpoint["step_number"] for checkpoint in found.json()["data"]]

    def stores(self, job_id: str, at_least: int = 1) -> None:
        """So many checkpoints beside that of step 0, which a slow machine has time for."""
        self.relay.wait(lambda: len([step for step in self.steps_stored(job_id) if step]) >= at_least, 60)

    def said(self, job_id: str) -> list[str]:
        """The oldest first, but for the progress."""
        events = self.relay.client().fine_tuning.jobs.list_events(job_id, limit=100)  # page after page
        return [e.message for e in events if e.type == "message"][::-1]

    def losses(self, job_id: str) -> dict[int, float]:
        events = self.relay.client().fine_tuning.jobs.list_events(job_id, limit=100)
        told = [e.data for e in events if e.type == "metrics"]
        return {data["step"]: data["train_loss"] for data in told if isinstance(data, dict) and "train_loss" in data}

    def holders(self, job_id: str) -> list[str]:
        return [found[1] for text in self.said(job_id) if (found := re.match("Given to gpu '(.+)'", text))]

    def weights(self, job: Any) -> str:
        """The SHA-256 of the trained tensors."""
        (adapter,) = self.query("select adapter from models where id = ?", job.fine_tuned_model)
        return next(str(f["sha256"]) for f in json.loads(adapter)["files"] if f["name"].endswith(".safetensors"))

    def query(self, sql: str, value: str) -> Any:
        with closing(sqlite3.connect(self.relay.folder / "data/relay.db")) as db:
            return db.execute(sql, (value,)).fetchone()

    def ends_as_if_undisturbed(self, job_id: str) -> None:
        """On two gpus, the second of which began at a checkpoint."""
        job = follow(self.relay, job_id, ended, 180)
        said = self.said(job_id)
        assert job.status == "succeeded", said
        assert len(set(self.holders(job_id))) == 2, said
        assert any(f" of {STEPS} from the checkpoint of " in text for text in said), said
        assert job.trained_tokens == self.straight.trained_tokens
        assert self.weights(job) == self.weights(self.straight)
        losses = self.losses(job_id)  # but for those that a killed gpu had not yet told
        assert losses.items() <= self.losses(self.straight.id).items()
        assert max(losses) == STEPS


@pytest.fixture(scope="module")
def cluster(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("resume")
    model = shutil.copytree(tiny_dir, folder / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.2}))
    painter = tiny_sd.make(folder / tiny_sd.NAME)
    relay = Relay(folder / "relay", RELAY_LEASE_S="3")
    with running(relay):
        gpus = {
            name: Gpu(
                folder / name, {TINY: model, tiny_sd.NAME: painter}, relay, GPU_NAME=name, GPU_CHECKPOINT_EVERY_S="0.2"
            )
            for name in ("one", "two")
        }
        with running(*gpus.values()):
            cluster = Cluster(relay, gpus)
            cluster.both_are_up()
            cluster.straight = follow(relay, cluster.start_job(), ended, 180)
            assert cluster.straight.status == "succeeded", cluster.straight.error
            yield cluster


def test_a_job_whose_gpu_is_killed_goes_on_from_its_last_checkpoint_to_the_same_weights(cluster: Cluster) -> None:
    cluster.both_are_up()
    job_id = cluster.start_job()
    cluster.stores(job_id)
    cluster.gpus[cluster.holders(job_id)[-1]].kill()
    cluster.ends_as_if_undisturbed(job_id)
    said = cluster.said(job_id)
    step = next(int(f[1]) for text in said if (f := re.match(r"Goes on at step (\d+) of", text)))
    assert any(f"to go on from the checkpoint of step {step}." in text for text in said), "\n".join(said)


def test_a_job_on_pictures_whose_gpu_is_killed_ends_elsewhere_with_the_same_weights(cluster: Cluster) -> None:
    cluster.both_are_up()
    straight = follow(cluster.relay, cluster.start_picture_job(), ended, 180)
    assert straight.status == "succeeded", straight.error
    job_id = cluster.start_picture_job()
    cluster.stores(job_id)
    cluster.gpus[cluster.holders(job_id)[-1]].kill()
    job = follow(cluster.relay, job_id, ended, 180)
    assert job.status == "succeeded", cluster.said(job_id)
    assert len(set(cluster.holders(job_id))) == 2
    assert any("Goes on at step" in text for text in cluster.said(job_id))
    assert cluster.weights(job) == cluster.weights(straight)
    assert cluster.losses(job_id).items() <= cluster.losses(straight.id).items()


def test_a_paused_job_keeps_what_it_learnt_and_ends_elsewhere_with_the_same_weights(cluster: Cluster) -> None:
    cluster.both_are_up()
    job_id = cluster.start_job()
    cluster.stores(job_id)
    assert cluster.post(job_id, "pause")["pausing"] is True
    paused = follow(cluster.relay, job_id, lambda job: job.status == "paused", 60)
    assert paused.attempts == 0
    assert cluster.steps_stored(job_id)
    assert cluster.post(job_id, "resume")["status"] == "queued"
    cluster.ends_as_if_undisturbed(job_id)


def test_ctrl_c_stores_a_checkpoint_and_gives_the_job_back_at_no_cost(cluster: Cluster) -> None:
    cluster.both_are_up()
    job_id = cluster.start_job()
    cluster.stores(job_id)
    before = cluster.steps_stored(job_id)[0]
    assert cluster.gpus[cluster.holders(job_id)[-1]].stop() == 0
    cluster.ends_as_if_undisturbed(job_id)
    said = cluster.said(job_id)
    back = next(f for text in said if (f := re.match(r"The gpu stops\..* from the checkpoint of step (\d+)\.$", text)))
    assert int(back[1]) > before
    assert any(text.startswith(f"Goes on at step {back[1]} of ") for text in said)


def test_of_a_damaged_checkpoint_the_one_before_is_used(cluster: Cluster) -> None:
    cluster.both_are_up()
    job_id = cluster.start_job()
    cluster.stores(job_id, at_least=2)
    cluster.post(job_id, "pause")
    follow(cluster.relay, job_id, lambda job: job.status == "paused", 60)
    newest, before, *_ = cluster.steps_stored(job_id)
    (manifest,) = cluster.query("select manifest from checkpoints where job_id = ? order by step desc limit 1", job_id)
    sha256 = json.loads(manifest)["files"][0]["chunks"][0]["sha256"]
    (chunk,) = (cluster.relay.folder / "data/blobs").rglob(sha256)
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    for gpu in cluster.gpus.values():  # an earlier job like this one may have left a sound copy with the other
        (gpu.folder / "data/blobs" / sha256).unlink(missing_ok=True)
    cluster.post(job_id, "resume")
    cluster.ends_as_if_undisturbed(job_id)
    said = cluster.said(job_id)
    assert any(text.startswith(f"The checkpoint of step {newest} can't be used: ") for text in said), said
    assert any(text.startswith(f"Goes on at step {before} of ") for text in said), said
