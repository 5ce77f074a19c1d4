"""What training a selection of tensors costs: memory and disk by what fills it, arithmetic, time. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import wire
from gpu_service.layers import Selection, TensorInfo

SMALLEST_8BIT = 4096  # numbers in a tensor whose moments take 8 bits
BLOCK = 64  # weights that share a scale where they are held in 4 bits
HEAD_CHUNK_TOKENS = 256  # labels whose logits are held at once over a frozen head
TRAINED_HEAD_CHUNK_TOKENS = 1024  # the same where the head is trained, or adapted
LABELLED = 0.5  # of all tokens, where the data is not known
DISK_BYTES_PER_S = 500e6  # of a plain SSD, until it is measured
TEXT_TOKENS = 77  # that a text encoder of Stable Diffusion reads at once
LEAST_GAIN_S = 2.0  # below it a cached prefix is not worth its bytes, and timing would decide by chance
STATE_OVERHEAD_BYTES, STATE_TENSOR_BYTES = 12_000, 600  # of a checkpoint: its description; names and shapes, by tensor


@dataclass(frozen=True)
class Estimate:
    """Memory of training at its peak, by what fills it."""

    weights_bytes: int  # the base model, frozen
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    adapter_bytes: int  # the trained numbers in fp32, beside the frozen base; also the adapter's size on disk

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Shape:
    """A model's measures, as far as activations follow from them."""

    hidden: int
    intermediate: int
    vocab: int
    n_heads: int
    gated: bool  # two matrices up and one down, as in Llama
    attention_dropout: bool  # then the attention's probabilities are kept
    tied: bool


def estimate(
    selection: Selection,
    shape: Shape,
    *,
    base_bytes_per_param: int,
    base_weights_bytes: int,
    rows: int,
    tokens: int,
    checkpointing: bool = False,
    moments_bytes_per_param: int = 8,
    keeps_best: bool = False,
) -> Estimate:
    """What a micro-batch of `rows` x `tokens` needs.

    Trained numbers and their gradients are fp32, 4 bytes each; AdamW's two moments are 8. Early stop keeps the best
    numbers so far besides, counted with the moments. Nothing is kept for the backward pass below the lowest trained
    layer.
    """
    n = selection.n_trainable
    kept = [_kept_numbers(selection, shape, layer) for layer in range(selection.lowest_layer, selection.n_layers)]
    per_token = sum(kept)
    if checkpointing:  # each layer keeps its input, and one at a time is computed again
        per_token = len(kept) * shape.hidden + max(kept, default=0)
    exact = 4 * shape.n_heads * len(kept)  # attention's normalisers, fp32
    if shape.attention_dropout:
        exact += 13 * shape.n_heads * tokens * len(kept)  # scores, probabilities and what is left of them, and a mask
    head = [t for t in selection.full if t.part == ("embed" if shape.tied else "head")]
    head_trained = bool(head) or any(target.tensor.part == "head" for target in selection.lora)
    chunk = min(rows * tokens, TRAINED_HEAD_CHUNK_TOKENS if head_trained else HEAD_CHUNK_TOKENS)
    logits = chunk * shape.vocab * (12 if head_trained else 4)
    labelled = int(LABELLED * rows * tokens) * shape.hidden * base_bytes_per_param
    adapted = [4 * target.tensor.n_params for target in selection.lora if target.dora]  # whole, one at a time
    cast = n * base_bytes_per_param if base_bytes_per_param < 4 else 0  # of fp32 copies, for the products
    kept_bytes = rows * tokens * (per_token * base_bytes_per_param + exact)
    return Estimate(
        weights_bytes=base_weights_bytes,
        gradients_bytes=4 * n,
        optimizer_bytes=_optimizer_bytes(selection, moments_bytes_per_param, keeps_best),
        activations_bytes=kept_bytes + logits + 2 * labelled + cast + max(adapted, default=0),
        adapter_bytes=4 * n,
    )


def _kept_numbers(selection: Selection, shape: Shape, layer: int) -> int:
    """Numbers by token that one layer keeps for the backward pass.

    Always: what enters it and what lies between its two blocks; q, k, v (as if heads were not shared) and the
    attention's output; and the MLP's inner states, of which a gated one has three. A matrix that is trained or adapted
    keeps its input besides; under DoRA also what it puts out, once without and once with its pair.
    """
    parts = {t.part for t in selection.full if t.layer == layer}
    parts |= {target.tensor.part for target in selection.lora if target.tensor.layer == layer}
    numbers = 6 * shape.hidden + (3 if shape.gated else 1) * shape.intermediate
    if parts & {"attn.q", "attn.k", "attn.v"}:
        numbers += shape.hidden
    if parts & {"mlp.gate", "mlp.up"}:
        numbers += shape.hidden
    if "mlp.down" in parts:
        numbers += shape.intermediate
    return numbers + sum(2 * t.tensor.shape[0] for t in selection.lora if t.dora and t.tensor.layer == layer)


