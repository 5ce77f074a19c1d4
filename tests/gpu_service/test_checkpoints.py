"""A run that stops and goes on elsewhere is the run that never stopped, bit for bit; what is damaged is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import wire
from demo import gpt2
from gpu_service import checkpoints, decoder, layers, learn_text, optimizer, train
from gpu_service import plan as plans
from gpu_service.artifacts import BlobCache
from gpu_service.checkpoints import Stored
from gpu_service.device import Device
from gpu_service.errors import BadCheckpoint
from gpu_service.models import Base, Models
from tests.gpu_service.test_train import FULL, LORA, ROWS, job

JOB = "a" * 64


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in ROWS))
    return file


def run(
    wanted: learn_text.TextJob,
    base: Base,
    cpu: Device,
    start: train.State | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[list[tuple[int, float]], train.State | train.Trained]:
    """Losses by step, training and validation alike, and what the run ended with: a state where `stop` had it."""
    losses: list[tuple[int, float]] = []
    model = decoder.build(base.source.family, base.source.config, cpu.torch)
    for item in learn_text.run(wanted, base, model, cpu, start=start, wanted=stop):
        if isinstance(item, train.State | train.Trained):
            return losses, item
        if not isinstance(item, train.Progress):
            continue
        losses += [(item.step, loss) for loss in (item.train_loss, item.valid_loss) if loss is not None]
    raise AssertionError("a run ends with what it trained")


def after(asked: int) -> Callable[[], bool]:
    """Yes when asked for the so-manieth time."""
    left = iter(range(asked - 1, -1, -1))
    return lambda: next(left, 1) == 0


def stored(state: train.State, plan: plans.Plan) -> Stored:
    return Stored(state, plan, elapsed_s=1.5, made_on="cpu fp32", made_at=1.0)


def same(one: train.Trained, other: train.Trained) -> bool:
    full = all(torch.equal(tensor, other.full[name]) for name, tensor in one.full.items())
    lora = all(
        torch.equal(tensor, other.lora[name].tensors[side])
        for name, pair in one.lora.items()
        for side, tensor in pair.tensors.items()
    )
    return full and lora and one.tokens == other.tokens


DORA = wire.LayerSpec(method="dora", layers="last:1", rank=2)
PACKED: dict[str, Any] = {"optimizer": "adamw_8bit", "packing": True, "early_stop_patience": 2, "schedule": "cosine"}
KINDS: dict[str, tuple[wire.LayerSpec, dict[str, Any]]] = {
    "lora": (LORA, {}),
    "full": (FULL, {"weight_decay": 0.1, "activation_checkpointing": True}),
    "dora": (DORA, {"early_stop_patience": 1, "learning_rate": 0.3}),
    "8bit": (wire.LayerSpec(method="full", parts=["mlp"], layers="last:1"), PACKED),
}


@pytest.fixture(scope="module")
def straight() -> dict[str, Any]:
    """Runs that were never disturbed, by kind."""
    return {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asked", [2, 6, 8, 13])
def test_a_run_resumed_from_its_files_is_the_run_that_never_stopped_to_the_bit(
    kind: str, asked: int, tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path, straight: dict[str, Any]
) -> None:
    """Accumulation and validation included; the moments fall within, right before and right after validations."""
    spec, more = KINDS[kind]
    wanted = job(tiny, cpu, rows_file, tmp_path / "rows", spec, micro_batch_rows=3, **more)
    wanted = replace(wanted, validation=wanted.store)
    if kind not in straight:
        straight[kind] = run(wanted, tiny, cpu)
    losses, trained = straight[kind]
    before, state = run(wanted, tiny, cpu, stop=after(asked))
    assert isinstance(state, train.State)
    saved = checkpoints.save(BlobCache(tmp_path / "here", 2**30), JOB, stored(state, wanted.plan))
    cache = BlobCache(tmp_path / "here", 2**30)  # as another process would
    torch.rand(asked)  # random state of somebody else
    found = checkpoints.load(saved, lambda ref: cache.path(ref.sha256) or Path(), JOB, wanted.selection)
    assert found.plan == wanted.plan
    rest, resumed = run(wanted, tiny, cpu, start=found.state)
    assert before + rest == losses
    assert isinstance(trained, train.Trained)
    assert isinstance(resumed, train.Trained)
    assert same(trained, resumed)
    assert resumed.course.told() == trained.course.told()


@pytest.mark.parametrize("spec", [LORA, wire.LayerSpec(method="full", layers="last:2")], ids=["lora", "full"])
def test_dropout_goes_on_where_it_was(spec: wire.LayerSpec, cpu: Device, rows_file: Path, tmp_path: Path) -> None:
    """The demo GPT-2 drops a share of its activations: each step's losses depend on the random state."""
    folder = Path(gpt2.__file__).parent / "model"
    base = Models((f"demo-gpt2={folder}",), cpu).load("demo-gpt2")
    assert base.source.config.resid_pdrop > 0
    wanted = job(base, cpu, rows_file, tmp_path / "rows", spec, n_epochs=1, micro_batch_rows=2)
    losses, trained = run(wanted, base, cpu)
    before, state = run(wanted, base, cpu, stop=after(2))
    assert isinstance(state, train.State)
    cache = BlobCache(tmp_path / "blobs", 2**30)
    saved = checkpoints.save(cache, JOB, stored(state, wanted.plan))
    found = checkpoints.load(saved, lambda ref: cache.path(ref.sha256) or Path(), JOB, wanted.selection)
    rest, resumed = run(wanted, base, cpu, start=found.state)
    assert before + rest == losses
    assert isinstance(trained, train.Trained)
    assert isinstance(resumed, train.Trained)
    assert same(trained, resumed)
    found.state.tensors[train.CPU_RANDOM] = torch.Generator().manual_seed(99).get_state()
    other, _ = run(wanted, base, cpu, start=found.state)
    assert other != rest, "without the random state the losses would differ: the test would prove nothing"


