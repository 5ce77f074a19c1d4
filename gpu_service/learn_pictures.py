"""What a run on pictures learns: to see through noise, as in https://arxiv.org/abs/2112.10752.

Latents and texts are computed once, before the first step, unless the text encoder itself is trained. Everything random
of a row follows from the seed, the epoch and the row: neither how a batch is cut nor where a run goes on changes it.
The loop is train.py's. Knows the model's three networks; nothing of optimizers or steps.
"""

import hashlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import wire
from gpu_service import image, trainable
from gpu_service.device import Device
from gpu_service.errors import NotFinite
from gpu_service.picture_data import Kept, PictureStore, data_url
from gpu_service.plan import MOMENTS_BYTES, SAMPLE_STEPS, pictures_in_a_row
from gpu_service.prefix import Chosen, Working
from gpu_service.sd import PictureBase, PictureSource
from gpu_service.train import Job, Report, State
from gpu_service.train import run as loop
from gpu_service.trainable import Trainable
from gpu_service.tuned import PLAIN, Tuned

VALIDATION_TIMES = 4  # at which a validation picture is looked at, evenly spread: one alone says little
CERTAIN = -30.0  # logarithm of a variance that is next to nothing
GUIDANCE = 7.5  # of sample pictures and of those of a class


@dataclass(frozen=True, kw_only=True)
class PictureJob(Job[PictureSource, PictureStore]):
    concept: wire.Concept | None = (
        None  # with a class, the model makes pictures of that first, and goes on knowing them
    )

    @property
    def trains_texts(self) -> bool:
        return any(t.component == "text_encoder" for t in self.selection.tensors)

    @property
    def class_prompt(self) -> str | None:
        return self.concept.class_prompt if self.concept else None

    @property
    def in_a_row(self) -> int:
        """Pictures that a row takes through the UNet."""
        return pictures_in_a_row(self.concept)


def steps(
    job: PictureJob,
    device: Device,
    load: Callable[[], PictureBase],
    *,
    start: State | None = None,
    wanted: Callable[[], bool] = lambda: False,
) -> Iterator[Report]:
    """All slices of a run."""
    base = load()
    with base.kept("text_encoder") if job.trains_texts else nullcontext():
        yield from loop(job, base, partial(PictureLearner, job, base, device), device, start=start, wanted=wanted)


@dataclass(frozen=True)
class _Seen:
    """One picture in the loss."""

    clean: Tensor  # (4, h, w) latents, fp32, on the CPU as all here
    noise: Tensor  # the same
    time: int
    caption: int
    weight: float


