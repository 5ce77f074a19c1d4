"""A fine-tune with everything asked for, its report, and a second one that begins at the first; real processes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import wire
from tests.conftest import TINY
from tests.end_to_end.stack import Gpu, Relay, ended, follow, running

pytestmark = pytest.mark.timeout(600)  # it trains; a busy machine takes its time

PROMPTS = ["Say 3", "<script>alert(1)</script>"]
SAID = {
    "n_epochs": 3,
    "batch_size": 4,
    "learning_rate": 3e-3,
    "optimizer": "adamw_8bit",
    "schedule": "cosine",
    "packing": True,
    "activation_checkpointing": True,
    "early_stop_patience": 2,
    "samples_every_steps": 3,
}


def rows(numbers: range) -> bytes:
    return "\n".join(
        json.dumps(
            {"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": f"It is {n}."}]}
        )
        for n in numbers
    ).encode()


@pytest.fixture(scope="module")
def relay(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    folder = tmp_path_factory.mktemp("training")
    relay = Relay(folder / "relay")
    with running(relay):
        gpu = Gpu(folder / "gpu", {TINY: tiny_dir}, relay)
        with running(gpu):
            relay.serves(TINY)
            yield relay


def tuned(relay: Relay, model: str, layers: dict[str, Any], **said: Any) -> tuple[Any, list[Any]]:
    """The job that has succeeded, and its events, the oldest first."""
    client = relay.client()
    files = [
        client.files.create(file=("rows.jsonl", rows(numbers)), purpose="fine-tune")
        for numbers in (range(12), range(12, 16))
    ]
    job = client.fine_tuning.jobs.create(
        model=model,
        training_file=files[0].id,
        validation_file=files[1].id,
        seed=3,
        extra_body={"layers": layers, "sample_prompts": PROMPTS, "hyperparameters": SAID | said},
    )
    done = follow(relay, job.id, ended, 300)
    assert done.status == "succeeded", done.error
    return done, list(client.fine_tuning.jobs.list_events(job.id, limit=100))[::-1]


def answer(relay: Relay, model: str) -> str:
    messages: Any = [{"role": "user", "content": "Say 3"}]
    client = relay.client()
    done = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=20)
    return str(done.choices[0].message.content)


def test_a_job_tells_its_course_ends_with_a_report_and_can_be_continued_from(relay: Relay) -> None:
    job, events = tuned(relay, TINY, {"layers": "last:2", "rank": 4})
    data = [event.data for event in events if event.type == "metrics"]
    steps = [row for row in data if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 10))
    assert all(row["memory_bytes"] > 0 and row["gradient_norm"] > 0 for row in steps)
    assert [row["step"] for row in data if "perplexity" in row] == [0, 3, 6, 9]
    samples = [(row["step"], [s["prompt"] for s in row["samples"]]) for row in data if "samples" in row]
    assert samples[:4] == [(0, PROMPTS), (3, PROMPTS), (6, PROMPTS), (9, PROMPTS)]
    chosen = job.hyperparameters.model_dump()
    assert {name: chosen[name] for name in SAID} == SAID
    assert {name for name, value in chosen.items() if value == "auto"} == wire.OF_PICTURES
    assert any("longest rows fits" in event.message for event in events)

    http = relay.http()
    report = http.get(f"/v1/fine_tuning/jobs/{job.id}/report").raise_for_status().json()
    assert [row["step"] for row in report["losses"]] == list(range(1, 10))
    assert report["perplexity"]["after"] < report["perplexity"]["before"]
    assert [row["prompt"] for row in report["answers"]] == PROMPTS
    assert [row["layer"] for row in report["changes"]["layers"]] == [2, 3]
    page = http.get(f"/v1/fine_tuning/jobs/{job.id}/report.html").raise_for_status().text
    assert "<svg" in page
    assert "<script" not in page

    again, events = tuned(relay, job.fine_tuned_model, {"layers": "1-3", "rank": 8, "method": "dora"}, n_epochs=1)
    assert again.model == job.fine_tuned_model
    assert any(job.fine_tuned_model in event.message for event in events)
    first = next(event.data["validation_loss"] for event in events if "validation_loss" in (event.data or {}))
    assert first == pytest.approx(report["validations"][-1]["loss"], rel=1e-3), "it begins where the first one ended"
    before = answer(relay, again.fine_tuned_model)
    relay.client().models.delete(job.fine_tuned_model)
    assert answer(relay, again.fine_tuned_model) == before, "it is whole without the first"


def test_a_streamed_job_learns_what_the_one_beside_the_whole_model_learns(relay: Relay) -> None:
    spec = {"parts": ["attn", "mlp"], "layers": "last:1", "rank": 4}
    streamed, events = tuned(relay, TINY, spec, stream_layers=True)
    assert any("the layers are streamed" in event.message for event in events)
    assert any("no answers to prompts" in event.message for event in events)
    beside, others = tuned(relay, TINY, spec, prefix_cache=True)
    assert losses(events) == losses(others)
    assert answer(relay, streamed.fine_tuned_model) == answer(relay, beside.fine_tuned_model)


def losses(events: list[Any]) -> list[tuple[str, float]]:
    named = ("train_loss", "validation_loss")
    return [(n, e.data[n]) for e in events if e.type == "metrics" for n in named if n in e.data]
