"""Who may call: the relay by signature, anyone else by the bearer key. Checked before a body is parsed."""

import hmac
from collections.abc import Callable
from dataclasses import dataclass

from starlette.requests import Request

import wire
from gpu_service.errors import BodyTooLarge, Unauthorized


@dataclass(frozen=True)
class Identity:
    """Who this gpu is to its relay, since the last enrolment."""

    by: wire.SignedBy
    signing_key: str
    now: Callable[[], float]  # the relay's time


class Gate:
    def __init__(self, key: str, max_body_bytes: int, identity: Callable[[], Identity | None]) -> None:
        self._key, self._max_body_bytes, self._identity = key, max_body_bytes, identity
        self._seen = wire.SeenNonces()

    async def admit(self, request: Request) -> bytes:
        """The body of a request that may be served. Raises Unauthorized, BodyTooLarge, ClientDisconnect."""
        if wire.HEADER_SIGNATURE in request.headers:
            promised = self._verify(request)
            body = await self._read(request)
            if not hmac.compare_digest(wire.body_sha256(body), promised):
                raise Unauthorized("The body is not the one that was signed.", code="bad_signature")
            return body
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key.encode()):
            raise Unauthorized(
                "Send this gpu's key as 'Authorization: Bearer ...'. It was printed at start and stands in gpu.key."
            )
        return await self._read(request)

    def _verify(self, request: Request) -> str:
        identity = self._identity()
        target = request.scope["raw_path"].decode("latin-1")
        if query := request.scope["query_string"].decode("latin-1"):
            target = f"{target}?{query}"
        try:
            claimed = wire.SignedBy.claimed(request.headers)
            if identity is None or claimed != identity.by:
                raise wire.BadSignature("signed for another gpu, or for an earlier epoch of this one")
            return wire.verify(
                identity.signing_key,
                claimed,
                request.method,
                target,
                request.headers,
                identity.now(),
                self._seen,
            )
        except wire.BadSignature as exc:
            raise Unauthorized(f"Bad signature: {exc}.", code="bad_signature") from exc

    async def _read(self, request: Request) -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._max_body_bytes:
                raise BodyTooLarge(f"The body is larger than {self._max_body_bytes:,} bytes, which is the limit here.")
        return bytes(body)
