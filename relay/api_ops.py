"""Routes for whoever runs the relay: is it there, can it do its work. Knows no user."""

from dataclasses import dataclass

from fastapi import APIRouter
from starlette.responses import JSONResponse

from relay import errors
from relay.health import Health

NEVER_KEPT = {"cache-control": "no-store"}


@dataclass(frozen=True)
class OpsApi:
    health: Health


def router(api: OpsApi) -> APIRouter:
    routes = APIRouter(tags=["operations"])

    @routes.get("/healthz")
    async def healthz() -> JSONResponse:
        """The process lives: to be started again if this does not answer."""
        return JSONResponse({"status": "ok"})

    @routes.get("/readyz")
    async def readyz() -> JSONResponse:
        """It can do its work: to be sent requests only while this is 200."""
        reasons = await api.health.reasons()
        shown = {"reasons": [vars(reason) for reason in reasons]}
        if not reasons:
            return JSONResponse({"status": "ready", **shown}, headers=NEVER_KEPT)
        error = errors.NotReady("not ready: " + "; ".join(reason.message for reason in reasons))
        return JSONResponse({**error.body(), **shown}, error.status, headers={**error.headers, **NEVER_KEPT})

    return routes
