"""Dials and adapters inside the decoder."""

import torch
from torch import Tensor

from gpu_service import bodies
from gpu_service import decoder as decoders
from gpu_service.llama import Llama
from gpu_service.lora import Lora
from gpu_service.models import Base
from gpu_service.rows import Dials, Rows, join
from tests.gpu_service.test_decoders import whole_logits

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 99, 1234, 7, 42], [8, 1, 2, 3, 4]])


def dials(base: Base, **settings: object) -> Dials | None:
    return bodies.DialsBody.model_validate(settings).for_layers(base.source.tensors, base.source.n_layers)


def random_lora(base: Base, seed: int) -> dict[str, Lora]:
    """Of another rank and other layers with each seed, and strong enough to change the answers."""
    random = torch.Generator().manual_seed(seed)
    rank, lora = 2 + seed % 3, {}
    for tensor in base.source.tensors:
        if tensor.quantisable and (tensor.layer or 0) % 3 == seed % 3:
            a = torch.randn(rank, tensor.shape[1], generator=random) / tensor.shape[1] ** 0.5
            b = torch.randn(tensor.shape[0], rank, generator=random) / tensor.shape[1] ** 0.5
            lora[tensor.name] = Lora(a, b, 0.5)
    return lora


@torch.no_grad()
def logits(base: Base, rows: Rows) -> Tensor:
    return whole_logits(Llama(base.source.config, CPU), rows, IDS)


@torch.no_grad()
def baked(base: Base, *, attn: float = 1.0, mlp: float = 1.0, layers: range) -> dict[str, Tensor]:
    """Scaling what a block adds is scaling its output projection."""
    scale = {f"model.layers.{i}.self_attn.o_proj.weight": attn for i in layers}
    scale |= {f"model.layers.{i}.mlp.down_proj.weight": mlp for i in layers}
    return {name: tensor * scale.get(name, 1.0) for name, tensor in base.weights.items()}


def test_no_dials_and_neutral_dials_are_the_plain_path_bit_for_bit(tiny: Base) -> None:
    plain = logits(tiny, Rows(tiny.weights))
    assert dials(tiny) is None
    neutral = Dials.plain(4)
    assert neutral.neutral
    assert torch.equal(plain, logits(tiny, Rows(tiny.weights, dials=[neutral, neutral])))


def test_gains_equal_weights_with_the_gain_baked_in(tiny: Base) -> None:
    turned = dials(tiny, attn=1.2, mlp=0.7)
    assert turned
    expected = logits(tiny, Rows(baked(tiny, attn=1.2, mlp=0.7, layers=range(4))))
    torch.testing.assert_close(logits(tiny, Rows(tiny.weights, dials=[turned, turned])), expected)


def test_a_band_multiplies_in_its_layers_only(tiny: Base) -> None:
    turned = dials(tiny, bands=[{"layers": "1-2", "attn": 0.5, "mlp": 1.5}])
    assert turned
    assert turned.attn == (1.0, 0.5, 0.5, 1.0)
    expected = logits(tiny, Rows(baked(tiny, attn=0.5, mlp=1.5, layers=range(1, 3))))
    torch.testing.assert_close(logits(tiny, Rows(tiny.weights, dials=[turned, turned])), expected)


def test_eps_equals_a_model_with_that_epsilon(tiny: Base) -> None:
    turned = dials(tiny, eps=10000.0)
    assert turned
    config = type(tiny.source.config)(**{**tiny.source.config.to_dict(), "rms_norm_eps": 1e-2})
    with torch.no_grad():
        expected = whole_logits(Llama(config, CPU), Rows(tiny.weights), IDS)
    torch.testing.assert_close(logits(tiny, Rows(tiny.weights, dials=[turned, turned])), expected)
    assert not torch.allclose(expected, logits(tiny, Rows(tiny.weights)), atol=1e-3)


def test_each_row_has_its_own_dials(tiny: Base) -> None:
    turned = dials(tiny, mlp=0.2)
    assert turned
    mixed = logits(tiny, Rows(tiny.weights, dials=[turned, None]))
    both = logits(tiny, Rows(tiny.weights, dials=[turned, turned]))
    torch.testing.assert_close(mixed[0], both[0])
    assert torch.equal(mixed[1], logits(tiny, Rows(tiny.weights))[1])


def test_lora_equals_weights_with_the_product_merged_and_full_replaces_a_tensor(tiny: Base) -> None:
    random = torch.Generator().manual_seed(3)
    q, down = "model.layers.2.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"
    lora = {q: Lora(torch.randn(4, 64, generator=random), torch.randn(64, 4, generator=random), 0.5)}
    full = {down: torch.randn(64, 128, generator=random) * 0.1}
    merged = {**tiny.weights, **full, q: tiny.weights[q] + 0.5 * lora[q].b @ lora[q].a}
    torch.testing.assert_close(
        logits(tiny, Rows(tiny.weights, full=full, lora=[lora])), logits(tiny, Rows(merged)), atol=1e-4, rtol=1e-4
    )


def test_rows_of_different_adapters_and_none_share_a_batch(tiny: Base) -> None:
    """Different ranks, scales and tensors; each row as if it were alone."""
    random = torch.Generator().manual_seed(4)
    q, up = "model.layers.2.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"

    def pair(rank: int, out: int, scale: float) -> Lora:
        return Lora(torch.randn(rank, 64, generator=random) / 8, torch.randn(out, rank, generator=random) / 8, scale)

    one, two = {q: pair(4, 64, 0.5)}, {q: pair(8, 64, 2.0), up: pair(2, 128, 1.0)}
    ids = IDS[0].expand(4, -1)
    decoder = Llama(tiny.source.config, CPU)
    with torch.no_grad():
        mixed = whole_logits(decoder, Rows(tiny.weights, lora=[one, None, two, one]), ids)
        for row, adapter in enumerate([one, None, two, one]):
            alone = whole_logits(decoder, Rows(tiny.weights, lora=[adapter]), ids[:1])
            torch.testing.assert_close(mixed[row], alone[0], atol=1e-5, rtol=1e-4)
        assert torch.equal(mixed[1], whole_logits(decoder, Rows(tiny.weights), ids)[1]), "base rows are untouched"


@torch.no_grad()
def test_matrices_laid_side_by_side_say_what_they_say_apart(tiny: Base, gpt2: Base) -> None:
    for base in (tiny, gpt2):
        decoder = decoders.build(base.source.family, base.source.config, CPU)
        weights = dict(base.weights)
        joined = join(weights, decoder.same_input())
        assert joined
        for names, both in joined.items():
            for name in names:
                assert weights[f"{name}.weight"].data_ptr() in range(
                    both.weight.data_ptr(), both.weight.data_ptr() + both.weight.nbytes
                ), "it is held twice"
                assert torch.equal(weights[f"{name}.weight"], base.weights[f"{name}.weight"])
        replaced = f"{next(iter(joined))[1]}.weight"  # one of a group
        full = {replaced: base.weights[replaced] * 2}
        for more in ({}, {"lora": [random_lora(base, 0), random_lora(base, 1)]}, {"full": full}):
            apart = whole_logits(decoder, Rows(base.weights, **more), IDS)
            together = whole_logits(decoder, Rows(weights, joined=joined, **more), IDS)
            torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


def test_what_is_not_all_there_is_not_joined() -> None:
    weights = {"a.weight": torch.ones(2, 3), "b.weight": torch.ones(1, 3), "b.bias": torch.ones(1)}
    assert join(weights, [("a", "b"), ("a", "packed")]) == {}
