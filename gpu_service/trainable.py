"""The tensors of one run: which are trained, which stay as an earlier fine-tune left them, and what comes of both.

A run may begin at a tuned model. What the new selection trains in the same way is trained on from where it stands; what
it trains otherwise is folded into the frozen weight beneath; what it leaves alone is carried along. The result needs
the base model and nothing else. Knows neither data nor loss.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from adapter import LoraMeta
from gpu_service.artifacts import Adapter
from gpu_service.layers import LoraTarget, Selection
from gpu_service.lora import Lora


class Weights(Protocol):
    """A model in memory, as far as a run looks at it."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def whole(self, name: str) -> Tensor: ...


SIDES = {"a": "a", "b": "b", "m": "magnitude"}  # of a Lora


@dataclass(frozen=True)
class Trainable:
    """Keys are names in the base model."""

    full: dict[str, Tensor]  # trained, fp32
    lora: dict[str, Lora]
    frozen: dict[str, Tensor] = field(default_factory=dict)  # weights that are not the base's; some lie under a lora
    carried: dict[str, Lora] = field(default_factory=dict)

    @property
    def named(self) -> dict[str, Tensor]:
        """What is trained, each tensor under a name of its own, in the order that the optimizer has them."""
        sides = ((name, side, getattr(x, attr)) for name, x in self.lora.items() for side, attr in SIDES.items())
        return {**self.full, **{f"{name}:{side}": tensor for name, side, tensor in sides if tensor is not None}}


def shapes(selection: Selection) -> dict[str, tuple[int, ...]]:
    """Of `Trainable.named`."""
    found: dict[str, tuple[int, ...]] = {t.name: tuple(t.shape) for t in selection.full}
    for target in selection.lora:
        out_features, in_features = target.tensor.matrix
        found[f"{target.tensor.name}:a"] = (target.rank, in_features)
        found[f"{target.tensor.name}:b"] = (out_features, target.rank)
        if target.dora:
            found[f"{target.tensor.name}:m"] = (out_features,)
    return found


def on_device(adapter: Adapter, device: torch.device) -> Adapter:
    """As it was stored, in fp32."""
    lora = {}
    for name, pair in adapter.lora.items():
        magnitude = None if pair.magnitude is None else pair.magnitude.to(device)
        lora[name] = Lora(pair.a.to(device), pair.b.to(device), pair.scale, magnitude)
    return Adapter(adapter.meta, {n: x.to(device) for n, x in adapter.full.items()}, lora)


def build(selection: Selection, base: Weights, seed: int, earlier: Adapter | None = None) -> Trainable:
    """fp32 copies that require gradients. LoRA starts as no change: A random, B zero (arXiv:2106.09685).

    So does DoRA, whose magnitudes are the lengths that the weight's rows have.
    """
    frozen: dict[str, Tensor] = {}
    full = {t.name: _own(before(t.name, base, earlier)) for t in selection.full}
    lora: dict[str, Lora] = {}
    random = torch.Generator().manual_seed(seed)  # on the CPU: the same start on every device
    for target in selection.lora:
        name = target.tensor.name
        fresh = _fresh(target, base.device, random)
        if earlier and _goes_on(target, earlier):
            lora[name] = _trained(earlier.lora[name])
            continue
        if earlier and name in earlier.meta.tensors:
            frozen[name] = before(name, base, earlier).to(base.dtype)
        if target.dora:
            fresh = replace(fresh, magnitude=fresh.lengths(frozen.get(name, base.whole(name))).requires_grad_())
        lora[name] = fresh
    if earlier is None:
        return Trainable(full, lora)
    ours = {*full, *lora}
    frozen |= {name: tensor.to(base.dtype) for name, tensor in earlier.full.items() if name not in ours}
    return Trainable(full, lora, frozen, {n: x for n, x in earlier.lora.items() if n not in ours})


def _fresh(target: LoraTarget, device: torch.device, random: torch.Generator) -> Lora:
    out_features, in_features = target.tensor.matrix
    a = torch.empty(target.rank, in_features).uniform_(-1, 1, generator=random) / math.sqrt(in_features)
    b = torch.zeros(out_features, target.rank)
    return Lora(a.to(device).requires_grad_(), b.to(device).requires_grad_(), target.scale)


def _goes_on(target: LoraTarget, earlier: Adapter) -> bool:
    """Whether the earlier fine-tune has just this adapter on the tensor."""
    return earlier.meta.lora.get(target.tensor.name) == target.meta


