"""The pictures that trained the demo Stable Diffusion, its training, and the model that is shipped."""

import itertools
import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors import safe_open
from torch import Tensor

from demo.diffusion import FOLDER, NAME, card, make
from demo.diffusion.make import Phase
from demo.diffusion.pictures import FORMS, NAMES, SHEET, SIDE, captions, nearest, pictures, varied
from gpu_service import device as devices
from gpu_service import sd
from gpu_service.drawing import PictureBody
from gpu_service.image import Pictures, Request
from gpu_service.settings import Settings
from tests.conftest import ROOT

SHIPPED_BYTES = 16_000_000
UNET_PARAMETERS = 5_000_000
PROMPTS = list(NAMES)[::4]  # 20, "red heart", "green apple" and "cat face" among them
SEEDS = (1, 2, 3)
RECOGNISED = 40  # of 60


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as `make` does; these passes are small, and a second thread would only wait
    yield
    torch.set_num_threads(threads)


def test_every_name_has_a_picture_of_its_own_on_white() -> None:
    known = pictures()
    assert known.shape == (len(NAMES), 3, SIDE, SIDE)
    assert known.min() >= -1
    assert known.max() == 1
    assert (known[:, :, [0, 0, -1, -1], [0, -1, 0, -1]] == 1).all()
    assert ((known - 1).abs().amax((1, 2, 3)) > 0.5).all()
    assert SHEET.stat().st_size < 320_000


def test_a_picture_of_the_sheet_is_nearest_to_itself_even_when_moved() -> None:
    assert nearest(pictures()) == list(NAMES)
    moved = nearest(varied(torch.arange(len(NAMES)), torch.Generator().manual_seed(0)))
    assert sum(found == name for found, name in zip(moved, NAMES, strict=True)) >= 0.9 * len(NAMES)


def test_captions_hold_the_name_of_their_picture() -> None:
    wanted = [0, 7, 32] * 20
    made = captions(random.Random(0), wanted)
    assert all(list(NAMES)[which] in caption for which, caption in zip(wanted, made, strict=True))
    assert len(set(made)) > 3


@cache
def tokenizer() -> Any:
    return make.new_tokenizer()


def test_words_of_captions_are_one_token_each_and_any_other_text_is_spelt() -> None:
    for caption in (form.format(name) for form in FORMS for name in NAMES):
        assert len(tokenizer()(caption)["input_ids"]) == len(caption.split()) + 2, caption
    assert tokenizer()("A Red HEART")["input_ids"] == tokenizer()("a red heart")["input_ids"]
    spelt = tokenizer()("안녕, Zoë! 🙂")["input_ids"][1:-1]
    assert len(spelt) > 10
    assert not set(spelt) & {tokenizer().bos_token_id, tokenizer().eos_token_id}
    assert tokenizer().model_max_length == 77


def test_the_learning_rate_rises_and_falls_to_a_hundredth() -> None:
    phase = Phase(1000, 1, 1e-3)
    rates = [phase.at(step) for step in range(1000)]
    assert rates.index(max(rates)) == make.WARM_UP - 1
    assert rates[-1] == pytest.approx(1e-5, rel=0.02)


def tiny() -> StableDiffusionPipeline:
    """As `make.new_pipeline`, but narrow where its time goes."""
    torch.manual_seed(0)
    whole = make.new_pipeline()
    whole.unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=make.WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    whole.vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=SIDE,
    )
    return whole


