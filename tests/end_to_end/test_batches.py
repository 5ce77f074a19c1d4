"""Batches end to end: the official client, a real relay, real gpus that are killed in the middle. Tiny model."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.conftest import TINY
from tests.end_to_end.stack import Gpu, Relay, ended, follow, running

CHAT: Any = "/v1/chat/completions"
COMPLETIONS: Any = "/v1/completions"
OVER = ("completed", "failed", "expired", "cancelled")
ENDLESS = 400  # tokens of an answer that takes its time


QUICK = {"GPU_CHECKPOINT_EVERY_S": "0.2", "GPU_BATCH_ROWS": "4"}


@pytest.fixture(scope="module")
def both(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Relay, Gpu]]:
    folder = tmp_path_factory.mktemp("batches")
    relay = Relay(folder / "relay")
    with running(relay):
        gpu = Gpu(folder / "gpu", {TINY: tiny_dir}, relay, GPU_CHECKPOINT_EVERY_S="0.5", GPU_BATCH_ROWS="8")
        with running(gpu):
            relay.serves(TINY)
            yield relay, gpu


@pytest.fixture
def relay(both: tuple[Relay, Gpu]) -> Relay:
    """With one healthy gpu."""
    return both[0]


@pytest.fixture
def gpu(both: tuple[Relay, Gpu]) -> Gpu:
    return both[1]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Relay]:
    """Without a gpu."""
    relay = Relay(tmp_path / "relay")
    with running(relay):
        yield relay


def body(number: int, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Tell me of the number {number}" + ", please" * (number % 7)}]
    return {"model": TINY, "messages": messages, "max_tokens": 5 + number % 9, "temperature": 0, **more}


def start(relay: Relay, bodies: list[dict[str, Any]], endpoint: Any = CHAT) -> Any:
    rows = [{"custom_id": f"row-{n}", "method": "POST", "url": endpoint, "body": b} for n, b in enumerate(bodies)]
    client = relay.client()
    file = client.files.create(file=("rows.jsonl", "\n".join(map(json.dumps, rows)).encode()), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")


def wait(relay: Relay, batch: Any, until: Callable[[Any], bool], within_s: float = 120) -> Any:
    client = relay.client()

    def look() -> Any:
        found = client.batches.retrieve(batch.id)
        return found if until(found) else None

    return relay.wait(look, within_s)


def is_over(batch: Any) -> bool:
    return batch.status in OVER


def lines(relay: Relay, file_id: str | None) -> list[dict[str, Any]]:
    return [json.loads(line) for line in relay.client().files.content(file_id).text.splitlines()] if file_id else []


def text(answer: Any) -> str:
    return str(answer["choices"][0]["message"]["content"])


def test_a_batch_gives_the_answers_of_live_calls_and_bad_rows_go_to_the_error_file(relay: Relay, gpu: Gpu) -> None:
    bodies = [body(n) for n in range(40)]
    bodies[3] |= {"dials": {"attn": 0.5}}
    bodies[5] |= {"messages": [{"role": "user", "content": "word " * 600}]}
    bodies[7] |= {"max_tokens": -1}
    bodies[9] |= {"whatever": 1}
    bodies[11] |= {"n": 2, "logprobs": True, "top_logprobs": 2}
    done = wait(relay, start(relay, bodies), is_over)
    assert (done.status, done.errors) == ("completed", None)
    assert done.request_counts.model_dump() == {"total": 40, "completed": 37, "failed": 3}
    answers, errors = lines(relay, done.output_file_id), lines(relay, done.error_file_id)
    assert [line["custom_id"] for line in answers] == [f"row-{n}" for n in range(40) if n not in (5, 7, 9)]
    codes = [(line["custom_id"], line["response"]["body"]["error"]["code"]) for line in errors]
    assert codes == [("row-5", "context_length_exceeded"), ("row-7", "invalid_value"), ("row-9", "invalid_value")]
    http, usage = relay.http(), [0, 0]
    for line in answers:
        live = http.post(CHAT, json=bodies[int(line["custom_id"].removeprefix("row-"))]).raise_for_status().json()
        ours = line["response"]["body"]
        assert [choice["message"] for choice in ours["choices"]] == [choice["message"] for choice in live["choices"]]
        assert ours["usage"]["completion_tokens"] == live["usage"]["completion_tokens"]
        usage = [usage[0] + ours["usage"]["prompt_tokens"], usage[1] + ours["usage"]["completion_tokens"]]
    assert (done.usage.input_tokens, done.usage.output_tokens) == (usage[0], usage[1])
    events = http.get(f"/v1/batches/{done.id}/events").json()["data"]
    assert any(event["data"].get("rows") == 40 for event in events if event["type"] == "metrics")


def test_plain_completions_are_answered_too(relay: Relay, gpu: Gpu) -> None:
    bodies: list[Any] = [{"model": TINY, "prompt": f"Once {n}", "max_tokens": 4, "temperature": 0} for n in range(12)]
    done = wait(relay, start(relay, bodies, COMPLETIONS), is_over)
    client = relay.client()
    for line in lines(relay, done.output_file_id):
        live = client.completions.create(**bodies[int(line["custom_id"].removeprefix("row-"))])
        assert line["response"]["body"]["choices"][0]["text"] == live.choices[0].text


def test_a_gpu_killed_in_the_middle_is_replaced_and_every_row_is_answered_once(
    alone: Relay, tiny_dir: Path, tmp_path: Path
) -> None:
    relay = alone
    bodies = [body(n, max_tokens=60, ignore_eos=True) for n in range(60)]
    first = Gpu(tmp_path / "first", {TINY: tiny_dir}, relay, **QUICK)
    with running(first):
        relay.serves(TINY)
        batch = start(relay, bodies)
        before = wait(relay, batch, lambda found: found.request_counts.completed >= 5)
        first.kill()
        assert before.request_counts.completed < 60, "it was killed in the middle"
    second = Gpu(tmp_path / "second", {TINY: tiny_dir}, relay, **QUICK)
    with running(second):
        done = wait(relay, batch, is_over)
        assert done.status == "completed"
        answers = lines(relay, done.output_file_id)
        assert [line["custom_id"] for line in answers] == [f"row-{n}" for n in range(60)]
        assert done.attempts == 0, "rows had come, so the loss costs nothing"
        assert done.request_counts.completed == 60
        for line in answers[::6]:
            live = relay.http().post(CHAT, json=bodies[int(line["custom_id"].removeprefix("row-"))]).json()
            assert text(line["response"]["body"]) == text(live)


def test_a_cancelled_batch_leaves_the_gpu_to_the_next_job_and_keeps_its_answers(relay: Relay, gpu: Gpu) -> None:
    batch = start(relay, [body(n, max_tokens=2 if n < 4 else ENDLESS, ignore_eos=True) for n in range(400)])
    wait(relay, batch, lambda found: found.request_counts.completed >= 4)
    assert relay.client().batches.cancel(batch.id).status in ("cancelling", "cancelled")
    following = start(relay, [body(0)])
    done = wait(relay, batch, is_over)
    assert done.status == "cancelled"
    answers, errors = lines(relay, done.output_file_id), lines(relay, done.error_file_id)
    assert len(answers) == done.request_counts.completed >= 4
    assert len(answers) + len(errors) == 400
    assert {line["error"]["code"] for line in errors} == {"batch_cancelled"}
    assert wait(relay, following, is_over).status == "completed"


def test_a_paused_batch_hands_in_what_it_has_and_goes_on_when_it_is_resumed(relay: Relay, gpu: Gpu) -> None:
    batch = start(relay, [body(n, max_tokens=40, ignore_eos=True) for n in range(60)])
    wait(relay, batch, lambda found: found.request_counts.completed >= 1)
    http = relay.http()
    http.post(f"/v1/batches/{batch.id}/pause").raise_for_status()
    paused = wait(relay, batch, lambda found: found.paused)
    assert 1 <= paused.request_counts.completed < 60
    http.post(f"/v1/batches/{batch.id}/resume").raise_for_status()
    done = wait(relay, batch, is_over)
    assert (done.status, done.request_counts.completed, done.attempts) == ("completed", 60, 0)


def test_a_relay_killed_in_the_middle_of_a_batch_loses_no_row(relay: Relay, gpu: Gpu) -> None:
    batch = start(relay, [body(n, max_tokens=40, ignore_eos=True) for n in range(60)])
    before = wait(relay, batch, lambda found: found.request_counts.completed >= 1)
    relay.kill()
    relay.start()
    done = wait(relay, batch, is_over)
    assert before.request_counts.completed < 60, "it was killed in the middle"
    assert (done.status, done.request_counts.completed, done.attempts) == ("completed", 60, 0)
    assert [line["custom_id"] for line in lines(relay, done.output_file_id)] == [f"row-{n}" for n in range(60)]
    relay.serves(TINY)


def test_a_live_caller_is_answered_while_a_batch_runs(relay: Relay, gpu: Gpu) -> None:
    client = relay.client()
    live: Any = {
        "model": TINY,
        "prompt": "Hello",
        "max_tokens": 20,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    batch = start(relay, [body(n, max_tokens=ENDLESS, ignore_eos=True) for n in range(300)])
    wait(relay, batch, lambda found: found.status == "in_progress")
    answers = [client.completions.create(**live).choices[0].text for _ in range(5)]
    found = client.batches.retrieve(batch.id)
    client.batches.cancel(batch.id)
    assert found.status == "in_progress", "the batch went on all the time"
    assert len(set(answers)) == 1
    assert "batch_rows" in gpu_metrics(gpu)


def gpu_metrics(gpu: Gpu) -> str:
    return httpx2.get(f"{gpu.url}/metrics", headers={"authorization": f"Bearer {gpu.key}"}).text


@pytest.mark.long
def test_a_tuned_model_answers_a_batch_also_when_it_is_deleted_meanwhile(
    alone: Relay, tiny_dir: Path, tmp_path: Path
) -> None:
    relay, client = alone, alone.client()
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Good day to you!"}]}
    with running(gpu := Gpu(tmp_path / "tuning", {TINY: tiny_dir}, relay)):
        relay.serves(TINY)
        file = client.files.create(
            file=("rows.jsonl", ("\n".join([json.dumps(row)] * 20)).encode()), purpose="fine-tune"
        )
        hyperparameters: Any = {"n_epochs": 3, "batch_size": 4, "learning_rate": 1e-2}
        job = client.fine_tuning.jobs.create(
            model=TINY, training_file=file.id, extra_body={"hyperparameters": hyperparameters}
        )
        tuned = follow(relay, job.id, ended, 120).fine_tuned_model
        bodies = [body(n) | {"model": tuned} for n in range(8)]
        live = [text(relay.http().post(CHAT, json=b).raise_for_status().json()) for b in bodies]
        base = [text(relay.http().post(CHAT, json=b | {"model": TINY}).raise_for_status().json()) for b in bodies]
        assert gpu.stop() == 0
    batch = start(relay, bodies)
    client.models.delete(tuned)
    with running(Gpu(tmp_path / "answering", {TINY: tiny_dir}, relay)):
        done = wait(relay, batch, is_over)
    assert done.status == "completed"
    ours = [text(line["response"]["body"]) for line in lines(relay, done.output_file_id)]
    assert ours == live
    assert ours != base
    with pytest.raises(openai.NotFoundError):
        start(relay, bodies)


@pytest.mark.long
def test_a_gpu_that_stops_gives_its_batch_back_without_a_loss(alone: Relay, tiny_dir: Path, tmp_path: Path) -> None:
    relay = alone
    bodies = [body(n, max_tokens=40, ignore_eos=True) for n in range(60)]
    first = Gpu(tmp_path / "first", {TINY: tiny_dir}, relay, **QUICK)
    with running(first):
        relay.serves(TINY)
        batch = start(relay, bodies)
        wait(relay, batch, lambda found: found.request_counts.completed >= 4)
        began = time.monotonic()
        assert first.stop() == 0
        assert time.monotonic() - began < 10
    kept: Any = relay.client().batches.retrieve(batch.id)
    assert "Traceback" not in first.log()
    with running(Gpu(tmp_path / "second", {TINY: tiny_dir}, relay)):
        done = wait(relay, batch, is_over)
    assert done.status == "completed"
    assert len(lines(relay, done.output_file_id)) == 60 > kept.request_counts.completed >= 4
