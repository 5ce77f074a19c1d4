"""/v1/batches: a file of requests as a job, as the official client speaks of it, with pause, resume and events.

https://platform.openai.com/docs/api-reference/batch
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

import batchfile
from relay import errors, shapes
from relay.api_openai import Limit, OpenAIApi
from relay.batches import Batches, BatchRow, NewBatch, end_of
from relay.bodies import parse, parse_object, read_body
from relay.files import BATCH_PURPOSE, file_ref

LONGEST_WINDOW_H = 168
TIMES = ("finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at", "cancelled_at")


class NewBatchBody(BaseModel):
    """POST /v1/batches. Unknown fields are refused by name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input_file_id: str = Field(min_length=1, max_length=100)
    endpoint: str = Field(min_length=1, max_length=100)
    completion_window: str = Field(min_length=1, max_length=10)
    metadata: (
        Annotated[
            dict[
                Annotated[str, StringConstraints(min_length=1, max_length=64)],
                Annotated[str, StringConstraints(max_length=512)],
            ],
            Field(max_length=16),
        ]
        | None
    ) = None
    priority: int = Field(default=0, ge=-100, le=100)  # ours: among one's own jobs
    output_expires_after: None = None  # accepted when it says nothing

    @property
    def window_s(self) -> float:
        """Raises InvalidRequest."""
        found = re.fullmatch(r"([1-9]\d{0,2})h", self.completion_window)
        if not found or int(found[1]) > LONGEST_WINDOW_H:
            message = f"completion_window: use '24h', or another number of hours up to {LONGEST_WINDOW_H}"
            raise errors.InvalidRequest(message, param="completion_window")
        return int(found[1]) * 3600.0


@dataclass(frozen=True)
class BatchesApi:
    openai: OpenAIApi
    batches: Batches

    async def shown(self, batch: BatchRow) -> JSONResponse:
        return JSONResponse(shape(batch, await self.openai.placement.waiting_for([batch])))


def shape(row: BatchRow, waiting_for: Mapping[str, dict[str, str]] = shapes.NOTHING) -> dict[str, Any]:
    """Fields of our own stand beside the OpenAI ones. `waiting_for`: why jobs wait, by id (placement.py)."""
    end = end_of(row)
    closing = "cancelling" if end == "cancelled" else "finalizing" if end in ("completed", "expired") else None
    times: dict[str, int | None] = dict.fromkeys(TIMES)
    if closing:
        times[f"{closing}_at"] = _int(row.finished_at)
    if end and row.files_at is not None:
        times[f"{end}_at"] = _int(row.files_at)
    return {
        "id": row.id,
        "object": "batch",
        "endpoint": row.endpoint,
        "model": row.model,
        "errors": {"object": "list", "data": [{**row.error, "line": None}]} if row.error else None,
        "input_file_id": row.training_file,
        "completion_window": row.completion_window,
        "status": _status(row, end, closing),
        "output_file_id": row.output_file,
        "error_file_id": row.error_file,
        "created_at": int(row.created_at),
        "in_progress_at": _int(row.in_progress_at),
        "expires_at": int(row.expires_at),
        **times,
        "request_counts": {"total": row.total, "completed": row.completed, "failed": row.failed},
        "usage": {
            "input_tokens": row.prompt_tokens,
            "input_tokens_details": {"cached_tokens": row.cached_tokens},
            "output_tokens": row.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": row.prompt_tokens + row.completion_tokens,
        },
        "metadata": row.metadata,
        "base_model": row.base_model,
        "priority": -row.behind,
        "gpu": row.last_gpu_id,
        "attempts": row.attempts,
        "paused": row.status == "paused",
        "pausing": row.pause_asked_at is not None,
        "estimated_finish": _int(row.estimated_finish),
        "waiting_for": waiting_for.get(row.id),
    }


def _status(row: BatchRow, end: str | None, closing: str | None) -> str:
    """In OpenAI's words, of which there is none for a pause."""
    if end is None:
        return "validating" if row.in_progress_at is None else "in_progress"
    return end if row.files_at is not None else closing or "finalizing"


