"""Text generation side by side with `transformers serve --continuous-batching`, over HTTP with streaming, in one run.

Both serve SmolLM2-135M-Instruct in bf16, each in a process and an environment of its own. Greedy, exactly N_TOKENS new
tokens (end of text ignored: by a field here, by a model folder without one there), prompts that differ each time, 1, 8
and 32 streams; the two sides take turns, and medians of the repetitions count: as many as fit the time, for on a CPU
without bf16 units the peer takes minutes for one. Then, on our side alone: eight rows with eight dial settings, and
with eight LoRA adapters, against eight plain rows; and the first token after a changed dial.

The last line is JSON. Speed ratios above 1 mean that ours is faster; time to first token and memory are ours / peer;
costs are fractions. Run it by `make bench-generate`, on a machine that does nothing else.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import psutil
import torch

import wire
from bench import peers
from demo import model as demo_model
from tests.end_to_end.stack import Gpu, Relay, Service, ended, follow, free_port, running

ROOT = Path(__file__).parent.parent
PEER = ("torch==2.13.0", "transformers[serving]==5.23.0", "accelerate==1.15.0")
N_TOKENS = 128
LOADS = (1, 8, 32)
PAIRS = 40  # of first tokens, plain and with changed dials
UNUSED_TOKEN = 3  # a special token that greedy decoding does not choose; the peer's end of text
WORDS = (ROOT / "README.md").read_text().split()


@dataclass(frozen=True)
class Side:
    name: str
    url: str
    headers: dict[str, str]
    model: str
    extra: dict[str, Any]
    pid: int


@dataclass
class Heard:
    """One stream: when it was asked, and when each piece came. Seconds."""

    asked: float
    times: list[float]

    @property
    def first(self) -> float:
        return self.times[0] - self.asked


@dataclass(frozen=True)
class Load:
    tokens_per_s: float
    first_p50_s: float
    first_p95_s: float
    between_p99_s: float


def prompt(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=40))


async def stream(http: httpx2.AsyncClient, side: Side, **extra: Any) -> Heard:
    body = {
        "model": side.model,
        "messages": [{"role": "user", "content": extra.pop("prompt")}],
        "max_tokens": N_TOKENS,
        "temperature": 0,
        "stream": True,
        **side.extra,
        **extra,
    }
    heard = Heard(time.perf_counter(), [])
    async with http.stream("POST", f"{side.url}/v1/chat/completions", json=body, headers=side.headers) as response:
        if response.status_code != 200:
            await response.aread()
            raise RuntimeError(f"{side.name}: {response.status_code} {response.text[:500]}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(f"{side.name}: {event}")
                for choice in event["choices"]:
                    if choice["delta"].get("content"):
                        heard.times.append(time.perf_counter())
                    if choice.get("finish_reason") not in (None, "length"):
                        raise RuntimeError(
                            f"{side.name} ended before it had written {body['max_tokens']} tokens: {event}"
                        )
    return heard


async def load(http: httpx2.AsyncClient, side: Side, extras: list[dict[str, Any]]) -> Load:
    start = time.perf_counter()
    heard = await asyncio.gather(*(stream(http, side, **extra) for extra in extras))
    seconds = time.perf_counter() - start
    firsts = sorted(h.first for h in heard)
    gaps = sorted(b - a for h in heard for a, b in zip(h.times, h.times[1:], strict=False))
    return Load(
        len(extras) * N_TOKENS / seconds,
        statistics.median(firsts),
        firsts[min(len(firsts) - 1, int(0.95 * len(firsts)))],
        gaps[int(0.99 * len(gaps))] if gaps else 0.0,
    )


def median(loads: list[Load]) -> Load:
    return Load(*(statistics.median(values) for values in zip(*(vars(x).values() for x in loads), strict=True)))


def peak_bytes(pid: int) -> int:
    """Of a process and its children, at their highest."""
    total = 0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        status = Path(f"/proc/{process.pid}/status").read_text()
        total += 1024 * int(status.split("VmHWM:")[1].split()[0])
    return total


def without_end(model: Path, folder: Path) -> Path:
    """The same model, whose end of text never comes: the peer has no field to ignore it."""
    folder.mkdir()
    for file in model.iterdir():
        if file.name in ("config.json", "generation_config.json"):
            config = json.loads(file.read_text())
            (folder / file.name).write_text(json.dumps({**config, "eos_token_id": UNUSED_TOKEN}))
        else:
            (folder / file.name).symlink_to(file.resolve())
    return folder


@contextmanager
def peer(model: Path, folder: Path) -> Iterator[Side]:
    port = free_port()
    python = peers.python(ROOT / "data/bench/peer", PEER)
    command = [str(python), "-m", "transformers.cli.transformers", "serve", str(model)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = ["--continuous-batching", "--device", device, "--dtype", "bfloat16", "--port", str(port)]
    with (folder / "peer.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, *options], stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 300
        while True:
            try:
                httpx2.get(f"{url}/v1/models", timeout=5)
                break
            except httpx2.TransportError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((folder / "peer.log").read_text()[-3000:]) from None
                time.sleep(0.5)
        yield Side("peer", url, {}, str(model), {}, process.pid)
    finally:
        process.terminate()
        process.wait()


def adapters(relay: Relay, model: str, n: int) -> list[str]:
    """Tuned models of one training step each: their values don't matter, their sizes do."""
    client = relay.client()
    rows = (ROOT / "demo/captain.jsonl").read_bytes().splitlines()[:2]
    file = client.files.create(file=("rows.jsonl", b"\n".join(rows)), purpose="fine-tune")
    ids = [
        client.fine_tuning.jobs.create(
            model=model,
            training_file=file.id,
            seed=seed,
            hyperparameters={"n_epochs": 1, "batch_size": 2},
            extra_body={"layers": {"method": "lora", "parts": ["attn", "mlp"], "layers": "all", "rank": 16}},
        ).id
        for seed in range(n)
    ]
    return [follow(relay, job_id, ended, 600).fine_tuned_model for job_id in ids]


