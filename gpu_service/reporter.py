"""What a job's owner reads while it runs: its events, gathered and sent about once a second.

Knows what the numbers mean and how they are worded; nothing of how they come about.
"""

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import wire
from gpu_service import train
from gpu_service.course import perplexity
from gpu_service.device import Device
from gpu_service.errors import RelayUnavailable
from gpu_service.link import LeaseLost, Link, NotEnrolled, Refused
from gpu_service.plan import Plan
from gpu_service.samples import Prompt

log = logging.getLogger(__name__)

FLUSH_S = 1.0  # between reports of progress
MOST_EVENTS = 500  # of one report
MOST_BYTES = 2**20  # likewise: sample pictures stand in events
MOST_CHARS = 2000  # of a prompt or an answer in an event


@dataclass(frozen=True)
class JobView:
    """How far a job is, for a person."""

    job_id: str
    model: str
    step: int
    total_steps: int  # 0 while the data is being prepared
    loss: float | None
    eta_s: float | None


class Reporter:
    """Gathers a job's events and sends them about once a second, in order, each once.

    The last events are sent by `flush`. A lost lease cancels the task that entered the context.
    """

    def __init__(self, link: Link, device: Device, job_id: str, model: str, fence: int) -> None:
        self._link, self._device, self._job_id, self._model, self._fence = link, device, job_id, model, fence
        self._waiting: list[wire.JobEvent] = []
        self._seq = 0
        self.is_lost = False
        self._loss: float | None = None
        self._progress: tuple[int, int, float] | None = None  # step, steps in all, seconds left
        self._first: tuple[int, float] | None = None  # step and monotonic time at which this lease's training began
        self._last: tuple[int, float] | None = None  # tokens and monotonic time of the last step

    async def __aenter__(self) -> "Reporter":
        owner = asyncio.current_task()
        assert owner
        self._owner = owner
        self._task = asyncio.create_task(self._loop())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        if self.is_lost and kind is asyncio.CancelledError:
            raise LeaseLost

    def view(self) -> JobView:
        step, total_steps, eta_s = self._progress or (0, 0, None)
        return JobView(self._job_id, self._model, step, total_steps, self._loss, eta_s)

    def say(self, message: str, *, level: Literal["info", "warn"] = "info", data: dict[str, Any] | None = None) -> None:
        self._add(message, "message", level, data or {})

    def begins(self, step: int) -> None:
        """The next steps are those whose pace says when the job will be done."""
        self._first = (step, time.monotonic())

    def metrics(self, item: train.Progress, plan: Plan, prompts: Sequence[Prompt], elapsed_s: float) -> None:
        """Of a step, a validation or answers. `elapsed_s`: spent on training so far, wherever."""
        at = time.monotonic()
        self._first = self._first or (item.step, at)
        first_step, began = self._first
        left_s = (at - began) / max(1, item.step - first_step) * (plan.total_steps - item.step)
        data: dict[str, Any] = {
            "step": item.step,
            "total_steps": plan.total_steps,
            "epoch": -(-item.step // plan.steps_per_epoch),
            _counted(plan): item.tokens,
            "elapsed_s": round(elapsed_s, 2),
            "memory_bytes": self._device.used_bytes(),
        }
        if item.step > first_step:
            data["eta_s"] = round(left_s, 1)
            self._progress = (item.step, plan.total_steps, left_s)
        text = f"Step {item.step}/{plan.total_steps}: "
        if item.train_loss is not None:
            self._loss = item.train_loss
            data |= {"loss": item.train_loss, "train_loss": item.train_loss}
            data |= {"learning_rate": item.learning_rate, "gradient_norm": _finite(item.gradient_norm)}
            if self._last:
                data[f"{_counted(plan)}_per_s"] = round(
                    (item.tokens - self._last[0]) / max(at - self._last[1], 1e-6), 1
                )
            self._last = (item.tokens, at)
            text += f"training loss {item.train_loss:.4f}"
        if item.valid_loss is not None:
            data |= {"validation_loss": item.valid_loss, "full_valid_loss": item.valid_loss}
            if not plan.resolution:
                data["perplexity"] = perplexity(item.valid_loss)
            text += f"validation loss {item.valid_loss:.4f}"
        if item.answers is not None:
            rows = zip(prompts, item.answers, strict=True)
            most = None if plan.resolution else MOST_CHARS  # a picture is small, and worth nothing when it is cut
            data["samples"] = [{"prompt": p.text[:MOST_CHARS], "answer": text[:most]} for p, text in rows]
            text += "pictures of the prompts" if plan.resolution else "answers to the prompts"
        self._add(text, "metrics", "info", data)

    def answered(self, done: int, total: int, here: int, failed: int, tokens: int, elapsed_s: float) -> None:
        """Of a batch: `done` rows of `total`, of which this lease has `here`; `tokens` were written in `elapsed_s`."""
        left_s = elapsed_s / max(1, here) * (total - done)
        self._progress = (done, total, left_s)
        data = {"rows": done, "total_rows": total, "failed_rows": failed, "tokens": tokens, "eta_s": round(left_s, 1)}
        data |= {"elapsed_s": round(elapsed_s, 2), "tokens_per_s": round(tokens / max(elapsed_s, 1e-6), 1)}
        self._add(f"{done:,} of {total:,} rows are answered", "metrics", "info", data)

    def _add(
        self, message: str, type: Literal["message", "metrics"], level: Literal["info", "warn"], data: dict[str, Any]
    ) -> None:
        at = self._link.now()
        self._waiting.append(
            wire.JobEvent(seq=self._seq, at=at, type=type, level=level, message=message[:2000], data=data)
        )
        self._seq += 1

    async def flush(self) -> None:
        """Send what waits. Raises LeaseLost; what can't be sent now stays."""
        while self._waiting:
            some = _fitting(self._waiting[:MOST_EVENTS])
            try:
                await self._link.report(self._job_id, wire.JobEvents(fence=self._fence, events=some))
            except (RelayUnavailable, NotEnrolled):
                return
            except Refused as exc:  # these events can't be told; the job itself is sound
                log.warning("job %s: %s", self._job_id, exc.message)
            del self._waiting[: len(some)]

    def lost(self) -> None:
        """The lease is another's now: the work on it ends."""
        self.is_lost = True
        self._owner.cancel()

    async def _loop(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            try:
                await self.flush()
            except LeaseLost:
                self.lost()
                return


def _fitting(events: list[wire.JobEvent]) -> list[wire.JobEvent]:
    """Of these the first ones that one report can hold; one at least."""
    size_bytes = 0
    for number, event in enumerate(events):
        size_bytes += len(event.model_dump_json())
        if size_bytes > MOST_BYTES and number:
            return events[:number]
    return events


def _counted(plan: Plan) -> str:
    return "pictures" if plan.resolution else "tokens"


def _finite(value: float | None) -> float | None:
    """JSON has no infinity."""
    return value if value is not None and math.isfinite(value) else None
