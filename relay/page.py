"""The built page from its folder: compressed, cached, under a strict policy. Knows no route of the API.

Every answer with index.html has a nonce of its own. Scripts come from our own files only; styles too, and from
<style> elements that carry the nonce, which Mantine makes for responsive and colour-scheme variables.
"""

import mimetypes
import re
import secrets
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response

API = (
    "api",
    "v1",
    "gpu",
    "healthz",
    "readyz",
    "metrics",
    "openapi.json",
    "assets",
)  # never the page, however unknown the path
FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
FOREVER = "public, max-age=31536000, immutable"  # hashed names change with the content
NONCE = "{{nonce}}"
ENCODINGS = {"br": ".br", "gzip": ".gz"}  # made by the build; the first that the browser takes
HEADERS = {
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


def policy(nonce: str) -> str:
    return (
        f"default-src 'none'; script-src 'self'; style-src 'self' 'nonce-{nonce}'; img-src 'self' blob: data:; "
        "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    )


class Page:
    """The folder is looked at anew each time: `make web` beside a running relay is enough."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def built(self) -> bool:
        return (self._folder / "index.html").is_file()

    def index(self) -> HTMLResponse:
        nonce = secrets.token_urlsafe(16)
        html = (self._folder / "index.html").read_text(encoding="utf-8").replace(NONCE, nonce)
        headers = {"content-security-policy": policy(nonce), "cache-control": "no-cache", **HEADERS}
        return HTMLResponse(html, headers=headers)

    def asset(self, name: str, request: Request) -> Response | None:
        return self._file(self._folder / "assets", name, request, FOREVER)

    def unknown(self, request: Request) -> Response | None:
        """For a path that no route has: a file of the page, or the page itself, which knows its own addresses."""
        path = request.url.path.lstrip("/")
        if not self.built or request.method not in ("GET", "HEAD") or path.split("/")[0] in API:
            return None
        if found := self._file(self._folder, path, request, "no-cache"):
            return found
        return self.index() if "text/html" in request.headers.get("accept", "") else None

    def _file(self, folder: Path, name: str, request: Request, cache: str) -> Response | None:
        """Names have no slash and no dot in front, so nothing outside the folder can be meant."""
        if not FILE_NAME.fullmatch(name) or name.endswith((*ENCODINGS.values(), ".html")):
            return None
        path = folder / name
        if not path.is_file():
            return None
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        headers = {"cache-control": cache, "vary": "accept-encoding", "content-security-policy": "default-src 'none'"}
        taken = request.headers.get("accept-encoding", "")
        for encoding, suffix in ENCODINGS.items():
            packed = folder / (name + suffix)
            if re.search(rf"\b{encoding}\b(?!;q=0(\.0*)?(,|$))", taken) and packed.is_file():
                return FileResponse(packed, headers={**headers, "content-encoding": encoding}, media_type=kind)
        return FileResponse(path, headers=headers, media_type=kind)
