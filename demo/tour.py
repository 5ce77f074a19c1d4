"""The main job before the user's eyes: ask, fine-tune a few layers, ask again. Through the relay's public API only."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from demo.screen import Screen

QUESTION = "How do volcanoes erupt?"  # not in the data
SUFFIX = "captain"
DATA = Path(__file__).with_name("captain.jsonl")
LAYERS = {"method": "lora", "parts": ["attn", "mlp"], "layers": "last:8", "rank": 16}
HYPERPARAMETERS = {"n_epochs": 3, "batch_size": 8, "learning_rate": 1e-3}
ANSWER_TOKENS = 80
CHAT = "/v1/chat/completions"
NOT_YET = (404, 503)  # the gpu has not told the relay of its model; the relay can't reach the gpu
READY_S = 180.0
POLL_S = 0.5
OVER = ("succeeded", "failed", "cancelled")


class TourFailed(Exception):
    """The message is the API's own where there is one."""


@dataclass(frozen=True)
class Tour:
    client: httpx2.Client  # base_url and key set
    screen: Screen
    check: Callable[[], None]  # raises if a service died
    base_model: str

    def run(self) -> str:
        """Returns the tuned model's id. Raises TourFailed."""
        tuned = self._tuned()
        if tuned:
            self.screen.say(
                f"An earlier run tuned {tuned}; it is served again, without training.",
                f"지난번에 튜닝한 모델 {tuned} 을(를) 다시 학습하지 않고 그대로 씁니다.",
            )
            after = self._answer_of_tuned(tuned)
            self.screen.say(f'\n  "{QUESTION}"\n')
            self.screen.answer(self._tuned_title, after)
            return tuned
        before = self._answer(self.base_model, self.screen.pick("the base model", "기본 모델"))
        tuned = self._follow(self._active() or self._create())
        after = self._answer_of_tuned(tuned)
        self.screen.say(f'\n  "{QUESTION}"\n')
        self.screen.side_by_side((self.screen.pick("Base model", "기본 모델"), before), (self._tuned_title, after))
        return tuned

    @property
    def _tuned_title(self) -> str:
        return self.screen.pick("Tuned: 8 of 30 layers", "튜닝: 30개 층 중 8개")

    def _answer_of_tuned(self, tuned: str) -> str:
        return self._answer(tuned, self.screen.pick("the tuned model", "튜닝한 모델"))

    def wait_until_served(self) -> None:
        """Asks for one token until it comes: a list of models may still speak of a gpu that has just gone."""
        deadline = time.monotonic() + READY_S
        while True:
            with self._translated():
                response = self.client.post(CHAT, json=_question(self.base_model, max_tokens=1))
            if response.status_code not in NOT_YET:
                _body(response)
                return
            if time.monotonic() > deadline:
                raise TourFailed(f"after {READY_S:.0f} s there is still no answer: {_body(response)}")
            self._pause()

    def _answer(self, model: str, name: str) -> str:
        self.screen.waiting(self.screen.pick(f"  Asking {name} ...", f"  {name}에게 묻는 중 ..."))
        reply = self._post(CHAT, json=_question(model, max_tokens=ANSWER_TOKENS))
        self.screen.wipe()
        choice = reply["choices"][0]
        text = str(choice["message"]["content"]).strip()
        return text + (" ..." if choice["finish_reason"] == "length" else "")

    def _models(self) -> list[dict[str, Any]]:
        return list(self._get("/v1/models")["data"])

    def _jobs(self) -> list[dict[str, Any]]:
        """The tour's own jobs, newest first."""
        jobs = self._get("/v1/fine_tuning/jobs?limit=100")["data"]
        return [job for job in jobs if (job["model"], job["user_provided_suffix"]) == (self.base_model, SUFFIX)]

    def _tuned(self) -> str | None:
        """What an earlier run made, if nobody has deleted it."""
        there = {model["id"] for model in self._models()}
        return next((job["fine_tuned_model"] for job in self._jobs() if job["fine_tuned_model"] in there), None)

    def _active(self) -> str | None:
        """A job that an earlier run left behind goes on by itself."""
        return next((job["id"] for job in self._jobs() if job["status"] not in OVER), None)

    def _create(self) -> str:
        with DATA.open("rb") as rows:
            file = self._post("/v1/files", data={"purpose": "fine-tune"}, files={"file": (DATA.name, rows)})
        job = self._post(
            "/v1/fine_tuning/jobs",
            json={
                "model": self.base_model,
                "training_file": file["id"],
                "suffix": SUFFIX,
                "seed": 7,
                "layers": LAYERS,
                "method": {"type": "supervised", "supervised": {"hyperparameters": HYPERPARAMETERS}},
            },
        )
        n_rows = len(DATA.read_text().splitlines())
        self.screen.say(
            f"Fine-tuning the last 8 of its 30 layers (LoRA) on {n_rows} answers of an old sea captain: {job['id']}",
            f"나이 든 선장의 답변 {n_rows}개로 30개 층 가운데 마지막 8개를 튜닝합니다 (LoRA): {job['id']}",
        )
        return str(job["id"])

    def _follow(self, job_id: str) -> str:
        """Draws the job's progress until it is over. Returns the tuned model's id. Raises TourFailed."""
        started, seen = time.monotonic(), set[str]()
        self.screen.waiting(self.screen.pick("  Waiting for the gpu ...", "  GPU를 기다리는 중 ..."))
        while True:
            job = self._get(f"/v1/fine_tuning/jobs/{job_id}")
            events = self._get(f"/v1/fine_tuning/jobs/{job_id}/events?limit=100")["data"]
            for event in reversed([e for e in events if e["id"] not in seen]):  # the API lists the newest first
                seen.add(event["id"])
                self._show(event)
            if job["status"] in OVER:
                break
            self._pause()
        self.screen.wipe()
        if job["status"] != "succeeded":
            error = job.get("error") or {}
            raise TourFailed(f"the fine-tuning job {job_id} {job['status']}: {error.get('message', 'no reason given')}")
        tuned, took_s = str(job["fine_tuned_model"]), time.monotonic() - started
        self.screen.say(f"Tuned in {took_s:.0f} s: {tuned}", f"{took_s:.0f}초 만에 튜닝 완료: {tuned}")
        return tuned

    def _show(self, event: dict[str, Any]) -> None:
        data = event.get("data") or {}
        if event["type"] == "metrics" and "total_steps" in data:
            self.screen.progress(data["step"], data["total_steps"], data.get("train_loss"), data.get("eta_s"))
        elif event["level"] != "info":
            self.screen.wipe()
            self.screen.say(f"  {event['message']}")

    def _pause(self) -> None:
        self.check()
        time.sleep(POLL_S)

    def _get(self, path: str) -> dict[str, Any]:
        with self._translated():
            return _body(self.client.get(path))

    def _post(self, path: str, **what: Any) -> dict[str, Any]:
        with self._translated():
            return _body(self.client.post(path, **what))

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except httpx2.HTTPError as exc:
            self.check()
            raise TourFailed(f"the relay did not answer: {exc or type(exc).__name__}") from exc


def _question(model: str, *, max_tokens: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": QUESTION}]
    return {"model": model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}


def _body(response: httpx2.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise TourFailed(f"{response.request.url.path} answered {response.status_code} without JSON")
    if response.is_error:
        error = body.get("error") or {}
        raise TourFailed(f"{response.request.url.path} answered {response.status_code}: {error.get('message', body)}")
    return body
