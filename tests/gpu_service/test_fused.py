"""Training's own arithmetic gives what the plain expressions give, gradients included."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_service import device, fused


@pytest.fixture(params=["as chosen", "oneDNN"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both libraries that multiply, whatever the processor."""
    device.prefers_onednn.cache_clear()
    if request.param == "oneDNN":
        monkeypatch.setattr(fused, "prefers_onednn", lambda: True)
    return


def gradients(work: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The result, and the gradient of what it is made of."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = work(*leaves)
    weights = torch.linspace(-1, 1, y.numel()).view_as(y) if y.dim() else torch.ones(())
    (y * weights).sum().backward()  # type: ignore[no-untyped-call]
    return [y.detach(), *(x.grad for x in leaves if x.grad is not None)]


def same(ours: list[Tensor], plain: list[Tensor]) -> bool:
    return len(ours) == len(plain) and all(
        torch.allclose(a, b, rtol=1e-5, atol=2e-6 * float(b.abs().max())) for a, b in zip(ours, plain, strict=True)
    )


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("biased", [True, False])
def test_a_lora_beside_a_frozen_matrix(biased: bool) -> None:
    torch.manual_seed(0)
    x, weight, a, b = torch.randn(2, 7, 24), torch.randn(40, 24), torch.randn(4, 24), torch.randn(40, 4)
    bias = torch.randn(40) if biased else None

    def plain(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, weight, bias) + F.linear(F.linear(x, a), b) * 0.7

    assert same(
        gradients(lambda x, a, b: fused.adapted_linear(x, weight, bias, a, b, 0.7), x, a, b), gradients(plain, x, a, b)
    )
    assert same(
        gradients(lambda x: fused.frozen_linear(x, weight, bias), x), gradients(lambda x: F.linear(x, weight, bias), x)
    )


def test_an_rms_norm_with_a_frozen_weight() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 7, 24), torch.randn(24)
    plain = lambda x: weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))  # noqa: E731
    assert same(gradients(lambda x: fused.rms_norm(x, weight, 1e-5), x), gradients(plain, x))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
def test_a_loss_whose_logits_are_never_whole(chunk_tokens: int) -> None:
    torch.manual_seed(0)
    h, head, labels = torch.randn(11, 24), torch.randn(300, 24), torch.randint(0, 300, (11,))

    def plain(h: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, head), labels, reduction="sum")

    assert same(gradients(lambda h: fused.cross_entropy(h, head, labels, chunk_tokens), h), gradients(plain, h))
    halves = gradients(lambda h: fused.cross_entropy(h, head.bfloat16(), labels, chunk_tokens), h.bfloat16())
    assert float(halves[0]) == pytest.approx(float(plain(h)), rel=2e-2)
    assert torch.allclose(halves[1].float(), gradients(plain, h)[1], atol=0.1)
