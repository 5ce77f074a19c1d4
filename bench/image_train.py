"""The training half of bench/image.py: one run on pictures by us and one by diffusers' recipe, each in its process.

A Stable Diffusion with random weights in the proportions of 1.5, a fifth as wide: what is timed is arithmetic, and real
weights would change none of it. Both train LoRA of rank 8 on the four matrices of every attention of the UNet, on the
same pictures at the same size with the same batches, 200 steps, which is half of what a job takes by itself; the clock
runs from the weights in memory to the last step, so it has what we compute once.
"""

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from demo import diffusion

ROOT = Path(__file__).parent.parent
SIDE, PICTURES, BATCH, EPOCHS, RANK = 128, 32, 4, 25, 8
RATE, GAMMA = 1e-4, 5.0


def write_model(folder: Path) -> Path:
    """35 million parameters in the UNet."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(diffusion.FOLDER / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=12,
        num_attention_heads=6,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=SIDE // 8,
        block_out_channels=(64, 128, 256, 256),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=192,
        attention_head_dim=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=SIDE,
    )
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(**noise, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def write_pictures(path: Path) -> Path:
    """Of noise; each has a caption of its own."""
    random = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(PICTURES):
            file = io.BytesIO()
            Image.fromarray(random.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(file, "PNG")
            archive.writestr(f"{number:02}.png", file.getvalue())
            archive.writestr(f"{number:02}.txt", f"a picture of a house, number {number}")
    return path


def both(folder: Path, peer: Path, threads: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Theirs and ours: `wall_s` and `rss_bytes`."""
    model, pictures = folder / "model", folder / "pictures.zip"
    if not model.exists():
        write_model(model)
    if not pictures.exists():
        write_pictures(pictures)
    spec = {
        "train": True,
        "model": str(model),
        "pictures": str(pictures),
        "folder": str(folder / "work"),
        "threads": threads,
        "side": SIDE,
        "batch": BATCH,
        "epochs": EPOCHS,
        "rank": RANK,
        "learning_rate": RATE,
        "gamma": GAMMA,
    }
    (folder / "train.json").write_text(json.dumps(spec))
    theirs = _run([peer, ROOT / "bench/image_peer.py", folder / "train.json"])
    return theirs, _run([sys.executable, "-m", "bench.image_train", folder / "train.json"])


def _run(command: list[Any]) -> dict[str, Any]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True, cwd=ROOT)
    told: dict[str, Any] = json.loads(done.stdout.decode().splitlines()[-1])
    return told


def main() -> None:
    """Ours: what a job calls, without relay, worker and events."""
    import resource
    import shutil
    import time

    import wire
    from gpu_service import device as devices
    from gpu_service import layers, learn_pictures, sd
    from gpu_service import plan as plans
    from gpu_service.picture_data import PictureStore
    from gpu_service.settings import Settings

    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(spec["threads"])
    device = devices.choose(Settings(device="cpu", precision="fp32"))
    source = sd.open_folder("bench", Path(spec["model"]), None)
    chosen = wire.LayerSpec(parts=["attn.self", "attn.cross"], rank=spec["rank"], alpha=spec["rank"])
    selection = layers.select(source.tensors, [chosen], tied=False)
    shutil.rmtree(spec["folder"], ignore_errors=True)
    store = PictureStore.build(Path(spec["pictures"]), Path(spec["folder"]), source, spec["side"])
    wanted = wire.Hyperparameters(
        n_epochs=spec["epochs"],
        batch_size=spec["batch"],
        micro_batch_rows=spec["batch"],
        learning_rate=spec["learning_rate"],
        min_snr_gamma=spec["gamma"],
    )
    plan = plans.resolve_pictures(wanted, source, selection, len(store), device)
    job = learn_pictures.PictureJob(source, selection, plan, store, None, 5)
    base = sd.load(source, device)
    began = time.perf_counter()
    for _ in learn_pictures.steps(job, device, lambda: base):
        pass
    wall_s = time.perf_counter() - began
    rss_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"wall_s": wall_s, "rss_bytes": rss_bytes, "steps": plan.total_steps}))


if __name__ == "__main__":
    main()
