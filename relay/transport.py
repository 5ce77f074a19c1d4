"""How bytes get to a gpu and back: one interface. Here is HTTP through a tunnel; dialout.py has the other way.

Knows nothing of signatures, models or what an answer means.
"""

import ipaddress
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from yarl import URL

import wire

CONNECT_TIMEOUT_S = 10.0
KEEPALIVE_S = (
    4.0  # below uvicorn's 5 s: we must be the first to drop an idle connection, or a request meets a closed one
)
CHUNK_BYTES = 2**16
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # leaves out what wraps an IPv4 address: mapped, NAT64
NOT_TUNNELS = (
    ipaddress.ip_network("2002::/16"),  # 6to4
    ipaddress.ip_network("192.0.0.0/24"),  # a cloud's metadata among them
    ipaddress.ip_network("168.63.129.16/32"),  # public by its number, and inside a cloud its own host
)


class TransportFailed(Exception):
    """The connection could not be made, or broke. The message is for a log."""

    forbidden = False  # to where it led we do not connect


@dataclass(frozen=True)
class Endpoint:
    """A gpu as its transport sees it. `signing_key` holds for this epoch only."""

    gpu_id: str
    epoch: int
    name: str
    tunnel: str  # its kind: `relay` means that the gpu dialled in
    url: str | None  # without a slash at the end; None: it has none of its own
    signing_key: str
    relay_id: str | None = None  # where several relay processes are: the one that it dialled in to


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


class NotPublic(OSError):
    """A name without an address of the open internet."""


class GuardedResolver(AbstractResolver):
    """Names as `names` has them, without the addresses that no tunnel has.

    A name can lead elsewhere after its URL was checked; what is connected to is what was looked at here.
    """

    def __init__(self, names: AbstractResolver, *, allow_loopback: bool) -> None:
        self._names = names
        self._allow_loopback = allow_loopback

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Raises OSError where no address is left."""
        found = await self._names.resolve(host, port, family)
        own = self._allow_loopback and host == "localhost"
        if good := [one for one in found if is_public(one["host"]) or (own and is_loopback(one["host"]))]:
            return good
        raise NotPublic(f"{host} leads to no public address")

    async def close(self) -> None:
        await self._names.close()


def is_public(address: str) -> bool:
    """An address of the open internet, by itself and not as a wrapping of another (IPv4-mapped, NAT64, 6to4).

    https://www.iana.org/assignments/iana-ipv6-special-registry
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if not ip.is_global or ip.is_multicast:
        return False
    return (ip.version == 4 or ip in GLOBAL_UNICAST) and not any(ip in network for network in NOT_TUNNELS)


def is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class GuardedHttp:
    """Plain HTTP requests to URLs that others chose: to the open internet only, whatever a name leads to by then.

    Follows no redirect, obeys no proxy of ours, keeps no cookie.
    """

    def __init__(
        self, headers: Mapping[str, str], *, allow_loopback: bool, names: AbstractResolver | None = None
    ) -> None:
        self._headers = headers
        self._allow_loopback = allow_loopback
        self._names = names  # None: as this machine resolves them
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        resolver = GuardedResolver(self._names or ThreadedResolver(), allow_loopback=self._allow_loopback)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S, resolver=resolver),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            headers=self._headers,
            read_bufsize=CHUNK_BYTES,
        )

    async def close(self) -> None:
        if self._session:
            await self._session.close()

    async def request(self, method: str, url: URL, headers: Mapping[str, str], body: bytes) -> _HttpAnswer:
        """Returns once the answer's headers are here. Raises TransportFailed."""
        assert self._session, "open() comes first"
        host = url.host or ""
        if _is_address(host) and not is_public(host) and not (self._allow_loopback and is_loopback(host)):
            raise _forbidden(f"{host} is no public address")  # an address in a URL is not resolved
        try:
            response = await self._session.request(
                method,
                url,
                headers=headers,
                data=body or None,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, OSError) as exc:  # OSError: TimeoutError too
            if isinstance(exc.__cause__, NotPublic):
                raise _forbidden(str(exc.__cause__)) from exc
            raise TransportFailed(repr(exc)) from exc
        return _HttpAnswer(response)


def _forbidden(why: str) -> TransportFailed:
    failed = TransportFailed(why)
    failed.forbidden = True
    return failed


class TunnelTransport:
    """To the URL that the gpu's tunnel has."""

    def __init__(self, *, allow_loopback: bool, names: AbstractResolver | None = None) -> None:
        headers = {"user-agent": "im-fine-relay", "ngrok-skip-browser-warning": "1", "accept-encoding": "identity"}
        self._http = GuardedHttp(headers, allow_loopback=allow_loopback, names=names)

    async def open(self) -> None:
        await self._http.open()

    async def close(self) -> None:
        await self._http.close()

    async def request(
        self, to: Endpoint, method: str, target: str, headers: Mapping[str, str], body: bytes
    ) -> _HttpAnswer:
        """Returns once the answer's headers are here. Raises TransportFailed."""
        if to.url is None:
            raise TransportFailed("it has no URL")
        url = URL(to.url + target, encoded=True)  # the target is signed as it stands
        return await self._http.request(method, url, headers, body)


class ByTunnel:
    """Each gpu by the way that its kind of tunnel asks for."""

    def __init__(self, http: Transport, dialled: Transport, hop: Transport, relay_id: str | None) -> None:
        """`hop`: through another relay process, to which the gpu dialled in. `relay_id`: this one."""
        self._http, self._dialled, self._hop, self._relay_id = http, dialled, hop, relay_id

    async def request(self, to: Endpoint, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Raises TransportFailed."""
        here = to.relay_id in (None, self._relay_id)
        transport = self._http if to.tunnel != wire.DIALLED else self._dialled if here else self._hop
        return await transport.request(to, method, target, headers, body)
