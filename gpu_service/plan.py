"""The hyperparameters of one run with every "auto" resolved, and the learning rate of each step.

Knows sizes: of the data, of the model, of free memory. It knows nothing of the loop that follows it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import wire
from gpu_service.costs import Estimate, picture_training_s
from gpu_service.data import TokenStore, epoch_order
from gpu_service.device import Device
from gpu_service.errors import BadRequest
from gpu_service.layers import Selection
from gpu_service.models import Source
from gpu_service.sd import PictureSource

MICRO_BATCH_TOKENS = 1024  # of one slice on the CPU: about a second, which chat has to wait
MICRO_BATCH_TOKENS_GPU = 8192
FREE_SHARE = 0.6  # of the free memory, for activations; the rest is for chat and for what estimates miss
LEARNING_RATES = {"lora": 2e-4, "full": 5e-5}
WEIGHT_DECAYS = {"lora": 0.0, "full": 0.01}
WARMUP_RATIO = 0.1
MAX_GRADIENT_NORM = 1.0
AIMED_STEPS = 150  # of "auto" epochs
DEFAULT_MAX_LENGTH_TOKENS = 1024
# Of models that make pictures. The rates are of a UNet 1280 wide, as Stable Diffusion's is; a narrower one takes larger
# steps, one over its width (arXiv:2203.03466).
PICTURE_RATES = {"lora": 1e-4, "full": 1e-5}
PICTURE_WIDTH = 1280
PICTURE_BATCH = 4
AIMED_PICTURE_STEPS = 400
MICRO_BATCH_LATENTS, MICRO_BATCH_LATENTS_GPU = 1024, 16_384  # of one slice: four pictures of 128 x 128; of 512 x 512
SAMPLE_STEPS = 20  # of sample pictures, and of those of a class
MOST_ROUNDS = 20  # of sample pictures: each is kept with the job's events
MIN_SNR_GAMMA = 5.0  # https://arxiv.org/abs/2303.09556
WORTH_PACKING = 0.1  # of all positions that would be padding
PADDING_ROWS = 10_000  # looked at for that
MOMENTS_BYTES = {"adamw": 8, "adamw_8bit": 2}  # of a trained number


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Fixed at the start: changing anything would change the result. Only the probe may lower `micro_rows`."""

    n_epochs: int
    batch_rows: int
    micro_rows: int
    learning_rate: float  # the peak, multiplier included
    multiplier: float
    max_length_tokens: int
    steps_per_epoch: int
    warmup_steps: int
    warmup_ratio: float = WARMUP_RATIO
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    weight_decay: float = 0.0
    max_gradient_norm: float = MAX_GRADIENT_NORM  # 0: not clipped
    activation_checkpointing: bool = False
    packing: bool = False
    early_stop_patience: int = 0
    train_on: Literal["completions", "all"] = "completions"
    samples_every_steps: int = 0  # 0: before and after only
    rate_factor: float = 1.0  # of a run that diverged and goes on
    prefix_cache: bool | None = None  # None: what is measured before the first step decides
    stream_layers: bool = False
    resolution: int = 0  # pixels of a side; 0: the model writes text
    min_snr_gamma: float = 0.0  # 0: every time of the noise weighs the same
    caption_dropout: float = 0.0  # share of rows that are seen without their caption
    prefix_rows: int = 0  # of one pass through the frozen layers: as micro_rows before the probe; 0: as they are

    @property
    def total_steps(self) -> int:
        return self.n_epochs * self.steps_per_epoch

    def chosen(self) -> wire.Hyperparameters:
        """As the owner reads it; what this kind of model has not stays "auto"."""
        found = wire.Hyperparameters(
            n_epochs=self.n_epochs,
            batch_size=self.batch_rows,
            learning_rate_multiplier=self.multiplier,
            learning_rate=self.learning_rate / self.multiplier,
            max_length_tokens=self.max_length_tokens,
            micro_batch_rows=self.micro_rows,
            schedule=self.schedule,
            warmup_ratio=self.warmup_ratio,
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
            max_gradient_norm=self.max_gradient_norm,
            activation_checkpointing=self.activation_checkpointing,
            packing=self.packing,
            early_stop_patience=self.early_stop_patience,
            train_on=self.train_on,
            samples_every_steps=self.samples_every_steps or self.total_steps,
            prefix_cache="auto" if self.prefix_cache is None else self.prefix_cache,
            stream_layers=self.stream_layers,
            resolution=self.resolution or "auto",
            min_snr_gamma=self.min_snr_gamma,
            caption_dropout=self.caption_dropout,
        )
        foreign = wire.OF_TEXT if self.resolution else wire.OF_PICTURES
        return found.model_copy(update=dict.fromkeys(foreign, "auto"))

    def rate(self, step: int) -> float:
        """Learning rate of a step, from 0: linear warm-up, then by the schedule, which falls to zero or stays."""
        peak = self.learning_rate * self.rate_factor
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        left = (self.total_steps - step) / max(1, self.total_steps - self.warmup_steps)
        if self.schedule == "cosine":
            return peak * 0.5 * (1 - math.cos(math.pi * left))
        return peak * (left if self.schedule == "linear" else 1.0)


