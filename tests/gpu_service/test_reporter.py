"""What a job says of its pace."""

from types import SimpleNamespace
from typing import Any

import pytest

import wire
from gpu_service.device import Device
from gpu_service.plan import Plan
from gpu_service.reporter import Reporter
from gpu_service.train import Progress

PLAN = Plan(
    n_epochs=1,
    batch_rows=1,
    micro_rows=1,
    learning_rate=1e-3,
    multiplier=1.0,
    max_length_tokens=8,
    steps_per_epoch=10,
    warmup_steps=1,
)


class Link:
    def __init__(self) -> None:
        self.told: list[wire.JobEvent] = []

    def now(self) -> float:
        return 0.0

    async def report(self, job_id: str, events: wire.JobEvents) -> None:
        self.told += events.events


@pytest.mark.parametrize("first", [0, 4], ids=["from its beginning", "resumed"])
async def test_the_time_left_follows_the_steps_pace_from_the_first_on(
    first: int, cpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 100.0
    monkeypatch.setattr("gpu_service.reporter.time", SimpleNamespace(monotonic=lambda: clock))
    link: Any = Link()
    reporter = Reporter(link, cpu, "job", "model", 1)
    clock += 50  # the data is prepared
    reporter.begins(first)
    for step in range(first + 1, 11):
        clock += 3
        reporter.metrics(Progress(step, step * 100, 1.0, 1.0, 1e-3), PLAN, (), clock)
        assert reporter.view().eta_s == 3 * (10 - step)
    await reporter.flush()
    told = [event.data for event in link.told]
    assert [data["eta_s"] for data in told] == [3.0 * (10 - step) for step in range(first + 1, 11)]
    assert [data.get("tokens_per_s") for data in told[1:]] == [round(100 / 3, 1)] * (len(told) - 1)
