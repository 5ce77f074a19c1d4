"""The one training loop. `run` reads top to bottom and yields after every micro-batch: that is one slice.

It knows the decoder, the batches and the optimizer; nothing of leases, threads or HTTP. The caller keeps its random
state apart from everybody else's between slices. Trained tensors are fp32 copies of their own, so the base model goes
on serving beside it, unchanged.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gpu_service.cache import Whole
from gpu_service.data import Batch, TokenStore, epoch_order
from gpu_service.decoder import Decoder
from gpu_service.device import Device
from gpu_service.errors import BadRequest
from gpu_service.layers import Selection
from gpu_service.lora import Lora
from gpu_service.models import Base, Source
from gpu_service.plan import Plan
from gpu_service.prefix import Prefixes
from gpu_service.rows import Rows

LOSS_CHUNK_TOKENS = 1024  # labelled tokens whose logits are held at once: (1024, 49152) fp32 is 200 MB
MAX_GRADIENT_NORM = 1.0


class Diverged(BadRequest):
    code = "training_diverged"


@dataclass(frozen=True)
class Job:
    """All that one run needs; prepared off the device thread."""

    source: Source
    selection: Selection
    plan: Plan
    store: TokenStore
    validation: TokenStore | None
    seed: int


@dataclass(frozen=True)
class Progress:
    """After one micro-batch. `train_loss` only after an optimizer step; `valid_loss` at the end of an epoch."""

    step: int  # optimizer steps done
    tokens: int  # seen so far, padding not counted
    train_loss: float | None = None
    gradient_norm: float | None = None
    learning_rate: float | None = None
    valid_loss: float | None = None


@dataclass(frozen=True)
class State:
    """A run between two optimizer steps, copied to the CPU: all that `run` needs to go on from there, plan apart."""

    step: int  # optimizer steps done; with the seed it says which rows come next
    tokens: int
    validations: int  # run so far: one is due after each epoch, and may still be when `step` is at its end
    train_loss: float | None
    valid_loss: float | None
    scaler: dict[str, float]  # of the gradients; empty without one
    tensors: dict[str, Tensor]  # weights, moments and optimizer steps of what is trained, and the random states
    copy_s: float = 0.0  # that the run stood still for it


@dataclass(frozen=True)
class Trained:
    """On the CPU, in fp32."""

    full: dict[str, Tensor]
    lora: dict[str, Lora]
    tokens: int


def run(
    job: Job,
    base: Base,
    decoder: Decoder,
    device: Device,
    *,
    prefix: Prefixes = Prefixes(),  # noqa: B008
    start: State | None = None,
    wanted: Callable[[], bool] = lambda: False,
) -> Iterator[Progress | State | Trained]:
    """Train, one micro-batch per `next`; the last thing yielded is what came of it.

    From `start` it goes on as if it had never stopped: on the same kind of device and in the same precision bit for
    bit. Between two optimizer steps, and between the slices of a validation, `wanted` is asked; where it says yes the
    state follows. Raises Diverged when the loss is no longer a number.
    """
    torch.manual_seed(job.seed)
    plan, store, lowest = job.plan, job.store, job.selection.lowest_layer
    full, lora = trainable(job.selection, base, job.seed)
    named = _named(full, lora)
    parameters = list(named.values())
    rows = Rows(base.weights, quantized=base.quantized, full=full, lora=[lora], dropout=True)
    optimizer = torch.optim.AdamW(parameters, lr=plan.learning_rate, weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(device.torch.type, enabled=device.precision.scaler)
    step = tokens = validations = 0
    order: list[int] = []
    train_loss: float | None = None
    valid_loss: float | None = None
    if start:
        _restore(start, named, optimizer, scaler)
        step, tokens, validations = start.step, start.tokens, start.validations
        train_loss, valid_loss = start.train_loss, start.valid_loss

    def state() -> State:
        began = time.perf_counter()
        tensors = _captured(named, optimizer)
        copy_s = time.perf_counter() - began
        return State(step, tokens, validations, train_loss, valid_loss, scaler.state_dict(), tensors, copy_s)

    while True:
        epoch, index_in_epoch = divmod(step, plan.steps_per_epoch)
        if job.validation and validations < epoch:
            total_loss = 0.0
            for micro in _cut(list(range(len(job.validation))), plan.micro_rows):
                below = prefix.validation.hidden(micro) if prefix.validation else None
                with torch.no_grad():
                    batch = job.validation.batch(micro, pad_id=0)
                    loss = summed_loss(decoder, rows, batch, lowest, device, below=below)
                total_loss += loss.item() / job.validation.report.learned_tokens
                yield Progress(step, tokens)
                if wanted():
                    yield state()  # as before the validation, which is then run as a whole
            if not math.isfinite(total_loss):
                raise _diverged(total_loss, step, plan)
            valid_loss, validations = total_loss, epoch
            yield Progress(step, tokens, valid_loss=valid_loss)
            if wanted():
                yield state()
        if step == plan.total_steps:
            break
        if index_in_epoch == 0 or not order:
            order = epoch_order(len(store), job.seed, epoch)
        batch_rows = order[index_in_epoch * plan.batch_rows :][: plan.batch_rows]
        micros = _cut(batch_rows, plan.micro_rows)
        batches = [store.batch(micro, pad_id=0) for micro in micros]
        # The mean is over the labelled tokens of the whole batch, however it is cut into micro-batches.
        learned = sum(int(batch.learn.sum()) for batch in batches)
        total_loss = 0.0
        for index, batch in enumerate(batches):
            below = prefix.training.hidden(micros[index]) if prefix.training else None
            loss = summed_loss(decoder, rows, batch, lowest, device, below=below) / learned
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total_loss += loss.item()
            tokens += int(batch.lengths.sum())
            if index + 1 < len(batches):
                yield Progress(step, tokens)
        if not math.isfinite(total_loss):
            raise _diverged(total_loss, step + 1, plan)
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        scaler.unscale_(optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step, train_loss = step + 1, total_loss
        yield Progress(step, tokens, total_loss, norm, plan.rate(step - 1))
        if wanted():
            yield state()

    if not all(bool(parameter.isfinite().all()) for parameter in parameters):
        raise _diverged(float("nan"), step, plan)
    yield Trained(
        {name: tensor.detach().cpu() for name, tensor in full.items()},
        {name: pair.on_cpu() for name, pair in lora.items()},
        tokens,
    )


WEIGHT, FIRST, SECOND, COUNT = "weight", "first_moment", "second_moment", "steps"
_ADAM = {FIRST: "exp_avg", SECOND: "exp_avg_sq", COUNT: "step"}
CPU_RANDOM, CUDA_RANDOM = "random.cpu", "random.cuda"
_SIDES = {"a": "a", "b": "b", "m": "magnitude"}  # of a Lora


def _named(full: dict[str, Tensor], lora: dict[str, Lora]) -> dict[str, Tensor]:
    """What is trained, each tensor under a name of its own, in the order that the optimizer has them."""
    sides = ((name, side, getattr(x, field)) for name, x in lora.items() for side, field in _SIDES.items())
    return {**full, **{f"{name}:{side}": tensor for name, side, tensor in sides if tensor is not None}}


def state_shapes(selection: Selection) -> dict[str, tuple[int, ...]]:
    """Key -> shape, of the numbers in a State of this selection; the random states are left out."""
    shapes: dict[str, tuple[int, ...]] = {t.name: tuple(t.shape) for t in selection.full}
    for target in selection.lora:
        out_features, in_features = target.tensor.shape
        shapes[f"{target.tensor.name}:a"] = (target.rank, in_features)
        shapes[f"{target.tensor.name}:b"] = (out_features, target.rank)
        if target.dora:
            shapes[f"{target.tensor.name}:m"] = (out_features,)
    kinds = (WEIGHT, FIRST, SECOND)
    return {f"{kind}.{name}": shape for name, shape in shapes.items() for kind in kinds} | {
        f"{COUNT}.{name}": () for name in shapes
    }


def _captured(named: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies on the CPU. A parameter that no step has moved yet has moments of zero, as AdamW would begin with."""
    tensors = {CPU_RANDOM: torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors[CUDA_RANDOM] = torch.cuda.get_rng_state()
    for name, parameter in named.items():
        tensors[f"{WEIGHT}.{name}"] = _copy(parameter)
        moments = optimizer.state.get(parameter) or {}
        for kind, key in _ADAM.items():
            empty = torch.zeros(()) if kind == COUNT else torch.zeros(parameter.shape)
            tensors[f"{kind}.{name}"] = _copy(moments[key]) if key in moments else empty
    return tensors


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


@torch.no_grad()
def _restore(
    start: State, named: dict[str, Tensor], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    """Into the memory that a new run has anyway: the layout of a tensor may decide how it is rounded."""
    for name, parameter in named.items():
        parameter.copy_(start.tensors[f"{WEIGHT}.{name}"])
        first, second = (torch.zeros_like(parameter, memory_format=torch.preserve_format) for _ in range(2))
        optimizer.state[parameter] = {
            "step": start.tensors[f"{COUNT}.{name}"].clone().to(parameter.device),
            "exp_avg": first.copy_(start.tensors[f"{FIRST}.{name}"]),
            "exp_avg_sq": second.copy_(start.tensors[f"{SECOND}.{name}"]),
        }
    if start.scaler:
        scaler.load_state_dict(start.scaler)
    torch.set_rng_state(start.tensors[CPU_RANDOM])
    if torch.cuda.is_available() and CUDA_RANDOM in start.tensors:
        torch.cuda.set_rng_state(start.tensors[CUDA_RANDOM])


def _diverged(loss: float, step: int, plan: Plan) -> Diverged:
    return Diverged(
        f"The loss is {loss} at step {step}: lower the learning rate (it is {plan.learning_rate:g}) or check the data.",
        param="hyperparameters",
    )


def trainable(selection: Selection, base: Base, seed: int) -> tuple[dict[str, Tensor], dict[str, Lora]]:
    """fp32 copies that require gradients. LoRA starts as no change: A random, B zero (arXiv:2106.09685).

    So does DoRA, whose magnitudes are the lengths that the weight's rows have.
    """
    full = {t.name: base.weights[t.name].float().clone().requires_grad_() for t in selection.full}
    lora = {}
    random = torch.Generator().manual_seed(seed)  # on the CPU: the same start on every device
    for target in selection.lora:
        out_features, in_features = target.tensor.shape
        device = base.device
        a = torch.empty(target.rank, in_features).uniform_(-1, 1, generator=random) / math.sqrt(in_features)
        b = torch.zeros(out_features, target.rank)
        pair = Lora(a.to(device).requires_grad_(), b.to(device).requires_grad_(), target.scale)
        if target.dora:
            lengths = pair.lengths(base.whole(target.tensor.name))
            pair = replace(pair, magnitude=lengths.requires_grad_())
        lora[target.tensor.name] = pair
    return full, lora


def summed_loss(
    decoder: Decoder,
    rows: Rows,
    batch: Batch,
    lowest: int,
    device: Device,
    *,
    below: Tensor | None = None,
    chunk_tokens: int = LOSS_CHUNK_TOKENS,
) -> Tensor:
    """Cross entropy summed over the labelled tokens of a batch; a scalar in fp32.

    Below `lowest` nothing is trained, so nothing is kept for the backward pass; `below` is what comes out there, (B, T,
    D), where it is known. The logits of at most `chunk_tokens` labels are held at once.
    """
    ids, learn = batch.ids.to(device.torch), batch.learn.to(device.torch)  # (B, T)
    n_layers = decoder.n_layers
    attention = Whole(ids.shape[1], ids.device, decoder.attention_dropout if rows.dropout else 0.0)
    if below is None:
        with torch.set_grad_enabled(lowest == 0 and torch.is_grad_enabled()):
            below = decoder.embed(ids, rows, attention)
        with torch.no_grad():
            below = decoder.layers(below, 0, lowest, rows, attention) if lowest else below
    h = decoder.layers(below, lowest, n_layers, rows, attention)
    # The hidden state at t predicts the token at t + 1; only positions with a label reach the head.
    labelled = learn[:, 1:]
    h, labels = decoder.final_norm(h, rows)[:, :-1][labelled], ids[:, 1:][labelled]  # (N, D), (N,)

    def loss(h: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(decoder.unembed(h, rows).float(), labels, reduction="sum")

    if len(labels) <= chunk_tokens:
        return loss(h, labels)
    chunked: Callable[..., Tensor] = checkpoint  # logits are computed again in the backward pass, never all held
    cuts = [slice(at, at + chunk_tokens) for at in range(0, len(labels), chunk_tokens)]
    parts = [chunked(loss, h[cut], labels[cut], use_reentrant=False) for cut in cuts]
    return torch.stack(parts).sum()


def _cut(rows: list[int], size: int) -> list[list[int]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]
