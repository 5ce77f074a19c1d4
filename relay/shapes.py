"""How files, jobs, events and models look to a caller, and what a caller may ask for a job.

https://platform.openai.com/docs/api-reference/fine-tuning. Fields of our own stand beside the OpenAI ones.
"""

import secrets
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from sqlalchemy import Row

import wire
from relay import errors
from relay.models import Model

EVENT_PREFIX = "ftevent-"
SUFFIX = "use letters, digits, '-' and '_': it becomes part of the model's name"
MAX_SUFFIX_CHARS = 64
NOTHING: Mapping[str, dict[str, str]] = {}
PUBLIC_STATUS = {"leased": "queued", "finalizing": "running"}  # the others have OpenAI's names


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Supervised(_Asked):
    hyperparameters: wire.Hyperparameters | None = None


class Method(_Asked):
    type: Literal["supervised"]
    supervised: Supervised | None = None


class JobRequest(_Asked):
    """POST /v1/fine_tuning/jobs. Unknown fields are refused by name."""

    model: str = Field(min_length=1, max_length=400)
    training_file: str = Field(min_length=1, max_length=100)
    validation_file: str | None = Field(default=None, max_length=100)
    suffix: str | None = Field(default=None, min_length=1, max_length=MAX_SUFFIX_CHARS)
    seed: int | None = Field(default=None, ge=0, lt=2**31)
    priority: int = Field(default=0, ge=-100, le=100)  # ours: among one's own jobs; it gains nothing on others'
    method: Method | None = None
    hyperparameters: wire.Hyperparameters | None = None  # where the API had them before `method`
    layers: list[wire.LayerSpec] = Field(default=[wire.LayerSpec()], min_length=1, max_length=16)
    sample_prompts: list[wire.SamplePrompt] = Field(default=[], max_length=wire.MAX_SAMPLE_PROMPTS)
    concept: wire.Concept | None = None  # ours: what pictures without captions show
    metadata: None = None  # these two are accepted when they say nothing
    integrations: None = None

    @field_validator("layers", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        if value is None:
            return [wire.LayerSpec()]
        return [value] if isinstance(value, dict) else value

    @field_validator("suffix")
    @classmethod
    def _in_a_name(cls, suffix: str | None) -> str | None:
        if suffix is not None and not _fits_a_name(suffix):
            raise ValueError(SUFFIX)
        return suffix

    @model_validator(mode="after")
    def _said_once(self) -> "JobRequest":
        if self.hyperparameters and self.method and self.method.supervised and self.method.supervised.hyperparameters:
            raise ValueError("give hyperparameters in 'method' only, not at the top as well")
        return self

    @property
    def chosen_hyperparameters(self) -> wire.Hyperparameters:
        in_method = self.method.supervised.hyperparameters if self.method and self.method.supervised else None
        return in_method or self.hyperparameters or wire.Hyperparameters()

    @cached_property
    def chosen_seed(self) -> int:
        return secrets.randbelow(2**31) if self.seed is None else self.seed


def _fits_a_name(suffix: str) -> bool:
    return suffix.isascii() and suffix.replace("-", "").replace("_", "").isalnum()


def suffix(text: str | None) -> str | None:
    """As a job's. Raises InvalidRequest."""
    if text is not None and not (len(text) <= MAX_SUFFIX_CHARS and _fits_a_name(text)):
        raise errors.InvalidRequest(f"suffix: {SUFFIX}", param="suffix")
    return text


class Resume(_Asked):
    """POST /v1/fine_tuning/jobs/{id}/resume; an empty body says the same as {}."""

    learning_rate_factor: float = Field(default=1.0, gt=0, le=1)


def page(shape: Callable[[Row[Any]], dict[str, Any]], rows: Iterable[Row[Any]], more: bool) -> dict[str, Any]:
    data = [shape(row) for row in rows]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, "has_more": more, **ends}


def model(found: Model) -> dict[str, Any]:
    return {
        "id": found.id,
        "object": "model",
        "created": int(found.created_at),
        "owned_by": found.owner or (found.id.split("/")[0] if "/" in found.id else "im-fine"),
        "parent": found.base if found.is_tuned else None,
        "family": found.family,
        "n_layers": found.n_layers,
        "context_tokens": found.context_tokens,
        "available": found.available,
    }


def file(row: Row[Any]) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "file",
        "bytes": row.bytes,
        "created_at": int(row.created_at),
        "filename": row.filename,
        "purpose": row.purpose,
        "status": "processed",
        "status_details": None,
        "expires_at": None,
        "rows": row.rows,
        "kind": row.kind,
        "captioned": row.captioned,
    }


def job(row: Row[Any], waiting_for: Mapping[str, dict[str, str]] = NOTHING) -> dict[str, Any]:
    """`waiting_for`: why jobs wait, by id (placement.py)."""
    return {
        "id": row.id,
        "object": "fine_tuning.job",
        "created_at": int(row.created_at),
        "finished_at": None if row.finished_at is None else int(row.finished_at),
        "estimated_finish": None if row.estimated_finish is None else int(row.estimated_finish),
        "model": row.continue_from["id"] if row.continue_from else row.base_model,
        "fine_tuned_model": row.fine_tuned_model,
        "organization_id": row.owner,
        "status": PUBLIC_STATUS.get(row.status, row.status),
        "hyperparameters": row.hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": row.hyperparameters}},
        "training_file": row.training_file,
        "validation_file": row.validation_file,
        "result_files": [],
        "trained_tokens": row.trained_tokens,
        "error": row.error,
        "seed": row.seed,
        "priority": -row.behind,
        "user_provided_suffix": row.suffix,
        "metadata": None,
        "integrations": [],
        "layers": row.layers,
        "sample_prompts": row.sample_prompts or [],
        "concept": row.concept,
        "base_model": row.base_model,
        "gpu": row.last_gpu_id,
        "attempts": row.attempts,
        "pausing": row.pause_asked_at is not None,
        "waiting_for": waiting_for.get(row.id),
    }


def checkpoint(row: Row[Any]) -> dict[str, Any]:
    return {
        "id": f"ftckpt-{row.job_id.removeprefix('ftjob-')}-{row.step}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(row.created_at),
        "fine_tuning_job_id": row.job_id,
        "fine_tuned_model_checkpoint": None,  # it is there to go on from, not to be served
        "step_number": row.step,
        "metrics": {"step": row.step, "full_valid_loss": row.validation_loss},
        "bytes": row.bytes,
    }


def event(row: Row[Any]) -> dict[str, Any]:
    return {
        "id": f"{EVENT_PREFIX}{row.id}",
        "object": "fine_tuning.job.event",
        "created_at": int(row.created_at),
        "level": row.level,
        "message": row.message,
        "type": row.type,
        "data": row.data,
    }


def event_number(after: str | None) -> int | None:
    """Raises InvalidRequest."""
    if after is None:
        return None
    digits = after.removeprefix(EVENT_PREFIX)
    if not digits.isdecimal() or len(digits) > 18:
        raise errors.InvalidRequest(f"after: '{after[:50]}' is no event's id", param="after")
    return int(digits)
