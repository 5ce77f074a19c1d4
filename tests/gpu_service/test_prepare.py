"""Before the first step: the prefix that pays is taken, and a streamed run holds only what it trains."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import wire
from gpu_service import decoder as decoders
from gpu_service import layers, learn_text, models, prepare, train
from gpu_service import plan as plans
from gpu_service.data import TokenStore
from gpu_service.device import Device
from gpu_service.errors import BadRequest, OutOfMemory, Withheld
from gpu_service.models import Base, Models
from gpu_service.prefix import Chosen, Shelf
from gpu_service.sampling import Sampling
from gpu_service.settings import Settings
from gpu_service.text import Finish
from gpu_service.worker import Generation, Worker
from tests.conftest import ROOT, TINY

LAST = wire.LayerSpec(layers="last:2", rank=4)


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    file.write_text("\n".join((ROOT / "demo/captain.jsonl").read_text().splitlines()[:8]))
    return file


def job(
    source: models.Source, device: Device, rows_file: Path, folder: Path, spec: wire.LayerSpec = LAST, **asked: object
) -> learn_text.TextJob:
    selection = layers.select(source.tensors, [spec], tied=source.tied)
    store = TokenStore.build(rows_file, folder / "rows", source.tokenizer, 64)
    wanted = wire.Hyperparameters.model_validate({"n_epochs": 2, "batch_size": 4, "micro_batch_rows": 2, **asked})
    plan = plans.resolve(wanted, source, selection, store, 64, device)
    return learn_text.TextJob(source, selection, plan, store, store, seed=5)


def nothing_resident() -> tuple[Base, decoders.Decoder]:
    raise AssertionError("a streamed run loads no whole model")


def ran(steps: Iterator[train.Report]) -> tuple[Chosen, list[float], train.Trained]:
    items = list(steps)
    chosen = next(i for i in items if isinstance(i, Chosen))
    progress = [i for i in items if isinstance(i, train.Progress)]
    losses = [x for i in progress for x in (i.train_loss, i.valid_loss) if x is not None]
    assert isinstance(items[-1], train.Trained)
    return chosen, losses, items[-1]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("spec", [LAST, wire.LayerSpec(method="full", parts=["mlp", "norm.final"], layers="last:1")])
def test_a_streamed_run_equals_the_cached_one_to_the_bit(
    family: str, spec: wire.LayerSpec, tiny: Base, gpt2: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    base = gpt2 if family == "gpt2" else tiny
    decoder = decoders.build(base.source.family, base.source.config, cpu.torch)
    cached = job(base.source, cpu, rows_file, tmp_path, spec, prefix_cache=True)
    streamed = job(base.source, cpu, rows_file, tmp_path, spec, stream_layers=True)
    one = ran(prepare.steps(cached, cpu, Shelf(tmp_path / "a", 10**9), lambda: (base, decoder)))
    other = ran(prepare.steps(streamed, cpu, Shelf(tmp_path / "b", 10**9), nothing_resident))
    assert one[0].cached
    assert other[0].cached
    assert one[1] == other[1]
    assert one[2].full.keys() == other[2].full.keys()
    assert all(torch.equal(tensor, other[2].full[name]) for name, tensor in one[2].full.items())
    assert all(torch.equal(pair.b, other[2].lora[name].b) for name, pair in one[2].lora.items())


def test_a_streamed_run_of_the_demo_model_holds_less_than_half_of_its_weights(
    smol_dir: Path, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    source = models.find(str(smol_dir))
    streamed = job(source, cpu, rows_file, tmp_path, wire.LayerSpec(layers="last:8"), stream_layers=True)
    whole = source.weights_bytes("none", 4)
    held = models.read_base(source, cpu, only=prepare.trained_weights(streamed)).n_bytes
    assert held + 4 * streamed.selection.n_trainable < 0.45 * whole
    stages = [r for _, _, r in prepare.from_checkpoint(source, cpu, "none", 2)()]
    assert len(stages) == 3


def test_a_model_that_does_not_fit_is_streamed_and_one_that_does_is_not(
    tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    source = tiny.source
    store = TokenStore.build(rows_file, tmp_path / "rows", source.tokenizer, 64)
    for layers_wanted, fits, streams in (("last:2", False, True), ("last:2", True, False), ("all", False, False)):
        selection = layers.select(source.tensors, [wire.LayerSpec(layers=layers_wanted)], tied=source.tied)
        plan = plans.resolve(wire.Hyperparameters(), source, selection, store, 64, cpu, fits=fits)
        assert plan.stream_layers is streams
    with pytest.raises(BadRequest, match="layer 0"):
        job(source, cpu, rows_file, tmp_path, wire.LayerSpec(), stream_layers=True)
    with pytest.raises(BadRequest, match="prefix_cache is false"):
        job(source, cpu, rows_file, tmp_path, stream_layers=True, prefix_cache=False)


def test_a_streamed_run_without_room_on_the_disk_says_what_to_change(
    tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    streamed = job(tiny.source, cpu, rows_file, tmp_path, stream_layers=True)
    with pytest.raises(OutOfMemory, match="GPU_PREFIX_BYTES"):
        list(prepare.steps(streamed, cpu, Shelf(tmp_path / "a", 10), nothing_resident))


def test_a_disk_that_fails_meanwhile_leaves_the_run_uncached(
    tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    decoder = decoders.build("llama", tiny.source.config, cpu.torch)
    cached = job(tiny.source, cpu, rows_file, tmp_path, prefix_cache=True)
    (tmp_path / "a").mkdir()
    for wanted in prepare.data_sets(cached, cpu):
        (tmp_path / "a" / wanted.key).write_text("a file where a folder should be")
    chosen, losses, _ = ran(prepare.steps(cached, cpu, Shelf(tmp_path / "a", 10**9), lambda: (tiny, decoder)))
    assert not chosen.cached
    assert "the disk refuses" in chosen.why
    assert losses


def test_a_disk_that_fails_while_it_is_measured_leaves_the_run_uncached(
    tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    decoder = decoders.build("llama", tiny.source.config, cpu.torch)
    undecided = job(tiny.source, cpu, rows_file, tmp_path)
    (tmp_path / "a").write_text("a file where the folder should be")
    chosen, losses, _ = ran(prepare.steps(undecided, cpu, Shelf(tmp_path / "a", 10**9), lambda: (tiny, decoder)))
    assert not chosen.cached
    assert "the disk refuses" in chosen.why
    assert losses


def test_a_cached_run_whose_trial_halved_it_goes_on_to_the_bit(
    tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    """The frozen layers' passes keep the size that they had before the trial, in whatever process."""
    decoder = decoders.build("llama", tiny.source.config, cpu.torch)
    planned = job(tiny.source, cpu, rows_file, tmp_path, prefix_cache=True, micro_batch_rows=4)
    halved = replace(planned, plan=replace(planned.plan, micro_rows=2))
    keys = [[w.key for w in prepare.data_sets(wanted, cpu)] for wanted in (planned, halved)]
    assert keys[0] == keys[1]

    def steps(folder: str, start: train.State | None, stop: bool) -> Iterator[train.Report]:
        shelf = Shelf(tmp_path / folder, 10**9)
        return prepare.steps(halved, cpu, shelf, lambda: (tiny, decoder), start=start, wanted=lambda: stop)

    _, losses, trained = ran(steps("a", None, stop=False))
    state = next(i for i in steps("a", None, stop=True) if isinstance(i, train.State) and i.step == 1)
    _, rest, resumed = ran(steps("b", state, stop=False))
    assert losses[-len(rest) :] == rest
    assert all(torch.equal(pair.b, resumed.lora[name].b) for name, pair in trained.lora.items())


async def test_while_a_model_is_streamed_nobody_is_served_by_it_and_afterwards_everybody_is(
    tiny_dir: Path, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    worker = Worker(Settings(data_dir=tmp_path / "gpu"), cpu, Models((f"{TINY}={tiny_dir}",), cpu))
    worker.start()
    ask = Generation(TINY, None, [1, 2, 3], Sampling(max_tokens=40), None)

    async def answer() -> int:
        return len([piece async for piece in worker.generate(ask) if isinstance(piece, Finish)])

    try:
        early = asyncio.create_task(answer())
        await asyncio.sleep(0)
        source = worker_source(worker)
        streamed = job(source, cpu, rows_file, tmp_path, stream_layers=True)
        refused = 0
        async for item in worker.train(replace(streamed, validation=None)):
            if isinstance(item, Chosen):
                with pytest.raises(Withheld, match="when the job has ended"):
                    await answer()
                refused += 1
        assert refused == 1
        assert await early == 1, "who was being answered is answered to the end"
        assert await answer() == 1
    finally:
        worker.stop()


def worker_source(worker: Worker) -> models.Source:
    return worker._models.source(TINY)