def test_a_state_is_a_copy_that_further_steps_leave_alone(
    tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    wanted = job(tiny, cpu, rows_file, tmp_path, FULL)
    model = decoder.build(tiny.source.family, tiny.source.config, cpu.torch)
    states: list[train.State] = []
    copies: list[dict[str, torch.Tensor]] = []
    for item in learn_text.run(wanted, tiny, model, cpu, wanted=lambda: True):
        if isinstance(item, train.State):
            states.append(item)
            copies.append({name: tensor.clone() for name, tensor in item.tensors.items()})
    assert len(states) == wanted.plan.total_steps
    for state, copy in zip(states, copies, strict=True):
        assert all(torch.equal(tensor, copy[name]) for name, tensor in state.tensors.items())


@pytest.fixture
def saved(tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path) -> tuple[wire.Checkpoint, learn_text.TextJob]:
    wanted = job(tiny, cpu, rows_file, tmp_path / "rows", LORA)
    _, state = run(wanted, tiny, cpu, stop=after(2))
    assert isinstance(state, train.State)
    cache = BlobCache(tmp_path / "blobs", 2**30)
    return checkpoints.save(cache, JOB, stored(state, wanted.plan)), wanted


def test_a_damaged_or_truncated_chunk_is_refused(
    saved: tuple[wire.Checkpoint, learn_text.TextJob], tmp_path: Path
) -> None:
    checkpoint, wanted = saved
    chunk = tmp_path / "blobs" / checkpoint.files[0].chunks[0].sha256
    whole = chunk.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (bytes(flipped), whole[:-1], b""):
        chunk.write_bytes(content)
        with pytest.raises(BadCheckpoint, match="damaged"):
            checkpoints.load(checkpoint, lambda ref: tmp_path / "blobs" / ref.sha256, JOB, wanted.selection)


def test_another_jobs_checkpoint_is_refused(
    saved: tuple[wire.Checkpoint, learn_text.TextJob], tiny: Base, tmp_path: Path
) -> None:
    checkpoint, wanted = saved
    at = lambda ref: tmp_path / "blobs" / ref.sha256  # noqa: E731
    with pytest.raises(BadCheckpoint, match="another job"):
        checkpoints.load(checkpoint, at, "b" * 64, wanted.selection)
    other = layers.select(tiny.source.tensors, [FULL], tied=tiny.source.tied)
    with pytest.raises(BadCheckpoint, match="disagree"):
        checkpoints.load(checkpoint, at, JOB, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(
    value: float, tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    wanted = job(tiny, cpu, rows_file, tmp_path / "rows", LORA)
    _, state = run(wanted, tiny, cpu, stop=after(1))
    assert isinstance(state, train.State)
    next(tensor for name, tensor in state.tensors.items() if name.startswith(optimizer.FIRST)).view(-1)[0] = value
    cache = BlobCache(tmp_path / "blobs", 2**30)
    checkpoint = checkpoints.save(cache, JOB, stored(state, wanted.plan))
    with pytest.raises(BadCheckpoint, match="finite"):
        checkpoints.load(checkpoint, lambda ref: cache.path(ref.sha256) or Path(), JOB, wanted.selection)


def test_a_job_is_known_by_all_that_would_change_its_result() -> None:
    spec = wire.JobSpec(
        job_id="j",
        base_model="m",
        layers=[wire.LayerSpec()],
        hyperparameters=wire.Hyperparameters(),
        seed=1,
        training_file=wire.FileRef(name="rows", sha256="c" * 64, bytes=3),
    )
    assert checkpoints.job_hash(spec, "r") == checkpoints.job_hash(spec, "r")
    changed = [spec.model_copy(update={"seed": 2}), spec.model_copy(update={"layers": [LORA]})]
    assert len({checkpoints.job_hash(s, r) for s in [spec, *changed] for r in ("r", "q")}) == 6


def test_the_interval_grows_with_the_cost_and_one_falls_before_the_announced_end() -> None:
    assert checkpoints.interval_s(0.0, None) == checkpoints.SHORTEST_S
    assert checkpoints.interval_s(2.0, None) == pytest.approx(120)
    assert checkpoints.interval_s(1e6, None) == checkpoints.LONGEST_S
    assert checkpoints.interval_s(1e6, 300.0) == 300.0 - checkpoints.BEFORE_END_S
