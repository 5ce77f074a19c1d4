"""Stable Diffusion folders in diffusers' format: what can be told without the weights, and the weights themselves.

SD 1.x and 2.x: UNet2DConditionModel, AutoencoderKL, CLIPTextModel. Safetensors only. diffusers is imported when a
folder is opened, for it takes seconds. Knows nothing of requests.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import CLIPTextModel, CLIPTokenizer

import wire
from gpu_service import unet
from gpu_service.costs import Estimate, picture_estimate
from gpu_service.device import Device
from gpu_service.errors import ModelUnreadable, OutOfMemory, UnsupportedModel
from gpu_service.layers import Selection, TensorInfo
from gpu_service.sd_tensors import sd_tensors

INDEX = "model_index.json"
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
COVERED = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
# What callers name; the classes are diffusers'. Each is made from the model's own settings.
SCHEDULERS: Mapping[str, str] = {
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "heun": "HeunDiscreteScheduler",
    "deis": "DEISMultistepScheduler",
}


@dataclass(frozen=True)
class PictureSource:
    """Where a model that makes pictures has its files, and what can be told without its weights."""

    id: str
    folder: Path
    revision: str
    tokenizer: Any
    scheduler: Mapping[str, Any]  # scheduler_config.json
    blocks: tuple[str, ...]  # of the UNet
    factor: int  # pixels along a side, for one latent
    native: int  # the side, in pixels, of the pictures it was trained on
    tensors: tuple[TensorInfo, ...]

    family: wire.Family = "sd"

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def context_tokens(self) -> int:
        return int(self.tokenizer.model_max_length)

    @property
    def tied(self) -> bool:
        return False

    def cost(self, selection: Selection, rows: int, bytes_per_param: int) -> Estimate:
        """What training `selection` takes in memory, with micro-batches of `rows` pictures of the native size."""
        side = self.native // self.factor
        return picture_estimate(selection, self.tensors, side=side, rows=rows, bytes_per_param=bytes_per_param)

    def weights_bytes(self, quantize: wire.Quantize, bytes_per_param: int) -> int:
        """In memory. It is not quantised."""
        return bytes_per_param * sum(t.n_params for t in self.tensors)

    def new_scheduler(self, name: str | None) -> Any:
        """One a picture: they keep state. None: the model's own."""
        import diffusers

        kind = SCHEDULERS[name] if name else str(self.scheduler["_class_name"])
        return getattr(diffusers, kind).from_config(dict(self.scheduler))


@dataclass(frozen=True)
class PictureBase:
    """A model in memory. The three are diffusers' and transformers' own modules."""

    source: PictureSource
    unet: Any
    vae: Any
    text_encoder: Any

    @property
    def device(self) -> torch.device:
        found: torch.device = self.unet.device
        return found


def is_pipeline(folder: Path) -> bool:
    return (folder / INDEX).is_file()


def open_folder(id: str, folder: Path, revision: str | None) -> PictureSource:
    """`revision` None: a hash of the folder's content. Raises UnsupportedModel."""
    index = _json(folder / INDEX)
    if index.get("_class_name") not in PIPELINES:
        raise UnsupportedModel(
            f"its pipeline is '{index.get('_class_name')}', which is not covered; SD 1.x and 2.x are"
        )
    for part, covered in COVERED.items():
        kind = (index.get(part) or [None, None])[1]
        if kind != covered:
            raise UnsupportedModel(f"its {part} is '{kind}', which is not covered; {covered} is")
    config, vae = _json(folder / "unet" / "config.json"), _json(folder / "vae" / "config.json")
    scheduler = _json(folder / "scheduler" / "scheduler_config.json")
    _check(config, vae, scheduler)
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    blocks = unet.blocks(config)
    side = config["sample_size"]
    return PictureSource(
        id=id,
        folder=folder,
        revision=revision or _fingerprint(folder),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        scheduler=scheduler,
        blocks=blocks,
        factor=factor,
        native=factor * (side if isinstance(side, int) else max(side)),
        tensors=tuple(sd_tensors({part: _shapes(_file(folder, part)) for part in COVERED}, blocks)),
    )


def _check(config: Mapping[str, Any], vae: Mapping[str, Any], scheduler: Mapping[str, Any]) -> None:
    if config.get("in_channels", 4) != vae.get("latent_channels", 4):
        raise UnsupportedModel("its UNet takes more than the latents (as for inpainting), which is not covered")
    if config.get("addition_embed_type") or config.get("class_embed_type") or config.get("time_cond_proj_dim"):
        raise UnsupportedModel("its UNet takes more than a prompt and a time, which is not covered")
    if scheduler.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
        raise UnsupportedModel(f"it predicts '{scheduler['prediction_type']}'; epsilon and v_prediction are covered")
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

    own = scheduler.get("_class_name")
    if own not in KarrasDiffusionSchedulers.__members__ or own == "DPMSolverSDEScheduler":
        raise UnsupportedModel(f"its scheduler is '{own}', which is not covered")


def load(source: PictureSource, device: Device) -> PictureBase:
    """Raises OutOfMemory, with both figures, before anything is read; ModelUnreadable."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    dtype = device.precision.dtype
    needs, free = source.weights_bytes("none", dtype.itemsize), device.free_bytes()
    if needs > free:
        raise OutOfMemory(
            f"{source.id} takes {needs / 1e6:,.0f} MB in {device.precision.name}, and {free / 1e6:,.0f} MB are free "
            "on this gpu: use a smaller model."
        )
    loaded: dict[str, Any] = {}
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    try:
        for part, kind in kinds.items():
            read = kind.from_pretrained(source.folder / part, dtype=dtype, use_safetensors=True, local_files_only=True)
            loaded[part] = read.to(device.torch).eval().requires_grad_(False)
    except (OSError, SafetensorError, ValueError, RuntimeError) as exc:
        raise ModelUnreadable(
            f"The weights of {source.id} can't be read from {source.folder} ({exc}): see that the drive is mounted and "
            "the files are whole, then start again."
        ) from exc
    return PictureBase(source, **loaded)


def _json(file: Path) -> dict[str, Any]:
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise UnsupportedModel(f"{file} can't be read ({exc})") from exc
    if not isinstance(told, dict):
        raise UnsupportedModel(f"{file} is no JSON object")
    return told


def _file(folder: Path, part: str) -> Path:
    file = folder / part / WEIGHTS[part]
    if not file.is_file():
        raise UnsupportedModel(
            f"{file} is missing; pickled weights (*.bin, *.pt) are not loaded, for they can run code"
        )
    return file


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(file, framework="pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def _fingerprint(folder: Path) -> str:
    """Hash of the configs, and of each weight file's size, first and last MiB: whole files would take minutes."""
    digest = hashlib.sha256()
    for part in COVERED:
        digest.update((folder / part / "config.json").read_bytes())
        file = _file(folder, part)
        size = file.stat().st_size
        digest.update(f"{part} {size}".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(2**20))
            opened.seek(max(0, size - 2**20))
            digest.update(opened.read())
    return digest.hexdigest()