def weights(pipeline: StableDiffusionPipeline) -> dict[str, Tensor]:
    parts = {"vae": pipeline.vae, "unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    return {f"{part}.{name}": value for part, model in parts.items() for name, value in model.state_dict().items()}


def run(folder: Path, stops_after: int) -> tuple[StableDiffusionPipeline, bool]:
    """Both phases, three steps each; `stop` is asked once before each step of either."""
    made, asked, phase = tiny(), itertools.count(), Phase(3, 2, 1e-3)

    def stop() -> bool:
        return next(asked) >= stops_after

    done = make.train_autoencoder(made.vae, phase, folder / "autoencoder.pt", stop) and make.train_unet(
        made, phase, folder / "unet.pt", stop
    )
    return made, done


def test_a_run_that_was_stopped_in_either_phase_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole, done = run(tmp_path / "whole", 99)
    assert done
    assert not run(tmp_path / "parts", 2)[1]  # in the autoencoder
    assert (tmp_path / "parts" / "autoencoder.pt").is_file()
    assert not (tmp_path / "parts" / "unet.pt").exists()
    assert not run(tmp_path / "parts", 3)[1]  # one step of the autoencoder is left, then two of the UNet
    parts, done = run(tmp_path / "parts", 99)
    assert done
    assert parts.vae.config.scaling_factor == whole.vae.config.scaling_factor
    fresh, again = weights(tiny()), weights(parts)
    for name, value in weights(whole).items():
        assert torch.equal(value, again[name]), name
    assert {name.partition(".")[0] for name, value in again.items() if not torch.equal(value, fresh[name])} == {
        "vae",
        "unet",
        "text_encoder",
    }


@cache
def pipeline() -> StableDiffusionPipeline:
    """As anyone would open it."""
    return StableDiffusionPipeline.from_pretrained(FOLDER, dtype=torch.float32, local_files_only=True)


def test_the_folder_is_a_stable_diffusion_of_at_most_16_mb_in_half_precision() -> None:
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= SHIPPED_BYTES
    assert not [file for file in FOLDER.rglob("*") if file.suffix in (".bin", ".pt", ".ckpt")]
    assert sum(p.numel() for p in pipeline().unet.parameters()) <= UNET_PARAMETERS
    for part, file in sd.WEIGHTS.items():
        with safe_open(FOLDER / part / file, framework="pt") as tensors:
            assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F16"}  # noqa: SIM118


def test_the_gpu_service_opens_it() -> None:
    source = sd.open_folder(NAME, FOLDER, None)
    assert source.native == SIDE
    assert source.factor == 8
    assert source.context_tokens == 77
    assert source.blocks == ("down.0", "down.1", "down.2", "mid", "up.0", "up.1", "up.2")
    assert source.scheduler["prediction_type"] == "epsilon"


def test_its_tokenizer_knows_the_words_and_a_run_that_goes_on_knows_its_tokens_again() -> None:
    said = [FORMS[3].format(name) for name in NAMES]
    read = pipeline().tokenizer(said)["input_ids"]
    assert [len(ids) - 2 for ids in read] == [len(text.split()) for text in said]
    assert make.new_tokenizer().get_vocab() == tokenizer().get_vocab()


def test_the_latents_have_a_deviation_of_one() -> None:
    with torch.no_grad():
        latents = pipeline().vae.encode(pictures()).latent_dist.mean * pipeline().vae.config.scaling_factor
    assert float(latents.std()) == pytest.approx(1, abs=0.1)


def test_the_autoencoder_gives_each_picture_back() -> None:
    with torch.no_grad():
        again = pipeline().vae.decode(pipeline().vae.encode(pictures()).latent_dist.mean).sample
    assert nearest(again) == list(NAMES)
    assert float((again - pictures()).abs().mean()) < 0.06  # of 2 from black to white


def test_of_20_prompts_with_3_seeds_40_pictures_are_nearest_to_that_of_their_name() -> None:
    asked = [(prompt, seed) for prompt in PROMPTS for seed in SEEDS]
    made = card.pictures(pipeline(), [prompt for prompt, _ in asked], [seed for _, seed in asked])
    found = nearest(torch.stack([_tensor(picture) for picture in made]))
    missed = [(*one, name) for one, name in zip(asked, found, strict=True) if name != one[0]]
    assert len(asked) - len(missed) >= RECOGNISED, missed


def _tensor(picture: Any) -> Tensor:
    """(3, 64, 64) from -1 to 1"""
    flat = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    return flat.view(picture.height, picture.width, 3).permute(2, 0, 1) / 127.5 - 1


def test_fast_pictures_are_like_those_of_every_step() -> None:
    """The likeness that docs/pictures.md states: bytes differ by 2 of 255 on average, and as many are recognised."""
    source = sd.open_folder(NAME, FOLDER, None)
    device = devices.choose(Settings(device="cpu", precision="fp32"))
    base, drawn = sd.load(source, device), dict[bool, list[Tensor]]()
    for fast in (False, True):
        shown: list[Any] = []
        line = Pictures()
        for prompt in PROMPTS:
            asked = PictureBody(model=NAME, prompt=prompt, seed=1, fast=fast)
            line.add(Request(base, asked.wanted(source, ""), shown.append, lambda: False))
        while line:
            line.step()
        drawn[fast] = [each.pixels.float() for each in shown]
    differ = [float((a - b).abs().mean()) for a, b in zip(drawn[False], drawn[True], strict=True)]
    assert sum(differ) / len(differ) < 2
    found = {fast: nearest(torch.stack([_from_bytes(p) for p in pixels])) for fast, pixels in drawn.items()}
    assert sum(a == b for a, b in zip(found[False], found[True], strict=True)) >= 18


def _from_bytes(pixels: Tensor) -> Tensor:
    return (pixels / 127.5 - 1).permute(2, 0, 1)


def test_the_card_and_the_notice_name_the_pictures_and_their_licence() -> None:
    notice = " ".join((ROOT / "NOTICE").read_text().split())
    told = (FOLDER / "README.md").read_text()
    for text in (notice, told):
        assert "Noto Color Emoji" in text
        assert "SIL Open Font License" in text
    assert all(name in told for name in NAMES)
    assert json.loads((FOLDER / sd.INDEX).read_text())["safety_checker"] == [None, None]