def max_length(wanted: int | wire.Auto, source: Source) -> int:
    """Tokens at which rows are cut. Raises BadRequest for more than the model can read."""
    if wanted == "auto":
        return min(DEFAULT_MAX_LENGTH_TOKENS, source.context_tokens)
    if wanted > source.context_tokens:
        raise BadRequest(
            f"max_length_tokens is {wanted:,}, and {source.id} reads at most {source.context_tokens:,} tokens.",
            param="hyperparameters",
        )
    return wanted


def train_on(wanted: wire.Hyperparameters) -> Literal["completions", "all"]:
    return "completions" if wanted.train_on == "auto" else wanted.train_on


def resolve(
    wanted: wire.Hyperparameters,
    source: Source,
    selection: Selection,
    store: TokenStore,
    length: int,
    device: Device,
    *,
    seed: int = 0,
    samples: bool = False,
    validates: bool = True,
    fits: bool = True,
) -> Plan:
    """Sensible values for whatever is "auto", from the data set's size, the method and the free memory.

    `validates`: there is a validation file. `fits`: the whole model is in memory, or could be. Raises BadRequest for
    what contradicts itself.
    """
    _refuse(wanted, wire.OF_PICTURES, "models that make pictures")
    patience = _patience(wanted, validates)
    batch, epochs = batch_rows(wanted, len(store)), n_epochs(wanted, len(store))
    steps = math.ceil(len(store) / batch)
    memory = Memory(source, selection, device, store.report.longest, wanted)
    micro = micro_rows(wanted, source, selection, batch, store.report.longest, device)
    every = wanted.samples_every_steps
    return Plan(
        n_epochs=epochs,
        batch_rows=batch,
        micro_rows=micro,
        max_length_tokens=length,
        steps_per_epoch=steps,
        optimizer=memory.optimizer,
        **_steps(wanted, selection, epochs * steps, LEARNING_RATES),
        activation_checkpointing=memory.checkpointing(micro),
        packing=_padding(store, seed, batch, micro) > WORTH_PACKING if wanted.packing == "auto" else wanted.packing,
        early_stop_patience=patience,
        train_on=train_on(wanted),
        samples_every_steps=(steps if samples else 0) if every == "auto" else every,
        prefix_cache=_prefix_cache(wanted, selection),
        stream_layers=streams(wanted, selection, fits),
        prefix_rows=micro,
    )


