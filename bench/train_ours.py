"""Our side of bench/train.py: one run of the training loop, in a process of its own.

Started with a JSON file that says what to do; the last line that it prints says what came of it. It calls what a job
calls, without relay, worker and events.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

import wire
from gpu_service import decoder as decoders
from gpu_service import device as devices
from gpu_service import layers, models, train
from gpu_service import plan as plans
from gpu_service.data import TokenStore
from gpu_service.rows import Rows
from gpu_service.settings import Settings


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(spec["threads"])
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
    )
    plan = plans.resolve(wanted, source, selection, store, length, device)
    job = train.Job(source, selection, plan, store, None, 5)
    base = models.read_base(source, device)
    decoder = decoders.build(source.family, source.config, device.torch)
    wall, cpu = time.perf_counter(), time.process_time()
    trained = None
    for item in train.run(job, base, decoder, device):
        if isinstance(item, train.Trained):
            trained = item
    assert trained
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {"wall_s": wall, "cpu_s": cpu, "rss_bytes": peak, "steps": plan.total_steps, "gemm": "torch's default"}
    rows = Rows(base.weights, full=trained.full, lora=[trained.lora])
    print(json.dumps(result | {"loss": validation(decoder, rows, checked, device)}))


@torch.no_grad()
def validation(decoder: Any, rows: Rows, store: TokenStore, device: devices.Device) -> float:
    """Cross entropy a labelled token, row by row."""
    losses = [train.summed_loss(decoder, rows, store.batch([i], pad_id=0), 0, device) for i in range(len(store))]
    return float(torch.stack(losses).sum()) / store.report.learned_tokens


if __name__ == "__main__":
    main()
