"""Pictures, side by side with diffusers' own pipeline, in one run: the same model, prompt, size, steps and guidance.

The demo Stable Diffusion in fp32 at 128 x 128, 20 steps. The peer draws in its own process and environment, one picture
after another; ours is asked over HTTP at the gpu, with five previews on. The sides take turns, and medians count.

The last line is JSON; ratios above 1 mean that ours is faster. `generate_ratio`: a picture of the pipeline / one of
ours. `batch8_ratio`: eight pictures of the pipeline one after another / eight requests at once. Run it by
`make bench-image`, on a machine that does nothing else.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import psutil

from bench import peers
from demo import diffusion
from tests.end_to_end.stack import Gpu, Relay, running

ROOT = Path(__file__).parent.parent
PEER = ("torch==2.13.0", "diffusers==0.42.0", "transformers==5.23.0", "accelerate==1.15.0")
ASKED = {"prompt": "a red heart", "steps": 20, "guidance": 7.5, "side": 128}
PREVIEWS, AT_ONCE = 5, 8


def peer_s(folder: Path, threads: int, pictures: int) -> float:
    """Seconds of one picture."""
    spec = {**ASKED, "model": str(diffusion.FOLDER), "threads": threads, "pictures": pictures}
    (folder / "spec.json").write_text(json.dumps(spec))
    command = [peers.python(ROOT / "data/bench/image-peer", PEER), ROOT / "bench/image_peer.py", folder / "spec.json"]
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, check=True)
    return float(json.loads(done.stdout.decode().splitlines()[-1])["picture_s"])


def draw(gpu: Gpu, seed: int) -> float:
    """Seconds until the whole picture is here."""
    body: dict[str, Any] = {
        "model": diffusion.NAME,
        "prompt": ASKED["prompt"],
        "steps": ASKED["steps"],
        "guidance": ASKED["guidance"],
        "size": f"{ASKED['side']}x{ASKED['side']}",
        "seed": seed,
        "stream": True,
        "partial_images": PREVIEWS,
    }
    began = time.perf_counter()
    headers = {"authorization": f"Bearer {gpu.key}"}
    with httpx2.stream("POST", f"{gpu.url}/v1/images/generations", json=body, headers=headers, timeout=600) as answer:
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
    asked = parser.parse_args()
    threads = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    theirs, ours, together = [], [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        relay = Relay(folder / "relay")
        with running(relay):
            served = {diffusion.NAME: diffusion.FOLDER}
            gpu = Gpu(folder / "gpu", served, relay, GPU_PRECISION="fp32", OMP_NUM_THREADS=str(threads))
            with running(gpu):
                relay.serves(diffusion.NAME)
                draw(gpu, 0)  # warm
                for repetition in range(asked.repetitions):
                    theirs.append(peer_s(folder, threads, asked.pictures))
                    ours.append(statistics.median(draw(gpu, seed) for seed in range(1, 1 + asked.pictures)))
                    together.append(at_once_s(gpu, 100 * (1 + repetition)))
                    print(
                        f"a picture: pipeline {theirs[-1]:.2f} s, ours {ours[-1]:.2f} s; eight at once "
                        f"{together[-1]:.2f} s; load {os.getloadavg()[0]:.1f}",
                        flush=True,
                    )
    generate = statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
    batch = statistics.median(AT_ONCE * a / b for a, b in zip(theirs, together, strict=True))
    print(json.dumps({"generate_ratio": round(generate, 2), "batch8_ratio": round(batch, 2)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
