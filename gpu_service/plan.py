"""The hyperparameters of one run with every "auto" resolved, and the learning rate of each step.

Knows sizes: of the data, of the model, of free memory. It knows nothing of the loop that follows it.
"""

import math
from dataclasses import dataclass

import wire
from gpu_service.data import TokenStore
from gpu_service.device import Device
from gpu_service.errors import BadRequest, NotYet
from gpu_service.layers import Selection
from gpu_service.models import Source

MICRO_BATCH_TOKENS = 1024  # of one slice on the CPU: about a second, which chat has to wait
MICRO_BATCH_TOKENS_GPU = 8192
FREE_SHARE = 0.6  # of the free memory, for activations; the rest is for chat and for what estimates miss
LEARNING_RATES = {"lora": 2e-4, "full": 5e-5}
WARMUP_SHARE = 0.1  # of all steps, then linear to zero
AIMED_STEPS = 150  # of "auto" epochs
DEFAULT_MAX_LENGTH_TOKENS = 1024
UNBUILT = (
    "optimizer",
    "weight_decay",
    "max_gradient_norm",
    "schedule",
    "warmup_ratio",
    "activation_checkpointing",
    "packing",
    "early_stop_patience",
    "train_on",
    "samples_every_steps",
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Hyperparameters with every "auto" resolved. Fixed at the start: changing one would change the result."""

    n_epochs: int
    batch_rows: int
    micro_rows: int
    learning_rate: float  # the peak, multiplier included
    multiplier: float
    max_length_tokens: int
    steps_per_epoch: int
    warmup_steps: int
    prefix_cache: bool | None = None  # None: what is measured before the first step decides
    stream_layers: bool = False

    @property
    def total_steps(self) -> int:
        return self.n_epochs * self.steps_per_epoch

    def chosen(self) -> wire.Hyperparameters:
        return wire.Hyperparameters(
            n_epochs=self.n_epochs,
            batch_size=self.batch_rows,
            learning_rate_multiplier=self.multiplier,
            learning_rate=self.learning_rate / self.multiplier,
            max_length_tokens=self.max_length_tokens,
            micro_batch_rows=self.micro_rows,
            prefix_cache="auto" if self.prefix_cache is None else self.prefix_cache,
            stream_layers=self.stream_layers,
        )

    def rate(self, step: int) -> float:
        """Learning rate of a step, from 0: linear warm-up, then linear to zero at the end."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        return self.learning_rate * (self.total_steps - step) / max(1, self.total_steps - self.warmup_steps)


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


def resolve(
    wanted: wire.Hyperparameters,
    source: Source,
    selection: Selection,
    store: TokenStore,
    length: int,
    device: Device,
    *,
    fits: bool = True,
) -> Plan:
    """Sensible values for whatever is "auto", from the data set's size, the method and the free memory.

    `fits`: the whole model is in memory, or could be. Raises BadRequest for what contradicts itself.
    """
    batch, epochs = batch_rows(wanted, len(store)), n_epochs(wanted, len(store))
    steps = math.ceil(len(store) / batch)
    micro = micro_rows(wanted, source, selection, batch, store.report.longest, device)
    multiplier = 1.0 if wanted.learning_rate_multiplier == "auto" else wanted.learning_rate_multiplier
    base_rate = LEARNING_RATES["full" if selection.full else "lora"]
    rate = base_rate if wanted.learning_rate == "auto" else wanted.learning_rate
    return Plan(
        n_epochs=epochs,
        batch_rows=batch,
        micro_rows=micro,
        learning_rate=rate * multiplier,
        multiplier=multiplier,
        max_length_tokens=length,
        steps_per_epoch=steps,
        warmup_steps=max(1, round(WARMUP_SHARE * epochs * steps)),
        prefix_cache=_prefix_cache(wanted, selection),
        stream_layers=_stream_layers(wanted, selection, fits),
    )


def _stream_layers(wanted: wire.Hyperparameters, selection: Selection, fits: bool) -> bool:
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


def micro_rows(
    wanted: wire.Hyperparameters, source: Source, selection: Selection, batch: int, longest: int, device: Device
) -> int:
    """Rows of one slice, the longest having `longest` tokens: as many as time and free memory allow."""
    if wanted.micro_batch_rows != "auto":
        return min(batch, wanted.micro_batch_rows)
    by_time = (MICRO_BATCH_TOKENS if device.torch.type == "cpu" else MICRO_BATCH_TOKENS_GPU) // longest
    a_row = source.cost(selection, 1, longest, device.precision.dtype.itemsize)
    fixed = a_row.gradients_bytes + a_row.optimizer_bytes + a_row.adapter_bytes
    by_memory = int(FREE_SHARE * (device.free_bytes() - fixed)) // a_row.activations_bytes
    return max(1, min(batch, by_time, by_memory))


def refuse_unbuilt(spec: wire.JobSpec) -> None:
    """Raises NotYet for what this version accepts and does not carry out."""
    if asked := [name for name in UNBUILT if getattr(spec.hyperparameters, name) != "auto"]:
        raise NotYet(f"{asked[0]} is not built yet: leave it out, or say auto.", param="hyperparameters")
    if spec.sample_prompts:
        raise NotYet("sample_prompts are not built yet: leave them out.", param="sample_prompts")
    if spec.continue_from:
        raise NotYet("Training on top of a tuned model is not built yet: use its base.", param="model")