def _trained(pair: Lora) -> Lora:
    magnitude = None if pair.magnitude is None else _own(pair.magnitude)
    return Lora(_own(pair.a), _own(pair.b), pair.scale, magnitude)


def _own(tensor: Tensor) -> Tensor:
    return tensor.float().clone().requires_grad_()


@torch.no_grad()
def folded(weight: Tensor, pair: Lora) -> Tensor:
    """fp32, in its own shape: the weight with what the adapter does to it."""
    whole = torch.addmm(weight.float().flatten(1), pair.b.float(), pair.a.float(), alpha=pair.scale)
    if pair.magnitude is not None:
        whole *= (pair.magnitude.float() / pair.lengths(weight))[:, None]
    return whole.view_as(weight)


@torch.no_grad()
def before(name: str, base: Weights, earlier: Adapter | None) -> Tensor:
    """A tensor as the run finds it, fp32; not to be written to."""
    if earlier and name in earlier.full:
        return earlier.full[name].float()
    if earlier and name in earlier.lora:
        return folded(base.whole(name), earlier.lora[name])
    return base.whole(name).float()


@torch.no_grad()
def after(name: str, base: Weights, trained: Trainable) -> Tensor:
    """A trained tensor as the run leaves it, fp32."""
    if name in trained.full:
        return trained.full[name].float()
    return folded(trained.frozen.get(name, base.whole(name)), trained.lora[name])


@dataclass(frozen=True)
class Result:
    """On the CPU, fp32: what an adapter holds, relative to the base model alone."""

    full: dict[str, Tensor]
    lora: dict[str, Lora]
    meta: dict[str, LoraMeta]


@torch.no_grad()
def result(selection: Selection, trained: Trainable, base: Weights, earlier: Adapter | None) -> Result:
    """What was trained, and what was carried.

    Where a lora lies on a weight that is not the base's, both become one: of two plain pairs a pair of both ranks, and
    else the whole matrix.
    """
    metas = {t.tensor.name: t.meta for t in selection.lora}
    full = {name: _out(tensor) for name, tensor in {**trained.frozen, **trained.full}.items()}
    if earlier:  # in fp32, not as they were held
        full |= {n: _out(x) for n, x in earlier.full.items() if n in trained.frozen and n not in trained.lora}
    lora: dict[str, Lora] = {}
    meta: dict[str, LoraMeta] = {}
    for name, pair in trained.lora.items():
        if name not in trained.frozen:
            lora[name], meta[name] = pair.on_cpu(), metas[name]
            continue
        full.pop(name)
        assert earlier, "only an earlier fine-tune leaves frozen weights"
        under = earlier.lora.get(name)
        if under and under.magnitude is None and pair.magnitude is None:
            lora[name], meta[name] = _stacked(under, pair.on_cpu())
        else:
            full[name] = _out(after(name, base, trained))
    if earlier:
        lora |= {name: earlier.lora[name].on_cpu() for name in trained.carried}
        meta |= {name: earlier.meta.lora[name] for name in trained.carried}
    return Result(full, lora, meta)


def result_bytes(selection: Selection, earlier: Adapter | None) -> int:
    """Of `result` on disk, at most."""
    n = selection.n_trainable
    if earlier:
        n += earlier.n_bytes // 4
        n += sum(t.tensor.n_params for t in selection.lora if t.tensor.name in earlier.meta.tensors)
    return 4 * n


def _stacked(one: Lora, other: Lora) -> tuple[Lora, LoraMeta]:
    """`B1 A1 s1 + B2 A2 s2` as one product of both ranks, its scale 1."""
    a = torch.cat([one.a.float().cpu(), other.a])
    b = torch.cat([one.b.float().cpu() * one.scale, other.b * other.scale], dim=1)
    rank = a.shape[0]
    return Lora(a, b, 1.0), LoraMeta(rank=rank, alpha=float(rank))


def _out(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu()


@torch.no_grad()
def change(name: str, base: Weights, trained: Trainable, earlier: Adapter | None) -> tuple[float, float]:
    """How far a trained tensor has moved, and how large it was: Frobenius norms."""
    was = before(name, base, earlier)
    moved = torch.linalg.vector_norm(after(name, base, trained) - was)
    return float(moved), float(torch.linalg.vector_norm(was))


def weights(trained: Trainable) -> tuple[Mapping[str, Tensor], dict[str, Lora]]:
    """What `Rows` lays over the base model."""
    return {**trained.frozen, **trained.full}, {**trained.carried, **trained.lora}
