"""The kernel for bf16 products on CPUs. Without a compiler there is nothing to test, and the service does without."""

import shutil
import stat
from functools import partial
from pathlib import Path

import pytest
import torch

from gpu_service import products
from gpu_service.llama import Llama
from gpu_service.models import Base
from gpu_service.products import Chosen, Kernel, compiled, plain
from gpu_service.rows import Rows
from tests.gpu_service.test_decoders import whole_logits
from tests.gpu_service.test_rows import IDS, dials, random_lora

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    if not any(shutil.which(name.split()[0]) for name in products.COMPILERS):
        pytest.skip("no compiler here")
    made = compiled(tmp_path_factory.mktemp("compiled"))
    assert made
    return made


def bf16(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 33])
@pytest.mark.parametrize("out", [1, 48, 50, 191])
def test_a_product_is_the_exact_one_rounded_once(kernel: Kernel, rows: int, out: int) -> None:
    x, weight = bf16(rows, 1, 128), bf16(out, 128, seed=1)
    for add in (None, bf16(out, seed=2), bf16(rows, 1, out, seed=3)):
        exact = x.double() @ weight.double().T + (0 if add is None else add.double())
        torch.testing.assert_close(kernel.linear(x, weight, add), exact.bfloat16(), rtol=2**-7, atol=1e-4)


def test_a_rows_result_does_not_depend_on_the_rows_beside_it(kernel: Kernel) -> None:
    x, weight = bf16(37, 192), bf16(100, 192, seed=1)
    together = kernel.linear(x, weight, None)
    for first, count in ((0, 1), (5, 2), (9, 3), (20, 17)):
        rows = slice(first, first + count)
        assert torch.equal(together[rows], kernel.linear(x[rows], weight, None))


@pytest.mark.parametrize("each", [1, 3])
def test_each_row_gets_what_its_own_pair_adds_and_one_without_nothing(kernel: Kernel, each: int) -> None:
    x, y = bf16(4, each, 80, seed=1), bf16(4, each, 150, seed=2)
    pairs = [(bf16(r, 80, seed=r), bf16(150, r, seed=9 + r), 0.5 * r) if r else None for r in (3, 0, 16, 37)]
    exact = torch.stack(
        [
            row.double() + (scale * of.double() @ a.double().T @ b.double().T if pair else 0)
            for of, row, pair in zip(x, y, pairs, strict=True)
            for a, b, scale in [pair or (x[0], x[0], 0.0)]
        ]
    )
    own = kernel.by_row(pairs)(x, y.clone())
    torch.testing.assert_close(own, exact.bfloat16(), rtol=2**-7, atol=1e-2)
    assert torch.equal(own[1], y[1])
    for i, pair in enumerate(pairs):
        if pair:  # whatever stands beside it
            alone = slice(i, i + 1)
            assert torch.equal(kernel.by_row([pair])(x[alone], y[alone].clone()), own[alone])


def test_infinities_and_what_is_no_number_come_through(kernel: Kernel) -> None:
    x = torch.ones(2, 64, dtype=torch.bfloat16)
    weight = torch.ones(3, 64, dtype=torch.bfloat16)
    weight[0, 3], weight[1, 5] = float("inf"), float("nan")
    y = kernel.linear(x, weight, None)
    assert y[:, 0].isposinf().all()
    assert y[:, 1].isnan().all()
    assert (y[:, 2] == 64).all()


@torch.inference_mode()
def test_rows_with_dials_and_adapters_compute_by_it_what_they_compute_by_torch(kernel: Kernel, tiny: Base) -> None:
    half = {name: weight.bfloat16() for name, weight in tiny.weights.items()}
    turned = dials(tiny, attn=1.1, eps=3.0)
    for adapters in ([random_lora(tiny, 0)], [random_lora(tiny, 0), random_lora(tiny, 1), None]):
        served = [
            adapter
            and {n: lora.served(CPU, torch.bfloat16, partial(half.__getitem__, n)) for n, lora in adapter.items()}
            for adapter in adapters
        ]
        ids = IDS[0].expand(len(adapters), -1)
        ours, theirs = (
            whole_logits(
                Llama(tiny.source.config, CPU),
                Rows(half, lora=served, dials=[turned, *[None] * (len(ids) - 1)], product=product),
                ids,
            ).float()
            for product in (Chosen(kernel, [True] * len(products.SPANS)), plain)
        )
        assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()


def test_what_the_kernel_does_not_take_goes_to_torch(kernel: Kernel) -> None:
    product = Chosen(kernel, [True] * len(products.SPANS))
    for x, weight in ((bf16(2, 20), bf16(5, 20)), (bf16(2, 64).float(), bf16(5, 64).float())):
        add = torch.ones(2, 5, dtype=x.dtype)
        assert torch.equal(product(x, weight, None), plain(x, weight, None))
        assert torch.equal(product(x, weight, add), plain(x, weight, add))


def test_other_precisions_need_no_kernel(tmp_path: Path) -> None:
    assert products.choose([torch.ones(4, 64)], tmp_path / "compiled") is plain
    assert not (tmp_path / "compiled").exists()


def test_without_a_compiler_or_with_one_that_fails_the_service_does_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compiled(tmp_path / "compiled") is None
    bad = tmp_path / "cc"
    bad.write_text("#!/bin/sh\nexit 1\n")
    bad.chmod(bad.stat().st_mode | stat.S_IEXEC)
    assert compiled(tmp_path / "compiled") is None
    assert not list((tmp_path / "compiled").iterdir()), "nothing half made is left"
