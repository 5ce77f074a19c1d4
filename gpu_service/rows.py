"""What differs by row in one forward pass: dials and adapters, and the linear map that applies them.

A `Rows` is made for a batch and handed to the decoder, which asks it for every weight, epsilon and gain. So serving,
training and dials need no hook and no patched module. Without dials or adapter every answer is the plain one, and the
arithmetic is that of the plain model, bit for bit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_service.artifacts import Lora


@dataclass(frozen=True)
class Dials:
    """Multipliers by layer for one row; 1.0 is the model as it is. The final norm takes `eps_final`."""

    eps: tuple[float, ...]  # on the norms' epsilon
    attn: tuple[float, ...]  # on what the attention block adds to the residual stream
    mlp: tuple[float, ...]  # on what the MLP block adds
    eps_final: float

    @property
    def neutral(self) -> bool:
        return self.eps_final == 1.0 and all(x == 1.0 for x in (*self.eps, *self.attn, *self.mlp))


class Rows:
    """`full` replaces whole tensors by name; `lora` adds low-rank updates. Both may require gradients."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        *,
        full: Mapping[str, Tensor] | None = None,
        lora: Mapping[str, Lora] | None = None,
        dials: Sequence[Dials] | None = None,  # one a row
    ) -> None:
        self._weights = weights
        self._full = full or {}
        self._lora = lora or {}
        self._gains: dict[str, Tensor] = {}
        if dials and not all(d.neutral for d in dials):
            device = next(iter(weights.values())).device
            self._gains = {
                "eps": torch.tensor([(*d.eps, d.eps_final) for d in dials], device=device).T[..., None, None],
                "attn": torch.tensor([d.attn for d in dials], device=device).T[..., None, None],
                "mlp": torch.tensor([d.mlp for d in dials], device=device).T[..., None, None],
            }  # each (L, B, 1, 1); eps has one more for the final norm

    def weight(self, name: str) -> Tensor:
        full = self._full.get(name)
        if full is None:
            return self._weights[name]
        # A tensor in training is kept in fp32 whatever the base runs in.
        return full.to(self._weights[name].dtype)

    def linear(self, x: Tensor, name: str) -> Tensor:
        """x (..., in) -> (..., out) by `<name>.weight`, `<name>.bias` where there is one, and the row's LoRA."""
        bias = self.weight(f"{name}.bias") if f"{name}.bias" in self._weights else None
        y = F.linear(x, self.weight(f"{name}.weight"), bias)
        lora = self._lora.get(f"{name}.weight")
        if lora is not None:
            y = y + F.linear(F.linear(x, lora.a.to(x.dtype)), lora.b.to(x.dtype)) * lora.scale
        return y

    def norm(self, x: Tensor, name: str, eps: float, layer: int) -> Tensor:
        """RMSNorm over the last dimension, in fp32 as the models were trained. `layer` -1 is the final norm."""
        scale = eps * self._gains["eps"][layer] if self._gains else eps  # (B, 1, 1) or a number
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + scale)
        return self.weight(f"{name}.weight") * wide.to(x.dtype)

    def gain(self, block: Tensor, dial: str, layer: int) -> Tensor:
        """What a block (`attn` or `mlp`) adds to the residual stream, (B, T, D), times the rows' dials."""
        return block * self._gains[dial][layer].to(block.dtype) if self._gains else block
