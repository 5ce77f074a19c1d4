"""How bytes get to a gpu and back: one interface. Here is HTTP through a tunnel; dialout.py has the other way.

Knows nothing of signatures, models or what an answer means.
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import aiohttp
from yarl import URL

import wire

CONNECT_TIMEOUT_S = 10.0
KEEPALIVE_S = (
    4.0  # below uvicorn's 5 s: we must be the first to drop an idle connection, or a request meets a closed one
)
CHUNK_BYTES = 2**16


class TransportFailed(Exception):
    """The connection could not be made, or broke. The message is for a log."""


@dataclass(frozen=True)
class Endpoint:
    """A gpu as its transport sees it. `signing_key` holds for this epoch only."""

    gpu_id: str
    epoch: int
    name: str
    tunnel: str  # its kind: `relay` means that the gpu dialled in
    url: str | None  # without a slash at the end; None: it has none of its own
    signing_key: str


class Answer(Protocol):
    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]: ...

    def chunks(self) -> AsyncIterator[bytes]:
        """As they arrive; slow reading slows the sender down. Raises TransportFailed."""

    def close(self) -> None:
        """Also in the middle: the gpu sees the connection go."""


class Transport(Protocol):
    async def request(
        self, to: Endpoint, method: str, target: str, headers: Mapping[str, str], body: bytes
    ) -> Answer: ...


class _HttpAnswer:
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers

    async def chunks(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._response.content.iter_any():
                yield chunk
        except (aiohttp.ClientError, OSError) as exc:
            raise TransportFailed(repr(exc)) from exc

    def close(self) -> None:
        self._response.close()


class TunnelTransport:
    """Plain HTTP requests to the URL that the gpu's tunnel has. Follows no redirect, obeys no proxy of ours."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            headers={"user-agent": "im-fine-relay", "ngrok-skip-browser-warning": "1", "accept-encoding": "identity"},
            read_bufsize=CHUNK_BYTES,
        )

    async def close(self) -> None:
        if self._session:
            await self._session.close()

    async def request(
        self, to: Endpoint, method: str, target: str, headers: Mapping[str, str], body: bytes
    ) -> _HttpAnswer:
        """Returns once the answer's headers are here. Raises TransportFailed."""
        assert self._session, "open() comes first"
        if to.url is None:
            raise TransportFailed("it has no URL")
        try:
            response = await self._session.request(
                method,
                URL(to.url + target, encoded=True),  # the target is signed as it stands
                headers=headers,
                data=body or None,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, OSError) as exc:  # OSError: TimeoutError too
            raise TransportFailed(repr(exc)) from exc
        return _HttpAnswer(response)


class ByTunnel:
    """Each gpu by the way that its kind of tunnel asks for."""

    def __init__(self, http: Transport, dialled: Transport) -> None:
        self._http, self._dialled = http, dialled

    async def request(self, to: Endpoint, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Raises TransportFailed."""
        transport = self._dialled if to.tunnel == wire.DIALLED else self._http
        return await transport.request(to, method, target, headers, body)
