"""DoRA and rsLoRA against peft's own layers: logits and gradients, in fp32; and in a batch with other rows."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import wire
from adapter import lora_scale
from gpu_service import checkpoints, layers, train
from gpu_service.artifacts import BlobCache
from gpu_service.checkpoints import Stored
from gpu_service.data import Batch
from gpu_service.device import Device
from gpu_service.errors import BadRequest
from gpu_service.layers import TensorInfo, gpt2_tensors, llama_tensors
from gpu_service.learn_text import summed_loss
from gpu_service.lora import Lora
from gpu_service.models import FAMILIES, Base, read_base
from gpu_service.rows import Rows
from tests.gpu_service.test_checkpoints import after, rows_file, same
from tests.gpu_service.test_checkpoints import run as run_until
from tests.gpu_service.test_decoders import VARIANTS, decoder_of, reference, weights_of, whole_logits
from tests.gpu_service.test_train import job, run

__all__ = ["rows_file"]  # a fixture

CPU = torch.device("cpu")
MODELS = ["biases, wide heads", "qwen2: biases on q, k and v only", "gpt2"]
METHODS = [(dora, rslora) for dora in (False, True) for rslora in (False, True)]
IDS = torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(3))


def tensors_of(family: str, weights: dict[str, Tensor]) -> list[TensorInfo]:
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    return gpt2_tensors(shapes) if family == "gpt2" else llama_tensors(shapes)


def random_pairs(weights: dict[str, Tensor], tensors: list[TensorInfo], *, dora: bool, rslora: bool) -> dict[str, Lora]:
    """For every second matrix of the layers; of GPT-2's fused ones all three slices."""
    random = torch.Generator().manual_seed(5)
    pairs = {}
    for i, tensor in enumerate(t for t in tensors if t.quantisable):
        if i % 2 and ".c_attn." not in tensor.name:
            continue
        rank, (out, width) = 4, tensor.shape
        a = torch.randn(rank, width, generator=random) / width**0.5
        b = torch.randn(out, rank, generator=random) / 2
        length = weights[tensor.name].norm(dim=1) * (1 + torch.rand(out, generator=random))
        pairs[tensor.name] = Lora(a, b, lora_scale(rank, 6.0, rslora=rslora), length if dora else None)
    return pairs


class Oracle:
    """peft's model with the same pairs. GPT-2's fused `c_attn` has the three pairs as one of three times the rank."""

    def __init__(self, model: Any, pairs: dict[str, Lora], *, dora: bool, rslora: bool) -> None:
        modules = list(dict.fromkeys(_module(name) for name in pairs))
        fused = {name: 12 for name in modules if name.endswith("c_attn")}
        # Three pairs side by side have the scale of one: alpha grows as the divisor does.
        alpha = dict.fromkeys(fused, 6.0 * (3**0.5 if rslora else 3))
        config = peft.LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=modules,
            rank_pattern=fused,
            alpha_pattern=alpha,
            use_dora=dora,
            use_rslora=rslora,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Conv1D wants fan_in_fan_out, and peft sets it by itself
            self.model = peft.get_peft_model(model, config).eval()
        self._layers = {name: model.get_submodule(name) for name in modules}
        for name, pair in pairs.items():
            for mine, theirs in zip(pair.tensors.values(), self.parts(name), strict=True):
                with torch.no_grad():
                    theirs.copy_(mine)

    def parts(self, name: str, *, gradient: bool = False) -> list[Tensor]:
        """Where in peft's tensors a pair's A, B and magnitude stand."""
        layer: Any = self._layers[_module(name)]
        found = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        if layer.lora_magnitude_vector:
            found.append(layer.lora_magnitude_vector["default"].weight)
        values = [x.grad if gradient else x.data for x in found]
        if ".c_attn." not in name:
            return values
        third = "qkv".index(name.split(".")[-2])
        rank, out = len(values[0]) // 3, len(values[1]) // 3
        if not gradient and third == 0:
            values[1].zero_()  # outside the three blocks
        r, o = slice(third * rank, (third + 1) * rank), slice(third * out, (third + 1) * out)
        return [values[0][r], values[1][o, r], *(x[o] for x in values[2:])]


def _module(name: str) -> str:
    stem = name.removesuffix(".weight")
    if name.startswith("h."):
        stem = f"transformer.{stem}"
    return stem.rsplit(".", 1)[0] if ".c_attn." in name else stem


