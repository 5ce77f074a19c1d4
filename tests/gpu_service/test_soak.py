"""Callers that come, leave midway and err, for a while: memory stays flat, and nothing of them is left.

`SOAK_S` says for how many seconds; `make soak` takes ten minutes.
"""

import asyncio
import gc
import json
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpu_service.device import Device
from gpu_service.settings import Settings
from tests.conftest import TINY
from tests.gpu_service.conftest import Gpu, run_gpu

SOAK_S = float(os.environ.get("SOAK_S", "60"))
CALLERS = 12
BUDGET_BYTES = 24_000_000  # for keys and values: small, so that it is full long before the warm-up ends
WARM_SHARE = 0.4
MOST_GROWTH = 0.04  # of resident memory, from after the warm-up to the end
WORDS = ["sea", "ship", "wind", "salt", "rope", "sail", "star", "night", "bird", "stone", "바다", "별", "🏴\u200d☠️"]

pytestmark = [pytest.mark.long, pytest.mark.timeout(SOAK_S + 180)]


def body(dice: random.Random) -> dict[str, Any]:
    asked: dict[str, Any] = {
        "model": TINY,
        "prompt": " ".join(dice.choices(WORDS, k=dice.randint(1, 60))),
        "max_tokens": dice.randint(1, 40),
        "ignore_eos": True,
        "n": dice.choice([1, 1, 1, 3]),
        "temperature": dice.choice([0, 1]),
        "deterministic": dice.random() < 0.1,
        "stream": True,
    }
    if dice.random() < 0.4:
        asked["dials"] = {"attn": dice.uniform(0.8, 1.2), "eps": dice.choice([1, 10])}
    if dice.random() < 0.3:
        asked |= {"logprobs": 2, "echo": True}
    return asked


async def call(gpu: Gpu, dice: random.Random) -> str:
    """What kind of call it was."""
    asked, kind = body(dice), dice.choice(["whole", "whole", "stream", "leave", "err"])
    if kind == "err":
        wrong: list[dict[str, Any]] = [
            {"prompt": "word " * 700},
            {"dials": {"attn": 100.0, "mlp": 100.0, "eps": 1e-6}, "temperature": 1e-3, "frequency_penalty": -2},
            {"logit_bias": {"99999999": 1}},
            {"model": "nobody"},
            {"top_p": 7},
        ]
        response = await gpu.http.post("/v1/completions", json={**asked, **dice.choice(wrong), "stream": False})
        return f"status {response.status_code}"
    if kind == "whole":
        response = await gpu.http.post("/v1/completions", json={**asked, "stream": False})
        assert response.status_code == 200, response.text
        return kind
    async with gpu.http.stream("POST", "/v1/completions", json=asked) as response:
        frames = 0
        last = ""
        async for line in response.aiter_lines():
            frames += 1
            last = line or last
            if kind == "leave" and frames > dice.randint(1, 12):
                return kind
        assert last == "data: [DONE]"
    return kind


async def caller(gpu: Gpu, seed: int, until: float, seen: Counter[str]) -> None:
    dice = random.Random(seed)
    while time.monotonic() < until:
        seen[await call(gpu, dice)] += 1


async def test_memory_stays_flat_and_nothing_is_left_of_callers_that_come_leave_and_err(
    tiny_dir: Path, cpu: Device
) -> None:
    process, seen, resident = psutil.Process(), Counter[str](), list[tuple[float, float]]()
    settings = Settings(kv_share=BUDGET_BYTES / cpu.free_bytes())
    async with run_gpu(tiny_dir, cpu, settings) as gpu:
        await gpu.http.get("/healthz")
        tasks_before, files_before = len(asyncio.all_tasks()), process.num_fds()
        start = time.monotonic()
        callers = [asyncio.create_task(caller(gpu, seed, start + SOAK_S, seen)) for seed in range(CALLERS)]
        while not all(task.done() for task in callers):
            await asyncio.wait(callers, timeout=SOAK_S / 60)
            resident.append((time.monotonic() - start, process.memory_info().rss / 1e6))
        await asyncio.gather(*callers)

        engine = gpu.worker._text
        async with asyncio.timeout(30):
            while gpu.worker.active_requests or len(engine):
                await gpu.worker._call(lambda: None)  # a turn of the device thread
                await asyncio.sleep(0)
        await gpu.worker._call(lambda: engine.step())  # what has just left is dropped
        held = await gpu.worker._call(
            lambda: (engine._admission.held_bytes, len(engine._groups), len(engine._readers), engine._reuse.n_bytes)
        )
        await gpu.http.aclose()
        gc.collect()
        async with asyncio.timeout(30):
            while len(asyncio.all_tasks()) > tasks_before or process.num_fds() > files_before:  # noqa: ASYNC110
                await asyncio.sleep(0.05)  # connections close; nothing tells when
    warm = [mb for at, mb in resident if at > WARM_SHARE * SOAK_S]
    early, late = sorted(warm[: len(warm) // 3]), sorted(warm[-len(warm) // 3 :])
    growth = late[len(late) // 2] / early[len(early) // 2] - 1
    print(
        json.dumps(
            {
                "soak_s": SOAK_S,
                "calls": dict(seen),
                "resident_mb": [round(mb) for _, mb in resident[:: max(1, len(resident) // 12)]],
                "growth": round(growth, 4),
            }
        )
    )
    assert held[:3] == (0, 0, 0)
    assert held[3] <= engine.budget_bytes
    assert growth < MOST_GROWTH
    assert {"whole", "stream", "leave", "status 400", "status 404"} <= set(seen)
