"""/v1/webhook_endpoints: as the official client manages them, and the log of deliveries, which is ours.

https://platform.openai.com/docs/guides/webhooks. One of a user's own is told when a job of theirs ends or is paused.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Row

from relay import errors, shapes
from relay.api_openai import OpenAIApi
from relay.audit import By
from relay.bodies import parse, parse_object, read_body
from relay.webhooks import Webhooks

EventType = Literal[
    "fine_tuning.job.succeeded",
    "fine_tuning.job.failed",
    "fine_tuning.job.cancelled",
    "fine_tuning.job.paused",
    "batch.completed",
    "batch.failed",
    "batch.expired",
    "batch.cancelled",
    "batch.paused",
]
ENDS = tuple(event for event in get_args(EventType) if not event.endswith("paused"))
SHOWN_CHARS = 10  # of a secret, in lists


class NewWebhook(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(min_length=1, max_length=2000)
    name: str = Field(default="", max_length=100)
    event_types: tuple[EventType, ...] = Field(default=ENDS, min_length=1, max_length=len(get_args(EventType)))


@dataclass(frozen=True)
class WebhooksApi:
    openai: OpenAIApi
    webhooks: Webhooks

    def by(self, request: Request, name: str) -> By:
        return By(name, request.client.host if request.client else "")


def shape(row: Row[Any]) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "webhook_endpoint",
        "name": row.name,
        "url": row.url,
        "event_types": row.event_types,
        "created_at": int(row.created_at),
        "signing_secret_hint": row.secret[:SHOWN_CHARS] + "...",
    }


def delivery(row: Row[Any]) -> dict[str, Any]:
    state = "delivered" if row.delivered_at else "waiting" if row.next_at is not None else "given_up"
    return {
        "id": row.id,
        "object": "webhook_endpoint.delivery",
        "event_id": row.event_id,
        "event_type": row.event_type,
        "job_id": row.job_id,
        "state": state,
        "attempts": row.attempts,
        "last_status": row.last_status,
        "last_error": row.last_error,
        "created_at": int(row.created_at),
        "next_at": None if row.next_at is None else int(row.next_at),
        "delivered_at": None if row.delivered_at is None else int(row.delivered_at),
    }


def router(api: WebhooksApi) -> APIRouter:
    routes = APIRouter(prefix="/v1/webhook_endpoints", tags=["webhooks"])

    @routes.post("")
    async def create(request: Request) -> JSONResponse:
        """The signing secret is in this answer and nowhere else."""
        user = await api.openai.user(request, "train")
        if user.rules.limited:  # or what it makes would outlast it
            raise errors.Forbidden("a key with limits makes no webhooks: use one that has none")
        asked = parse(NewWebhook, parse_object(await read_body(request, api.openai.settings.max_body_bytes)))
        kinds = list(dict.fromkeys(asked.event_types))
        row, secret = await api.webhooks.create(user.id, asked.name, asked.url, kinds, api.by(request, user.name))
        return JSONResponse({**shape(row), "signing_secret": secret})

    @routes.get("")
    async def page(
        request: Request, after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
    ) -> JSONResponse:
        user = await api.openai.user(request, "train")
        rows, more = await api.webhooks.page(user.id, after, limit)
        return JSONResponse(shapes.page(shape, rows, more))

    @routes.get("/{webhook_id}")
    async def get(webhook_id: str, request: Request) -> JSONResponse:
        user = await api.openai.user(request, "train")
        return JSONResponse(shape(await api.webhooks.get(user.id, webhook_id)))

    @routes.delete("/{webhook_id}")
    async def delete(webhook_id: str, request: Request) -> JSONResponse:
        user = await api.openai.user(request, "train")
        await api.webhooks.delete(user.id, webhook_id, api.by(request, user.name))
        return JSONResponse({"id": webhook_id, "object": "webhook_endpoint.deleted", "deleted": True})

    @routes.get("/{webhook_id}/deliveries")
    async def deliveries(
        webhook_id: str,
        request: Request,
        after: Annotated[int | None, Query(ge=1, lt=2**63)] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
    ) -> JSONResponse:
        """The newest first; kept for 30 days."""
        user = await api.openai.user(request, "train")
        rows, more = await api.webhooks.deliveries(user.id, webhook_id, after, limit)
        return JSONResponse(shapes.page(delivery, rows, more))

    return routes
