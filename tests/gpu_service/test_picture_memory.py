"""What pictures take in memory, held against what torch allocates, and what is done where memory is short."""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import wire
from gpu_service import costs, layers, sd
from gpu_service.device import Device
from gpu_service.image import Pictures, Request, Shown, Wanted
from gpu_service.layers import llama_tensors
from gpu_service.picture_data import as_tensor
from gpu_service.sd import PictureBase, PictureSource, tile_side
from gpu_service.sd_tensors import sd_tensors
from tests.conftest import ROOT
from tests.gpu_service import tiny_sd
from tests.gpu_service.test_costs import CLOSE
from tests.gpu_service.test_sd_layers import BLOCKS15, SD15
from tests.gpu_service.tiny_sd import NAME, SIDE

VAE15 = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
HALF, T4_BYTES = 2, 15 * 2**30 - 700 * 2**20  # a T4's memory, less what CUDA and its libraries take


class Lean(TorchFunctionMode):
    """Attention as the kernels of GPUs have it, whose scores are never whole."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


class Peak(TorchDispatchMode):
    """Bytes at most held at once, of what is made within; views of weights are not counted."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights = {p.untyped_storage()._cdata for p in module.parameters()}
        self._held: dict[int, int] = {}
        self._now = 0
        self.n_bytes: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._held and storage._cdata not in self._weights:
                    self._held[storage._cdata] = storage.nbytes()
                    self._now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata)
        self.n_bytes = max(self.n_bytes, self._now)
        return out

    def _gone(self, key: int) -> None:
        self._now -= self._held.pop(key, 0)


def peak(module: nn.Module, call: Callable[[], Any]) -> int:
    with torch.no_grad(), Lean(), Peak(module) as found:
        call()
    return int(found.n_bytes)


def empty(*shape: int) -> Tensor:
    return torch.zeros(shape, device="meta", dtype=torch.half)


