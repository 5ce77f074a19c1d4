"""Requests for pictures as this service takes them, and pictures as files. No device, no HTTP.

The OpenAI shape, with fields of our own: https://platform.openai.com/docs/api-reference/images
"""

import base64
import io
import json
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from pydantic import Field
from torch import Tensor

import picture
from gpu_service import unet
from gpu_service.bodies import Body, EpsGain, Gain
from gpu_service.errors import BadRequest, NotYet
from gpu_service.image import Shown, Wanted
from gpu_service.sd import SCHEDULERS, PictureSource
from gpu_service.unet import Part, UnetDials
from picture import BadPicture

MOST_PICTURES = 10  # of one request
JPEG_QUALITY = 95
MOST_PREVIEWS = 10
LARGER = 2  # times the side that a model was trained on; beyond, it repeats itself and memory grows with the square
SETTINGS_KEY = "im-fine"  # of the PNG's text


class PictureBand(Body):
    """On some blocks of the UNet. `attn` is on both kinds of attention."""

    layers: str = Field(max_length=500)
    eps: EpsGain = 1.0
    attn: Gain = 1.0
    attn_self: Gain = 1.0
    attn_cross: Gain = 1.0
    mlp: Gain = 1.0


class PictureDials(Body):
    eps: EpsGain = 1.0
    attn: Gain = 1.0
    attn_self: Gain = 1.0
    attn_cross: Gain = 1.0
    mlp: Gain = 1.0
    bands: list[PictureBand] = Field(default=[], max_length=32)

    def for_blocks(self, blocks: Sequence[str]) -> UnetDials | None:
        """A block's dial times that of each band which covers it. None where nothing is turned. Raises NoSuchLayer."""
        gains: dict[tuple[str, Part], float] = {}
        everywhere = PictureBand(layers="all", **self.model_dump(exclude={"bands"}))
        for band in [everywhere, *self.bands]:
            covered = unet.parse_blocks(blocks, band.layers)
            turned: dict[Part, float] = {
                "attn.self": band.attn * band.attn_self,
                "attn.cross": band.attn * band.attn_cross,
                "mlp": band.mlp,
                "eps": band.eps,
            }
            for block in [*covered, *([unet.OUTER] if band is everywhere else [])]:
                for part, gain in turned.items():
                    gains[block, part] = gains.get((block, part), 1.0) * gain
        return UnetDials(gains) if any(gain != 1.0 for gain in gains.values()) else None


