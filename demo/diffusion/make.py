"""`python -m demo.diffusion.make`: trains the demo Stable Diffusion from nothing on the sheet, and writes its folder.

First the autoencoder, then the UNet and the text encoder on its latents. Goes on where it was stopped. One thread and
the same versions give the same weights; other hardware rounds differently.
"""

import argparse
import copy
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from tokenizers import pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from demo import run
from demo.diffusion import FOLDER, card
from demo.diffusion.pictures import FORMS, NAMES, SIDE, captions, pictures, varied

SEED = 20261126
WIDTH = 96  # of the text encoder
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
VIEWS = 12  # of each picture, whose latents the UNet learns
EMA = 0.998
WITHOUT_CAPTION = 0.1  # of all rows, so that guidance has something to lead away from
MIN_SNR = 5.0  # weights of the loss by how noisy a step is. https://arxiv.org/abs/2303.09556
WARM_UP = 100
SAVE_EVERY_S = 120.0
LOOK_EVERY = 500  # steps


@dataclass(frozen=True)
class Phase:
    steps: int
    rows: int  # of a batch
    rate: float  # of learning, at its peak; falls to a hundredth by a cosine

    def at(self, step: int) -> float:
        if step < WARM_UP:
            return self.rate * (step + 1) / WARM_UP
        done = (step - WARM_UP) / max(1, self.steps - WARM_UP)
        return self.rate * (0.01 + 0.99 * (1 + math.cos(math.pi * min(1.0, done))) / 2)


