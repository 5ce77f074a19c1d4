"""What a run on text learns: the loss of rows of tokens, with or without the frozen prefix, and answers to prompts.

The loop is train.py's. Knows the decoder and the batches; nothing of optimizers or steps.
"""

from collections.abc import Callable, Generator, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gpu_service import samples, trainable
from gpu_service.cache import Attention, Packed, Whole
from gpu_service.costs import TRAINED_HEAD_CHUNK_TOKENS
from gpu_service.data import Batch, TokenStore
from gpu_service.decoder import Decoder
from gpu_service.device import Device
from gpu_service.models import Base, Source
from gpu_service.plan import MOMENTS_BYTES
from gpu_service.prefix import Chosen, Prefix, Prefixes, Working
from gpu_service.rows import Rows
from gpu_service.train import Job, Report, State
from gpu_service.train import run as loop
from gpu_service.trainable import Trainable

MakePrefix = Callable[[], Generator[Chosen | Working, None, Prefixes]]

TextJob = Job[Source, TokenStore]


def run(
    job: TextJob,
    base: Base,
    decoder: Decoder,
    device: Device,
    *,
    prefix: Prefixes | MakePrefix = Prefixes(),  # noqa: B008
    start: State | None = None,
    wanted: Callable[[], bool] = lambda: False,
) -> Iterator[Report]:
    """All of a run. A `prefix` that is yet to be made is made after the trial of the longest rows."""

    def learner(trained: Trainable) -> TextLearner:
        return TextLearner(job, base, decoder, device, trained, prefix)

    return loop(job, base, learner, device, start=start, wanted=wanted)


class TextLearner:
    unit = 1.0
    advice = "Lower max_length_tokens, train fewer layers, or set activation_checkpointing, adamw_8bit or quantize."

    def __init__(
        self,
        job: TextJob,
        base: Base,
        decoder: Decoder,
        device: Device,
        trained: Trainable,
        prefix: Prefixes | MakePrefix,
    ) -> None:
        self._job, self._decoder, self._device = job, decoder, device
        full, lora = trainable.weights(trained)
        self._rows = Rows(base.weights, quantized=base.quantized, full=full, lora=[lora], dropout=True)
        self._lowest = job.selection.lowest_layer
        self._make = None if isinstance(prefix, Prefixes) else prefix
        self._known = prefix if isinstance(prefix, Prefixes) else Prefixes()
        self._longest = job.store.lengths.argsort(kind="stable")[::-1].tolist()

    def prepare(self) -> Generator[Chosen | Working, None, None]:
        if self._make:
            self._known = yield from self._make()

    def loss(self, rows: Sequence[int], epoch: int) -> Tensor:
        return self._loss(self._job.store, rows, self._known.training)

    def weight(self, rows: Sequence[int]) -> int:
        """Labels."""
        return self._job.store.learned(rows)

    def seen(self, rows: Sequence[int]) -> int:
        """Tokens."""
        return int(self._job.store.lengths[list(rows)].sum())

    def validation_loss(self, rows: Sequence[int]) -> float:
        assert self._job.validation
        loss = self._loss(self._job.validation, rows, self._known.validation)
        return loss.item() / self._job.validation.report.learned_tokens

    def trial(self, rows: int) -> Tensor:
        return self._loss(self._job.store, self._longest[:rows], self._known.training)

    def needs_bytes(self, rows: int) -> int:
        plan, store = self._job.plan, self._job.store
        cost = self._job.source.cost(
            self._job.selection,
            rows,
            store.report.longest,
            self._device.precision.dtype.itemsize,
            checkpointing=plan.activation_checkpointing,
            moments_bytes_per_param=MOMENTS_BYTES[plan.optimizer],
        )
        return cost.activations_bytes + cost.gradients_bytes + cost.optimizer_bytes

    def answers(self) -> Generator[None, None, list[str]]:
        geometry = self._decoder.geometry(self._device.precision.dtype, self._device.torch)
        return samples.answers(self._decoder, self._rows, self._job.prompts, self._job.source, geometry)

    def _loss(self, data: TokenStore, rows: Sequence[int], states: Prefix | None) -> Tensor:
        batch, below = data.batch(rows, pad_id=0), states.hidden(rows) if states else None
        if self._job.plan.packing:
            below = None if below is None else batch.pack(below)
            batch = batch.packed()
        again = self._job.plan.activation_checkpointing
        return summed_loss(
            self._decoder, self._rows, batch, self._lowest, self._device, below=below, checkpointing=again
        )


def summed_loss(
    decoder: Decoder,
    rows: Rows,
    batch: Batch,
    lowest: int,
    device: Device,
    *,
    below: Tensor | None = None,
    checkpointing: bool = False,
    chunk_tokens: int = TRAINED_HEAD_CHUNK_TOKENS,
) -> Tensor:
    """Cross entropy summed over the labelled tokens of a batch; a scalar in fp32.

    Below `lowest` nothing is trained, so nothing is kept for the backward pass; `below` is what comes out there, (B, T,
    D), where it is known. The logits of at most `chunk_tokens` labels are held at once. `checkpointing` keeps only what
    enters a layer and computes the rest again: the same numbers, to the bit.
    """
    ids, learn = batch.ids.to(device.torch), batch.learn.to(device.torch)  # (B, T)
    n_layers = decoder.n_layers
    dropout = decoder.attention_dropout if rows.dropout else 0.0
    attention: Attention = Whole(ids.shape[1], ids.device, dropout)
    if batch.is_packed:
        attention = Packed(batch.lengths.tolist(), ids.device, dropout)
    again: Callable[..., Tensor] = checkpoint
    if below is None:
        with torch.set_grad_enabled(lowest == 0 and torch.is_grad_enabled()):
            below = decoder.embed(ids, rows, attention)
        with torch.no_grad():
            below = decoder.layers(below, 0, lowest, rows, attention) if lowest else below
    h = below
    if checkpointing and torch.is_grad_enabled():
        for layer in range(lowest, n_layers):
            h = again(decoder.layers, h, layer, layer + 1, rows, attention, use_reentrant=False)
    else:
        h = decoder.layers(h, lowest, n_layers, rows, attention)
    # The hidden state at t predicts the token at t + 1; only positions with a label reach the head.
    labelled = learn[:, 1:]
    h, labels = decoder.final_norm(h, rows)[:, :-1][labelled], ids[:, 1:][labelled]  # (N, D), (N,)

    def loss(h: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(decoder.unembed(h, rows).float(), labels, reduction="sum")

    if (frozen := rows.frozen_loss(h, decoder.head, labels)) is not None:
        return frozen
    if len(labels) <= chunk_tokens:
        return loss(h, labels)
    # Logits are computed again in the backward pass, never all held.
    cuts = [slice(at, at + chunk_tokens) for at in range(0, len(labels), chunk_tokens)]
    parts = [again(loss, h[cut], labels[cut], use_reentrant=False) for cut in cuts]
    return torch.stack(parts).sum()