def _int(at: float | None) -> int | None:
    return None if at is None else int(at)


def _event(row: Any) -> dict[str, Any]:
    return {**shapes.event(row), "object": "batch.event"}


def router(parts: BatchesApi) -> APIRouter:
    routes = APIRouter(prefix="/v1/batches")
    api, batches = parts.openai, parts.batches

    @routes.post("")
    async def create_batch(request: Request) -> JSONResponse:
        """The file was checked when it came; here it is checked against the endpoint, and its model is looked up."""
        user = await api.user(request, "train")
        user.need("generate")
        await api.usage.check(user)
        asked = parse(NewBatchBody, parse_object(await read_body(request, api.settings.max_body_bytes)))
        if asked.endpoint not in batchfile.NEEDS:
            known = " or ".join(f"'{name}'" for name in batchfile.NEEDS)
            message = f"endpoint: use {known}; others are not answered in batches"
            raise errors.InvalidRequest(message, param="endpoint", code="not_supported_yet")
        window_s = asked.window_s
        row = await api.files.get(user.id, asked.input_file_id, param="input_file_id", purpose=BATCH_PURPOSE)
        report = await api.files.requests(row)
        if report.url != asked.endpoint:
            message = (
                f"the file's rows have the url '{report.url}', and endpoint is '{asked.endpoint}': use one of the two"
            )
            raise errors.InvalidBatchFile(message, param="endpoint")
        model = await api.models.resolve(user.id, report.model)
        if model.family == "sd":
            message = f"'{model.base}' makes pictures, and batches are answered by models of text: name another model"
            raise errors.InvalidBatchFile(message, param="model")
        batch = await batches.create(
            user.id,
            NewBatch(
                endpoint=asked.endpoint,
                model=model.id,
                base_model=model.base,
                is_tuned=model.is_tuned,
                input_file=row.id,
                input_blob=file_ref(row),
                total=report.rows,
                tokens=report.tokens,
                window=asked.completion_window,
                window_s=window_s,
                metadata=asked.metadata,
                priority=asked.priority,
                key_id=user.key_id,
            ),
        )
        api.dispatcher.wake(batch.id)
        return await parts.shown(batch)

    @routes.get("")
    async def list_batches(request: Request, after: str | None = None, limit: Limit = 20) -> JSONResponse:
        user = await api.user(request, "train")
        rows, more = await batches.page(user.id, after, limit)
        waiting_for = await api.placement.waiting_for(rows)
        return JSONResponse(shapes.page(lambda row: shape(row, waiting_for), rows, more))

    @routes.get("/{batch_id}")
    async def get_batch(batch_id: str, request: Request) -> JSONResponse:
        user = await api.user(request, "train")
        return await parts.shown(await batches.get(user.id, batch_id))

    @routes.get("/{batch_id}/events")
    async def batch_events(
        batch_id: str, request: Request, after: str | None = None, limit: Limit = 20
    ) -> JSONResponse:
        """The newest first."""
        user = await api.user(request, "train")
        rows, more = await batches.events(user.id, batch_id, shapes.event_number(after), limit)
        return JSONResponse(shapes.page(_event, rows, more))

    @routes.post("/{batch_id}/cancel")
    async def cancel_batch(batch_id: str, request: Request) -> JSONResponse:
        """What is answered by then is in its files."""
        user = await api.user(request, "train")
        batch, gpu_id = await batches.cancel(user.id, batch_id)
        api.dispatcher.ring(gpu_id)
        api.dispatcher.wake(batch_id)
        return await parts.shown(batch)

    @routes.post("/{batch_id}/pause")
    async def pause_batch(batch_id: str, request: Request) -> JSONResponse:
        user = await api.user(request, "train")
        batch, gpu_id = await batches.pause(user.id, batch_id)
        api.dispatcher.ring(gpu_id)
        return await parts.shown(batch)

    @routes.post("/{batch_id}/resume")
    async def resume_batch(batch_id: str, request: Request) -> JSONResponse:
        user = await api.user(request, "train")
        batch = await batches.resume(user.id, batch_id)
        api.dispatcher.wake(batch_id)
        return await parts.shown(batch)

    return routes
