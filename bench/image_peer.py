"""The peer of bench/image.py: diffusers' own pipeline, in an environment of its own.

Started as a script with a JSON file that says what to do; the last line that it prints says what came of it. It imports
nothing of ours.
"""

import importlib
import json
import statistics
import sys
import time
from pathlib import Path


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch = importlib.import_module("torch")
    diffusers = importlib.import_module("diffusers")
    torch.set_num_threads(spec["threads"])
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(spec["model"], dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def draw(seed: int) -> float:
        began = time.perf_counter()
        pipeline(
            spec["prompt"],
            num_inference_steps=spec["steps"],
            guidance_scale=spec["guidance"],
            width=spec["side"],
            height=spec["side"],
            generator=torch.Generator().manual_seed(seed),
        )
        return time.perf_counter() - began

    draw(0)  # warm
    print(json.dumps({"picture_s": statistics.median(draw(seed) for seed in range(1, 1 + spec["pictures"]))}))


if __name__ == "__main__":
    main()
