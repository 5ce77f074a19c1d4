"""Frozen weights in 8 or 4 bits: packed once when a model is loaded, unpacked matrix by matrix where one is used.

Four bits are bitsandbytes' NF4 (arXiv:2305.14314) in blocks of 64; eight are one scale a row. The products themselves
run in the precision of the activations, and gradients flow through to them, never to the weight. Knows no model.
"""

import importlib
import logging
import sys
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_service.costs import BLOCK
from gpu_service.errors import UnsupportedModel


class Quantized:
    """One matrix (out, in), packed."""

    def __init__(self, weight: Tensor, bits: Literal["8bit", "4bit"]) -> None:
        self.shape, self.dtype, self.device = weight.shape, weight.dtype, weight.device
        self._state: Any = None  # bitsandbytes' own, in 4 bits
        self._packed: Tensor
        if bits == "4bit":
            if self.device.type == "cpu":
                # There bitsandbytes 0.50 unpacks wrongly what has rows that blocks don't divide: let a row be a block.
                weight = weight.reshape(-1, BLOCK) if weight.numel() % BLOCK == 0 else weight.reshape(-1)
            self._packed, self._state = bitsandbytes().functional.quantize_4bit(
                weight.contiguous(), blocksize=BLOCK, quant_type="nf4"
            )
            self._scale: Tensor = self._state.absmax
        else:
            wide = weight.float()
            self._scale = wide.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127  # (out, 1)
            self._packed = (wide / self._scale).round_().to(torch.int8)

    @property
    def n_bytes(self) -> int:
        return int(self._packed.nbytes + self._scale.nbytes)

    def whole(self) -> Tensor:
        """(out, in), in the precision that it was packed from."""
        if self._state is None:
            return self._packed.to(self.dtype) * self._scale.to(self.dtype)
        unpacked: Tensor = bitsandbytes().functional.dequantize_4bit(self._packed, self._state)
        return unpacked.view(self.shape)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in) -> (..., out)."""
        if self._state is not None and self.device.type == "cuda":  # its kernels unpack while they multiply
            y: Tensor = bitsandbytes().matmul_4bit(x, self._packed.t(), self._state, bias=bias)
            return y
        product: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return product if bias is None else product + bias


class _Product(torch.autograd.Function):
    """x @ whole().T, without keeping the unpacked matrix for the backward pass.

    bitsandbytes' own module may repack a 4-bit weight in place on CPUs with AVX512-BF16, and its backward pass then
    yields no gradient and no error.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Quantized) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.whole())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.weight.whole(), None


@cache
def bitsandbytes() -> Any:
    """Imported where it is first needed, and without the native code that it would fetch from a hub at import."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it would report the kernel missing
    before = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]  # what makes `import kernels` fail
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as exc:
        raise UnsupportedModel(
            "4-bit weights need bitsandbytes, which is not installed here: pip install bitsandbytes"
        ) from exc
    finally:
        if before is None:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = before
