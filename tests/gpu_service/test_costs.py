"""What is said before a job starts, against what is measured: within a quarter."""

from pathlib import Path
from typing import Any

import pytest
import torch

import wire
from bench import train_table
from gpu_service import artifacts, checkpoints, costs, layers, learn_text, train, trainable
from gpu_service import decoder as decoders
from gpu_service import plan as plans
from gpu_service.data import TokenStore
from gpu_service.device import Device
from gpu_service.models import Base
from gpu_service.prefix import Wanted
from gpu_service.rows import Rows
from tests.conftest import ROOT

CLOSE = 0.25
SPECS = [
    wire.LayerSpec(layers="last:3"),
    wire.LayerSpec(parts=["attn"], layers="last:3"),
    wire.LayerSpec(method="full", parts=["mlp"], layers="last:2"),
    wire.LayerSpec(method="dora", layers="last:2"),
]


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    file.write_text("\n".join((ROOT / "demo/captain.jsonl").read_text().splitlines()[:12]))
    return file


class Kept:
    """Bytes of what autograd keeps: each memory once, weights and trained tensors not counted."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        self._known = {t.untyped_storage().data_ptr() for t in known}
        self._found: dict[int, int] = {}

    def __enter__(self) -> "Kept":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.__exit__(*exc)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        at, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if at not in self._known:
            self._found[at] = size
        return tensor

    @property
    def n_bytes(self) -> int:
        return sum(self._found.values())


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_activations_are_what_autograd_keeps(
    family: str, spec: wire.LayerSpec, smol: Base, gpt2: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    base = smol if family == "llama" else gpt2
    source = base.source
    selection = layers.select(source.tensors, [spec], tied=source.tied)
    store = TokenStore.build(rows_file, tmp_path / "rows", source.tokenizer, 64)
    decoder = decoders.build(source.family, source.config, cpu.torch)
    run = trainable.build(selection, base, 0)
    full, lora = trainable.weights(run)
    rows = Rows(base.weights, full=full, lora=[lora], dropout=True)
    batch = store.batch([0, 1, 2, 3], pad_id=0)
    with Kept([*base.weights.values(), *run.named.values()]) as kept:
        loss = learn_text.summed_loss(decoder, rows, batch, selection.lowest_layer, cpu)
    assert loss.requires_grad
    tokens = batch.ids.shape[1]
    said = source.cost(selection, 4, tokens, 4).activations_bytes
    logits = min(costs.HEAD_CHUNK_TOKENS, int(batch.learn.sum())) * source.config.vocab_size * 4
    # Logits come and go while all else is kept; the estimate supposes a full chunk of them.
    chunk = min(4 * tokens, costs.HEAD_CHUNK_TOKENS) * source.config.vocab_size * 4
    assert said - chunk + logits == pytest.approx(kept.n_bytes + logits, rel=CLOSE)


@pytest.mark.parametrize("more", [{}, {"optimizer": "adamw_8bit"}, {"early_stop_patience": 1}], ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_weights_trained_numbers_and_checkpoints_are_what_is_stored(
    spec: wire.LayerSpec, more: dict[str, Any], tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    source = tiny.source
    selection = layers.select(source.tensors, [spec], tied=source.tied)
    store = TokenStore.build(rows_file, tmp_path / "rows", source.tokenizer, 64)
    wanted = wire.Hyperparameters.model_validate({"n_epochs": 1, "batch_size": 4, "prefix_cache": False, **more})
    plan = plans.resolve(wanted, source, selection, store, 64, cpu)
    job = learn_text.TextJob(source, selection, plan, store, None, seed=5)
    decoder = decoders.build(source.family, source.config, cpu.torch)
    items = list(learn_text.run(job, tiny, decoder, cpu, wanted=lambda: True))
    state = next(item for item in items if isinstance(item, train.State))
    trained = items[-1]
    assert isinstance(trained, train.Trained)
    cost = source.cost(selection, plan.micro_rows, 64, 4)
    assert cost.weights_bytes == tiny.n_bytes
    tensors = [*trained.full.values(), *(t for pair in trained.lora.values() for t in pair.tensors.values())]
    assert cost.adapter_bytes == cost.gradients_bytes == sum(t.nbytes for t in tensors)
    cache = artifacts.BlobCache(tmp_path / "blobs", 10**9)
    stored = checkpoints.save(cache, "0" * 64, checkpoints.Stored(state, plan, 0.0, "here", 0.0))
    moments, keeps_best = plans.MOMENTS_BYTES[plan.optimizer], plan.early_stop_patience > 0
    said = costs.checkpoint_bytes(selection, moments, keeps_best=keeps_best)
    assert said == pytest.approx(sum(f.bytes for f in stored.files), rel=CLOSE)
    held = [t.nbytes for name, t in state.tensors.items() if not name.startswith(("weight.", "random."))]
    cost = source.cost(selection, plan.micro_rows, 64, 4, moments_bytes_per_param=moments, keeps_best=keeps_best)
    assert cost.optimizer_bytes == pytest.approx(sum(held), rel=CLOSE)


def test_a_prefix_takes_the_bytes_that_were_said(tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path) -> None:
    source = tiny.source
    selection = layers.select(source.tensors, [SPECS[0]], tied=source.tied)
    store = TokenStore.build(rows_file, tmp_path / "rows", source.tokenizer, 64)
    tokens = int(store.lengths.sum())
    assert costs.prefix_bytes(selection, source.shape, tokens, 4) == Wanted(source, store, 1, 64, "none", cpu).n_bytes


def test_time_counts_the_frozen_layers_once_where_their_output_is_kept() -> None:
    flops = costs.Flops(below=6e9, above=4e9)
    once = costs.training_time(flops, 1000, 5, 1e12, 2_000_000, asked=None)
    assert once.cached
    assert once.seconds == pytest.approx(6 + 5 * 4, rel=0.01)
    anew = costs.training_time(flops, 1000, 5, 1e12, 2_000_000, asked=False)
    assert not anew.cached
    assert anew.seconds == pytest.approx(5 * (6 + 4))
    assert not costs.training_time(flops, 1000, 5, 1e12, 0, asked=None).cached


def test_the_table_in_the_docs_is_what_the_estimator_says() -> None:
    assert "\n".join(train_table.lines()) in (ROOT / "docs/prefix.md").read_text()
