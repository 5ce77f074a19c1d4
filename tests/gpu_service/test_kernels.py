"""The kernels for bf16 on CPUs. Without a compiler there is nothing to test, and the service does without."""

import shutil
import stat
from functools import partial
from pathlib import Path

import pytest
import torch

from gpu_service import kernels
from gpu_service.kernels import SPANS, TORCH, Own, Places, compiled
from gpu_service.llama import Llama
from gpu_service.models import Base
from gpu_service.rows import Rows
from tests.gpu_service.test_decoders import whole_logits
from tests.gpu_service.test_rows import IDS, dials, random_lora

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> Own:
    if not any(shutil.which(name.split()[0]) for name in kernels.COMPILERS):
        pytest.skip("no compiler here")
    made = compiled(tmp_path_factory.mktemp("compiled"))
    assert made
    return made


def bf16(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 33])
@pytest.mark.parametrize("out", [1, 48, 50, 191])
def test_a_product_is_the_exact_one_rounded_once(own: Own, rows: int, out: int) -> None:
    x, weight = bf16(rows, 1, 128), bf16(out, 128, seed=1)
    for add in (None, bf16(out, seed=2), bf16(rows, 1, out, seed=3)):
        exact = x.double() @ weight.double().T + (0 if add is None else add.double())
        torch.testing.assert_close(own.product(x, weight, add), exact.bfloat16(), rtol=2**-7, atol=1e-4)


def test_a_rows_result_does_not_depend_on_the_rows_beside_it(own: Own) -> None:
    x, weight = bf16(37, 192), bf16(100, 192, seed=1)
    together = own.product(x, weight, None)
    for first, count in ((0, 1), (5, 2), (9, 3), (20, 17)):
        rows = slice(first, first + count)
        assert torch.equal(together[rows], own.product(x[rows], weight, None))


@pytest.mark.parametrize("each", [1, 3])
def test_each_row_gets_what_its_own_pair_adds_and_one_without_nothing(own: Own, each: int) -> None:
    x, y = bf16(4, each, 80, seed=1), bf16(4, each, 150, seed=2)
    pairs = [(bf16(r, 80, seed=r), bf16(150, r, seed=9 + r), 0.5 * r) if r else None for r in (3, 0, 16, 37)]
    exact = torch.stack(
        [
            row.double() + (scale * of.double() @ a.double().T @ b.double().T if pair else 0)
            for of, row, pair in zip(x, y, pairs, strict=True)
            for a, b, scale in [pair or (x[0], x[0], 0.0)]
        ]
    )
    by_row = own.by_row(pairs)
    assert by_row
    added = by_row(x, y.clone())
    torch.testing.assert_close(added, exact.bfloat16(), rtol=2**-7, atol=1e-2)
    assert torch.equal(added[1], y[1])
    for i, pair in enumerate(pairs):
        if pair:  # whatever stands beside it
            alone = slice(i, i + 1)
            single = own.by_row([pair])
            assert single
            assert torch.equal(single(x[alone], y[alone].clone()), added[alone])


def test_a_product_that_does_not_pay_is_torchs(own: Own, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = bf16(9, 64), bf16(5, 64, seed=1)
    monkeypatch.setattr(own, "pays", [(most, most != SPANS[1][1]) for _, most in SPANS])
    assert torch.equal(own.linear(x, weight, None), TORCH.linear(x, weight, None))


@pytest.mark.parametrize("eps", [1e-5, torch.tensor([1e-5, 2.0, 1e3, 0.5])[:, None, None]])
def test_a_norm_is_torchs_to_the_last_bit_but_one_and_the_rows_own(own: Own, eps: float | torch.Tensor) -> None:
    x, weight = bf16(4, 3, 88), bf16(88, seed=1)
    normed = own.rms_norm(x, weight, eps)
    torch.testing.assert_close(normed, TORCH.rms_norm(x, weight, eps), rtol=2**-7, atol=0)
    alone = own.rms_norm(x[2:3], weight, eps[2:3] if isinstance(eps, torch.Tensor) else eps)
    assert torch.equal(alone, normed[2:3])


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 80), (7, 1, 32)])
def test_a_token_attends_to_what_its_row_holds(own: Own, heads: int, kv_heads: int, head_dim: int) -> None:
    lengths = torch.tensor([0, 299, 17, 120])
    places = Places(lengths, 300, False)
    # As the decoders give them: parts of one product, of which a row's lie apart.
    whole = bf16(4, 1, (heads + 2 * kv_heads) * head_dim)
    sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    q, k, v = (t.view(4, 1, -1, head_dim).transpose(1, 2) for t in torch.split(whole, sizes, dim=-1))
    keys, values = bf16(6, kv_heads, 512, head_dim, seed=1), bf16(6, kv_heads, 512, head_dim, seed=2)
    wide = [t.double() for t in (q, k, v, keys, values)]
    exact = TORCH.attend(wide[0].contiguous(), wide[1], wide[2], wide[3], wide[4], places)
    kept = keys.clone(), values.clone()
    y = own.attend(q, k, v, keys, values, places)
    torch.testing.assert_close(y, exact.bfloat16(), rtol=2**-7, atol=2**-9)
    assert torch.equal(keys.double(), wide[3])
    assert torch.equal(values.double(), wide[4])
    row = slice(2, 3)
    beside = own.attend(q[row], k[row], v[row], kept[0][row], kept[1][row], Places(lengths[row], 18, True))
    assert torch.equal(beside, y[row]), "it depends on the rows beside it"


def test_what_is_no_number_stays_in_its_row(own: Own) -> None:
    q, k, v = bf16(2, 4, 1, 32), bf16(2, 2, 1, 32), bf16(2, 2, 1, 32)
    keys, values = bf16(2, 2, 256, 32, seed=1), bf16(2, 2, 256, 32, seed=2)
    keys[1, :, 3] = float("nan")
    y = own.attend(q, k, v, keys, values, Places(torch.tensor([9, 20]), 21, False))
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


def test_infinities_and_what_is_no_number_come_through(own: Own) -> None:
    x = torch.ones(2, 64, dtype=torch.bfloat16)
    weight = torch.ones(3, 64, dtype=torch.bfloat16)
    weight[0, 3], weight[1, 5] = float("inf"), float("nan")
    y = own.product(x, weight, None)
    assert y[:, 0].isposinf().all()
    assert y[:, 1].isnan().all()
    assert (y[:, 2] == 64).all()


@torch.inference_mode()
def test_rows_with_dials_and_adapters_compute_by_it_what_they_compute_by_torch(own: Own, tiny: Base) -> None:
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
                Rows(half, lora=served, dials=[turned, *[None] * (len(ids) - 1)], arithmetic=by),
                ids,
            ).float()
            for by in (own, TORCH)
        )
        assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()


def test_what_the_kernel_does_not_take_goes_to_torch(own: Own) -> None:
    for x, weight in ((bf16(2, 20), bf16(5, 20)), (bf16(2, 64).float(), bf16(5, 64).float())):
        add = torch.ones(2, 5, dtype=x.dtype)
        assert torch.equal(own.linear(x, weight, None), TORCH.linear(x, weight, None))
        assert torch.equal(own.linear(x, weight, add), TORCH.linear(x, weight, add))


def test_other_precisions_need_no_kernel(tmp_path: Path) -> None:
    assert kernels.choose([torch.ones(4, 64)], tmp_path / "compiled") is TORCH
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