def picture_estimate(
    selection: Selection,
    tensors: Sequence[TensorInfo],
    *,
    side: int,
    rows: int,
    bytes_per_param: int,
    moments_bytes_per_param: int = 8,
    keeps_best: bool = False,
) -> Estimate:
    """What a micro-batch of `rows` pictures needs, whose latents are `side` x `side`.

    The same for a Stable Diffusion: nothing is kept below the lowest trained block, for latents and texts that do not
    change are computed once, before. Each picture has a text of its own, which a trained encoder reads with it.
    """
    n = selection.n_trainable
    trained = {t.name for t in selection.full} | {target.tensor.name for target in selection.lora}
    unet, lowest = [t for t in tensors if t.component == "unet"], selection.lowest_layer
    kept = sum(_kept_of_picture(t, side, trained, selection) for t in unet if t.layer is None or t.layer >= lowest)
    kept += TEXT_TOKENS * _kept_of_text(selection, tensors, trained)
    cast = n * bytes_per_param if bytes_per_param < 4 else 0
    return Estimate(
        weights_bytes=bytes_per_param * sum(t.n_params for t in tensors),
        gradients_bytes=4 * n,
        optimizer_bytes=_optimizer_bytes(selection, moments_bytes_per_param, keeps_best),
        activations_bytes=rows * kept * bytes_per_param + cast,
        adapter_bytes=4 * n,
    )


def _kept_of_picture(tensor: TensorInfo, side: int, trained: set[str], selection: Selection) -> int:
    """Numbers that are kept for the backward pass around one weight of the UNet, for one picture.

    Of a resnet's convolution: what enters its norm, what leaves it, and what enters the convolution. Of a transformer:
    what enters each norm; queries, keys, values and what attention puts out; both halves of the gated MLP, the gate
    once more, and what enters each matrix that is trained.
    """
    block, width = tensor.block, tensor.shape[1] if len(tensor.shape) > 1 else tensor.shape[0]
    downs = sum(1 for name in selection.blocks if name.startswith("down."))
    number = int(block.partition(".")[2] or 0) if block else 0
    halved = number if block and block.startswith("down") else downs - 1 - number if block and block != "mid" else 0
    places = (side >> (downs - 1 if block == "mid" else halved)) ** 2
    if not tensor.name.endswith(".weight"):
        return 0
    of_input = width * places if tensor.name in trained else 0
    match tensor.part:
        case "conv.resnet":
            return 0 if "shortcut" in tensor.name else 3 * width * places
        case "conv.sample":
            return width * places * (4 if block and block.startswith("up") else 1)
        case "attn.proj":
            return width * places * (2 if "proj_in" in tensor.name else 1)
        case "norm.self" | "norm.mlp" | "norm.cross" | "norm.final":
            return width * places * (2 if tensor.part == "norm.final" else 1)
        case "attn.self.q":
            return 3 * width * places + width * places + of_input
        case "attn.cross.q":
            return 2 * width * places + of_input
        case "mlp.up":
            return tensor.shape[0] * places * 3 // 2 + of_input
        case "mlp.down":
            return of_input
    return 0


def _kept_of_text(selection: Selection, tensors: Sequence[TensorInfo], trained: set[str]) -> int:
    """Numbers by token that a trained text encoder keeps: what enters each norm; queries, keys, values and what
    attention puts out; the MLP's inner states and their gate; and what enters each matrix that is trained.
    """
    texts = [t for t in selection.tensors if t.component == "text_encoder"]
    if not texts:
        return 0
    lowest = 0 if any(t.is_first for t in texts) else min((t.layer for t in texts if t.layer is not None), default=inf)
    numbers = 0
    for tensor in tensors:
        if tensor.component != "text_encoder" or (tensor.layer is not None and tensor.layer < lowest):
            continue
        width = tensor.shape[-1]
        if len(tensor.shape) == 2 and not tensor.is_first and tensor.name in trained:
            numbers += width
        if tensor.name.endswith(".weight"):
            numbers += {
                "norm.attn": width,
                "norm.mlp": width,
                "norm.final": width,
                "attn.q": 4 * width,
                "mlp.up": 2 * tensor.shape[0],
            }.get(tensor.part, 0)
    return numbers


def checkpoint_bytes(selection: Selection, moments_bytes_per_param: int = 8, *, keeps_best: bool = False) -> int:
    """Of one: the trained numbers in fp32, the best of them where early stop keeps these, moments, random states."""
    tensors = len(selection.full) + 2 * len(selection.lora)
    numbers = 4 * selection.n_trainable + _optimizer_bytes(selection, moments_bytes_per_param, keeps_best)
    return numbers + tensors * STATE_TENSOR_BYTES + STATE_OVERHEAD_BYTES


def _optimizer_bytes(selection: Selection, moments_bytes_per_param: int, keeps_best: bool) -> int:
    """Moments, which small tensors keep in fp32 whatever was asked, and the best numbers so far."""
    sizes = [t.n_params for t in selection.full]
    for target in selection.lora:
        sizes += [target.rank * side for side in target.tensor.matrix] + [target.tensor.shape[0]] * target.dora
    moments = sum(n * (moments_bytes_per_param if n >= SMALLEST_8BIT else 8) for n in sizes)
    return moments + 4 * keeps_best * sum(sizes)


