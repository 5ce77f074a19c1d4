"""Pictures: one step for all that are under way, on the device thread.

A step is one thing: a prompt read, a denoising step of a batch, a preview or a finished picture decoded. So text goes
on between any two. Pictures of one model, one shape and one length of prompt share a batch; each has its own scheduler,
noise and dials. Knows nothing of HTTP or file formats.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpu_service.device import translate
from gpu_service.errors import GpuError, NotFinite
from gpu_service.scheduler import Admission
from gpu_service.sd import PictureBase
from gpu_service.tuned import PLAIN, Tuned
from gpu_service.unet import Shallow, UnetDials, dialled, keeping

log = logging.getLogger(__name__)

SKETCHED_LATENTS = 12  # along the shorter side: from here on a preview is drawn at half the size
FULL_EVERY = 3  # steps, of a picture that is drawn fast
BATCH_LATENTS = 4 * 64 * 64  # that denoise together: four pictures of 512 x 512, or one that is larger


@dataclass(frozen=True)
class Shown:
    """A picture as bytes (H, W, 3), whole or on its way there; or its latents, where those are wanted."""

    index: int  # among the pictures of the request
    pixels: Tensor
    preview: int | None = None  # which preview, from 0; None: it is finished


@dataclass(frozen=True)
class Wanted:
    """What a caller asks for."""

    base_model: str
    prompt: Tensor  # (C, 77) token ids: C chunks, read apart
    negative: Tensor  # (C, 77)
    width: int
    height: int
    steps: int
    guidance: float  # 1 or less: no second pass without the prompt
    scheduler: str | None  # None: the model's own
    seeds: tuple[int, ...]  # a picture each
    dials: UnetDials | None = None
    start: Tensor | None = None  # (1, 3, H, W) from -1 to 1: the picture to begin with
    strength: float = 1.0  # of the change to it
    previews: int = 0
    drawn: bool = True  # else latents are wanted, (4, h, w) in fp32 and scaled as the UNet knows them
    fast: bool = False  # two steps of three take what is deep in the UNet from the one before
    caller: str = ""


@dataclass(frozen=True, eq=False)
class Request:
    base: PictureBase
    wanted: Wanted
    send: Callable[[Shown | BaseException], None]
    cancelled: Callable[[], bool]
    tuned: Tuned = PLAIN  # a fine-tune's tensors; who shares a batch shares them


@dataclass(eq=False)
class _Row:
    """One picture under way."""

    request: Request
    index: int
    scheduler: Any
    generator: torch.Generator
    seen: Tensor | None = None  # (1 or 2, C x 77, D): what the UNet reads; without the prompt first
    latents: Tensor | None = None  # (1, 4, h, w)
    times: Sequence[Tensor] = ()
    done: int = 0  # steps
    deep: Tensor | None = None  # that the next steps may take over: (places, C, h', w')
    previews_at: list[int] = field(default_factory=list)  # steps after which one is due
    preview: Tensor | None = None  # the latents that it shows, until it is decoded

    @property
    def size_latents(self) -> int:
        wanted, factor = self.request.wanted, self.request.base.source.factor
        return (wanted.width // factor) * (wanted.height // factor)

    @property
    def reuses(self) -> bool:
        """What is deep, in the next step."""
        return self.deep is not None and self.done % FULL_EVERY > 0

    @property
    def n_places(self) -> int:
        """In a pass of the UNet."""
        assert self.seen is not None
        return len(self.seen)

    @property
    def shape(self) -> tuple[object, ...]:
        """Those of one shape may share a batch."""
        assert self.seen is not None
        request = self.request
        size = request.wanted.width, request.wanted.height
        return id(request.base), id(request.tuned), size, self.seen.shape[1], self.reuses


class Pictures:
    def __init__(self) -> None:
        self._line: Admission[_Row] = Admission(BATCH_LATENTS)
        self._rows: list[_Row] = []  # under way; who waits longest for a step is first
        self._texts: tuple[list[_Row], Tensor] | None = None  # of the last batch, and what it read

    def __len__(self) -> int:
        return len(self._rows) + len(self._line)

    def add(self, request: Request) -> None:
        for index, seed in enumerate(request.wanted.seeds):
            generator = torch.Generator().manual_seed(seed)  # on the CPU, so that a seed means the same everywhere
            scheduler = request.base.source.new_scheduler(request.wanted.scheduler)
            row = _Row(request, index, scheduler, generator)
            self._line.ask(row, request.wanted.caller, min(row.size_latents, BATCH_LATENTS))

    def fail_all(self, error: BaseException) -> None:
        self._fail([*self._rows, *self._line.waiting()], error)

    @torch.inference_mode()
    def step(self) -> None:
        """One thing, for whoever waits longest for it."""
        for row in [*self._rows, *self._line.waiting()]:
            if row.request.cancelled():
                self._end(row)
        while (admitted := self._line.next()) is not None:
            self._rows.append(admitted)
        if not self._rows:
            return
        first = self._rows[0]
        batch = [first]
        try:
            if first.latents is None:
                _begin(first)
            elif first.preview is not None:
                first.request.send(Shown(first.index, _sketched(first, first.preview), _next_preview(first)))
                first.preview = None
            elif first.done == len(first.times):
                whole = _decode if first.request.wanted.drawn else _undecoded
                first.request.send(Shown(first.index, whole(first, first.latents)))
                self._end(first)
                return
            else:
                batch = _fitting([row for row in self._rows if _denoises(row) and row.shape == first.shape])
                _denoise(batch, self._texts_of(batch))
        except Exception as exc:  # others' pictures go on
            if not isinstance(exc, GpuError):
                log.exception("a picture failed")
            self._fail(batch, translate(exc))
            return
        self._rows = [row for row in self._rows if row not in batch] + batch

    def _texts_of(self, batch: list[_Row]) -> Tensor:
        """The same tensor as long as the batch is the same, for the UNet keeps what it has read of it."""
        if self._texts is None or self._texts[0] != batch:
            self._texts = batch, torch.cat([row.seen for row in batch if row.seen is not None])
        batch[0].request.base.texts.give(self._texts[1])
        return self._texts[1]

    def _fail(self, rows: list[_Row], error: BaseException) -> None:
        failed = {id(row.request): row.request for row in rows}
        for request in failed.values():
            request.send(error)
        for row in [*self._rows, *self._line.waiting()]:
            if id(row.request) in failed:
                self._end(row)

    def _end(self, row: _Row) -> None:
        self._line.done(row)
        if row in self._rows:
            self._rows.remove(row)
        self._texts = None
        row.request.base.texts.give(None)


def _denoises(row: _Row) -> bool:
    return row.latents is not None and row.preview is None and row.done < len(row.times)


def _fitting(rows: list[_Row]) -> list[_Row]:
    """As many as fit into what is free, from the first on; the others have their turn in the next step."""
    wanted, found = rows[0].request.wanted, rows[:1]
    if len(rows) == 1:
        return found
    left = rows[0].request.base.places(wanted.width, wanted.height) - rows[0].n_places
    for row in rows[1:]:
        left -= row.n_places
        if left < 0:
            break
        found.append(row)
    return found


def _begin(row: _Row) -> None:
    """Reads the prompt and draws the noise, in the order of diffusers' pipelines, so that a seed means the same."""
    base, wanted = row.request.base, row.request.wanted
    texts = [wanted.negative, wanted.prompt] if wanted.guidance > 1 else [wanted.prompt]
    row.seen = torch.cat([base.read(ids, row.request.tuned) for ids in texts])
    row.scheduler.set_timesteps(wanted.steps, device=base.device)
    row.times = list(row.scheduler.timesteps)
    if wanted.start is None:
        side = (wanted.height // base.source.factor, wanted.width // base.source.factor)
        row.latents = _noise((1, base.unet.config.in_channels, *side), row) * row.scheduler.init_noise_sigma
    else:
        row.latents = _noisy(row, wanted.start)
    n = len(row.times)
    row.previews_at = sorted({n * (i + 1) // (wanted.previews + 1) for i in range(wanted.previews)} - {0, n})


def _noise(shape: tuple[int, ...], row: _Row) -> Tensor:
    base = row.request.base
    return torch.randn(shape, generator=row.generator, dtype=base.dtype).to(base.device)


def _noisy(row: _Row, start: Tensor) -> Tensor:
    """The picture to begin with as latents, with the noise of the step at which it enters."""
    base, wanted, scheduler = row.request.base, row.request.wanted, row.scheduler
    latents = base.vae.config.scaling_factor * base.encode(start).sample(row.generator)
    skipped = max(wanted.steps - min(int(wanted.steps * wanted.strength), wanted.steps), 0) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    row.times = list(scheduler.timesteps[skipped:])
    noisy: Tensor = scheduler.add_noise(latents, _noise(tuple(latents.shape), row), torch.stack(list(row.times[:1])))
    return noisy


def _denoise(rows: list[_Row], seen: Tensor) -> None:
    """One step of each, in one pass of the UNet. B rows; a row with guidance takes two places."""
    given, times, dials = [], [], []
    for row in rows:
        assert row.seen is not None
        time = row.times[row.done]
        places = len(row.seen)
        given += [row.scheduler.scale_model_input(row.latents, time)] * places
        times += [time.float()] * places  # the UNet's first act with them; some schedulers count in whole numbers
        dials += [row.request.wanted.dials] * places
    told = _pass(rows, torch.cat(given), torch.stack(times), seen, dials)
    at = 0
    for row in rows:
        assert row.seen is not None
        own = told[at : at + len(row.seen)]
        if len(own) == 2:
            without, with_it = own.chunk(2)
            own = without + row.request.wanted.guidance * (with_it - without)
        _advance(row, own, given[at])
        at += len(row.seen)


def _pass(rows: list[_Row], given: Tensor, times: Tensor, seen: Tensor, dials: Sequence[UnetDials | None]) -> Tensor:
    """What the UNet takes for the noise, of each place; who draws fast keeps what is deep, or takes it over."""
    unet, tuned = rows[0].request.base.unet, rows[0].request.tuned
    with dialled(unet, dials):
        if rows[0].reuses:
            deep = torch.cat([row.deep for row in rows if row.deep is not None])
            told: Tensor = tuned("unet", Shallow(unet), given, times, seen, deep, within="unet")
            return told
        with keeping(unet, wanted=any(row.request.wanted.fast for row in rows)) as kept:
            told = tuned("unet", unet, given, times, encoder_hidden_states=seen, return_dict=False)[0]
    if kept:
        at = 0
        for row in rows:
            if row.request.wanted.fast:
                row.deep = kept[0][at : at + row.n_places].clone()
            at += row.n_places
    return told


def _advance(row: _Row, told: Tensor, given: Tensor) -> None:
    time = row.times[row.done]
    row.done += 1
    if row.done in row.previews_at:
        row.preview = _clean(row.scheduler, told, given, time)
    # Those that draw noise at each step take it from the picture's own; the others have no such argument.
    extra = {"generator": row.generator} if "generator" in signature(row.scheduler.step).parameters else {}
    row.latents = row.scheduler.step(told, time, row.latents, **extra, return_dict=False)[0]


def _clean(scheduler: Any, told: Tensor, given: Tensor, time: Tensor) -> Tensor:
    """The latents that the model sees through the noise. What it was given is scaled alike under every scheduler."""
    at = min(max(int(time), 0), len(scheduler.alphas_cumprod) - 1)
    signal = scheduler.alphas_cumprod[at].to(given.device, torch.float32)
    noisy, predicted = given.float(), told.float()
    if scheduler.config.prediction_type == "v_prediction":
        clean = signal.sqrt() * noisy - (1 - signal).sqrt() * predicted
    else:
        clean = (noisy - (1 - signal).sqrt() * predicted) / signal.sqrt()
    return torch.as_tensor(clean, dtype=given.dtype)


def _next_preview(row: _Row) -> int:
    return row.previews_at.index(row.done)


def _sketched(row: _Row, latents: Tensor) -> Tensor:
    """As `_decode`, at half the size and drawn up again, which takes a quarter of the time: on its way a picture has no
    finer detail. Small ones are decoded whole.
    """
    if min(latents.shape[-2:]) < SKETCHED_LATENTS:
        return _decode(row, latents)
    small = _decode(row, F.avg_pool2d(latents, 2)).permute(2, 0, 1)[None].float()
    wanted = row.request.wanted
    large = F.interpolate(small, (wanted.height, wanted.width), mode="bilinear", align_corners=False)
    return large[0].permute(1, 2, 0).round().byte()


def _undecoded(row: _Row, latents: Tensor) -> Tensor:
    if not torch.isfinite(latents).all():
        raise _not_finite(row)
    return latents[0].float().cpu()


def _not_finite(row: _Row) -> NotFinite:
    request = row.request
    return NotFinite("picture", dialled=request.wanted.dials is not None, tuned=request.tuned is not PLAIN)


def _decode(row: _Row, latents: Tensor) -> Tensor:
    """(1, 4, h, w) -> (H, W, 3) bytes, rounded as diffusers rounds. Raises NotFinite."""
    drawn = row.request.base.decode(latents)
    if not torch.isfinite(drawn).all():
        raise _not_finite(row)
    pixels: Tensor = ((drawn * 0.5 + 0.5).clamp(0, 1)[0].permute(1, 2, 0).float().cpu() * 255).round().byte()
    return pixels
