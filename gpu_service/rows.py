"""What differs by row in one forward pass: dials and adapters, and the linear map that applies them.

A `Rows` is made for a batch and handed to the decoder, which asks it for every weight, epsilon and gain. So serving,
training and dials need no hook and no patched module. Without dials or adapter every answer is the plain one, and the
arithmetic is that of the plain model, bit for bit.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_service import fused
from gpu_service.costs import HEAD_CHUNK_TOKENS
from gpu_service.kernels import TORCH, Arithmetic, ByRow
from gpu_service.lora import Lora
from gpu_service.quantize import Quantized


@dataclass(frozen=True)
class Dials:
    """Multipliers by layer for one row; 1.0 is the model as it is, and a row that turns none has no `Dials`."""

    eps: tuple[float, ...]  # on the norms' epsilon
    attn: tuple[float, ...]  # on what the attention block adds to the residual stream
    mlp: tuple[float, ...]  # on what the MLP block adds
    eps_final: float  # of the norm behind the last layer

    @classmethod
    def plain(cls, n_layers: int) -> "Dials":
        ones = (1.0,) * n_layers
        return cls(ones, ones, ones, 1.0)

    @property
    def neutral(self) -> bool:
        return self.eps_final == 1.0 and all(x == 1.0 for x in (*self.eps, *self.attn, *self.mlp))


@dataclass(frozen=True)
class Joined:
    """Matrices that meet the same input, side by side: a product costs more to begin than a small matrix to read."""

    weight: Tensor  # (sum of outs, in)
    bias: Tensor | None
    biases: tuple[Tensor | None, ...]
    sizes: list[int]  # their outs


def join(weights: dict[str, Tensor], groups: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], Joined]:
    """`weights` hold views of what is joined from now on, so it takes no memory. Where all of a group are there."""
    made: dict[tuple[str, ...], Joined] = {}
    for names in groups:
        parts = [weights.get(f"{name}.weight") for name in names]
        biases = [weights.get(f"{name}.bias") for name in names]
        if any(p is None for p in parts) or len({b is None for b in biases}) > 1:
            continue
        sizes = [len(p) for p in parts if p is not None]
        both: list[Tensor | None] = []
        for suffix, own in (("weight", parts), ("bias", biases)):
            held = [t for t in own if t is not None]
            both.append(torch.cat(held) if held else None)
            if (whole := both[-1]) is not None:
                weights |= {f"{n}.{suffix}": part for n, part in zip(names, torch.split(whole, sizes), strict=True)}
        assert both[0] is not None
        made[names] = Joined(both[0], both[1], tuple(weights.get(f"{name}.bias") for name in names), sizes)
    return made


class Rows:
    """The rows of one batch. `full` replaces whole tensors, for all rows alike; dials and LoRA adapters are by row.

    LoRA of several adapters is one pair of matrix products: their A's lie side by side, (sum of ranks, in), and a mask
    lets each row see its own adapter's share and nothing of the others. A row without an adapter has an empty share.
    Where the kernels are at hand, each row meets its own pair instead.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        *,
        quantized: Mapping[str, Quantized] | None = None,  # the matrices that `weights` lacks
        full: Mapping[str, Tensor] | None = None,
        lora: Sequence[Mapping[str, Lora] | None] = (),  # by row; a single one stands for every row
        dials: Sequence[Dials | None] = (),  # by row
        dropout: bool = False,
        arithmetic: Arithmetic = TORCH,
        joined: Mapping[tuple[str, ...], Joined] | None = None,  # of `weights`
    ) -> None:
        self._weights = weights
        self._quantized = quantized or {}
        self._arithmetic = arithmetic
        self.dropout = dropout  # in training, which also has its own arithmetic
        self._full = full or {}
        self._together = {names: both for names, both in (joined or {}).items() if all(map(self._is_frozen, names))}
        self._gains: dict[str, Tensor] = {}
        some = next(iter(weights.values()))
        self._device, self._dtype = some.device, some.dtype
        if any(d is not None for d in dials):
            n_layers = next(len(d.attn) for d in dials if d is not None)
            all_dials = [d or Dials.plain(n_layers) for d in dials]
            self._gains = {
                "eps": self._by_layer([(*d.eps, d.eps_final) for d in all_dials]),
                "attn": self._by_layer([d.attn for d in all_dials]),
                "mlp": self._by_layer([d.mlp for d in all_dials]),
            }
        self._lora: Mapping[str, Lora] = {}  # one adapter for every row
        self._shared: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # several: A's, B's, mask (B, 1, sum of ranks)
        self._own: dict[str, ByRow] = {}  # or, by the kernel, each row by itself
        self._stretch: dict[str, Tensor] = {}  # and where one of them is DoRA: (B, 1, out), 0 for the others' rows
        distinct = list({id(adapter): adapter for adapter in lora if adapter}.values())
        if distinct and all(adapter is distinct[0] for adapter in lora):
            self._lora = distinct[0]
            if not dropout:
                each = {name: arithmetic.by_row([(p.a, p.b, p.scale)]) for name, p in self._lora.items()}
                self._own = {name: kernel for name, kernel in each.items() if kernel}
        elif distinct:
            self._share(distinct, lora)

    def _by_layer(self, values: Sequence[Sequence[float]]) -> Tensor:
        """(L, B, 1, 1): a number for each layer and row, to multiply (B, T, D)."""
        return torch.tensor(values, device=self._device).T[..., None, None]

    def _share(self, distinct: Sequence[Mapping[str, Lora]], by_row: Sequence[Mapping[str, Lora] | None]) -> None:
        masks: dict[tuple[object, ...], Tensor] = {}  # most tensors have the same ranks and scales
        for name in dict.fromkeys(name for adapter in distinct for name in adapter):
            parts = [(adapter, adapter[name]) for adapter in distinct if name in adapter]
            own = [mine.get(name) if mine else None for mine in by_row]
            if each := self._arithmetic.by_row([(p.a, p.b, p.scale) if p else None for p in own]):
                self._own[name] = each
            else:
                self._shared[name] = self._joined(parts, by_row, masks)
            assert all(pair.magnitude is None for _, pair in parts), "DoRA is served with its lengths taken"
            if stretches := {id(adapter): pair.stretch for adapter, pair in parts if pair.stretch is not None}:
                none = torch.zeros_like(next(iter(stretches.values())))
                self._stretch[name] = torch.stack([stretches.get(id(mine), none) for mine in by_row])[:, None]

    def _joined(
        self,
        parts: Sequence[tuple[Mapping[str, Lora], Lora]],
        by_row: Sequence[Mapping[str, Lora] | None],
        masks: dict[tuple[object, ...], Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        layout = tuple((id(adapter), pair.a.shape[0], pair.scale) for adapter, pair in parts)
        if layout not in masks:
            rows = [
                [pair.scale if adapter is mine else 0.0 for adapter, pair in parts for _ in range(pair.a.shape[0])]
                for mine in by_row
            ]
            masks[layout] = torch.tensor(rows, device=self._device)[:, None]
        a = torch.cat([pair.a for _, pair in parts])
        b = torch.cat([pair.b for _, pair in parts], dim=1)
        return a, b, masks[layout].to(a.dtype)

    def weight(self, name: str) -> Tensor:
        full = self._full.get(name)
        if full is None:
            return self._weights[name]
        # A tensor in training is kept in fp32 whatever the base runs in.
        return full.to(self._dtype)

    def linear(self, x: Tensor, name: str) -> Tensor:
        """x (B, T, in) -> (B, T, out) by `<name>.weight`, `<name>.bias` where there is one, and the rows' LoRA."""
        bias = self.weight(f"{name}.bias") if f"{name}.bias" in self._weights else None
        if self.dropout and self._is_frozen(name) and (y := self._trained_over(x, name, bias)) is not None:
            return y
        packed = self._quantized.get(f"{name}.weight")
        if packed is not None and f"{name}.weight" not in self._full:
            return self._adapted(packed.linear(x, bias), x, name, bias)
        return self._adapted(self._arithmetic.linear(x, self.weight(f"{name}.weight"), bias), x, name, bias)

    def linears(self, x: Tensor, *names: str) -> tuple[Tensor, ...]:
        """`linear` by each of these: in one product where their matrices lie side by side."""
        together = self._together.get(names)
        if together is None:
            return tuple(self.linear(x, name) for name in names)
        y = self._arithmetic.linear(x, together.weight, together.bias)
        parts = zip(names, torch.split(y, together.sizes, dim=-1), together.biases, strict=True)
        return tuple(self._adapted(part, x, name, bias) for name, part, bias in parts)

    def _is_frozen(self, name: str) -> bool:
        """Weight and bias are the base's own, and not packed."""
        tensors = (f"{name}.weight", f"{name}.bias")
        return tensors[0] in self._weights and not any(t in self._full for t in tensors)

    def _trained_over(self, x: Tensor, name: str, bias: Tensor | None) -> Tensor | None:
        """A frozen matrix in training, alone or under one plain LoRA; None for what autograd does as well."""
        weight, lora = self._weights[f"{name}.weight"], self._lora.get(f"{name}.weight")
        if lora is None:
            return fused.frozen_linear(x, weight, bias)
        if lora.magnitude is not None or lora.stretch is not None:
            return None
        return fused.adapted_linear(x, weight, bias, lora.a, lora.b, lora.scale)

    def frozen_loss(self, h: Tensor, head: str, labels: Tensor) -> Tensor | None:
        """Cross entropy summed over hidden states (N, D) that the head meets, in training; None where something lies
        over the head, or it is trained itself."""
        plain = self._is_frozen(head) and f"{head}.weight" not in (*self._lora, *self._shared, *self._own)
        if not (self.dropout and plain) or f"{head}.bias" in self._weights:
            return None
        return fused.cross_entropy(h, self._weights[f"{head}.weight"], labels, HEAD_CHUNK_TOKENS)

    def _adapted(self, y: Tensor, x: Tensor, name: str, bias: Tensor | None) -> Tensor:
        """y (B, T, out), which has the bias in it already."""
        if lora := self._lora.get(f"{name}.weight"):
            if own := self._own.get(f"{name}.weight"):
                return own(x, y if lora.stretch is None else _stretched(y, lora.stretch, bias))
            u = self._arithmetic.linear(x, lora.a.to(x.dtype), None) * lora.scale
            b = lora.b.to(x.dtype)
            if lora.magnitude is not None:
                factor = lora.magnitude / lora.lengths(self._whole(f"{name}.weight"))
                change = self._arithmetic.linear(u, b, None)
                return _stretched(y, (factor - 1).to(y.dtype), bias) + change * factor.to(y.dtype)
            y = y if lora.stretch is None else _stretched(y, lora.stretch, bias)
            return self._arithmetic.linear(u, b, y)  # added within the product
        if (stretch := self._stretch.get(f"{name}.weight")) is not None:
            y = _stretched(y, stretch, bias)
        if own := self._own.get(f"{name}.weight"):
            return own(x, y)
        if shared := self._shared.get(f"{name}.weight"):
            a, b, mask = shared
            u = self._arithmetic.linear(x, a, None) * mask  # (B, T, sum of ranks)
            return self._arithmetic.linear(u, b, y)  # added within the product
        return y

    def _whole(self, name: str) -> Tensor:
        """A frozen matrix, unpacked."""
        if name in self._full:
            return self.weight(name)
        return self._quantized[name].whole() if name in self._quantized else self._weights[name]

    def rms_norm(self, x: Tensor, name: str, eps: float, layer: int) -> Tensor:
        """RMSNorm over the last dimension, in fp32 as the models were trained. `layer` -1 is the final norm."""
        if self.dropout and not self._gains and x.dtype is torch.float32 and f"{name}.weight" not in self._full:
            return fused.rms_norm(x, self._weights[f"{name}.weight"], eps)
        scale = eps * self._gains["eps"][layer] if self._gains else eps  # (B, 1, 1) or a number
        return self._arithmetic.rms_norm(x, self.weight(f"{name}.weight"), scale)

    def layer_norm(self, x: Tensor, name: str, eps: float, layer: int) -> Tensor:
        """LayerNorm over the last dimension, with weight and bias. `layer` -1 is the final norm."""
        bias = self.weight(f"{name}.bias")
        y = F.layer_norm(x, x.shape[-1:], self.weight(f"{name}.weight"), bias, eps)
        if not self._gains:
            return y
        # Another epsilon is another scale before the bias; rows that turn nothing keep torch's own result to the bit.
        factor = self._gains["eps"][layer]  # (B, 1, 1)
        variance = x.float().var(-1, keepdim=True, correction=0)
        ratio = torch.sqrt((variance + eps) / (variance + eps * factor))
        return torch.where(factor == 1.0, y, ((y - bias) * ratio + bias).to(y.dtype))

    def drop(self, x: Tensor, p: float) -> Tensor:
        """Dropout in training, and only where gradients are kept: frozen layers compute as they do in serving."""
        return F.dropout(x, p) if self.dropout and p and torch.is_grad_enabled() else x

    def gain(self, block: Tensor, dial: str, layer: int) -> Tensor:
        """What a block (`attn` or `mlp`) adds to the residual stream, (B, T, D), times the rows' dials."""
        return block * self._gains[dial][layer].to(block.dtype) if self._gains else block


def _stretched(y: Tensor, stretch: Tensor, bias: Tensor | None) -> Tensor:
    """The product in y (B, T, out), without the bias, grows by `stretch` of itself. At 0 every bit stays."""
    return torch.addcmul(y, stretch, y if bias is None else y - bias)
