"""A run's state as files and back: safetensors and JSON, cut into chunks that are named by their SHA-256.

Nothing read here is trusted: hashes, shapes, types and numbers are compared with what the job must have before a tensor
reaches the run. Knows no network and no thread.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from pydantic import Field, TypeAdapter, ValidationError

import wire
from gpu_service import plan as plans
from gpu_service import train
from gpu_service.artifacts import BlobCache
from gpu_service.course import Course
from gpu_service.errors import BadCheckpoint
from gpu_service.layers import Selection
from gpu_service.optimizer import Spec

TENSORS, DESCRIPTION = "state.safetensors", "state.json"
_PLAN = TypeAdapter(plans.Plan)
_COURSE = TypeAdapter(Course)


class Description(wire.Message):
    """state.json: whose state it is, and everything of it that is no tensor."""

    format: Literal[2] = 2
    job: wire.Sha256  # `job_hash` of the job that it belongs to
    plan: dict[str, Any]  # plans.Plan
    course: dict[str, Any]  # course.Course
    scaler: dict[str, float]
    elapsed_s: float = Field(ge=0, allow_inf_nan=False)  # spent on training so far, wherever
    made_on: str
    made_at: float  # unix time
    tensors: wire.FileRef


@dataclass(frozen=True)
class Stored:
    """A checkpoint that was read back."""

    state: train.State
    plan: plans.Plan
    elapsed_s: float
    made_on: str
    made_at: float


def job_hash(spec: wire.JobSpec, revision: str) -> str:
    """What must be the same for a state to be this job's: its spec, and the base model's revision."""
    # What says nothing is left out, so that a field which a later version adds changes no job that lacks it.
    told = spec.model_dump(mode="json", exclude={"checkpoints", "rate_factor"}, exclude_defaults=True)
    return hashlib.sha256(json.dumps([told, revision], sort_keys=True).encode()).hexdigest()


def save(cache: BlobCache, job: str, stored: Stored) -> wire.Checkpoint:
    """Cut into chunks that lie in `cache`, each whole or absent. Blocks: it hashes and waits for the disk."""
    state, plan = stored.state, stored.plan
    tensors = _cut(cache, TENSORS, safetensors.torch.save(state.tensors))
    description = Description(
        job=job,
        plan=asdict(plan),
        course=state.course.told(),
        scaler=state.scaler,
        elapsed_s=stored.elapsed_s,
        made_on=stored.made_on,
        made_at=stored.made_at,
        tensors=wire.FileRef(name=TENSORS, sha256=tensors.sha256, bytes=tensors.bytes),
    )
    return wire.Checkpoint(
        step=state.course.step,
        total_steps=plan.total_steps,
        validation_loss=state.course.valid_loss,
        made_on=stored.made_on,
        files=[tensors, _cut(cache, DESCRIPTION, description.model_dump_json().encode())],
    )


def _cut(cache: BlobCache, name: str, content: bytes) -> wire.ChunkedFile:
    view, chunks = memoryview(content), []
    for at in range(0, len(content), wire.MAX_CHUNK_BYTES):
        piece = view[at : at + wire.MAX_CHUNK_BYTES]
        chunks.append(wire.ChunkRef(sha256=cache.put(piece), bytes=len(piece)))
    return wire.ChunkedFile(name=name, sha256=hashlib.sha256(content).hexdigest(), bytes=len(content), chunks=chunks)


def chunks(checkpoint: wire.Checkpoint) -> list[wire.ChunkRef]:
    """Each once."""
    return list({chunk.sha256: chunk for file in checkpoint.files for chunk in file.chunks}.values())


def load(checkpoint: wire.Checkpoint, chunk: Callable[[wire.ChunkRef], Path], job: str, selection: Selection) -> Stored:
    """Read a checkpoint whose chunks are at hand. Raises BadCheckpoint, saying what is wrong with it."""
    files = {file.name: file for file in checkpoint.files}
    if missing := {TENSORS, DESCRIPTION} - files.keys():
        raise BadCheckpoint(f"it lacks {', '.join(sorted(missing))}")
    try:
        told = Description.model_validate_json(_joined(files[DESCRIPTION], chunk))
        plan, course = _PLAN.validate_python(told.plan), _COURSE.validate_python(told.course)
    except ValidationError as exc:
        message, _ = wire.validation_message([dict(error) for error in exc.errors()])
        raise BadCheckpoint(f"{DESCRIPTION} can't be used: {message}") from exc
    if told.job != job:
        raise BadCheckpoint("it is of another job, or of another revision of the base model")
    if told.tensors.sha256 != files[TENSORS].sha256:
        raise BadCheckpoint(f"{TENSORS} is not the file that {DESCRIPTION} was written for")
    if not course.is_sound():
        raise BadCheckpoint(f"{DESCRIPTION} has counts or losses that can't be")
    if course.step != checkpoint.step or course.step > plan.total_steps:
        raise BadCheckpoint(f"it is of step {course.step}, and not of step {checkpoint.step}")
    try:
        tensors = safetensors.torch.load(_joined(files[TENSORS], chunk))
    except (safetensors.SafetensorError, KeyError, ValueError) as exc:
        raise BadCheckpoint(f"{TENSORS} is no safetensors file: {exc}") from exc
    _check(tensors, train.state_specs(selection, plan))
    return Stored(train.State(course, told.scaler, tensors), plan, told.elapsed_s, told.made_on, told.made_at)


def _joined(file: wire.ChunkedFile, chunk: Callable[[wire.ChunkRef], Path]) -> bytes:
    parts = []
    for ref in file.chunks:
        part = chunk(ref).read_bytes()
        if len(part) != ref.bytes or hashlib.sha256(part).hexdigest() != ref.sha256:
            raise BadCheckpoint(f"a chunk of {file.name} is damaged")
        parts.append(part)
    content = b"".join(parts)
    if len(content) != file.bytes or hashlib.sha256(content).hexdigest() != file.sha256:
        raise BadCheckpoint(f"{file.name} is not whole")
    return content


def _check(tensors: dict[str, torch.Tensor], specs: dict[str, Spec]) -> None:
    random = {train.CPU_RANDOM: torch.get_rng_state().shape}
    if odd := (tensors.keys() ^ {*specs, *random}) - {train.CUDA_RANDOM}:
        raise BadCheckpoint(f"{TENSORS} and this job disagree about {min(odd)} ({len(odd)} in all)")
    for key, tensor in tensors.items():
        if key in (train.CPU_RANDOM, train.CUDA_RANDOM):
            if tensor.dtype != torch.uint8 or tensor.shape != random.get(key, tensor.shape):
                raise BadCheckpoint(f"{key} is no state of a random generator")
            continue
        shape, dtype = specs[key]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise BadCheckpoint(f"{key} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}")
        if not bool(tensor.isfinite().all()):
            raise BadCheckpoint(f"{key} has values that are no finite numbers")


# --- when ------------------------------------------------------------------------------------------------------------

LIFETIME_S = 3600.0  # of a free notebook between two failures, where nothing better is known
SHORTEST_S, LONGEST_S = 30.0, 900.0
BEFORE_END_S = 60.0  # the last one begins this long before the runtime's announced end


def interval_s(cost_s: float, left_s: float | None) -> float:
    """Young's rule, sqrt(2 x cost x time between failures), within bounds. https://doi.org/10.1145/361147.361115

    `left_s`: until the announced end of the runtime; one checkpoint falls shortly before it for certain.
    """
    lifetime_s = LIFETIME_S if left_s is None else min(LIFETIME_S, max(left_s, 1.0))
    chosen = min(LONGEST_S, max(SHORTEST_S, math.sqrt(2 * cost_s * lifetime_s)))
    if left_s is not None and left_s > BEFORE_END_S:
        chosen = min(chosen, left_s - BEFORE_END_S)
    return chosen