@pytest.mark.parametrize("variant", MODELS)
@pytest.mark.parametrize(("dora", "rslora"), METHODS)
def test_logits_and_gradients_equal_those_of_peft(variant: str, dora: bool, rslora: bool) -> None:
    config = VARIANTS[variant]
    model, decoder = reference(config), decoder_of(config)
    weights = weights_of(model)
    tensors = tensors_of(FAMILIES[config.model_type], weights)
    pairs = random_pairs(weights, tensors, dora=dora, rslora=rslora)
    oracle = Oracle(model, pairs, dora=dora, rslora=rslora)
    for pair in pairs.values():
        for tensor in pair.tensors.values():
            tensor.requires_grad_()
    rows = Rows(weights, lora=[pairs])
    theirs = oracle.model(IDS).logits
    torch.testing.assert_close(whole_logits(decoder, rows, IDS), theirs, atol=1e-4, rtol=1e-4)
    served = Rows(
        weights,
        lora=[{n: x.on_cpu().served(CPU, torch.float, partial(weights.__getitem__, n)) for n, x in pairs.items()}],
    )
    with torch.no_grad():
        torch.testing.assert_close(whole_logits(decoder, served, IDS), theirs, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(theirs, whole_logits(decoder, Rows(weights), IDS), atol=1e-2)

    learn = torch.ones_like(IDS, dtype=torch.bool)
    batch = Batch(IDS, learn, torch.tensor([IDS.shape[1]] * 2))
    device = Device(CPU, "cpu", None)  # type: ignore[arg-type]
    loss = summed_loss(decoder, rows, batch, 0, device)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.functional.cross_entropy(theirs[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum").backward()  # type: ignore[no-untyped-call]
    for name, pair in pairs.items():
        for mine, reference_gradient in zip(pair.tensors.values(), oracle.parts(name, gradient=True), strict=True):
            assert mine.grad is not None
            scale = float(reference_gradient.abs().max())
            torch.testing.assert_close(mine.grad, reference_gradient, atol=1e-4 * scale, rtol=1e-3, msg=name)


def served_pairs(base: Base, *, dora: bool) -> dict[str, Lora]:
    weights = {t.name: base.whole(t.name) for t in base.source.tensors}
    pairs = random_pairs(weights, list(base.source.tensors), dora=dora, rslora=False)
    return {n: x.served(CPU, torch.float, partial(base.whole, n)) for n, x in pairs.items()}


def merged(base: Base, pairs: dict[str, Lora]) -> dict[str, Tensor]:
    """Weights with DoRA worked into them, by its formula."""
    weights = {t.name: base.whole(t.name) for t in base.source.tensors}
    for name, pair in random_pairs(weights, list(base.source.tensors), dora=True, rslora=False).items():
        assert pair.magnitude is not None
        whole = weights[name] + pair.scale * pair.b @ pair.a
        weights[name] = whole * (pair.magnitude / whole.norm(dim=1))[:, None]
    assert pairs.keys() <= weights.keys()
    return weights


@pytest.mark.parametrize("held", ["none", "8bit", "4bit"])
def test_dora_lora_and_base_rows_share_a_batch_over_any_base(held: wire.Quantize, tiny: Base, cpu: Device) -> None:
    base = read_base(tiny.source, cpu, held)
    dora, lora = served_pairs(base, dora=True), served_pairs(base, dora=False)
    decoder = decoder_of(tiny.source.config)
    ids = IDS[:1].expand(5, -1)
    adapters = [dora, None, lora, dora, None]
    with torch.no_grad():
        mixed = whole_logits(decoder, Rows(base.weights, quantized=base.quantized, lora=adapters), ids)
        for row, adapter in enumerate(adapters):
            alone = whole_logits(decoder, Rows(base.weights, quantized=base.quantized, lora=[adapter]), ids[:1])
            torch.testing.assert_close(mixed[row], alone[0], atol=1e-4, rtol=1e-4)
        assert torch.equal(mixed[1], whole_logits(decoder, Rows(base.weights, quantized=base.quantized), ids)[1])
        expected = whole_logits(decoder, Rows(merged(base, dora)), ids[:1])
        torch.testing.assert_close(mixed[0], expected[0], atol=1e-3, rtol=1e-3)


DORA = wire.LayerSpec(method="dora", layers="last:2", rank=4)


@pytest.mark.parametrize("held", ["none", "4bit"])
def test_dora_begins_as_no_change_and_learns(
    held: wire.Quantize, tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    base = read_base(tiny.source, cpu, held)
    wanted = job(tiny, cpu, rows_file, tmp_path, DORA, learning_rate=1e-2, n_epochs=4)
    losses, trained = run(wanted, base, cpu)
    plain, _ = run(
        job(tiny, cpu, rows_file, tmp_path, DORA.model_copy(update={"method": "lora"}), n_epochs=1), base, cpu
    )
    assert losses[0] == pytest.approx(plain[0], rel=1e-4)
    assert losses[-1] < 0.85 * losses[0]
    for name, pair in trained.lora.items():
        assert pair.magnitude is not None
        assert not torch.allclose(pair.magnitude, base.whole(name).float().norm(dim=1), rtol=1e-4), name


def test_a_dora_run_resumed_from_its_files_is_the_one_that_never_stopped(
    tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    wanted = job(tiny, cpu, rows_file, tmp_path / "rows", DORA)
    losses, trained = run_until(wanted, tiny, cpu)
    before, state = run_until(wanted, tiny, cpu, stop=after(4))
    assert isinstance(state, train.State)
    cache = BlobCache(tmp_path / "here", 2**30)
    saved = checkpoints.save(cache, "a" * 64, Stored(state, wanted.plan, 1.0, "cpu fp32", 1.0))
    found = checkpoints.load(saved, lambda ref: cache.path(ref.sha256) or Path(), "a" * 64, wanted.selection)
    rest, resumed = run_until(wanted, tiny, cpu, start=found.state)
    assert before + rest == losses
    assert isinstance(trained, train.Trained)
    assert isinstance(resumed, train.Trained)
    assert same(trained, resumed)
    assert all(
        torch.equal(x.tensors["lora_magnitude_vector"], resumed.lora[n].tensors["lora_magnitude_vector"])
        for n, x in trained.lora.items()
    )


def test_a_spec_says_dora_and_rslora_and_full_has_neither(tiny: Base) -> None:
    def select(**spec: object) -> layers.Selection:
        return layers.select(tiny.source.tensors, [wire.LayerSpec.model_validate(spec)], tied=True)

    [target, *_] = select(method="dora", parts=["attn.q"], rank=4, alpha=6.0, rslora=True).lora
    assert (target.dora, target.rslora, target.scale) == (True, True, 3.0)
    assert target.n_params == 4 * (64 + 64) + 64
    with pytest.raises(BadRequest, match="leave it out with method full"):
        select(method="full", rslora=True)
    with pytest.raises(BadRequest, match="dora adapts the matrices"):
        select(method="dora", parts=["norm"])
