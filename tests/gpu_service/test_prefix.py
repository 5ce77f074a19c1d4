"""The frozen prefix: what is read from disk gives the losses and gradients of computing it, and is never trusted."""

import json
import os
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import torch

import wire
from gpu_service import decoder as decoders
from gpu_service import layers, learn_text, prefix, train
from gpu_service import plan as plans
from gpu_service.data import TokenStore
from gpu_service.device import Device, Precision
from gpu_service.models import Base
from gpu_service.prefix import Prefixes, Shelf, Wanted
from gpu_service.rows import Rows
from tests.conftest import ROOT

T = TypeVar("T")


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    file.write_text("\n".join((ROOT / "demo/captain.jsonl").read_text().splitlines()[:12]))
    return file


def ended(steps: Generator[prefix.Working, None, T]) -> T:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def wanted(base: Base, device: Device, store: TokenStore, cut: int) -> Wanted:
    return Wanted(base.source, store, cut, 128, "none", device)


def made(shelf: Shelf, base: Base, device: Device, store: TokenStore, cut: int) -> prefix.Prefix:
    decoder = decoders.build(base.source.family, base.source.config, device.torch)
    stages = prefix.resident(Rows(base.weights), cut)
    return ended(shelf.prepare(wanted(base, device, store, cut), decoder, stages))


def job(base: Base, device: Device, rows_file: Path, folder: Path, spec: wire.LayerSpec) -> learn_text.TextJob:
    source = base.source
    selection = layers.select(source.tensors, [spec], tied=source.tied)
    store = TokenStore.build(rows_file, folder / "rows", source.tokenizer, 64)
    asked = wire.Hyperparameters(n_epochs=3, batch_size=4, learning_rate=3e-3, micro_batch_rows=2)
    plan = plans.resolve(asked, source, selection, store, 64, device)
    return learn_text.TextJob(source, selection, plan, store, store, seed=5)


