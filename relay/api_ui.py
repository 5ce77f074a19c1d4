"""The plain page that names the API and how to call it, and whether we are well."""

import html
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse

PAGE = Path(__file__).with_name("page.html")
CSP = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def router() -> APIRouter:
    routes = APIRouter()
    page = PAGE.read_text(encoding="utf-8")

    @routes.get("/", include_in_schema=False)
    async def index(request: Request) -> HTMLResponse:
        # The address as the reader has it, which behind nginx is not ours.
        here = html.escape(f"{request.url.scheme}://{request.headers.get('host', '')}", quote=True)
        return HTMLResponse(page.replace("{{here}}", here), headers={"content-security-policy": CSP})

    @routes.get("/healthz", tags=["operations"])
    async def healthz() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    return routes