class PictureLearner:
    advice = "Lower the resolution, train fewer layers, or set optimizer adamw_8bit."

    def __init__(self, job: PictureJob, base: PictureBase, device: Device, trained: Trainable) -> None:
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        self._job, self._base, self._device = job, base, device
        self.unit = 1 + job.concept.prior_weight if job.concept and job.class_prompt else 1.0
        full, lora = trainable.weights(trained)
        self._tuned = Tuned(full, lora)
        begin = trainable.on_device(job.begin, base.device) if job.begin else None
        self._before = Tuned(begin.full, begin.lora) if begin else PLAIN
        self._noise = DDPMScheduler.from_config(dict(job.source.scheduler))
        self._snr = self._noise.alphas_cumprod / (1 - self._noise.alphas_cumprod)  # by time
        self._captions = {caption: number for number, caption in enumerate(_captions(job))}
        self._texts: Kept | None = None  # by caption (C x 77, D); None while the text encoder is trained
        self._latents = dict[str, Kept]()

    # --- before the first step ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def prepare(self) -> Generator[Chosen | Working, None, None]:
        began, job = time.perf_counter(), self._job
        sets = {"training": (len(job.store), self._encoded(job.store))}
        if job.validation:
            sets["validation"] = len(job.validation), self._encoded(job.validation)
        if job.concept and job.concept.class_prompt:
            sets["class"] = job.concept.n_of_class, self._of_class(job.concept.class_prompt, job.concept.n_of_class)
        done, total = 0, sum(count for count, _ in sets.values())
        for name, (count, pictures) in sets.items():
            kept = self._latents[name] = Kept(job.store.folder / f"latents-{name}", [self._shape] * count)
            row = 0
            for found in pictures:
                if found is not None:  # else it is a step on the way to it
                    kept.put(row, found)
                    row, done = row + 1, done + 1
                yield Working(done, total)
        if not job.trains_texts:
            ids = [self._ids(caption) for caption in self._captions]
            width = int(self._base.text_encoder.config.hidden_size)
            self._texts = Kept(job.store.folder / "texts", [(text.numel(), width) for text in ids])
            with self._base.kept("text_encoder"):
                for number, text in enumerate(ids):
                    self._texts.put(number, self._base.read(text, self._tuned)[0])
                    yield Working(done, total)
        what = f"{done:,} pictures" + ("" if job.trains_texts else f" and {len(self._captions):,} texts")
        yield Chosen(True, f"{what} took {time.perf_counter() - began:.1f} s")

    @property
    def _shape(self) -> tuple[int, int, int]:
        """Of the autoencoder's answer: means and the logarithms of variances."""
        side = self._job.plan.resolution // self._job.source.factor
        return 2 * int(self._base.vae.config.latent_channels), side, side

    def _encoded(self, store: PictureStore) -> Iterator[Tensor | None]:
        """(8, h, w) of each picture: what its latents are drawn from."""
        with self._base.kept("vae"):
            for row in range(len(store)):
                found: Tensor = self._base.encode(store.pixels(row)[None], whole=True).parameters[0]
                if not torch.isfinite(found).all():
                    raise NotFinite("picture", dialled=False)
                yield found.float().cpu()

    def _of_class(self, prompt: str, count: int) -> Iterator[Tensor | None]:
        """The same of pictures of the class, as the model makes them before it is trained; None after each step.

        They are never decoded, for how that is done hangs on what memory is free.
        """
        scale = float(self._base.vae.config.scaling_factor)
        for number in range(count):
            seed = _number(self._job.seed, "class", number) % 2**32
            for latents in self._drawn(prompt, seed, self._before, drawn=False):
                yield None if latents is None else torch.cat([latents / scale, torch.full_like(latents, CERTAIN)])

    def _ids(self, text: str) -> Tensor:
        return self._job.source.chunks(text)[0]

    def _drawn(self, prompt: str, seed: int, tuned: Tuned, *, drawn: bool) -> Iterator[Tensor | None]:
        """None after each step, then the picture as bytes (H, W, 3), or its latents where it is not to be `drawn`.

        Raises what went wrong on the way.
        """
        made: list[image.Shown | BaseException] = []
        side, (text, nothing) = self._job.plan.resolution, self._job.source.chunks(prompt, "")
        wanted = image.Wanted(
            base_model=self._job.source.id,
            prompt=text,
            negative=nothing,
            width=side,
            height=side,
            steps=SAMPLE_STEPS,
            guidance=GUIDANCE,
            scheduler=None,
            seeds=(seed,),
            drawn=drawn,
        )
        pictures = image.Pictures()
        pictures.add(image.Request(self._base, wanted, made.append, lambda: False, tuned))
        try:
            while pictures:
                pictures.step()
                yield None
        finally:  # a run may end here
            self._base.texts.give(None)
        [shown] = made
        if isinstance(shown, BaseException):
            raise shown
        yield shown.pixels

    # --- the loss ----------------------------------------------------------------------------------------------------

    def loss(self, rows: Sequence[int], epoch: int) -> Tensor:
        """Mean squared error of what the noise was taken for, by picture, weighed; summed over the rows."""
        seen = [self._training(row, epoch) for row in rows]
        if self._job.class_prompt:
            seen += [self._prior(row, epoch) for row in rows]
        return self._loss(seen)

    def weight(self, rows: Sequence[int]) -> int:
        return len(rows)

    def seen(self, rows: Sequence[int]) -> int:
        """Pictures."""
        return self._job.in_a_row * len(rows)

    def validation_loss(self, rows: Sequence[int]) -> float:
        """Of the same noise each time, so that it can be compared; times weigh alike."""
        assert self._job.validation
        total, step = 0.0, len(self._noise.alphas_cumprod) // VALIDATION_TIMES
        for number in range(VALIDATION_TIMES):
            seen = []
            for row in rows:
                random = torch.Generator().manual_seed(_number(self._job.seed, "validation", row, number))
                clean = self._clean("validation", row, random)
                noise = torch.randn(clean.shape, generator=random)
                caption = self._captions[self._job.validation.caption(row)]
                seen.append(_Seen(clean, noise, step // 2 + number * step, caption, 1.0))
            total += self._loss(seen).item()
        return total / VALIDATION_TIMES / len(self._job.validation)

    def trial(self, rows: int) -> Tensor:
        side, latents = self._job.plan.resolution, torch.zeros((self._shape[0] // 2, *self._shape[1:]))
        with torch.no_grad():
            self._base.encode(torch.zeros((1, 3, side, side)), whole=True)  # as each picture is, before the first step
        count = rows * self._job.in_a_row
        longest = sorted(self._captions, key=lambda caption: self._ids(caption).numel(), reverse=True)
        shown = longest[: count if self._job.trains_texts else 1]  # each is read, and what that keeps is kept
        return self._loss(
            [_Seen(latents, latents, 0, self._captions[shown[n % len(shown)]], 1.0) for n in range(count)]
        )

    def needs_bytes(self, rows: int) -> int:
        plan = self._job.plan
        cost = self._job.source.cost(
            self._job.selection,
            rows * self._job.in_a_row,
            self._device.precision.dtype.itemsize,
            resolution=plan.resolution,
            moments_bytes_per_param=MOMENTS_BYTES[plan.optimizer],
        )
        return cost.activations_bytes + cost.gradients_bytes + cost.optimizer_bytes

    def answers(self) -> Generator[None, None, list[str]]:
        """A picture to each prompt, always from the same noise, as a data URL of WebP."""
        found = []
        for number, prompt in enumerate(self._job.prompts):
            answer = ""  # where its numbers overflow: the run itself may be sound
            with suppress(NotFinite):
                for pixels in self._drawn(prompt.text, (self._job.seed + number) % 2**32, self._tuned, drawn=True):
                    yield
                    if pixels is not None:
                        answer = data_url(pixels)
            found.append(answer)
        return found

    def _training(self, row: int, epoch: int) -> _Seen:
        job = self._job
        random = torch.Generator().manual_seed(_number(job.seed, "row", epoch, row))
        seen = self._noisy("training", row, 1.0, self._captions[job.store.caption(row)], random)
        dropped = float(torch.rand((), generator=random)) < job.plan.caption_dropout
        return replace(seen, caption=self._captions[""]) if dropped else seen

    def _prior(self, row: int, epoch: int) -> _Seen:
        """The picture of the class that goes with a row in this epoch: each has its turn."""
        job, concept = self._job, self._job.concept
        assert concept
        assert concept.class_prompt
        random = torch.Generator().manual_seed(_number(job.seed, "prior", epoch, row))
        of_class = (epoch * len(job.store) + row) % concept.n_of_class
        return self._noisy("class", of_class, concept.prior_weight, self._captions[concept.class_prompt], random)

    def _noisy(self, kept: str, row: int, weight: float, caption: int, random: torch.Generator) -> _Seen:
        clean = self._clean(kept, row, random)
        noise = torch.randn(clean.shape, generator=random)
        time = int(torch.randint(len(self._noise.alphas_cumprod), (), generator=random))
        return _Seen(clean, noise, time, caption, weight * self._min_snr(time))

    def _min_snr(self, time: int) -> float:
        """https://arxiv.org/abs/2303.09556, section 3.4: of what the noise is, or of the velocity."""
        gamma, snr = self._job.plan.min_snr_gamma, float(self._snr[time])
        if not gamma:
            return 1.0
        return min(snr, gamma) / (snr + 1 if self._predicts_velocity else max(snr, 1e-8))

    @property
    def _predicts_velocity(self) -> bool:
        return str(self._noise.config.prediction_type) == "v_prediction"

    def _clean(self, kept: str, row: int, random: torch.Generator) -> Tensor:
        """Drawn from what the autoencoder says of the picture, and scaled as the UNet knows it."""
        mean, log_variance = self._latents[kept].get(row).chunk(2)
        deviation = (0.5 * log_variance.clamp(-30, 20)).exp()
        drawn = mean + deviation * torch.randn(mean.shape, generator=random)
        return drawn * float(self._base.vae.config.scaling_factor)

    def _loss(self, seen: Sequence[_Seen]) -> Tensor:
        """One pass for all whose texts are of one length; mostly that is all of them."""
        read = self._read(sorted({s.caption for s in seen}))
        lengths = sorted({read[s.caption].shape[1] for s in seen})
        losses = [self._pass([s for s in seen if read[s.caption].shape[1] == length], read) for length in lengths]
        return torch.stack(losses).sum()

    def _read(self, captions: Sequence[int]) -> dict[int, Tensor]:
        if self._texts:
            return {n: self._texts.get(n)[None].to(self._base.dtype) for n in captions}
        texts = list(self._captions)
        with torch.set_grad_enabled(self._job.trains_texts and torch.is_grad_enabled()):
            return {n: self._base.read(self._ids(texts[n]), self._tuned) for n in captions}

    def _pass(self, seen: Sequence[_Seen], read: dict[int, Tensor]) -> Tensor:
        unet, device = self._base.unet, self._base.device
        clean, noise = (
            torch.stack(found).to(device) for found in zip(*[(s.clean, s.noise) for s in seen], strict=True)
        )
        times = torch.tensor([s.time for s in seen], device=device)
        texts = torch.cat([read[s.caption].to(device) for s in seen])
        noisy = self._noise.add_noise(clean, noise, times).to(unet.dtype)
        told = self._tuned("unet", unet, noisy, times, encoder_hidden_states=texts, return_dict=False)[0]
        aim = self._noise.get_velocity(clean, noise, times) if self._predicts_velocity else noise
        errors = F.mse_loss(told.float(), aim, reduction="none").mean((1, 2, 3))  # (B,)
        return (errors * torch.tensor([s.weight for s in seen], device=device)).sum()


def _captions(job: PictureJob) -> list[str]:
    found = [*job.store.captions, *(job.validation.captions if job.validation else ())]
    if job.class_prompt:
        found.append(job.class_prompt)
    return list(dict.fromkeys(["", *found]))


def _number(*told: Any) -> int:
    """A seed, of which no other names the same."""
    return int.from_bytes(hashlib.blake2b(repr(told).encode(), digest_size=8).digest(), "little") % 2**63
