"""What training a selection would cost here, before anything runs: POST /v1/layers/preview. Nothing is kept."""

from typing import Annotated, Any

from pydantic import Field

import wire
from gpu_service import costs, layers
from gpu_service import plan as plans
from gpu_service.bodies import Body
from gpu_service.device import Device
from gpu_service.layers import Selection, TensorInfo
from gpu_service.models import Source
from gpu_service.sd import PictureSource

PREVIEW_ROWS, PREVIEW_TOKENS = 4, 256
FILE_BYTES_PER_TOKEN = 5  # of a JSONL file: about four of text, and what JSON adds


class DataSize(Body):
    """Of a training file, as the relay tells it."""

    rows: Annotated[int, Field(ge=1, le=10**9)]
    bytes: Annotated[int, Field(ge=1, le=10**15)]


class PreviewBody(Body):
    model: str
    layers: wire.LayerSpec | Annotated[list[wire.LayerSpec], Field(min_length=1, max_length=16)]
    data: DataSize | None = None  # with it, the time that training takes
    concept: wire.Concept | None = None  # of a job on pictures; those of a class cost as much as the others
    hyperparameters: wire.Hyperparameters = wire.Hyperparameters()

    @property
    def specs(self) -> list[wire.LayerSpec]:
        return self.layers if isinstance(self.layers, list) else [self.layers]


def of_text(
    source: Source, body: PreviewBody, device: Device, flops_per_s: float | None, *, fits: bool
) -> dict[str, Any]:
    """What a layer spec trains and what it costs.

    `flops_per_s`: of this device with this model, if it is known. `fits`: all of the model is in memory, or could be.
    """
    selection = layers.select(source.tensors, body.specs, tied=source.tied)
    cost, told = _text_cost(source, selection, body, device, flops_per_s, fits)
    return _preview(source.id, selection, cost, told, timed=flops_per_s is not None)


def of_pictures(source: PictureSource, body: PreviewBody, device: Device, picture_s: float | None) -> dict[str, Any]:
    """The same. `picture_s`: of one pass for one picture of the native size, if it is known."""
    selection = layers.select(source.tensors, body.specs, tied=source.tied)
    cost, told = _picture_cost(source, selection, body, device, picture_s)
    return _preview(source.id, selection, cost, told, timed=picture_s is not None)


def _preview(
    model: str, selection: Selection, cost: costs.Estimate, told: dict[str, Any], *, timed: bool
) -> dict[str, Any]:
    notes = [] if timed else ["No time is said: this gpu measures a model's speed when it loads it."]
    return {
        "object": "layers.preview",
        "model": model,
        "summary": costs.summary(selection, cost),
        "selected_tensors": selection.n_tensors,
        "total_tensors": selection.total_tensors,
        "trainable_parameters": selection.n_trainable,
        "total_parameters": selection.total_params,
        "lowest_layer": selection.lowest_layer,
        "memory_bytes": {
            "weights": cost.weights_bytes,
            "gradients": cost.gradients_bytes,
            "optimizer": cost.optimizer_bytes,
            "activations": cost.activations_bytes,
            "adapter": cost.adapter_bytes,
            "total": cost.total,
        },
        **told,
        "notes": [*selection.notes, *notes],
        "tensors": [_chosen(t, t.n_params, "full") for t in selection.full]
        + [_chosen(t.tensor, t.n_params, "dora" if t.dora else "lora") for t in selection.lora],
    }


def _chosen(tensor: TensorInfo, parameters: int, method: str) -> dict[str, Any]:
    named = {"block": tensor.block} if tensor.block else {}
    told = {"name": tensor.name, "shape": list(tensor.shape), "part": tensor.part, "layer": tensor.layer}
    return {**told, **named, "method": method, "parameters": parameters}


