"""Stable Diffusion folders in diffusers' format: what can be told without the weights, and the weights themselves.

SD 1.x and 2.x: UNet2DConditionModel, AutoencoderKL, CLIPTextModel. Safetensors only. diffusers is imported when a
folder is opened, for it takes seconds. Knows nothing of requests.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

import wire
from gpu_service import shortcuts, unet
from gpu_service.costs import Estimate, picture_estimate
from gpu_service.device import Device, give_back
from gpu_service.errors import ModelUnreadable, OutOfMemory, PromptTooLong, UnsupportedModel
from gpu_service.layers import Selection, TensorInfo
from gpu_service.sd_tensors import sd_tensors
from gpu_service.shortcuts import Texts
from gpu_service.tuned import PLAIN, Tuned

log = logging.getLogger(__name__)

INDEX = "model_index.json"
# Numbers that are held at a pass's peak, by latent and by pixel, for each channel: of the outermost block, which is the
# largest, its inputs side by side and the inner states of its feed-forward; of the decoder three maps of full size.
PASS_NUMBERS, DECODE_NUMBERS = 26, 3
USABLE = 0.8  # of the free memory: estimates miss something
SMALLEST_TILE = 16  # latents along a side
MOST_CHUNKS = 4  # of a prompt, each as long as the text encoder reads at once
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
    width: int  # of the UNet at full size, in channels
    vae_width: int  # of the autoencoder one halving further down
    tensors: tuple[TensorInfo, ...]

    family: wire.Family = "sd"

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def n_halvings(self) -> int:
        """Of the latents' side, on the way down through the UNet."""
        return sum(block.startswith("down.") for block in self.blocks) - 1

    @property
    def context_tokens(self) -> int:
        return int(self.tokenizer.model_max_length)

    @property
    def tied(self) -> bool:
        return False

    def cost(
        self,
        selection: Selection,
        rows: int,
        bytes_per_param: int,
        *,
        resolution: int | None = None,
        moments_bytes_per_param: int = 8,
        keeps_best: bool = False,
    ) -> Estimate:
        """What training `selection` takes in memory, with micro-batches of `rows` pictures.

        `resolution`: pixels of a side; None: the native ones.
        """
        return picture_estimate(
            selection,
            self.tensors,
            side=(resolution or self.native) // self.factor,
            rows=rows,
            bytes_per_param=bytes_per_param,
            moments_bytes_per_param=moments_bytes_per_param,
            keeps_best=keeps_best,
        )

    def chunks(self, *prompts: str, params: Sequence[str] = ("prompt", "negative_prompt")) -> list[Tensor]:
        """Token ids (C, 77) of each, all of equally many chunks: what the text encoder reads at once, again and again.

        `params` name them in an error. Raises PromptTooLong rather than cut.
        """
        tokenizer, length = self.tokenizer, self.context_tokens
        told = []
        for text, param in zip(prompts, params, strict=False):
            ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            room = length - 2  # start and end stand around each chunk
            if len(ids) > MOST_CHUNKS * room:
                raise PromptTooLong(len(ids), MOST_CHUNKS * room, param=param, answer=False)
            told.append([ids[at : at + room] for at in range(0, max(1, len(ids)), room)])
        count = max(len(chunks) for chunks in told)
        start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id

        def padded(chunk: list[int]) -> list[int]:
            return [start, *chunk, end, *[pad] * (length - 2 - len(chunk))]

        return [torch.tensor([padded(chunks[n] if n < len(chunks) else []) for n in range(count)]) for chunks in told]

    def weights_bytes(self, quantize: wire.Quantize, bytes_per_param: int) -> int:
        """In memory. It is not quantised."""
        return sum(self._part_bytes(part, bytes_per_param) for part in COVERED)

    def least_bytes(self, bytes_per_param: int) -> int:
        """In the device's memory where what reads and decodes is there for its own turn only."""
        sizes = {part: self._part_bytes(part, bytes_per_param) for part in COVERED}
        return sizes.pop("unet") + max(sizes.values())

    def _part_bytes(self, part: str, bytes_per_param: int) -> int:
        return bytes_per_param * sum(t.n_params for t in self.tensors if t.component == part)

    def pass_bytes(self, places: int, width: int, height: int, bytes_per_number: int) -> int:
        """That a pass of the UNet takes beside the weights, attention's scores never being held whole."""
        latents = (width // self.factor) * (height // self.factor)
        return places * latents * PASS_NUMBERS * self.width * bytes_per_number

    def decode_bytes(self, width: int, height: int, bytes_per_number: int) -> int:
        """That the autoencoder takes beside its weights to draw a picture of so many pixels."""
        return width * height * DECODE_NUMBERS * self.vae_width * bytes_per_number

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
    free_bytes: Callable[[], int] = lambda: 2**62  # of the device's memory
    away: set[str] = field(default_factory=set)  # parts that are on the device for their own turn only
    texts: Texts = field(default_factory=Texts)  # whose keys and values the UNet keeps from step to step

    @property
    def device(self) -> torch.device:
        return self._first.device

    @property
    def dtype(self) -> torch.dtype:
        return self._first.dtype

    @property
    def _first(self) -> Tensor:
        """Of the UNet's tensors. diffusers' own properties look at them all, which takes as long as a layer."""
        found: Tensor = next(self.unet.parameters())
        return found

    def whole(self, name: str) -> Tensor:
        """A tensor by its name in the source, as it is held."""
        component, _, own = name.partition(".")
        found: Tensor = getattr(self, component).get_parameter(own)
        return found

    def read(self, ids: Tensor, tuned: Tuned = PLAIN) -> Tensor:
        """What the UNet reads of a prompt: (C, 77) token ids -> (1, C x 77, D)."""
        ids = ids.to(self.device)
        with self.kept("text_encoder"):
            return self._read(ids, tuned)

    def _read(self, ids: Tensor, tuned: Tuned) -> Tensor:
        mask = None
        if getattr(self.text_encoder.config, "use_attention_mask", False):
            mask = (ids != self.source.tokenizer.pad_token_id).long()
        # A chunk at a time: a batch of them would be rounded otherwise than each alone.
        read = [
            tuned("text_encoder", self.text_encoder, chunk[None], attention_mask=None if mask is None else mask[i:][:1])
            for i, chunk in enumerate(ids)
        ]
        return torch.cat([found[0] for found in read], dim=1)

    def encode(self, pixels: Tensor, *, whole: bool = False) -> Any:
        """(B, 3, H, W) from -1 to 1 -> the distribution that latents are drawn from, not scaled. In tiles where the
        whole would not fit, unless it must be `whole`: then it is the same whatever is free.
        """
        given, factor = pixels.to(self.device, self.vae.dtype), self.source.factor
        with self.kept("vae"):
            self.vae.use_tiling = not whole and self._needs_tiles(given.shape[-1] // factor, given.shape[-2] // factor)
            return self.vae.encode(given).latent_dist

    def decode(self, latents: Tensor) -> Tensor:
        """(1, 4, h, w), scaled as the UNet knows them -> (1, 3, H, W). In tiles where the whole would not fit."""
        given = latents / self.vae.config.scaling_factor
        with self.kept("vae"):
            self.vae.use_tiling = self._needs_tiles(given.shape[-1], given.shape[-2])
            found: Tensor = self.vae.decode(given, return_dict=False)[0]
            return found

    def _needs_tiles(self, width: int, height: int) -> bool:
        """Whether the autoencoder has to go tile by tile, of which size it is told. In latents."""
        side = tile_side(self.source, width, height, self.dtype.itemsize, self.free_bytes())
        if side is not None:
            self.vae.tile_latent_min_size, self.vae.tile_sample_min_size = side, side * self.source.factor
        return side is not None

    def places(self, width: int, height: int) -> int:
        """That a pass of the UNet may have now, one at least."""
        one = self.source.pass_bytes(1, width, height, self.dtype.itemsize)
        return max(1, int(USABLE * self.free_bytes()) // one)

    @contextmanager
    def kept(self, part: str) -> Iterator[None]:
        """Within, this part stays on the device, wherever it is else."""
        if part not in self.away:
            yield
            return
        module = getattr(self, part)
        module.to(self.device)
        self.away.discard(part)
        try:
            yield
        finally:
            module.to("cpu")
            self.away.add(part)
            give_back(self.device)


def tile_side(source: PictureSource, width: int, height: int, bytes_per_number: int, free_bytes: int) -> int | None:
    """Latents along a tile's side, of `width` x `height` of them; None: the whole fits."""
    factor, usable = source.factor, int(USABLE * free_bytes)
    if source.decode_bytes(width * factor, height * factor, bytes_per_number) <= usable:
        return None
    side = max(width, height)
    while side > SMALLEST_TILE and source.decode_bytes(side * factor, side * factor, bytes_per_number) > usable:
        side = -(-side // 2)
    return max(side, SMALLEST_TILE)


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
        width=int(config["block_out_channels"][0]),
        vae_width=int(vae["block_out_channels"][min(1, len(vae["block_out_channels"]) - 1)]),
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
    needs, free = source.least_bytes(dtype.itemsize), device.free_bytes()
    if needs > free:
        raise OutOfMemory(
            f"{source.id} takes {needs / 1e6:,.0f} MB in {device.precision.name}, part by part, and "
            f"{free / 1e6:,.0f} MB are free on this gpu: use a smaller model."
        )
    away = set[str]()
    native = source.native
    at_work = source.pass_bytes(2, native, native, dtype.itemsize)
    if device.torch.type != "cpu" and source.weights_bytes("none", dtype.itemsize) + at_work > USABLE * free:
        away = {"vae", "text_encoder"}
        log.info("%s: text encoder and autoencoder are on the device for their own turn only", source.id)
    loaded: dict[str, Any] = {}
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    try:
        for part, kind in kinds.items():
            read = kind.from_pretrained(source.folder / part, dtype=dtype, use_safetensors=True, local_files_only=True)
            place = "cpu" if part in away else device.torch
            loaded[part] = read.to(place).eval().requires_grad_(False)
            # On CPUs convolutions are a third faster so. In half precision torch 2.13 crashes on the way back.
            if part != "text_encoder" and device.torch.type == "cpu" and dtype is torch.float32:
                shortcuts.pack(loaded[part].to(memory_format=torch.channels_last))
    except (OSError, SafetensorError, ValueError, RuntimeError) as exc:
        raise ModelUnreadable(
            f"The weights of {source.id} can't be read from {source.folder} ({exc}): see that the drive is mounted and "
            "the files are whole, then start again."
        ) from exc
    texts = shortcuts.read_texts_once(loaded["unet"])
    return PictureBase(source, **loaded, free_bytes=device.free_bytes, away=away, texts=texts)


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