def resolve_pictures(
    wanted: wire.Hyperparameters,
    source: PictureSource,
    selection: Selection,
    rows: int,
    device: Device,
    *,
    concept: wire.Concept | None = None,
    samples: bool = False,
    validates: bool = True,
) -> Plan:
    """The same for a model that makes pictures. Raises BadRequest."""
    _refuse(wanted, wire.OF_TEXT, "models of text")
    _refuse_ways_of_text(selection)
    patience, side = _patience(wanted, validates), resolution(wanted.resolution, source)
    batch = min(rows, PICTURE_BATCH) if wanted.batch_size == "auto" else min(rows, wanted.batch_size)
    steps = math.ceil(rows / batch)
    epochs = min(100, max(1, round(AIMED_PICTURE_STEPS / steps))) if wanted.n_epochs == "auto" else wanted.n_epochs
    usable, in_a_row = int(FREE_SHARE * device.free_bytes()), pictures_in_a_row(concept)
    cost = partial(source.cost, selection, bytes_per_param=device.precision.dtype.itemsize, resolution=side)
    optimizer: Literal["adamw", "adamw_8bit"] = (
        ("adamw" if _fixed(cost(rows=in_a_row)) <= usable else "adamw_8bit")
        if wanted.optimizer == "auto"
        else wanted.optimizer
    )
    a_row = cost(rows=in_a_row, moments_bytes_per_param=MOMENTS_BYTES[optimizer])
    slice_latents = MICRO_BATCH_LATENTS if device.torch.type == "cpu" else MICRO_BATCH_LATENTS_GPU
    by_time = slice_latents // ((side // source.factor) ** 2 * in_a_row)
    by_memory = int(usable - _fixed(a_row)) // max(1, a_row.activations_bytes)
    asked_rows = wanted.micro_batch_rows
    micro = max(1, min(batch, by_time, by_memory)) if asked_rows == "auto" else min(batch, asked_rows)
    every = max(1, epochs * steps // 4) if samples else 0
    if wanted.samples_every_steps != "auto":
        every = max(wanted.samples_every_steps, -(-epochs * steps // MOST_ROUNDS))
    width = max(t.shape[0] for t in source.tensors if t.component == "unet" and t.part == "conv.resnet")
    rates = {kind: rate * PICTURE_WIDTH / width for kind, rate in PICTURE_RATES.items()}
    return Plan(
        n_epochs=epochs,
        batch_rows=batch,
        micro_rows=micro,
        max_length_tokens=source.context_tokens,
        steps_per_epoch=steps,
        optimizer=optimizer,
        **_steps(wanted, selection, epochs * steps, rates),
        early_stop_patience=patience,
        samples_every_steps=every,
        resolution=side,
        min_snr_gamma=MIN_SNR_GAMMA if wanted.min_snr_gamma == "auto" else wanted.min_snr_gamma,
        caption_dropout=0.0 if wanted.caption_dropout == "auto" else wanted.caption_dropout,
    )


def pictures_in_a_row(concept: wire.Concept | None) -> int:
    """That one row takes through the UNet: beside its own one of the class, if there is one."""
    return 2 if concept and concept.n_of_class else 1


def pictures_s(plan: Plan, source: PictureSource, rows: int, picture_s: float, concept: wire.Concept | None) -> float:
    """Seconds of a run; `picture_s` is a pass of the UNet for one picture of the native size."""
    seen, of_class = plan.n_epochs * rows * pictures_in_a_row(concept), concept.n_of_class if concept else 0
    made = 2 * of_class * SAMPLE_STEPS * picture_s * (plan.resolution / source.native) ** 2
    return picture_training_s(picture_s, seen, plan.resolution, source.native) + made


def resolution(wanted: int | wire.Auto, source: PictureSource) -> int:
    """Raises BadRequest for a side that the model's halvings don't divide, or far from what it was trained on."""
    if wanted == "auto":
        return source.native
    step, most = source.factor * 2 ** (source.n_halvings), 2 * source.native
    if wanted % step or not step <= wanted <= most:
        raise BadRequest(
            f"resolution is {wanted}: use a multiple of {step} up to {most}; {source.id} was trained on "
            f"{source.native}.",
            param="hyperparameters",
        )
    return wanted


def _refuse(wanted: wire.Hyperparameters, names: frozenset[str], whose: str) -> None:
    if given := sorted(name for name in names if getattr(wanted, name) != "auto"):
        raise BadRequest(f"Only {whose} have {', '.join(given)}: leave it out.", param="hyperparameters")


def _refuse_ways_of_text(selection: Selection) -> None:
    if selection.quantize != "none":
        raise BadRequest("A model that makes pictures is not quantised: leave quantize out.", param="layers")
    if any(target.dora for target in selection.lora):
        raise BadRequest("dora is for text: use lora or full for a model that makes pictures.", param="layers")


def _patience(wanted: wire.Hyperparameters, validates: bool) -> int:
    patience = 0 if wanted.early_stop_patience == "auto" else wanted.early_stop_patience
    if patience and not validates:
        raise BadRequest(
            "early_stop_patience counts validations: give a validation_file too, or leave it out.",
            param="hyperparameters",
        )
    return patience


def _steps(
    wanted: wire.Hyperparameters, selection: Selection, total: int, rates: Mapping[str, float]
) -> dict[str, Any]:
    """The fields that say how far each of `total` steps goes."""
    kind = "full" if selection.full else "lora"
    multiplier = 1.0 if wanted.learning_rate_multiplier == "auto" else wanted.learning_rate_multiplier
    rate = rates[kind] if wanted.learning_rate == "auto" else wanted.learning_rate
    warmup = WARMUP_RATIO if wanted.warmup_ratio == "auto" else wanted.warmup_ratio
    return {
        "learning_rate": rate * multiplier,
        "multiplier": multiplier,
        "warmup_ratio": warmup,
        "warmup_steps": max(1, round(warmup * total)) if warmup else 0,
        "schedule": "linear" if wanted.schedule == "auto" else wanted.schedule,
        "weight_decay": WEIGHT_DECAYS[kind] if wanted.weight_decay == "auto" else wanted.weight_decay,
        "max_gradient_norm": MAX_GRADIENT_NORM if wanted.max_gradient_norm == "auto" else wanted.max_gradient_norm,
    }


def streams(wanted: wire.Hyperparameters, selection: Selection, fits: bool) -> bool:
    """Whether the frozen layers stay out of memory. `fits`: the whole model is in it, or could be."""
    if wanted.stream_layers == "auto":
        return not fits and selection.lowest_layer > 0 and wanted.prefix_cache is not False
    if wanted.stream_layers and selection.lowest_layer == 0:
        raise BadRequest(
            "stream_layers leaves the frozen layers out of memory, and here layer 0 or the embedding is trained: train "
            "only higher layers, or leave stream_layers out.",
            param="hyperparameters",
        )
    if wanted.stream_layers and wanted.prefix_cache is False:
        raise BadRequest(
            "stream_layers needs the prefix cache, and prefix_cache is false: leave it out.", param="hyperparameters"
        )
    return wanted.stream_layers


def _prefix_cache(wanted: wire.Hyperparameters, selection: Selection) -> bool | None:
    if wanted.prefix_cache is True and selection.lowest_layer == 0:
        raise BadRequest(
            "prefix_cache keeps what the layers below the trained ones put out, and here layer 0 or the embedding is "
            "trained: train only higher layers, or leave prefix_cache out.",
            param="hyperparameters",
        )
    return None if wanted.prefix_cache == "auto" else wanted.prefix_cache


def batch_rows(wanted: wire.Hyperparameters, rows: int) -> int:
    """Rows of one optimizer step, of a data set of so many."""
    return min(rows, (8 if rows >= 64 else max(1, rows // 8)) if wanted.batch_size == "auto" else wanted.batch_size)


def n_epochs(wanted: wire.Hyperparameters, rows: int) -> int:
    steps = math.ceil(rows / batch_rows(wanted, rows))
    return min(10, max(1, round(AIMED_STEPS / steps))) if wanted.n_epochs == "auto" else wanted.n_epochs


class Memory:
    """What a selection's training needs of the free memory, and what that decides."""

    def __init__(
        self, source: Source, selection: Selection, device: Device, longest: int, wanted: wire.Hyperparameters
    ) -> None:
        self._wanted, self._longest = wanted, longest
        self._usable = int(FREE_SHARE * device.free_bytes())
        self._cost = partial(source.cost, selection, tokens=longest, bytes_per_param=device.precision.dtype.itemsize)

    @property
    def optimizer(self) -> Literal["adamw", "adamw_8bit"]:
        """8 bits where the plain one's numbers alone would not fit."""
        if self._wanted.optimizer != "auto":
            return self._wanted.optimizer
        return "adamw" if _fixed(self._cost(rows=1)) <= self._usable else "adamw_8bit"

    def checkpointing(self, rows: int) -> bool:
        """Where the activations of a micro-batch would not fit without."""
        if self._wanted.activation_checkpointing != "auto":
            return self._wanted.activation_checkpointing
        cost = self._cost(rows=rows, moments_bytes_per_param=MOMENTS_BYTES[self.optimizer])
        return cost.activations_bytes > self._usable - _fixed(cost)

    def rows(self) -> int:
        """Of a micro-batch, as many as fit."""
        checkpointing = self._wanted.activation_checkpointing is True
        moments = MOMENTS_BYTES[self.optimizer]
        a_row = self._cost(rows=1, checkpointing=checkpointing, moments_bytes_per_param=moments)
        return int(self._usable - _fixed(a_row)) // a_row.activations_bytes


def _fixed(cost: Estimate) -> int:
    return cost.gradients_bytes + cost.optimizer_bytes + cost.adapter_bytes


def micro_rows(
    wanted: wire.Hyperparameters, source: Source, selection: Selection, batch: int, longest: int, device: Device
) -> int:
    """Rows of one slice, the longest having `longest` tokens: as many as time and free memory allow."""
    if wanted.micro_batch_rows != "auto":
        return min(batch, wanted.micro_batch_rows)
    by_time = (MICRO_BATCH_TOKENS if device.torch.type == "cpu" else MICRO_BATCH_TOKENS_GPU) // longest
    return max(1, min(batch, by_time, Memory(source, selection, device, longest, wanted).rows()))


def _padding(store: TokenStore, seed: int, batch: int, micro: int) -> float:
    """Share of all positions of the first epoch that hold padding where each micro-batch is as wide as its longest."""
    lengths = store.lengths[epoch_order(len(store), seed, 0)[:PADDING_ROWS]]
    whole = [lengths[i : i + batch] for i in range(0, len(lengths), batch)]
    micros = [rows[i : i + micro] for rows in whole for i in range(0, len(rows), micro)]
    positions = sum(len(rows) * int(rows.max()) for rows in micros)
    return 1 - int(lengths.sum()) / positions