def _text_cost(
    source: Source, selection: Selection, body: PreviewBody, device: Device, flops_per_s: float | None, fits: bool
) -> tuple[costs.Estimate, dict[str, Any]]:
    """Memory, and what else a preview tells of a text model."""
    wanted, rows, tokens = body.hyperparameters, PREVIEW_ROWS, PREVIEW_TOKENS
    if body.data:
        longest = plans.max_length(wanted.max_length_tokens, source)
        tokens = min(longest, max(1, body.data.bytes // body.data.rows // FILE_BYTES_PER_TOKEN))  # of a usual row
        rows = plans.micro_rows(wanted, source, selection, plans.batch_rows(wanted, body.data.rows), tokens, device)
    itemsize = device.precision.dtype.itemsize
    epochs, seen = (
        (plans.n_epochs(wanted, body.data.rows), body.data.rows * tokens) if body.data else (1, rows * tokens)
    )
    on_disk = costs.prefix_bytes(selection, source.shape, seen, itemsize)
    times, asked = {}, None if wanted.prefix_cache == "auto" else wanted.prefix_cache
    streamed = plans.streams(wanted, selection, fits)
    if flops_per_s:
        flops = costs.training_flops(selection, source.tensors, tied=source.tied)
        time = costs.training_time(flops, seen, epochs, flops_per_s, on_disk, asked=streamed or asked)
        slice_flops = max(flops.above, flops.below) if time.cached else flops.above + flops.below
        times["chat_pause_s"] = round(rows * tokens * slice_flops / flops_per_s, 2)
        if body.data:
            times["time_s"] = round(time.seconds, 1)
            on_disk = on_disk if time.cached else 0
    memory = plans.Memory(source, selection, device, tokens, wanted)
    moments, keeps_best = plans.MOMENTS_BYTES[memory.optimizer], wanted.early_stop_patience not in ("auto", 0)
    told = {
        # Of the data set that was named, where its output is kept; without data, of one batch.
        "prefix_bytes": on_disk,
        "checkpoint_bytes": costs.checkpoint_bytes(selection, moments, keeps_best=keeps_best),
        **times,
        "batch": {"rows": rows, "tokens": tokens},
        # As "auto" would choose them now.
        "optimizer": memory.optimizer,
        "activation_checkpointing": memory.checkpointing(rows),
        "stream_layers": streamed,
    }
    cost = source.cost(
        selection,
        rows,
        tokens,
        itemsize,
        checkpointing=memory.checkpointing(rows),
        moments_bytes_per_param=moments,
        keeps_best=keeps_best,
        streamed=streamed,
    )
    return cost, told


def _picture_cost(
    source: PictureSource, selection: Selection, body: PreviewBody, device: Device, picture_s: float | None
) -> tuple[costs.Estimate, dict[str, Any]]:
    """The same for a model that makes pictures."""
    in_a_row = plans.pictures_in_a_row(body.concept)
    rows = body.data.rows if body.data else 1
    wanted = body.hyperparameters
    plan = plans.resolve_pictures(wanted, source, selection, rows, device, concept=body.concept)
    cost = source.cost(
        selection,
        plan.micro_rows * in_a_row,
        device.precision.dtype.itemsize,
        resolution=plan.resolution,
        moments_bytes_per_param=plans.MOMENTS_BYTES[plan.optimizer],
        keeps_best=plan.early_stop_patience > 0,
    )
    times = {}
    if picture_s:
        a_slice_s = costs.picture_training_s(picture_s, plan.micro_rows * in_a_row, plan.resolution, source.native)
        times["chat_pause_s"] = round(a_slice_s, 2)
        if body.data:
            times["time_s"] = round(plans.pictures_s(plan, source, rows, picture_s, body.concept), 1)
    told = {
        "checkpoint_bytes": costs.checkpoint_bytes(
            selection, plans.MOMENTS_BYTES[plan.optimizer], keeps_best=plan.early_stop_patience > 0
        ),
        **times,
        "batch": {"rows": plan.micro_rows, "width": plan.resolution, "height": plan.resolution},
        "optimizer": plan.optimizer,
    }
    return cost, told
