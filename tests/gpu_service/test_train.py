"""The training loop on the tiny model: what is trained, what stays, and what chat beside it changes (nothing)."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import wire
from gpu_service import layers, learn_text, train
from gpu_service import plan as plans
from gpu_service.data import TokenStore
from gpu_service.device import DTYPES, Device, Precision
from gpu_service.errors import BadRequest
from gpu_service.llama import Llama
from gpu_service.models import Base
from gpu_service.sampling import Sampling
from gpu_service.text import Finish
from gpu_service.worker import Generation, Worker

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"Say {n} times {n}"},
            {"role": "assistant", "content": f"It is {n * n}!"},
        ]
    }
    for n in range(12)
]


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in ROWS))
    return file


def job(
    base: Base, cpu: Device, rows_file: Path, folder: Path, *specs: wire.LayerSpec, **wanted: object
) -> learn_text.TextJob:
    source = base.source
    selection = layers.select(source.tensors, specs, tied=source.tied)
    store = TokenStore.build(rows_file, folder, source.tokenizer, 64)
    hyperparameters = wire.Hyperparameters.model_validate({"n_epochs": 3, "batch_size": 4, **wanted})
    plan = plans.resolve(hyperparameters, source, selection, store, 64, cpu)
    return learn_text.TextJob(source, selection, plan, store, None, seed=5)


def run(job: learn_text.TextJob, base: Base, device: Device) -> tuple[list[float], train.Trained]:
    items = list(learn_text.run(job, base, Llama(base.source.config, device.torch), device))
    trained = items[-1]
    assert isinstance(trained, train.Trained)
    losses = [i.train_loss for i in items if isinstance(i, train.Progress) and i.train_loss is not None]
    return losses, trained


LORA = wire.LayerSpec(layers="last:2", rank=4)
FULL = wire.LayerSpec(method="full", parts=["mlp.down", "norm"], layers="2-3")


@pytest.mark.parametrize("spec", [LORA, FULL, wire.LayerSpec(method="full", parts=["embed", "norm.final"])])
def test_only_the_selected_tensors_change_and_the_loss_falls(
    spec: wire.LayerSpec, tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.weights.items()}
    wanted = job(tiny, cpu, rows_file, tmp_path, spec, learning_rate=3e-3, n_epochs=8)
    losses, trained = run(wanted, tiny, cpu)
    assert losses[-1] < 0.8 * losses[0]
    assert set(trained.full) == {t.name for t in wanted.selection.full}
    assert set(trained.lora) == {t.tensor.name for t in wanted.selection.lora}
    assert all(bool(pair.b.any()) for pair in trained.lora.values())
    assert all(torch.equal(tensor, tiny.weights[name]) for name, tensor in before.items()), "the base was touched"


def test_the_same_seed_gives_the_same_losses_and_weights(
    tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    results = [run(job(tiny, cpu, rows_file, tmp_path, LORA), tiny, cpu) for _ in range(2)]
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1].lora[n].b, results[1][1].lora[n].b) for n in results[0][1].lora)


def test_how_a_batch_is_cut_into_micro_batches_does_not_change_its_loss(
    tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    whole, _ = run(job(tiny, cpu, rows_file, tmp_path, FULL, micro_batch_rows=4), tiny, cpu)
    cut, _ = run(job(tiny, cpu, rows_file, tmp_path, FULL, micro_batch_rows=1), tiny, cpu)
    assert whole == pytest.approx(cut, rel=1e-4)


async def test_chatting_beside_a_training_run_does_not_change_its_losses(
    worker: Worker, tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    """One run alone, one while five people chat, sampled and seeded and with dials; and the chat really goes on."""
    alone, _ = run(job(tiny, cpu, rows_file, tmp_path, LORA, micro_batch_rows=2), tiny, cpu)
    beside: list[float] = []
    finished_meanwhile = 0
    generation = Generation("tiny", None, [1, 2, 3], Sampling(max_tokens=5, temperature=1.0), None)
    async for item in worker.train(job(tiny, cpu, rows_file, tmp_path, LORA, micro_batch_rows=2)):
        if isinstance(item, train.Progress) and item.train_loss is not None:
            beside.append(item.train_loss)
            async for piece in worker.generate(generation):
                finished_meanwhile += isinstance(piece, Finish)
    assert beside == alone
    assert finished_meanwhile == len(alone)


async def test_a_run_whose_reader_leaves_stops_and_the_next_one_runs(
    worker: Worker, tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    abandoned = worker.train(job(tiny, cpu, rows_file, tmp_path, LORA, n_epochs=100))
    await anext(abandoned)
    await abandoned.aclose()  # type: ignore[attr-defined]
    items = [item async for item in worker.train(job(tiny, cpu, rows_file, tmp_path, LORA))]
    assert isinstance(items[-1], train.Trained)


def test_a_loss_that_is_no_number_ends_the_run_and_says_what_to_do(
    tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    poisoned = Base(tiny.source, {**tiny.weights, "model.norm.weight": torch.full((64,), float("nan"))})
    with pytest.raises(train.Diverged, match="lower the learning rate"):
        run(job(tiny, cpu, rows_file, tmp_path, LORA), poisoned, cpu)


def test_validation_loss_is_reported_at_the_end_of_each_epoch(
    tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    wanted = job(tiny, cpu, rows_file, tmp_path, LORA)
    items = list(
        learn_text.run(replace(wanted, validation=wanted.store), tiny, Llama(tiny.source.config, cpu.torch), cpu)
    )
    valid = [i.valid_loss for i in items if isinstance(i, train.Progress) and i.valid_loss is not None]
    assert len(valid) == 4, "one before the first step, and one after each epoch"
    assert valid[-1] < valid[0]


@pytest.mark.parametrize(("name", "scaler"), [("bf16", False), ("fp16", True)])
def test_half_precision_bases_train_with_fp32_copies(
    name: str, scaler: bool, tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    device = Device(cpu.torch, "half", Precision(name, DTYPES[name], scaler, "for the test"))
    half = Base(tiny.source, {n: t.to(DTYPES[name]) for n, t in tiny.weights.items()})
    losses, trained = run(job(tiny, cpu, rows_file, tmp_path, FULL, learning_rate=3e-3), half, device)
    assert losses[-1] < losses[0]
    assert {t.dtype for t in trained.full.values()} == {torch.float32}


def test_auto_is_resolved_to_numbers_that_fit_the_data(
    tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    chosen = job(tiny, cpu, rows_file, tmp_path, LORA, n_epochs="auto", batch_size="auto").plan.chosen()
    left = {name for name, value in chosen.model_dump().items() if value == "auto"}
    assert left <= {"prefix_cache", *wire.OF_PICTURES}  # whether the prefix is kept is measured before the first step
    assert chosen.batch_size == 1
    assert chosen.n_epochs == 10


def test_warm_up_rises_to_the_peak_and_the_rate_ends_near_zero(
    tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    plan = job(tiny, cpu, rows_file, tmp_path, LORA, n_epochs=20, learning_rate=1e-3).plan
    rates = [plan.rate(step) for step in range(plan.total_steps)]
    assert max(rates) == pytest.approx(1e-3)
    assert rates.index(max(rates)) in (plan.warmup_steps - 1, plan.warmup_steps)
    assert 0 < rates[-1] < 0.05e-3


def test_rows_longer_than_the_model_reads_are_refused_by_number(tiny: Base) -> None:
    with pytest.raises(BadRequest, match="512"):
        plans.max_length(513, tiny.source)
