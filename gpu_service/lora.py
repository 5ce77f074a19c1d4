"""What LoRA and DoRA add to one matrix, in training and as it is served. Knows no model and no file."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter import MAGNITUDE, A, B


@dataclass(frozen=True)
class Lora:
    """Adds `scale * B @ A` to a weight W (out, in). https://arxiv.org/abs/2106.09685

    With a magnitude it is DoRA: each row of the sum is brought to a length of its own. https://arxiv.org/abs/2402.09353
    """

    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    scale: float
    magnitude: Tensor | None = None  # (out,): the rows' lengths, as they are trained and stored
    stretch: Tensor | None = None  # (out,): as DoRA is served, by how much of itself W x grows; B has grown already

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that are trained and stored, by their endings in a file, which are peft's."""
        pair = {A: self.a, B: self.b}
        return pair if self.magnitude is None else pair | {MAGNITUDE: self.magnitude}

    def on_cpu(self) -> "Lora":
        """What is trained, out of the graph."""
        magnitude = None if self.magnitude is None else self.magnitude.detach().cpu()
        return Lora(self.a.detach().cpu(), self.b.detach().cpu(), self.scale, magnitude)

    @torch.no_grad()
    def lengths(self, weight: Tensor) -> Tensor:
        """(out,) fp32: of the rows of W + scale * B @ A; a constant in training, as in section 4.3 of DoRA's paper."""
        whole = torch.addmm(weight.float(), self.b.float(), self.a.float(), alpha=self.scale)
        lengths: Tensor = torch.linalg.vector_norm(whole, dim=1)
        return lengths.clamp_min(torch.finfo(torch.float).tiny)  # a row of nothing has no direction, and stays

    def served(self, device: torch.device, dtype: torch.dtype, weight: Callable[[], Tensor]) -> "Lora":
        """On the device, in its precision. DoRA's lengths are taken once, over the weight that it is served with."""
        a, b = self.a.to(device, dtype), self.b.to(device, dtype)
        if self.magnitude is None:
            return Lora(a, _by_rank(b), self.scale)
        wide = Lora(self.a.to(device), self.b.to(device), self.scale)
        factor = self.magnitude.to(device).float() / wide.lengths(weight())
        b = (wide.b.float() * factor[:, None]).to(dtype)
        return Lora(a, _by_rank(b), self.scale, stretch=(factor - 1).to(dtype))


def _by_rank(b: Tensor) -> Tensor:
    """The same B, laid out by rank: so the kernel that adds by row (kernels.c) adds up many outputs at once."""
    return b.T.contiguous().T