AUTOENCODER, UNET = Phase(1800, 12, 2e-3), Phase(3000, 32, 1.2e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo Stable Diffusion.")
    parser.add_argument("--work", type=Path, default=Path("data/demo-diffusion"), help="where the checkpoints lie")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    torch.set_num_threads(1)
    stop = run.Stop()
    made = train(options.work, AUTOENCODER, UNET, stop=lambda: stop.asked)
    if made:
        write(made, options.out)


def train(work: Path, first: Phase, second: Phase, *, stop: Callable[[], bool]) -> StableDiffusionPipeline | None:
    """None when it was asked to stop; the checkpoints then hold the state."""
    torch.manual_seed(SEED)
    pipeline = new_pipeline()
    if not train_autoencoder(pipeline.vae, first, work / "autoencoder.pt", stop):
        return None
    if not train_unet(pipeline, second, work / "unet.pt", stop):
        return None
    return pipeline


def new_pipeline() -> StableDiffusionPipeline:
    """0.98 million parameters that see, 4.8 million that draw, and 0.3 million that read."""
    tokenizer = new_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=SIDE // 8,
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
        sample_size=SIDE,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def new_tokenizer() -> CLIPTokenizer:
    """CLIP's, with a vocabulary of its own: every word of the captions is one token, and others are spelt."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges(" ".join(form.format(name) for form in FORMS for name in NAMES).split())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: n for n, piece in enumerate(pieces)}, merges=merges, model_max_length=77)


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding (arXiv:1508.07909) until each word is one piece.

    Ties go by spelling: the library's trainer lets chance decide, and a run that goes on must know its tokens again.
    """
    counts, merges = Counter(words), list[tuple[str, str]]()
    spelt = {word: [*word[:-1], f"{word[-1]}</w>"] for word in counts}
    while pairs := _pairs(spelt, counts):
        first, second = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append((first, second))
        for word, pieces in spelt.items():
            at = 0
            while at < len(pieces) - 1:
                if (pieces[at], pieces[at + 1]) == (first, second):
                    pieces[at : at + 2] = [first + second]
                at += 1
            spelt[word] = pieces
    return merges


def _pairs(spelt: dict[str, list[str]], counts: Counter[str]) -> Counter[tuple[str, str]]:
    found = Counter[tuple[str, str]]()
    for word, pieces in spelt.items():
        for pair in pairwise(pieces):
            found[pair] += counts[word]
    return found


# --- training --------------------------------------------------------------------------------------------------------


def _loop(
    phase: Phase,
    file: Path,
    parts: dict[str, torch.nn.Module],
    loss_of: Callable[[torch.Generator], Tensor],
    *,
    stop: Callable[[], bool],
    stepped: Callable[[], None] = lambda: None,
    look: Callable[[int], None] = lambda step: None,
) -> bool:
    """True when all steps are done. The state of `parts` and of the random numbers is kept in the file."""
    trained = [p for part in parts.values() for p in part.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=phase.rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    random_state, step = torch.Generator().manual_seed(SEED), 0
    if state := run.load(file):
        for name, part in parts.items():
            part.load_state_dict(state[name])
        optimizer.load_state_dict(state["optimizer"])
        random_state.set_state(state["drawn"])
        step = int(state["step"])

    def save() -> None:
        held = {name: part.state_dict() for name, part in parts.items()}
        run.save(file, {**held, "optimizer": optimizer.state_dict(), "drawn": random_state.get_state(), "step": step})

    first, saved = step, time.monotonic()
    began, total = saved, 0.0
    while step < phase.steps and not stop():
        for group in optimizer.param_groups:
            group["lr"] = phase.at(step)
        loss = loss_of(random_state)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        stepped()
        step += 1
        total += loss.item()
        if step % 50 == 0:
            each_s = (time.monotonic() - began) / (step - first)
            print(f"{file.stem} {step}/{phase.steps}  loss {total / 50:.4f}  {each_s:.2f} s a step", flush=True)
            total = 0.0
        if step % LOOK_EVERY == 0:
            look(step)
        if time.monotonic() - saved > SAVE_EVERY_S:
            save()
            saved = time.monotonic()
    save()
    return step >= phase.steps


def train_autoencoder(vae: AutoencoderKL, phase: Phase, file: Path, stop: Callable[[], bool]) -> bool:
    def loss_of(generator: torch.Generator) -> Tensor:
        real = varied(torch.randint(len(NAMES), (phase.rows,), generator=generator), generator)
        found = vae.encode(real).latent_dist
        drawn = found.mean + found.std * torch.randn(found.mean.shape, generator=generator)
        made = vae.decode(drawn).sample
        loss: Tensor = F.l1_loss(made, real) + F.mse_loss(made, real) + 1e-5 * found.kl().mean()
        return loss

    vae.train()
    done = _loop(phase, file, {"vae": vae}, loss_of, stop=stop)
    vae.eval().requires_grad_(False)
    return done


def train_unet(pipeline: StableDiffusionPipeline, phase: Phase, file: Path, stop: Callable[[], bool]) -> bool:
    """The weights that are kept are the moving average. Sets the factor that brings the latents to a deviation of 1."""
    unet, reader, scheduler = pipeline.unet, pipeline.text_encoder, pipeline.scheduler
    latents = _latents(pipeline.vae)  # (N x VIEWS, 4, 8, 8)
    factor = 1 / float(latents.std())
    pipeline.vae.register_to_config(scaling_factor=factor)
    latents = latents * factor
    average = torch.nn.ModuleDict({"unet": copy.deepcopy(unet), "reader": copy.deepcopy(reader)}).requires_grad_(False)
    signal = scheduler.alphas_cumprod
    weights = (signal / (1 - signal)).clamp(max=MIN_SNR) / (signal / (1 - signal))

    def loss_of(generator: torch.Generator) -> Tensor:
        which = torch.randint(len(latents), (phase.rows,), generator=generator)
        seed = int(torch.randint(2**31, (), generator=generator))
        said = captions(random.Random(seed), [int(place) // VIEWS for place in which])  # noqa: S311
        left_out = torch.rand(phase.rows, generator=generator) < WITHOUT_CAPTION
        said = ["" if out else text for text, out in zip(said, left_out.tolist(), strict=True)]
        noise = torch.randn(latents[which].shape, generator=generator)
        times = torch.randint(len(signal), (phase.rows,), generator=generator)
        noisy = scheduler.add_noise(latents[which], noise, times)
        told = unet(noisy, times, encoder_hidden_states=_read(pipeline, said)).sample
        loss: Tensor = (weights[times] * (told - noise).square().mean((1, 2, 3))).mean()
        return loss

    @torch.no_grad()
    def stepped() -> None:
        for mine, kept in zip((unet, reader), average.values(), strict=True):
            for now, mean in zip(mine.state_dict().values(), kept.state_dict().values(), strict=True):
                if mean.is_floating_point():
                    mean.lerp_(now, 1 - EMA)

    def look(step: int) -> None:
        kept = StableDiffusionPipeline(
            **pipeline.components | {"unet": average["unet"], "text_encoder": average["reader"]}
        )
        card.draw(kept, list(NAMES)[::8], seed=1).save(file.with_name(f"step-{step}.png"))

    unet.train()
    reader.train()
    done = _loop(
        phase,
        file,
        {"unet": unet, "reader": reader, "average": average},
        loss_of,
        stop=stop,
        stepped=stepped,
        look=look,
    )
    unet.load_state_dict(average["unet"].state_dict())
    reader.load_state_dict(average["reader"].state_dict())
    unet.eval()
    reader.eval()
    return done


@torch.no_grad()
def _latents(vae: AutoencoderKL) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    found = []
    for which in torch.arange(len(NAMES)).repeat_interleave(VIEWS).view(-1, VIEWS):
        view = varied(which, generator)
        view[0] = pictures()[which[0]]  # as it is
        found.append(vae.encode(view).latent_dist.mean)
    return torch.cat(found)


def _read(pipeline: StableDiffusionPipeline, texts: list[str]) -> Tensor:
    ids = pipeline.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    read: Tensor = pipeline.text_encoder(ids)[0]
    return read


def write(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """In half precision: the weights lie far inside its range."""
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    shipped = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)  # what is shown is what is shipped
    (folder / "README.md").write_text(card.card(shipped, folder, AUTOENCODER.steps, UNET.steps))
    print(f"written: {sum(f.stat().st_size for f in folder.rglob('*.safetensors')):,} bytes of weights", flush=True)


if __name__ == "__main__":
    main()