async def compare(ours: Side, theirs: Side, repetitions: int, seconds: float) -> dict[str, Any]:
    """Each load has its equal share of the seconds that are left, and one repetition at least."""
    rng = random.Random(1)
    results: dict[tuple[str, int], list[Load]] = {(s.name, n): [] for n in LOADS for s in (ours, theirs)}
    async with httpx2.AsyncClient(timeout=1200, limits=httpx2.Limits(max_connections=64)) as http:
        for side in (ours, theirs):
            await load(http, side, [{"prompt": prompt(rng)} for _ in range(2)])  # warm
        end = time.perf_counter() + seconds
        for i, n in enumerate(LOADS):
            begun = time.perf_counter()
            share, done, spent = (end - begun) / (len(LOADS) - i), 0, 0.0
            while done == 0 or (done < repetitions and spent + spent / done <= share):
                for side in (ours, theirs):
                    results[side.name, n].append(await load(http, side, [{"prompt": prompt(rng)} for _ in range(n)]))
                done, spent = done + 1, time.perf_counter() - begun
            print(f"{n} streams: {done} repetitions in {spent:.0f} s", flush=True)
    for (name, n), loads in results.items():
        m = median(loads)
        print(
            f"{name:5} {n:2} streams: {m.tokens_per_s:6.1f} tokens/s, first token p50 {m.first_p50_s:.3f} s "
            f"p95 {m.first_p95_s:.3f} s, between tokens p99 {1000 * m.between_p99_s:.0f} ms"
        )
    pairs = {n: (median(results["ours", n]), median(results["peer", n])) for n in LOADS}
    return {
        "tok_s_ratio": {str(n): round(a.tokens_per_s / b.tokens_per_s, 2) for n, (a, b) in pairs.items()},
        "ttft_p50_ratio": {str(n): round(a.first_p50_s / b.first_p50_s, 2) for n, (a, b) in pairs.items()},
        "rss_ratio": round(peak_bytes(ours.pid) / peak_bytes(theirs.pid), 2),
    }


