"""What training a selection of tensors costs: memory by what fills it, and arithmetic. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import wire
from gpu_service.layers import Selection, TensorInfo

BLOCK = 64  # weights that share a scale where they are held in 4 bits


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


def estimate(
    selection: Selection,
    *,
    n_layers: int,
    hidden_size: int,
    intermediate_size: int,
    vocab_size: int,
    n_heads: int,
    base_bytes_per_param: int,
    base_weights_bytes: int,
    rows: int,
    tokens: int,
    checkpointing: bool = False,
    moments_bytes_per_param: int = 8,
) -> Estimate:
    """What a micro-batch of `rows` x `tokens` needs. An upper bound in its activations.

    Trained numbers, their gradients and AdamW's two moments are fp32: 4, 4 and 8 bytes each. For the backward pass a
    layer keeps per token, in the precision of the base: its input, the two norms' outputs, q, k, v, the attention's
    output and the residual between (8 H, k and v counted as if heads were not shared), gate, up, their activation and
    product (4 I), and one fp32 number per head (attention keeps no probabilities). This holds from the lowest trained
    layer upwards; those below keep nothing. The logits and their gradient are fp32: 8 V bytes per token.
    """
    n = selection.n_trainable
    per_layer = (8 * hidden_size + 4 * intermediate_size) * base_bytes_per_param + 4 * n_heads
    layers = n_layers - selection.lowest_layer
    kept = layers * per_layer
    if checkpointing:  # each layer keeps its input, and one at a time is computed again
        kept = layers * hidden_size * base_bytes_per_param + (per_layer if layers else 0)
    return Estimate(
        weights_bytes=base_weights_bytes,
        gradients_bytes=4 * n,
        optimizer_bytes=moments_bytes_per_param * n,
        activations_bytes=rows * tokens * (kept + 8 * vocab_size),
        adapter_bytes=4 * n,
    )


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


def training_flops(selection: Selection, tensors: Sequence[TensorInfo], *, tied: bool) -> float:
    """Of one token, forward and backward.

    All layers run forward. From the lowest trained one upwards gradients flow back, as much again; and a tensor that is
    trained in full takes its own gradient, as much once more. Half of all tokens carry a label and so meet the head.
    """
    head = sum(t.n_params for t in tensors if t.part == ("embed" if tied else "head"))
    forward = forward_flops(tensors, tied=tied) - 2 * head
    lowest = selection.lowest_layer
    above = 2 * sum(t.n_params for t in tensors if t.linear and t.layer is not None and t.layer >= lowest)
    return forward + above + 2 * selection.n_trainable + 0.5 * 4 * head


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
