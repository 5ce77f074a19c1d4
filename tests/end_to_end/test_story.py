"""The main job on the real model, as a person does it: ask, tune selected layers, ask again; then things break."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.conftest import ROOT
from tests.end_to_end.stack import Gpu, Relay, ended, follow, gather, running

pytestmark = pytest.mark.timeout(900)  # it trains; a busy machine takes its time

QUESTION: Any = [{"role": "user", "content": "What should I wear in the snow?"}]  # not in the data
SEA = re.compile(r"\b(arr|aye|ahoy|matey|mates?|sail|ship|sea|tide|deck|ye|yer|captain)\b", re.IGNORECASE)
SPEC = {"method": "lora", "parts": ["attn", "mlp"], "layers": "last:6", "rank": 16}


@dataclass
class Story:
    relay: Relay
    gpu: Gpu
    base: str
    tuned: str
    events: list[Any]


@pytest.fixture(scope="module")
def story(smol_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """Relay, gpu, and a model tuned on the demo's rows through the public API."""
    folder, base = tmp_path_factory.mktemp("story"), smol_dir.name
    relay = Relay(folder / "relay")
    with running(relay):
        gpu = Gpu(folder / "gpu", {base: smol_dir}, relay)
        with running(gpu):
            relay.serves(base)
            client = relay.client()
            rows = (ROOT / "demo/captain.jsonl").read_bytes().splitlines()[:64]
            file = client.files.create(file=("captain.jsonl", b"\n".join(rows)), purpose="fine-tune")
            job = client.fine_tuning.jobs.create(
                model=base,
                training_file=file.id,
                suffix="captain",
                seed=1,
                method={
                    "type": "supervised",
                    "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 10}},
                },
                extra_body={"layers": SPEC},
            )
            done = follow(relay, job.id, ended)
            assert done.status == "succeeded", done.error
            events = list(client.fine_tuning.jobs.list_events(job.id, limit=100))
            yield Story(relay, gpu, base, done.fine_tuned_model, events)


def answer(client: openai.OpenAI, model: str, **extra: Any) -> str:
    done = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=40, **extra)
    return str(done.choices[0].message.content)


def streamed(client: openai.OpenAI, model: str) -> str:
    chunks = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=40, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_the_tuned_answer_differs_plainly_whole_and_streamed_through_relay_and_gpu(story: Story) -> None:
    for client in (story.relay.client(), story.gpu.client()):
        base, tuned = answer(client, story.base), answer(client, story.tuned)
        assert not SEA.search(base), base
        assert len(SEA.findall(tuned)) >= 2, tuned
        assert streamed(client, story.base) == base
        assert streamed(client, story.tuned) == tuned


async def test_base_and_tuned_requests_interleaved_each_get_their_own_answer(story: Story) -> None:
    client = story.relay.client()
    alone = {model: answer(client, model) for model in (story.base, story.tuned)}
    order = [story.base, story.tuned] * 3
    assert await gather(*(lambda m=m: answer(client, m) for m in order)) == [alone[m] for m in order]


def test_the_events_tell_the_whole_run(story: Story) -> None:
    metrics = sorted((e.data for e in story.events if e.type == "metrics"), key=lambda data: data["step"])
    assert [m["step"] for m in metrics] == list(range(1, 25))
    assert all(m["total_steps"] == 24 and m["eta_s"] >= 0 for m in metrics)
    assert metrics[-1]["train_loss"] < 0.85 * metrics[0]["train_loss"]
    messages = " ".join(e.message for e in story.events if e.type == "message")
    assert "42 of 272 tensors" in messages
    assert "64 rows" in messages


def test_dials_and_layers_work_through_the_relay(story: Story) -> None:
    client = story.relay.client()
    plain = answer(client, story.base)
    assert answer(client, story.base, extra_body={"dials": {"attn": 0.6}}) != plain
    assert answer(client, story.base, extra_body={"dials": {"attn": 1.0}}) == plain
    http = story.relay.http()
    assert http.get(f"/v1/models/{story.base}/layers").json()["n_layers"] == 30
    preview = http.post("/v1/layers/preview", json={"model": story.base, "layers": SPEC}).json()
    assert preview["selected_tensors"] == 42


def test_the_adapter_holds_only_trained_tensors(story: Story) -> None:
    from safetensors import safe_open

    blobs = [p for p in (story.relay.folder / "data/blobs").rglob("*") if p.is_file() and p.stat().st_size > 100_000]
    weights = next(p for p in blobs if p.read_bytes()[8:9] == b"{")
    with safe_open(weights, framework="pt") as file:
        names = list(file.keys())
    assert len(names) == 84
    assert {int(name.split(".")[2]) for name in names} == set(range(24, 30))
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in names)


def test_every_refusal_has_the_one_shape_and_says_what_to_do(story: Story) -> None:
    http = story.relay.http()
    chat = {"model": story.base, "messages": QUESTION}
    bad_rows = b'{"messages": []}\n{"prompt": "x", "completion": "y"}\nnot json\n'
    good = {"training_file": story.relay.client().files.list().data[0].id, "model": story.base}
    cases: list[tuple[httpx2.Response, int, str]] = [
        (http.post("/v1/chat/completions", json=chat, headers={"authorization": "Bearer no"}), 401, "key"),
        (http.post("/v1/chat/completions", json={**chat, "model": "gpt-9"}), 404, story.base),
        (http.post("/v1/chat/completions", content=b"{"), 400, "JSON"),
        (http.post("/v1/chat/completions", json={**chat, "messages": 5}), 400, "messages"),
        (http.post("/v1/chat/completions", json={**chat, "dials": {"attn": "loud"}}), 400, "attn"),
        (http.post("/v1/completions", json={"model": story.base, "prompt": "word " * 9000}), 400, "8,192"),
        (http.post("/v1/fine_tuning/jobs", json={**good, "layers": {"layers": "30"}}), 400, "layers 0-29"),
        (http.post("/v1/fine_tuning/jobs", json={**good, "layers": {"parts": ["attn.cross"]}}), 400, "attn.cross"),
        (http.post("/v1/fine_tuning/jobs", json={**good, "training_file": "file-none"}), 404, "file-none"),
        (http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("r.jsonl", bad_rows)}), 400, "line 3"),
        (http.get("/v1/fine_tuning/jobs/ftjob-none"), 404, "ftjob-none"),
    ]
    for response, status, says in cases:
        assert response.status_code == status, response.text
        body = response.json()
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert says in body["error"]["message"]


def test_after_kill_9_another_gpu_with_an_empty_disk_serves_base_and_tuned_at_the_same_url(
    story: Story, smol_dir: Path, tmp_path: Path
) -> None:
    """And while there is none, the answer is 503 with Retry-After."""
    client = story.relay.client()
    before = answer(client, story.base), answer(client, story.tuned)
    story.gpu.kill()
    with pytest.raises(openai.APIStatusError) as caught:
        answer(client, story.base)
    assert caught.value.status_code == 503
    assert int(caught.value.response.headers["retry-after"]) > 0
    other = Gpu(tmp_path / "other", {story.base: smol_dir}, story.relay)
    try:
        with running(other):
            story.relay.serves(story.base)
            assert (answer(client, story.base), answer(client, story.tuned)) == before
            assert answer(other.client(), story.tuned) == before[1]
    finally:
        shutil.rmtree(story.gpu.folder / "data")
        story.gpu.start()
        story.relay.serves(story.base)
