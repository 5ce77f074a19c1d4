"""Training's own arithmetic where autograd's would pass over memory more often than it has to. Knows no model.

Each function gives what the plain expression gives, up to rounding, with fewer passes and less that is kept for the
backward pass. Frozen weights get no gradient, and a tensor that needs none is not given one.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_service.device import prefers_onednn


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (N, in) by a weight (out, in), in whichever library multiplies fp32 faster here; oneDNN may be switched off."""
    if x.dtype is torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.enabled and prefers_onednn():
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y
    return F.linear(x, weight, bias)


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in) -> (..., out) by a weight and a bias that are not trained."""
    y: Tensor = _FrozenLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        (weight,) = ctx.saved_tensors
        g = gradients[0]
        flat = _linear(g.reshape(-1, g.shape[-1]), weight.T)
        return flat.view(*g.shape[:-1], -1), None, None


def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """x (..., in) -> x W^T + bias + scale x A^T B^T (..., out), W and bias frozen."""
    y: Tensor = _AdaptedLinear.apply(x, weight, bias, a.to(x.dtype), b.to(x.dtype), scale)  # type: ignore[no-untyped-call]
    return y


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (N, in)
        u = flat @ a.T  # (N, r)
        y = _linear(flat, weight, bias).addmm_(u, b.T, alpha=scale)
        ctx.save_for_backward(flat, weight, a, b, u)
        ctx.scale = scale
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, a, b, u = ctx.saved_tensors
        shape = gradients[0].shape
        g = gradients[0].reshape(-1, shape[-1])  # (N, out)
        gu = (g @ b).mul_(ctx.scale)  # (N, r)
        gx = None
        if ctx.needs_input_grad[0]:
            gx = _linear(g, weight.T).addmm_(gu, a).view(*shape[:-1], -1)
        return gx, None, None, gu.T @ flat, (g.T @ u).mul_(ctx.scale), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D) over its last dimension, fp32; the weight is frozen."""
    y: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        factor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, factor)
        y: Tensor = (x * factor).mul_(weight)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        x, weight, factor = ctx.saved_tensors  # factor (..., 1)
        if not ctx.needs_input_grad[0]:
            return None, None, None
        g = gradients[0] * weight
        along = torch.einsum("...d,...d->...", g, x)[..., None] * factor.pow(3) / x.shape[-1]
        return g.mul_(factor).addcmul_(x, along, value=-1), None, None


def cross_entropy(h: Tensor, head: Tensor, labels: Tensor, chunk_tokens: int) -> Tensor:
    """Summed over (N, D) hidden states whose labels are (N,); `head` (V, D) is frozen. A scalar in fp32.

    The logits of `chunk_tokens` labels are held at once, and their gradient takes their place: no logits are kept, and
    none is computed twice.
    """
    loss: Tensor = _CrossEntropy.apply(h, head, labels, chunk_tokens)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, head: Tensor, labels: Tensor, chunk_tokens: int) -> Tensor:
        total = torch.zeros((), device=h.device)
        gradient = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        for at in range(0, len(labels), chunk_tokens):
            cut = slice(at, at + chunk_tokens)
            logits = _linear(h[cut], head).float()  # (n, V)
            chosen = logits.gather(1, labels[cut, None])
            most = logits.amax(1, keepdim=True)
            total += most.sum() - chosen.sum()
            # exp(logits - most) / their sum are the probabilities; the division waits until they are D wide.
            sums = logits.sub_(most).exp_().sum(1, keepdim=True)
            total += sums.log().sum()
            if gradient is not None:
                if h.dtype is torch.float32:
                    gradient[cut] = _linear(logits, head.T).div_(sums).sub_(head[labels[cut]])
                else:
                    gradient[cut] = logits.div_(sums).to(h.dtype) @ head - head[labels[cut]]
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return None if gradient is None else gradient * gradients[0].to(gradient.dtype), None, None, None
