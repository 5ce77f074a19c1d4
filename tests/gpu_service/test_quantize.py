"""Packed bases: what is computed with them is what their unpacked matrices give, forward and backward."""

from dataclasses import replace
from pathlib import Path
from weakref import ref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import wire
from demo import model as demo_model
from gpu_service import layers, quantize
from gpu_service.decoder import build
from gpu_service.device import DTYPES, Device, Precision
from gpu_service.errors import BadRequest, OutOfMemory
from gpu_service.models import Base, Models, find, read_base
from gpu_service.quantize import Quantized
from gpu_service.rows import Dials, Rows
from gpu_service.sampling import Sampling
from tests.conftest import TINY
from tests.gpu_service.test_decoders import whole_logits
from tests.gpu_service.test_rows import random_lora
from tests.gpu_service.test_text import write
from tests.gpu_service.test_train import LORA, job, rows_file, run

__all__ = ["rows_file"]  # a fixture
BITS: tuple[wire.Quantize, ...] = ("8bit", "4bit")
IDS = torch.tensor([[5, 9, 300, 77, 1000, 2]])


def unpacked(base: Base) -> dict[str, Tensor]:
    """All tensors, as a model of its own that was rounded the same way."""
    return {**base.weights, **{name: packed.whole() for name, packed in base.quantized.items()}}


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inner", [128, 80, 33])  # blocks of 64 that fit rows, cross them, and don't come out even
def test_a_product_with_a_packed_matrix_is_that_with_the_unpacked_one(
    bits: wire.Quantize, dtype: torch.dtype, inner: int
) -> None:
    assert bits != "none"
    weight = torch.randn(45, inner, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed, bias = Quantized(weight, bits), torch.randn(45, dtype=dtype)
    x = torch.randn(2, 3, inner, dtype=dtype)
    assert torch.equal(packed.linear(x, None), F.linear(x, packed.whole()))
    assert torch.equal(packed.linear(x, bias), F.linear(x, packed.whole()) + bias)
    error = (packed.whole() - weight).abs().mean() / weight.abs().mean()
    assert error < (0.02 if bits == "8bit" else 0.12)
    assert packed.whole().dtype == dtype


def test_four_bits_are_those_of_bitsandbytes() -> None:
    weight = torch.randn(64, 128)
    functional = quantize.bitsandbytes().functional
    theirs = functional.dequantize_4bit(*functional.quantize_4bit(weight, blocksize=64, quant_type="nf4"))
    assert torch.equal(Quantized(weight, "4bit").whole(), theirs)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_flow_through_a_packed_matrix_also_after_steps_without_them(
    bits: wire.Quantize, dtype: torch.dtype
) -> None:
    """On some CPUs bitsandbytes repacks a weight in a step without gradients, and none flow from then on."""
    assert bits != "none"
    packed = Quantized(torch.randn(48, 80, dtype=dtype), bits)
    before, x = packed.whole(), torch.randn(3, 80, dtype=dtype, requires_grad=True)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            packed.linear(x, None)
    packed.linear(x, None).square().sum().backward()  # type: ignore[no-untyped-call]
    ours, x.grad = x.grad, None
    F.linear(x, before).square().sum().backward()  # type: ignore[no-untyped-call]
    assert ours is not None
    assert torch.equal(packed.whole(), before)
    assert x.grad is not None
    assert torch.equal(ours, x.grad)
    assert bool(ours.any())


@pytest.mark.parametrize("bits", BITS)
@torch.no_grad()
def test_dials_and_adapters_by_row_work_over_a_packed_base(bits: wire.Quantize, tiny: Base, cpu: Device) -> None:
    packed = read_base(tiny.source, cpu, bits)
    decoder, ids = build("llama", tiny.source.config, cpu.torch), IDS.expand(3, -1)
    turned = Dials((2.0,) * 4, (0.5,) * 4, (1.5,) * 4, 2.0)
    lora, dials = [random_lora(tiny, 1), None, random_lora(tiny, 2)], [turned, None, None]
    ours = whole_logits(decoder, Rows(packed.weights, quantized=packed.quantized, lora=lora, dials=dials), ids)
    theirs = whole_logits(decoder, Rows(unpacked(packed), lora=lora, dials=dials), ids)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours[0], ours[1])