def prefix_bytes(selection: Selection, shape: Shape, tokens: int, bytes_per_number: int) -> int:
    """On disk, of a data set of so many tokens; 0 where nothing lies below the lowest trained layer."""
    return tokens * shape.hidden * bytes_per_number if selection.lowest_layer else 0


def weights_bytes(tensors: Sequence[TensorInfo], quantize: wire.Quantize, bytes_per_param: int) -> int:
    """Of a model in memory. What is quantised is the matrices within layers; embedding, head and norms never are."""
    return sum(_held_bytes(t, quantize if t.quantisable else "none", bytes_per_param) for t in tensors)


def _held_bytes(tensor: TensorInfo, quantize: wire.Quantize, bytes_per_param: int) -> int:
    n = tensor.n_params
    if quantize == "8bit":
        return n + 4 * tensor.shape[0]  # one scale a row
    if quantize == "4bit":
        return -(-n // 2) + 4 * -(-n // BLOCK)
    return n * bytes_per_param


def forward_flops(tensors: Sequence[TensorInfo], *, tied: bool) -> int:
    """Of one token through every layer and the head: two for each weight of a linear map."""
    return 2 * sum(t.n_params for t in tensors if t.linear or (tied and t.part == "embed"))


@dataclass(frozen=True)
class Flops:
    """Of one token in one epoch."""

    below: float  # forward through what is frozen, up to the lowest trained layer
    above: float  # forward and backward from there on, and the head


def training_flops(selection: Selection, tensors: Sequence[TensorInfo], *, tied: bool) -> Flops:
    """All layers run forward. From the lowest trained one upwards gradients flow back, as much again; what is trained
    takes its own gradient, as much once more for a matrix in full, and what it computes and takes for a LoRA. Half of
    all tokens carry a label and so meet the head.
    """
    linear = [t for t in tensors if t.linear and t.layer is not None]
    lowest = selection.lowest_layer
    below = 2 * sum(t.n_params for t in linear if t.layer is not None and t.layer < lowest)
    above = 4 * sum(t.n_params for t in linear if t.layer is not None and t.layer >= lowest)
    head = sum(t.n_params for t in tensors if t.part == ("embed" if tied else "head"))
    trained = 2 * sum(t.n_params for t in selection.full if t.linear) + 6 * sum(t.n_params for t in selection.lora)
    return Flops(below, above + trained + LABELLED * 4 * head)


@dataclass(frozen=True)
class Time:
    seconds: float
    cached: bool  # the frozen prefix is computed once and read from disk
    why: str


def training_time(
    flops: Flops, tokens: int, epochs: int, flops_per_s: float, prefix_bytes: int, asked: bool | None
) -> Time:
    """Of `epochs` through so many tokens, the disk being a plain SSD. `asked`: prefix_cache; None is "auto"."""
    forward_s, rest_s = (tokens * f / flops_per_s for f in (flops.below, flops.above))
    disk_s = prefix_bytes / DISK_BYTES_PER_S
    gain_s = (epochs - 1) * forward_s - (1 + epochs) * disk_s
    possible = prefix_bytes > 0 and asked is not False
    if possible and (asked or gain_s >= LEAST_GAIN_S):
        return Time(forward_s + epochs * rest_s + (1 + epochs) * disk_s, True, f"saves about {max(0.0, gain_s):.0f} s")
    why = "nothing lies below" if not prefix_bytes else "would save too little" if possible else "prefix_cache is false"
    return Time(epochs * (forward_s + rest_s), False, why)


def picture_training_s(picture_s: float, pictures: float, resolution: int, native: int) -> float:
    """Of so many pictures through a step; `picture_s` is a pass forward at the native size. A pass back takes two."""
    return 3 * pictures * picture_s * (resolution / native) ** 2


def held(tensors: Sequence[TensorInfo], selection: Selection, *, tied: bool) -> list[TensorInfo]:
    """What a streamed run holds: everything from the lowest trained layer upwards, the last norm and the head."""
    outer, lowest = ("embed" if tied else "head", "norm.final"), selection.lowest_layer
    return [t for t in tensors if t.part in outer or (t.layer is not None and t.layer >= lowest)]


def summary(selection: Selection, estimate: Estimate) -> str:
    """One line for a person: "160 of 272 tensors, 1.2 M trainable parameters (0.9 % of 134.5 M), about 1.1 GB"."""
    share = 100 * selection.n_trainable / selection.total_params
    return (
        f"{selection.n_tensors:,} of {selection.total_tensors:,} tensors, {_short(selection.n_trainable)} trainable "
        f"parameters ({share:.2g} % of {_short(selection.total_params)}), about {estimate.total / 1e9:.1f} GB"
    )


def _short(n: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:,.1f} {unit}"
    return str(n)
