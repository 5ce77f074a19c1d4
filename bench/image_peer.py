"""The peer of bench/image.py: diffusers' own pipeline, and its recipe for LoRA, in an environment of their own.

Started as a script with a JSON file that says what to do. A training's last line says what came of it; of pictures each
line of stdin is a seed, and a line answers it. It imports nothing of ours.
"""

import importlib
import io
import json
import resource
import sys
import time
import zipfile
from pathlib import Path
from typing import Any


def train(spec: dict[str, Any], torch: Any, diffusers: Any) -> dict[str, float]:
    """As diffusers' text-to-image example with LoRA does it; pictures lie in memory already, which spares it more."""
    peft, transformers = importlib.import_module("peft"), importlib.import_module("transformers")
    np, image = importlib.import_module("numpy"), importlib.import_module("PIL.Image")
    torch.manual_seed(5)
    folder = Path(spec["model"])
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoder = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    noise = diffusers.DDPMScheduler.from_pretrained(folder / "scheduler")
    for part in (encoder, vae, unet):
        part.requires_grad_(False)
    matrices = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(peft.LoraConfig(r=spec["rank"], lora_alpha=spec["rank"], target_modules=matrices))
    trained = [p for p in unet.parameters() if p.requires_grad]
    pixels, ids = [], []
    with zipfile.ZipFile(spec["pictures"]) as archive:
        for name in sorted(n for n in archive.namelist() if n.endswith(".png")):
            dots = torch.tensor(np.array(image.open(io.BytesIO(archive.read(name))))).permute(2, 0, 1)
            pixels.append(dots.float() / 127.5 - 1)
            caption = archive.read(name.replace(".png", ".txt")).decode()
            ids.append(tokenizer(caption, padding="max_length", truncation=True, return_tensors="pt").input_ids[0])
    loader = torch.utils.data.DataLoader(list(zip(pixels, ids, strict=True)), batch_size=spec["batch"], shuffle=True)
    optimizer = torch.optim.AdamW(trained, lr=spec["learning_rate"], weight_decay=0.0)
    began, steps = time.perf_counter(), 0
    for _ in range(spec["epochs"]):
        for batch, texts in loader:
            clean = vae.encode(batch).latent_dist.sample() * vae.config.scaling_factor
            drawn = torch.randn_like(clean)
            times = torch.randint(0, noise.config.num_train_timesteps, (len(clean),))
            seen = encoder(texts, return_dict=False)[0]
            told = unet(noise.add_noise(clean, drawn, times), times, seen, return_dict=False)[0]
            snr = diffusers.training_utils.compute_snr(noise, times)
            weights = snr.clamp(max=spec["gamma"]) / snr
            errors = torch.nn.functional.mse_loss(told.float(), drawn.float(), reduction="none")
            loss = (errors.mean(dim=list(range(1, errors.ndim))) * weights).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
    wall_s = time.perf_counter() - began
    return {"wall_s": wall_s, "rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "steps": steps}


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch = importlib.import_module("torch")
    diffusers = importlib.import_module("diffusers")
    torch.set_num_threads(spec["threads"])
    if spec.get("train"):
        print(json.dumps(train(spec, torch, diffusers)))
        return
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

    for seed in sys.stdin:
        print(json.dumps({"picture_s": draw(int(seed))}), flush=True)


if __name__ == "__main__":
    main()