@pytest.mark.parametrize("bits", BITS)
def test_gpt2_packs_too_and_its_bytes_are_those_that_were_estimated(bits: wire.Quantize, cpu: Device) -> None:
    source = find(f"demo-gpt2={Path(demo_model.__file__).parent / 'gpt2' / 'model'}")
    packed = read_base(source, cpu, bits)
    assert packed.n_bytes == source.weights_bytes(bits, 4)
    assert packed.n_bytes < 0.8 * source.weights_bytes("none", 4)
    decoder = build("gpt2", source.config, cpu.torch)
    with torch.no_grad():
        ours = whole_logits(decoder, Rows(packed.weights, quantized=packed.quantized), IDS % 500)
        theirs = whole_logits(decoder, Rows(unpacked(packed)), IDS % 500)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_lora_over_a_packed_base_learns_as_over_its_unpacked_weights(
    bits: wire.Quantize, tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    packed = read_base(tiny.source, cpu, bits)
    wanted = job(tiny, cpu, rows_file, tmp_path, LORA, learning_rate=3e-3, n_epochs=8)
    losses, trained = run(wanted, packed, cpu)
    reference, _ = run(wanted, Base(tiny.source, unpacked(packed)), cpu)
    assert losses == pytest.approx(reference, rel=1e-4)
    assert losses[-1] < 0.85 * losses[0]
    assert all(bool(pair.b.any()) for pair in trained.lora.values())


def test_a_packed_base_of_a_job_goes_with_it_and_what_serves_stays(tiny_dir: Path, cpu: Device) -> None:
    models = Models((f"{TINY}={tiny_dir}",), cpu)
    serving = models.load(TINY)
    lent = models.load(TINY, "4bit")
    assert lent.quantize == "4bit"
    assert models.load(TINY, "4bit") is lent
    assert models.load(TINY) is models.load(TINY, "none") is serving
    assert not serving.quantized
    gone = ref(lent)
    del lent
    assert gone() is None


def packing(cpu: Device, bits: wire.Quantize) -> Device:
    return replace(cpu, precision=replace(cpu.precision, quantize=bits))


def test_what_does_not_fit_is_refused_with_both_figures_before_it_is_read(tiny_dir: Path, cpu: Device) -> None:
    class Full(Device):
        def free_bytes(self) -> int:
            return 1_000_000

    models = Models((f"{TINY}={tiny_dir}",), Full(cpu.torch, cpu.name, cpu.precision))
    with pytest.raises(OutOfMemory, match=r"takes 13 MB in fp32, and 1 MB are free"):
        models.load(TINY)


def test_specs_agree_on_one_base_and_a_packed_matrix_takes_no_full_training(tiny: Base) -> None:
    def select(*specs: wire.LayerSpec) -> layers.Selection:
        return layers.select(tiny.source.tensors, specs, tied=True)

    packed = wire.LayerSpec(parts=["attn"], quantize="4bit")
    norms = wire.LayerSpec(method="full", parts=["norm"])
    assert select(packed, norms).quantize == "4bit"
    with pytest.raises(BadRequest, match="one frozen base"):
        select(packed, wire.LayerSpec(parts=["mlp"], quantize="8bit"))
    with pytest.raises(BadRequest, match="held in 4bit"):
        select(packed, wire.LayerSpec(method="full", parts=["mlp"]))


@pytest.mark.parametrize("bits", BITS)
def test_the_real_model_still_makes_sense_when_it_is_packed(bits: wire.Quantize, smol_dir: Path, cpu: Device) -> None:
    device = replace(cpu, precision=Precision("bf16", DTYPES["bf16"], False, "a test"))
    base = Models((str(smol_dir),), packing(device, bits)).load(smol_dir.name)
    assert base.n_bytes == base.source.weights_bytes(bits, 2)
    text, _ = write(base, device, "The capital of France is", Sampling(max_tokens=8, temperature=0))
    assert "Paris" in text
