"""Routes for whoever runs the relay: is it there, can it do its work, what does it count."""

import hmac
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from relay import errors
from relay.health import Health
from relay.metrics import CONTENT_TYPE
from relay.sessions import Sessions
from relay.settings import Settings
from relay.vitals import Vitals

NEVER_KEPT = {"cache-control": "no-store"}


@dataclass(frozen=True)
class OpsApi:
    health: Health
    vitals: Vitals
    sessions: Sessions
    settings: Settings

    async def may_read_metrics(self, request: Request) -> None:
        """The metrics' own token, or the admin's key. Where it came from proves nothing: nginx is on loopback too.

        Raises InvalidKey, Forbidden.
        """
        token = self.settings.metrics_token
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if token and scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode()):
            return
        user = await self.sessions.caller(request.headers, secure=request.scope["scheme"] == "https")
        request.state.user_id = user.id
        if not user.is_admin:
            raise errors.Forbidden("only the admin reads metrics; RELAY_METRICS_TOKEN is a token for nothing else")


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

    @routes.get("/metrics")
    async def metrics(request: Request) -> Response:
        """For Prometheus; its text format."""
        await api.may_read_metrics(request)
        return Response(await api.vitals.text(), media_type=CONTENT_TYPE, headers=NEVER_KEPT)

    return routes
