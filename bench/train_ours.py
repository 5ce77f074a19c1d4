"""Our side of bench/train.py: one run of the training loop, in a process of its own.

Started with a JSON file that says what to do; the last line that it prints says what came of it. It calls what a job
calls, without relay, worker and events.
"""

import gc
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

import wire
from gpu_service import costs, layers, learn_text, models, prepare, train
from gpu_service import decoder as decoders
from gpu_service import device as devices
from gpu_service import plan as plans
from gpu_service.data import TokenStore
from gpu_service.prefix import Chosen, Shelf
from gpu_service.rows import Rows
from gpu_service.settings import Settings
from gpu_service.speed import token_s


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(spec["threads"])
    if spec.get("like_for_like"):
        torch.backends.mkldnn.set_flags(_enabled=False)  # type: ignore[no-untyped-call]  # as torch multiplies by itself
    onednn = devices.prefers_onednn() and torch.backends.mkldnn.enabled
    device = devices.choose(Settings(device="cpu", precision=spec["precision"]))
    source = models.find(spec["model"])
    selection = layers.select(
        source.tensors,
        [wire.LayerSpec(layers=f"{spec['first_layer']}-{source.n_layers - 1}", rank=spec["rank"])],
        tied=source.tied,
    )
    folder = Path(spec["folder"])
    length = spec["max_length"]
    store = TokenStore.build(Path(spec["rows"]), folder / "rows", source.tokenizer, length)
    checked = TokenStore.build(Path(spec["validation_rows"]), folder / "validation", source.tokenizer, length)
    wanted = wire.Hyperparameters(
        n_epochs=spec["epochs"],
        batch_size=spec["batch"],
        learning_rate=spec["learning_rate"],
        max_length_tokens=length,
        stream_layers=spec["streamed"],
        prefix_cache=True if spec["streamed"] else spec["prefix_cache"],
    )
    plan = plans.resolve(wanted, source, selection, store, length, device)
    job = learn_text.TextJob(source, selection, plan, store, None, 5)
    base = None if spec["streamed"] else models.read_base(source, device)
    decoder = decoders.build(source.family, source.config, device.torch)
    expected_s = expected(job, base, decoder, device) if base else None
    wall, cpu = time.perf_counter(), time.process_time()
    trained = None
    prefix_s, most_held = 0.0, 0

    def resident() -> tuple[models.Base, decoders.Decoder]:
        assert base
        return base, decoder

    for item in prepare.steps(job, device, Shelf(folder / "prefix", 2**40), resident):
        if spec["streamed"]:
            most_held = max(most_held, held_bytes(source))
        if isinstance(item, Chosen):
            prefix_s = time.perf_counter() - wall
            print(f"prefix {'kept' if item.cached else 'not kept'}: {item.why}")
        if isinstance(item, train.Trained):
            trained = item
    assert trained
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    whole = source.weights_bytes("none", device.precision.dtype.itemsize)
    result = {
        "wall_s": wall,
        "cpu_s": cpu,
        "prefix_s": prefix_s,
        "expected_s": expected_s,
        "rss_bytes": peak,
        "steps": plan.total_steps,
        "weights_ratio": (most_held if spec["streamed"] else whole) / whole,
        "gemm": "oneDNN" if onednn else "MKL (torch's default for fp32)",
    }
    base = base or models.read_base(source, device)
    rows = Rows(base.weights, full=trained.full, lora=[trained.lora])
    print(json.dumps(result | {"loss": validation(decoder, rows, checked, device)}))


def expected(job: learn_text.TextJob, base: models.Base, decoder: Any, device: devices.Device) -> float:
    """Seconds, as a preview says it before."""
    source, rows = job.source, Rows(base.weights)
    speed = costs.forward_flops(source.tensors, tied=source.tied) / token_s(decoder, rows, device.torch)
    flops = costs.training_flops(job.selection, source.tensors, tied=source.tied)
    tokens = int(job.store.lengths.sum())
    on_disk = costs.prefix_bytes(job.selection, source.shape, tokens, device.precision.dtype.itemsize)
    return costs.training_time(flops, tokens, job.plan.n_epochs, speed, on_disk, job.plan.prefix_cache).seconds


def held_bytes(source: models.Source) -> int:
    """Of weights, wherever they are held: every tensor in this process that has the shape of one, and no gradient."""
    shapes = {t.shape for t in source.tensors}
    found = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and tuple(x.shape) in shapes]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found if not x.requires_grad}
    return sum(storages.values())


@torch.no_grad()
def validation(decoder: Any, rows: Rows, store: TokenStore, device: devices.Device) -> float:
    """Cross entropy a labelled token, row by row."""
    losses = [learn_text.summed_loss(decoder, rows, store.batch([i], pad_id=0), 0, device) for i in range(len(store))]
    return float(torch.stack(losses).sum()) / store.report.learned_tokens


if __name__ == "__main__":
    main()