def losses(
    work: learn_text.TextJob, base: Base, device: Device, prefixes: Prefixes
) -> tuple[list[float], dict[str, torch.Tensor]]:
    decoder = decoders.build(base.source.family, base.source.config, device.torch)
    found: list[float] = []
    for item in learn_text.run(work, base, decoder, device, prefix=prefixes):
        if isinstance(item, train.Progress):
            found += [x for x in (item.train_loss, item.gradient_norm, item.valid_loss) if x is not None]
        elif isinstance(item, train.Trained):
            return found, item.full | {name: pair.b for name, pair in item.lora.items()}
    raise AssertionError("it ended without a result")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "spec",
    [
        wire.LayerSpec(layers="last:2", rank=4),
        wire.LayerSpec(method="full", parts=["mlp.down", "norm"], layers="last:1"),
        wire.LayerSpec(method="full", parts=["norm.final"]),
    ],
)
def test_losses_gradients_and_weights_equal_those_of_the_uncached_run(
    family: str, spec: wire.LayerSpec, tiny: Base, gpt2: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    base = gpt2 if family == "gpt2" else tiny
    work = job(base, cpu, rows_file, tmp_path, spec)
    cached = made(Shelf(tmp_path / "shelf", 10**9), base, cpu, work.store, work.selection.lowest_layer)
    plain, weights = losses(work, base, cpu, Prefixes())
    read, from_disk = losses(work, base, cpu, Prefixes(cached, cached))
    assert read == pytest.approx(plain, rel=1e-6, abs=1e-6)
    for name, tensor in weights.items():
        # Not each number: Adam makes a whole step of a gradient that is nothing but rounding.
        assert (from_disk[name] - tensor).norm() <= 1e-4 * tensor.norm(), name


def test_a_sound_file_is_used_again_and_a_damaged_or_foreign_one_is_made_anew(
    tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    store = TokenStore.build(rows_file, tmp_path / "rows", tiny.source.tokenizer, 64)
    shelf = Shelf(tmp_path / "shelf", 10**9)
    first = made(shelf, tiny, cpu, store, 2)
    folder = tmp_path / "shelf" / wanted(tiny, cpu, store, 2).key
    states, description = folder / prefix.STATES, folder / prefix.DESCRIPTION
    whole, told = states.read_bytes(), description.read_bytes()

    def again() -> bool:
        """Whether the file was left as it was."""
        before = states.stat().st_mtime_ns if states.exists() else None
        found = made(shelf, tiny, cpu, store, 2)
        assert states.read_bytes() == whole
        assert torch.equal(found.hidden([3, 0]), first.hidden([3, 0]))
        return states.stat().st_mtime_ns == before

    assert again()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    states.write_bytes(flipped)
    assert not again(), "one flipped bit"
    states.write_bytes(whole[:-1])
    assert not again(), "cut short"
    description.write_text(json.dumps({**json.loads(told), "key": "0" * 64}))
    assert not again(), "of something else"
    description.write_bytes(told[: len(told) // 2])
    assert not again(), "half a description"
    description.unlink()
    assert not again(), "no description: the process died before its end"
    states.unlink()
    assert not again(), "no file"


def test_the_key_differs_with_all_that_the_numbers_follow_from(
    tiny: Base, gpt2: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    store = TokenStore.build(rows_file, tmp_path / "a", tiny.source.tokenizer, 64)
    shorter = TokenStore.build(rows_file, tmp_path / "b", tiny.source.tokenizer, 48)
    plain = wanted(tiny, cpu, store, 2)
    half = replace(cpu, precision=Precision("bf16", torch.bfloat16, False, "for the test"))
    others = [
        replace(plain, cut=1),
        replace(plain, quantize="8bit"),
        replace(plain, store=shorter),
        replace(plain, batch_tokens=64),
        replace(plain, device=half),
        replace(plain, source=replace(tiny.source, revision="another")),
    ]
    assert len({w.key for w in (plain, *others)}) == 1 + len(others)
    assert wanted(tiny, cpu, TokenStore.build(rows_file, tmp_path / "c", tiny.source.tokenizer, 64), 2).key == plain.key


def test_half_precision_comes_back_bit_for_bit(tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path) -> None:
    half = replace(cpu, precision=Precision("bf16", torch.bfloat16, False, "for the test"))
    base = Base(tiny.source, {n: t.bfloat16() for n, t in tiny.weights.items()})
    store = TokenStore.build(rows_file, tmp_path / "rows", tiny.source.tokenizer, 64)
    found = made(Shelf(tmp_path / "shelf", 10**9), base, half, store, 2)
    asked = wanted(base, half, store, 2)
    batch = asked.batches[0]
    decoder = decoders.build("llama", base.source.config, cpu.torch)
    computed = ended(prefix.compute([batch], asked, decoder, prefix.resident(Rows(base.weights), 2)))[0]
    for i, row in enumerate(batch):
        assert torch.equal(found.row(row), computed[i, : int(store.lengths[row])])


def test_the_least_recently_used_leave_when_the_budget_is_spent(
    tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    store = TokenStore.build(rows_file, tmp_path / "rows", tiny.source.tokenizer, 64)
    asked = [wanted(tiny, cpu, store, cut) for cut in (1, 2, 3)]
    shelf = Shelf(tmp_path / "shelf", int(2.5 * asked[0].n_bytes))
    for age, w in zip((300, 100), asked[:2], strict=True):
        made(shelf, tiny, cpu, store, w.cut)
        os.utime(tmp_path / "shelf" / w.key / prefix.DESCRIPTION, (time.time() - age,) * 2)
    torn = tmp_path / "shelf" / "torn"
    torn.mkdir()
    (torn / prefix.STATES).write_bytes(b"half")
    assert shelf.room([asked[2]]) is None
    assert {p.name for p in (tmp_path / "shelf").iterdir()} == {asked[1].key}
    assert "GPU_PREFIX_BYTES" in str(Shelf(tmp_path / "small", asked[0].n_bytes - 1).room([asked[0]]))


@pytest.mark.parametrize(
    ("cut", "epochs", "asked", "budget", "cached", "why"),
    [
        (2, 3, False, 10**9, False, "prefix_cache is false"),
        (0, 3, None, 10**9, False, "nothing below is constant"),
        (2, 1, None, 10**9, False, "seen once"),
        (2, 3, None, 10, False, "GPU_PREFIX_BYTES"),
        (2, 3, True, 10, False, "GPU_PREFIX_BYTES"),
        (2, 3, True, 10**9, True, "prefix_cache is true"),
        (2, 3, None, 10**9, False, "saved"),  # of a tiny model: seconds do not come together
    ],
)
def test_whether_the_prefix_is_kept_has_a_reason(
    cut: int,
    epochs: int,
    asked: bool | None,
    budget: int,
    cached: bool,
    why: str,
    tiny: Base,
    cpu: Device,
    rows_file: Path,
    tmp_path: Path,
) -> None:
    store = TokenStore.build(rows_file, tmp_path / "rows", tiny.source.tokenizer, 64)
    decoder = decoders.build("llama", tiny.source.config, cpu.torch)
    stages = prefix.resident(Rows(tiny.weights), cut)
    shelf = Shelf(tmp_path / "shelf", budget)
    chosen = ended(prefix.choose(shelf, [wanted(tiny, cpu, store, cut)], epochs, asked, decoder, stages))
    assert chosen.cached is cached
    assert why in chosen.why


def test_the_formula_weighs_passes_saved_against_the_disk() -> None:
    assert prefix.Costs(forward_s=100, write_s=10, read_s=2).gain_s(epochs=5) == pytest.approx(380)
    assert prefix.Costs(forward_s=1, write_s=10, read_s=2).gain_s(epochs=5) < 0