@pytest.fixture(scope="module")
def sd15() -> tuple[PictureSource, UNet2DConditionModel, AutoencoderKL]:
    """Stable Diffusion 1.5 without its numbers; the text encoder is counted by its size."""
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**SD15).half(), AutoencoderKL(**VAE15).half()
    shapes = {
        "unet": {n: tuple(t.shape) for n, t in unet.state_dict().items()},
        "vae": {n: tuple(t.shape) for n, t in vae.state_dict().items()},
        "text_encoder": {"embeddings.token_embedding.weight": (123_060_480 // 768, 768)},
    }
    known = sd.open_folder("demo", ROOT / "demo/diffusion/model", None)
    tensors = tuple(sd_tensors(shapes, BLOCKS15))
    source = replace(known, id="sd15", blocks=BLOCKS15, factor=8, native=512, width=320, vae_width=256, tensors=tensors)
    return source, unet, vae


def _unets(folder: Path) -> Iterator[tuple[PictureSource, UNet2DConditionModel, AutoencoderKL]]:
    source = sd.open_folder("demo", folder, None)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet")).half()
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")).half()
    yield source, unet, vae


@pytest.mark.parametrize(("places", "side"), [(2, 512), (8, 512), (2, 1024)])
def test_a_pass_takes_what_was_said(sd15: Any, places: int, side: int) -> None:
    source, unet, _ = sd15
    given = empty(places, 4, side // 8, side // 8), empty(places), empty(places, 77, 768)
    assert source.pass_bytes(places, side, side, HALF) == pytest.approx(peak(unet, lambda: unet(*given)), rel=CLOSE)


@pytest.mark.parametrize("side", [512, 1024])
def test_decoding_takes_what_was_said(sd15: Any, side: int) -> None:
    source, _, vae = sd15
    told = peak(vae, lambda: vae.decode(empty(1, 4, side // 8, side // 8)))
    assert source.decode_bytes(side, side, HALF) == pytest.approx(told, rel=CLOSE)


def test_the_demo_model_takes_what_was_said() -> None:
    [(source, unet, vae)] = _unets(ROOT / "demo/diffusion/model")
    given = empty(8, 4, 16, 16), empty(8), empty(8, 77, 96)
    assert source.pass_bytes(8, 128, 128, HALF) == pytest.approx(peak(unet, lambda: unet(*given)), rel=CLOSE)
    told = peak(vae, lambda: vae.decode(empty(1, 4, 16, 16)))
    assert source.decode_bytes(128, 128, HALF) == pytest.approx(told, rel=CLOSE)


def test_stable_diffusion_at_512_fits_a_t4_beside_a_llama_in_4_bits(sd15: Any) -> None:
    """Computed, not run: weights of both, four pictures under guidance in one pass, and room for a chat's keys."""
    source, *_ = sd15
    hidden, inner = 4096, 11_008
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32_000, hidden), "model.norm.weight": (hidden,)}
    shapes["lm_head.weight"] = (32_000, hidden)
    for layer in range(32):
        name = f"model.layers.{layer}."
        shapes |= {f"{name}self_attn.{m}_proj.weight": (hidden, hidden) for m in "qkvo"}
        shapes |= {f"{name}mlp.{m}_proj.weight": (inner, hidden) for m in ("gate", "up")}
        shapes[f"{name}mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{name}{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    llama = costs.weights_bytes(llama_tensors(shapes), "4bit", HALF)
    pictures = source.weights_bytes("none", HALF)
    work = max(source.pass_bytes(8, 512, 512, HALF), source.decode_bytes(512, 512, HALF))
    left = T4_BYTES - llama - pictures - work
    print(
        f"\nllama {llama / 1e9:.1f}, pictures {pictures / 1e9:.1f}, at work {work / 1e9:.1f}, left {left / 1e9:.1f} GB"
    )
    keys = 4096 * 32 * 2 * hidden * HALF
    assert left > 2 * keys
    assert tile_side(source, 64, 64, HALF, left + work) is None
    attention = layers.select(source.tensors, [wire.LayerSpec(parts=["attn.self", "attn.cross"])], tied=False)
    trained = source.cost(attention, 4, HALF)
    assert llama + trained.total < T4_BYTES, "and so does training LoRA on four pictures at once"


def test_a_decoder_that_does_not_fit_works_in_tiles(sd15: Any) -> None:
    source, *_ = sd15
    whole = source.decode_bytes(1024, 1024, HALF)
    assert tile_side(source, 128, 128, HALF, 2 * whole) is None
    side = tile_side(source, 128, 128, HALF, whole // 3)
    assert side
    assert source.decode_bytes(8 * side, 8 * side, HALF) < whole // 3
    assert tile_side(source, 128, 128, HALF, 0) == sd.SMALLEST_TILE


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> PictureSource:
    return sd.open_folder(NAME, tiny_sd.make(tmp_path_factory.mktemp("models") / NAME), None)


def test_tiles_make_nearly_the_picture_of_the_whole(cpu: Device) -> None:
    """A sheet of 36 pictures, which is larger than the model draws."""
    base = sd.load(sd.open_folder("demo", ROOT / "demo/diffusion/model", None), cpu)
    sheet = Image.open(ROOT / "demo/diffusion/sheet.png").convert("RGB").crop((0, 0, 384, 384))
    with torch.no_grad():
        latents = base.encode(as_tensor(np.array(sheet))[None]).mode() * base.vae.config.scaling_factor
        whole = base.decode(latents)
        least = base.source.decode_bytes(256, 256, base.dtype.itemsize)
        tiled = replace(base, free_bytes=lambda: int(least / sd.USABLE)).decode(latents)
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)
    assert float((tiled - whole).abs().mean()) < 0.05, "of a range of two"


def test_a_batch_is_cut_to_what_is_free_and_its_pictures_stay_the_same(source: PictureSource, cpu: Device) -> None:
    base = sd.load(source, cpu)
    passes: list[int] = []
    base.unet.register_forward_pre_hook(lambda _, given: passes.append(len(given[0])))
    one = source.pass_bytes(2, SIDE, SIDE, base.dtype.itemsize)

    def drawn(free_bytes: int) -> list[Tensor]:
        shown: list[Shown | BaseException] = []
        pictures, (prompt, nothing) = Pictures(), source.chunks("a", "")
        wanted = Wanted(NAME, prompt, nothing, SIDE, SIDE, 3, 7.5, "ddim", (1, 2, 3))
        there = replace(base, free_bytes=lambda: free_bytes)
        pictures.add(Request(there, wanted, shown.append, lambda: False))
        while pictures:
            pictures.step()
        found = [s for s in shown if isinstance(s, Shown)]
        return [s.pixels for s in sorted(found, key=lambda s: s.index)]

    together = drawn(100 * one)
    assert set(passes) == {6}
    passes.clear()
    apart = drawn(int(2.1 * one / sd.USABLE))
    assert set(passes) == {2, 4}, "two pictures a pass, and the third by itself"
    assert all(int((a.int() - b.int()).abs().max()) <= 1 for a, b in zip(together, apart, strict=True))
    passes.clear()
    assert len(drawn(0)) == 3
    assert set(passes) == {2}, "one picture always has its turn"


def test_what_is_away_comes_for_its_turn_and_draws_the_same(source: PictureSource, cpu: Device) -> None:
    base = sd.load(source, cpu)
    away: PictureBase = replace(base, away={"vae", "text_encoder"})
    moves: list[str] = []
    for part in ("vae", "text_encoder"):
        module = getattr(base, part)
        module.to = partial(_moved, moves, part)
    ids = source.chunks("a wall")[0]
    with torch.no_grad():
        assert torch.equal(away.read(ids), base.read(ids))
        assert moves == ["text_encoder cpu", "text_encoder cpu"], "to the device, which is a CPU here, and back"
        latents = torch.randn(1, 4, 16, 16)
        assert torch.equal(away.decode(latents), base.decode(latents))
        away.encode(torch.zeros(1, 3, SIDE, SIDE))
    assert moves[2:] == ["vae cpu"] * 4
    with away.kept("text_encoder"):
        assert away.away == {"vae"}
        away.read(ids)
    assert away.away == {"vae", "text_encoder"}
    assert moves[6:] == ["text_encoder cpu"] * 2, "once there and back, however often it reads"


def _moved(moves: list[str], part: str, place: object) -> None:
    moves.append(f"{part} {place}")
