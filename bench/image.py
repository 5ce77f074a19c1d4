"""Pictures, side by side with diffusers, in one run: drawing them, and training on them.

Drawing: the demo Stable Diffusion in fp32 at 128 x 128, 20 steps, the same prompt and guidance. The peer draws in its
own process and environment; ours is asked over HTTP at the gpu, with five previews on. The sides take turns from
picture to picture, for a machine's speed may change within a minute, and medians count. Training is
bench/image_train.py's.

The last line is JSON; ratios above 1 mean that ours is faster. `generate_ratio`: a picture of the pipeline / the one
of ours after it. `batch8_ratio`: eight pictures of the pipeline one after another / eight requests at once.
`train_speedup`: seconds of a run of theirs / of ours. `train_rss_ratio`: memory of ours / of theirs. `fast_ratio`: ours
with every step whole / one that is drawn fast, of the model that the training half makes. Run it by `make bench-image`,
on a machine that does nothing else.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil

from bench import image_train, peers
from demo import diffusion
from tests.end_to_end.stack import Gpu, Relay, running

ROOT = Path(__file__).parent.parent
PEER = ("torch==2.13.0", "diffusers==0.42.0", "transformers==5.23.0", "accelerate==1.15.0", "peft==0.21.0")
ASKED = {"prompt": "a red heart", "steps": 20, "guidance": 7.5, "side": 128}
PREVIEWS, AT_ONCE = 5, 8
NARROW = "narrow"  # in the proportions of Stable Diffusion 1.5


def peer() -> Path:
    return peers.python(ROOT / "data/bench/image-peer", PEER)


@contextmanager
def pipeline(folder: Path, threads: int) -> Iterator[Callable[[int], float]]:
    """What draws the picture of a seed, and returns its seconds."""
    (folder / "spec.json").write_text(json.dumps({**ASKED, "model": str(diffusion.FOLDER), "threads": threads}))
    command = [peer(), ROOT / "bench/image_peer.py", folder / "spec.json"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def draw(seed: int) -> float:
            assert process.stdin
            assert process.stdout
            process.stdin.write(f"{seed}\n")
            process.stdin.flush()
            return float(json.loads(process.stdout.readline())["picture_s"])

        yield draw


@functools.cache
def client() -> httpx2.Client:
    """One for all: a new one reads every certificate that it trusts, 18 ms for which no picture is drawn."""
    return httpx2.Client(timeout=600, trust_env=False, verify=False)


def draw(gpu: Gpu, seed: int, model: str = diffusion.NAME, **more: object) -> float:
    """Seconds until the whole picture is here."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": ASKED["prompt"],
        "steps": ASKED["steps"],
        "guidance": ASKED["guidance"],
        "size": f"{ASKED['side']}x{ASKED['side']}",
        "seed": seed,
        "stream": True,
        "partial_images": PREVIEWS,
        **more,
    }
    began = time.perf_counter()
    headers = {"authorization": f"Bearer {gpu.key}"}
    with client().stream("POST", f"{gpu.url}/v1/images/generations", json=body, headers=headers) as answer:
        events = answer.read()
    assert events.count(b"image_generation.completed") == 1, events[:500]
    assert events.count(b"image_generation.partial_image") == PREVIEWS
    return time.perf_counter() - began


def at_once_s(gpu: Gpu, first_seed: int) -> float:
    began = time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE) as callers:
        list(callers.map(lambda seed: draw(gpu, seed), range(first_seed, first_seed + AT_ONCE)))
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=5, help="of each side in one repetition")
    parser.add_argument("--trainings", type=int, default=2, help="of each side; one takes minutes")
    asked = parser.parse_args()
    threads = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    theirs, ours, together, neighbours = [], [], [], []
    speedups, memory, fast_ratios = [], [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        relay = Relay(folder / "relay")
        with running(relay):
            narrow = image_train.write_model(folder / "model")
            served = {diffusion.NAME: diffusion.FOLDER, NARROW: narrow}
            gpu = Gpu(folder / "gpu", served, relay, GPU_PRECISION="fp32", OMP_NUM_THREADS=str(threads))
            with running(gpu), pipeline(folder, threads) as theirs_of:
                relay.serves(diffusion.NAME)
                for model in served:
                    draw(gpu, 0, model)  # warm
                theirs_of(0)
                for repetition in range(asked.repetitions):
                    seeds = range(1, 1 + asked.pictures)
                    pairs = [(theirs_of(seed), draw(gpu, seed)) for seed in seeds]
                    neighbours += [them / us for them, us in pairs]
                    theirs.append(statistics.median(them for them, _ in pairs))
                    ours.append(statistics.median(us for _, us in pairs))
                    together.append(at_once_s(gpu, 100 * (1 + repetition)))
                    plain, reused = ([draw(gpu, seed, NARROW, fast=fast) for seed in (1, 2)] for fast in (False, True))
                    fast_ratios.append(sum(plain) / sum(reused))
                    print(
                        f"a picture: pipeline {theirs[-1]:.2f} s, ours {ours[-1]:.2f} s; eight at once "
                        f"{together[-1]:.2f} s; fast {fast_ratios[-1]:.2f}; load {os.getloadavg()[0]:.1f}",
                        flush=True,
                    )
        for _ in range(asked.trainings):
            them, us = image_train.both(folder, peer(), threads)
            assert them["steps"] == us["steps"]
            speedups.append(them["wall_s"] / us["wall_s"])
            memory.append(us["rss_bytes"] / them["rss_bytes"])
            print(
                f"training, {us['steps']} steps: recipe {them['wall_s']:.1f} s and {them['rss_bytes'] / 1e6:,.0f} MB, "
                f"ours {us['wall_s']:.1f} s and {us['rss_bytes'] / 1e6:,.0f} MB; load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
    train = {
        "train_speedup": round(statistics.median(speedups), 2),
        "train_rss_ratio": round(statistics.median(memory), 2),
    }
    generate = statistics.median(neighbours)
    batch = statistics.median(AT_ONCE * a / b for a, b in zip(theirs, together, strict=True))
    fast_ratio = round(statistics.median(fast_ratios), 2)
    drawn = {"generate_ratio": round(generate, 2), "batch8_ratio": round(batch, 2), "fast_ratio": fast_ratio}
    print(json.dumps(train | drawn))
    return 0


if __name__ == "__main__":
    sys.exit(main())