class PictureBody(Body):
    ignored = frozenset({"user", "safety_identifier", "wait_s", "moderation"})
    neutral = {  # noqa: RUF012
        "background": ("auto", "opaque"),
        "quality": ("auto", "standard", "hd", "low", "medium", "high"),  # of drawing, which is what `steps` says
        "style": ("vivid", "natural"),
    }

    model: str
    prompt: str = Field(max_length=32_000)
    negative_prompt: str = Field(default="", max_length=32_000)
    n: Annotated[int, Field(ge=1, le=MOST_PICTURES)] | None = None
    size: str | None = Field(default=None, max_length=20)
    seed: Annotated[int, Field(ge=0, lt=2**53)] | None = None
    steps: int = Field(default=25, ge=1, le=200)
    guidance: float = Field(default=7.5, ge=0, le=100, allow_inf_nan=False)
    scheduler: str | None = Field(default=None, max_length=20)
    image: str | None = None  # base64, or a data URL
    strength: float = Field(default=0.8, gt=0, le=1)
    dials: str | PictureDials | None = None
    fast: bool = False
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "webp", "jpeg"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=MOST_PREVIEWS)] | None = None

    @property
    def format(self) -> str:
        return self.output_format or "png"

    def wanted(self, source: PictureSource, caller: str) -> Wanted:
        """Reads the picture to begin with, so not on the event loop. Raises BadRequest."""
        if self.response_format == "url":
            raise NotYet("Pictures come as b64_json: there is no address to fetch them from.", param="response_format")
        if self.format == "png" and self.output_compression not in (None, 100):
            raise BadRequest("A png loses nothing: use webp or jpeg, or leave it out.", param="output_compression")
        if self.scheduler is not None and self.scheduler not in SCHEDULERS:
            raise BadRequest(
                f"There is no scheduler '{self.scheduler}': use {', '.join(SCHEDULERS)}, or leave it out for the "
                "model's own.",
                param="scheduler",
            )
        given = _given(self.image) if self.image is not None else None
        width, height = self._size(source, given)
        if given is not None and int(self.steps * self.strength) < 1:
            raise BadRequest("steps x strength is below 1, so nothing would be drawn: raise one.", param="strength")
        prompt, negative = source.chunks(self.prompt, self.negative_prompt)
        first = secrets.randbelow(2**32) if self.seed is None else self.seed
        return Wanted(
            base_model=source.id,
            prompt=prompt,
            negative=negative,
            width=width,
            height=height,
            steps=self.steps,
            guidance=self.guidance,
            scheduler=self.scheduler,
            seeds=tuple(first + number for number in range(self.n or 1)),
            dials=self._dials(source),
            start=None if given is None else _as_tensor(given, width, height),
            strength=self.strength,
            previews=(self.partial_images or 0) if self.stream else 0,
            fast=self.fast,
            caller=caller,
        )

    def _dials(self, source: PictureSource) -> UnetDials | None:
        if isinstance(self.dials, str):
            raise NotYet(
                f"There is no dial preset '{self.dials}': presets are not built yet. "
                'Give numbers, for example {"attn_cross": 1.1, "bands": [{"layers": "mid", "mlp": 0.9}]}.',
                param="dials",
            )
        return self.dials.for_blocks(source.blocks) if self.dials else None

    def _size(self, source: PictureSource, given: Image.Image | None) -> tuple[int, int]:
        """Width and height in pixels. Raises BadRequest."""
        most, step = LARGER * source.native, source.factor
        if self.size in (None, "auto"):
            if given is None:
                return source.native, source.native
            share = min(1.0, most / max(given.size))
            width, height = (max(step, int(side * share) // step * step) for side in given.size)
            return width, height
        found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", self.size or "")
        sides = (int(found[1]), int(found[2])) if found else (0, 0)
        if not all(step <= side <= most and side % step == 0 for side in sides):
            raise BadRequest(
                f"size: use WIDTHxHEIGHT in multiples of {step}, from {step} to {most}; this model was trained on "
                f"{source.native}x{source.native}.",
                param="size",
            )
        return sides


def _given(text: str) -> Image.Image:
    """The picture to begin with, in RGB. Raises BadRequest."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        data = base64.b64decode("".join(text.split()), validate=True)  # with or without line breaks
    except ValueError as exc:
        raise BadRequest("image is no base64 of a file, nor a data URL.", param="image") from exc
    try:
        return picture.decoded(data)
    except BadPicture as exc:
        raise BadRequest(f"image {exc.message}.", param="image", code=exc.code) from exc


def _as_tensor(picture: Image.Image, width: int, height: int) -> Tensor:
    """(1, 3, H, W) from -1 to 1; what does not fit the shape is cut off at the sides."""
    if picture.size != (width, height):
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    dots = torch.from_numpy(np.asarray(picture).astype(np.float32) / 255)
    return (2 * dots - 1).permute(2, 0, 1)[None]


@dataclass(frozen=True)
class PictureShape:
    """How the answers to one request look."""

    body: PictureBody
    wanted: Wanted
    created: int

    @classmethod
    def new(cls, body: PictureBody, wanted: Wanted) -> "PictureShape":
        return cls(body, wanted, int(time.time()))

    def whole(self, pictures: Sequence[Shown]) -> dict[str, Any]:
        """Encodes, so not on the event loop."""
        data = [
            {"b64_json": self._encoded(p), "seed": self.wanted.seeds[p.index]}
            for p in sorted(pictures, key=lambda p: p.index)
        ]
        details = {"image_tokens": self._usage["output_tokens"], "text_tokens": 0}
        usage = {**self._usage, "output_tokens_details": details}
        return {
            "created": self.created,
            "background": "opaque",
            "output_format": self.body.format,
            "size": self._size,
            "data": data,
            "usage": usage,
        }

    def event(self, shown: Shown) -> dict[str, Any]:
        """As the OpenAI API streams them; `index` and `seed` say which of several. Encodes."""
        finished = shown.preview is None
        extra = {"usage": self._usage} if finished else {"partial_image_index": shown.preview}
        return {
            "type": "image_generation.completed" if finished else "image_generation.partial_image",
            "b64_json": self._encoded(shown),
            "created_at": self.created,
            "background": "opaque",
            "output_format": self.body.format,
            "quality": "auto",
            "size": self._size,
            **extra,
            "index": shown.index,
            "seed": self.wanted.seeds[shown.index],
        }

    @property
    def _size(self) -> str:
        return f"{self.wanted.width}x{self.wanted.height}"

    @property
    def read(self) -> int:
        """Tokens of the prompt."""
        return self.wanted.prompt.numel()

    def drawn(self, shown: Shown) -> int:
        """Steps that went into a picture before it was shown."""
        if shown.preview is None:
            return self.wanted.steps
        return self.wanted.steps * (shown.preview + 1) // (self.wanted.previews + 1)

    @property
    def _usage(self) -> dict[str, Any]:
        """Text is counted as the text encoder reads it; of a picture, each UNet step counts one."""
        read, drawn = self.read, len(self.wanted.seeds) * self.wanted.steps
        return {
            "input_tokens": read,
            "input_tokens_details": {"image_tokens": 0, "text_tokens": read},
            "output_tokens": drawn,
            "total_tokens": read + drawn,
        }

    def _encoded(self, shown: Shown) -> str:
        picture, file = Image.fromarray(shown.pixels.numpy()), io.BytesIO()
        given = self.body.output_compression
        if self.body.format == "webp" and given in (None, 100):
            picture.save(file, "WEBP", lossless=True)
        elif self.body.format in ("webp", "jpeg"):
            picture.save(file, self.body.format.upper(), quality=JPEG_QUALITY if given is None else given)
        else:
            hurried = {} if shown.preview is None else {"compress_level": 1}
            picture.save(file, "PNG", pnginfo=self._told(shown), **hurried)
        return base64.b64encode(file.getvalue()).decode()

    def _told(self, shown: Shown) -> PngInfo:
        """The settings, so that the picture can be made again."""
        body, wanted = self.body, self.wanted
        told = {
            "model": body.model,
            "prompt": body.prompt,
            "negative_prompt": body.negative_prompt,
            "size": self._size,
            "seed": wanted.seeds[shown.index],
            "steps": wanted.steps,
            "guidance": wanted.guidance,
            "scheduler": wanted.scheduler,
            "dials": body.dials.model_dump(exclude_defaults=True) if isinstance(body.dials, PictureDials) else None,
        }
        if wanted.start is not None:
            told["strength"] = wanted.strength
        if wanted.fast:
            told["fast"] = True
        info = PngInfo()
        info.add_text(SETTINGS_KEY, json.dumps(told))  # ASCII, so that it is a plain tEXt chunk
        return info
