"""From a job to its first step: which weights are held for it, and what is computed before the loop begins.

Beside a model that serves, training borrows its weights. A streamed run never holds the frozen layers: they are read
from the checkpoint one at a time, every row passes through, and what stays is what is trained, the last norm and the
head. Either way the loop is the same one.
"""

from collections.abc import Callable, Generator, Iterator
from functools import partial

import torch

import wire
from gpu_service import costs, learn_text, prefix, train
from gpu_service import decoder as decoders
from gpu_service.decoder import Decoder
from gpu_service.device import Device
from gpu_service.errors import BadRequest, OutOfMemory
from gpu_service.layers import TensorInfo
from gpu_service.learn_text import TextJob
from gpu_service.models import Base, Source, read_base
from gpu_service.prefix import Chosen, Prefixes, Shelf, Stages, Wanted, Working
from gpu_service.rows import Rows

GROUP_SHARE = 0.25  # of the free memory, for hidden states on their way through streamed layers


def steps(
    job: TextJob,
    device: Device,
    shelf: Shelf,
    resident: Callable[[], tuple[Base, Decoder]],
    *,
    start: train.State | None = None,
    wanted: Callable[[], bool] = lambda: False,
) -> Iterator[train.Report]:
    """All slices of a run. `resident` loads the whole model, and is not called for a streamed run.

    `Chosen` comes once, before the first step, and says whether the frozen prefix is read from disk.
    """
    torch.manual_seed(job.seed)
    if job.plan.stream_layers:
        decoder = decoders.build(job.source.family, job.source.config, device.torch)
        prefixes = yield from _streamed(job, decoder, device, shelf)
        base = read_base(job.source, device, job.selection.quantize, only=trained_weights(job))
        yield from learn_text.run(job, base, decoder, device, prefix=prefixes, start=start, wanted=wanted)
    else:
        base, decoder = resident()
        make = partial(_beside, job, base, decoder, device, shelf)
        yield from learn_text.run(job, base, decoder, device, prefix=make, start=start, wanted=wanted)


def data_sets(job: TextJob, device: Device) -> list[Wanted]:
    """For the training data, and for the validation data where there is some."""
    cut, tokens = job.selection.lowest_layer, (job.plan.prefix_rows or job.plan.micro_rows) * job.store.report.longest
    stores = [job.store, *([job.validation] if job.validation else [])]
    return [Wanted(job.source, store, cut, tokens, job.selection.quantize, device) for store in stores]


def _beside(
    job: TextJob, base: Base, decoder: Decoder, device: Device, shelf: Shelf
) -> Generator[Chosen | Working, None, Prefixes]:
    sets, plan = data_sets(job, device), job.plan
    stages = prefix.resident(Rows(base.weights, quantized=base.quantized, dropout=True), job.selection.lowest_layer)
    if _begins_below(job):
        chosen = Chosen(False, "the tuned model that it begins at changes the frozen layers")
        yield chosen
        return Prefixes()
    found = []
    try:
        chosen = yield from prefix.choose(shelf, sets, plan.n_epochs, plan.prefix_cache, decoder, stages)
        for each in sets if chosen.cached else []:
            found.append((yield from shelf.prepare(each, decoder, stages)))
    except OSError as exc:
        chosen, found = Chosen(False, f"the disk refuses: {exc.strerror or exc}"), []
    yield chosen
    return Prefixes(*found)


def _streamed(
    job: TextJob, decoder: Decoder, device: Device, shelf: Shelf
) -> Generator[Chosen | Working, None, Prefixes]:
    """Raises OutOfMemory where the disk can't hold what the memory shall not."""
    if _begins_below(job):
        raise BadRequest(
            "The tuned model that the job begins at changes layers below the lowest that is trained, and streamed "
            "layers are the base model's: train from the lowest of those upwards, or set stream_layers to false.",
            param="hyperparameters",
        )
    sets = data_sets(job, device)
    try:
        if obstacle := shelf.room(sets):
            raise OutOfMemory(_no_room(obstacle))
        stages = from_checkpoint(job.source, device, job.selection.quantize, job.selection.lowest_layer)
        group_bytes = min(prefix.GROUP_BYTES, int(GROUP_SHARE * device.free_bytes()))
        found = []
        for each in sets:
            found.append((yield from shelf.prepare(each, decoder, stages, group_bytes=group_bytes)))
    except OSError as exc:
        raise OutOfMemory(_no_room(f"the disk refuses: {exc.strerror or exc}")) from exc
    yield Chosen(True, "the layers are streamed: what the frozen ones put out is all that is kept of them")
    return Prefixes(*found)


def _begins_below(job: TextJob) -> bool:
    """Whether an earlier fine-tune changes what is frozen here: the base's own prefix is not this run's then."""
    cut, changed = job.selection.lowest_layer, job.begin.meta.tensors if job.begin else {}
    below = (t for t in job.source.tensors if t.belongs_to("embed") or (t.layer is not None and t.layer < cut))
    return any(t.name in changed for t in below)


def _no_room(obstacle: str) -> str:
    return (
        f"Streaming layers keeps what the frozen ones put out on disk: {obstacle}. Use fewer or shorter rows, raise "
        "GPU_PREFIX_BYTES, or set stream_layers to false on a gpu that holds the model."
    )


def from_checkpoint(source: Source, device: Device, quantize: wire.Quantize, cut: int) -> Stages:
    """The embedding and the layers below the cut, each in memory for its own turn only."""

    def part(only: Callable[[TensorInfo], bool]) -> Rows:
        base = read_base(source, device, quantize, only)
        return Rows(base.weights, quantized=base.quantized, dropout=True)

    def stages() -> Iterator[prefix.Stage]:
        yield 0, 0, part(lambda t: t.belongs_to("embed"))
        for layer in range(cut):
            yield layer, layer + 1, part(lambda t, layer=layer: t.layer == layer)  # type: ignore[misc]

    return stages


def trained_weights(job: TextJob) -> Callable[[TensorInfo], bool]:
    """What a streamed run holds: everything from the lowest trained layer upwards, and the head."""
    names = {t.name for t in costs.held(job.source.tensors, job.selection, tied=job.source.tied)}
    return lambda t: t.name in names