async def first_tokens(http: httpx2.AsyncClient, ours: Side, rng: random.Random) -> list[tuple[float, float]]:
    """Seconds to the first token: of a plain request, and of one with dials that nobody has turned so before.

    Each plain one comes from another caller: else it would find the chat template's beginning read already, and the
    two would differ in what they read.
    """
    found = []
    await stream(http, ours, prompt=prompt(rng), max_tokens=4)  # warm
    for i in range(PAIRS):
        dials = {"attn": 0.9 + 0.2 * rng.random(), "mlp": 0.9 + 0.2 * rng.random()}
        stranger = replace(ours, headers={**ours.headers, wire.HEADER_CALLER: f"caller {rng.random()}"})
        asked: list[tuple[Side, dict[str, Any]]] = [(stranger, {}), (ours, {"dials": dials})]
        first = {}
        for side, extra in asked[:: 1 if i % 2 else -1]:  # neither is always the second
            first[bool(extra)] = (await stream(http, side, prompt=prompt(rng), max_tokens=4, **extra)).first
        found.append((first[False], first[True]))
    return found


async def costs(ours: Side, tuned: list[str], repetitions: int) -> dict[str, float]:
    rng = random.Random(2)
    turned = [{"attn": 0.9 + 0.02 * i, "mlp": 1.1 - 0.02 * i, "eps": 1.0 + i} for i in range(8)]
    plain: list[float] = []
    dialled: list[float] = []
    adapted: list[float] = []
    async with httpx2.AsyncClient(timeout=600) as http:
        for model in tuned:  # fetched and loaded before the clock runs
            await stream(http, ours, model=model, prompt="hello", max_tokens=2)
        for _ in range(repetitions):
            asked: list[dict[str, Any]] = [{"prompt": prompt(rng)} for _ in range(8)]
            plain.append((await load(http, ours, asked)).tokens_per_s)
            asked = [{"prompt": prompt(rng), "dials": d} for d in turned]
            dialled.append((await load(http, ours, asked)).tokens_per_s)
            asked = [{"prompt": prompt(rng), "model": m} for m in tuned]
            adapted.append((await load(http, ours, asked)).tokens_per_s)
        pairs = await first_tokens(http, ours, rng)
    first_plain, first_turned = (statistics.median(firsts) for firsts in zip(*pairs, strict=True))
    quartiles = statistics.quantiles([turned / plain for plain, turned in pairs])
    print(
        f"first token of a plain request {first_plain:.3f} s, with changed dials {first_turned:.3f} s; "
        f"quartiles of {PAIRS} pairs' ratios: {', '.join(f'{q:.2f}' for q in quartiles)}"
    )
    base = statistics.median(plain)
    return {
        "dials_cost": round(base / statistics.median(dialled) - 1, 3),
        "adapters_cost": round(base / statistics.median(adapted) - 1, 3) if tuned else float("nan"),
        "dial_change_ttft_ratio": round(first_turned / first_plain, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5, help="of each load, at most")
    parser.add_argument("--minutes", type=float, default=7, help="for the comparison, start and costs apart")
    asked = parser.parse_args()
    model = demo_model.ensure(ROOT / "data")
    threads = {"OMP_NUM_THREADS": str(psutil.cpu_count(logical=False) or os.cpu_count() or 1)}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        relay = Relay(folder / "relay")
        stack.enter_context(running(relay))
        gpu = Gpu(folder / "gpu", {model.name: model}, relay, GPU_PRECISION="bf16", **threads)
        stack.enter_context(running(gpu))
        relay.serves(model.name, 300)  # a probe in bf16 takes its time where there are no units for it
        theirs = stack.enter_context(peer(without_end(model, folder / "without-end"), folder))
        headers = {"authorization": f"Bearer {gpu.key}"}
        ours = Side("ours", gpu.url, headers, model.name, {"ignore_eos": True}, pid_of(gpu))
        compared = asyncio.run(compare(ours, theirs, asked.repetitions, 60 * asked.minutes))
        cost = asyncio.run(costs(ours, adapters(relay, model.name, 8), min(3, asked.repetitions)))
    print(json.dumps(compared | cost))
    return 0


def pid_of(service: Service) -> int:
    assert service.process
    return service.process.pid


if __name__ == "__main__":
    sys.exit(main())
