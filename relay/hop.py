"""From one relay process to another: to a gpu that dialled in there, and to an answer that the page reads there.

A second dial-out: same interface, signed (peers.py), nothing held back in either direction. An answer of a gpu comes in
parts, each behind its length as 4 bytes, big-endian: its head as JSON, then its body as it came, then an empty part.
Without the last it broke off.
"""

import asyncio
import struct
from collections.abc import AsyncIterator, Mapping
from urllib.parse import quote, urlencode

import aiohttp
from yarl import URL

from frames import AnswerHead, RequestHead
from relay.peers import Peer, Peers
from relay.transport import CHUNK_BYTES, KEEPALIVE_S, Endpoint, TransportFailed

CONNECT_TIMEOUT_S = 3.0  # of a neighbour
MOST_OF_A_PART_BYTES = 2**20
GPUS, GENERATIONS = "/peer/gpus", "/peer/generations"

_LENGTH = struct.Struct(">I")


def part(data: bytes) -> bytes:
    return _LENGTH.pack(len(data)) + data


END = part(b"")


def packed(head: RequestHead, body: bytes) -> bytes:
    """A request for a gpu, as the other process gets it."""
    return head.model_dump_json().encode() + b"\n" + body


def unpacked(message: bytes) -> tuple[RequestHead, bytes]:
    """Raises ValueError."""
    head, _, body = message.partition(b"\n")
    return RequestHead.model_validate_json(head), body


class Hop:
    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            headers={"user-agent": "im-fine-relay", "accept-encoding": "identity"},
            read_bufsize=CHUNK_BYTES,
        )

    async def close(self) -> None:
        if self._session:
            await self._session.close()

    async def request(
        self, to: Endpoint, method: str, target: str, headers: Mapping[str, str], body: bytes
    ) -> "_HoppedAnswer":
        """Returns once the gpu's headers are here. Raises TransportFailed."""
        peer = await self._peers.find(to.relay_id or "")
        if peer is None:
            raise TransportFailed("the relay process that it dialled in to is gone")
        message = packed(RequestHead(method=method, target=target, headers=dict(headers)), body)
        response = await self._ask(peer, "POST", f"{GPUS}/{quote(to.gpu_id, safe='')}/{to.epoch}", message)
        try:
            if response.status != 200:
                raise TransportFailed(f"the relay process that it dialled in to says {response.status}")
            head = AnswerHead.model_validate_json(await _read_part(response))
        except ValueError as exc:
            response.close()
            raise TransportFailed("another relay process answers in a way that can't be read") from exc
        except BaseException:
            response.close()
            raise
        return _HoppedAnswer(response, head)

    async def frames(self, peer_id: str, generation_id: str, owner: str, after: int) -> AsyncIterator[bytes] | None:
        """Of an answer for the page, past number `after`; None if there is no such answer, or no such process."""
        response = await self._of_generation("GET", peer_id, generation_id, owner=owner, after=str(after))
        return _chunks(response) if response else None

    async def stop(self, peer_id: str, generation_id: str, owner: str) -> bool:
        """Whether there was such an answer."""
        response = await self._of_generation("DELETE", peer_id, generation_id, owner=owner)
        if response:
            response.close()
        return response is not None

    async def _of_generation(
        self, method: str, peer_id: str, generation_id: str, **query: str
    ) -> aiohttp.ClientResponse | None:
        peer = await self._peers.find(peer_id)
        if peer is None:
            return None
        try:
            target = f"{GENERATIONS}/{quote(generation_id, safe='')}?{urlencode(query)}"
            response = await self._ask(peer, method, target)
        except TransportFailed:
            return None
        if response.status != 200:
            response.close()
            return None
        return response

    async def _ask(self, peer: Peer, method: str, target: str, body: bytes = b"") -> aiohttp.ClientResponse:
        """Raises TransportFailed."""
        assert self._session, "open() comes first"
        if peer.url is None:
            raise TransportFailed("the relay process that it dialled in to has no RELAY_INTERNAL_URL")
        headers = self._peers.sign(peer, method, target, body)
        url = URL(peer.url + target, encoded=True)
        try:
            return await self._session.request(method, url, headers=headers, data=body or None, allow_redirects=False)
        except (aiohttp.ClientError, OSError) as exc:
            raise TransportFailed(f"the relay process that it dialled in to does not answer: {exc!r}") from exc


class _HoppedAnswer:
    def __init__(self, response: aiohttp.ClientResponse, head: AnswerHead) -> None:
        self._response = response
        self.status = head.status
        self.headers: Mapping[str, str] = head.headers

    async def chunks(self) -> AsyncIterator[bytes]:
        while chunk := await _read_part(self._response):
            yield chunk

    def close(self) -> None:
        self._response.close()


async def _read_part(response: aiohttp.ClientResponse) -> bytes:
    """Empty at the end. Raises TransportFailed."""
    try:
        (length,) = _LENGTH.unpack(await response.content.readexactly(_LENGTH.size))
        if length > MOST_OF_A_PART_BYTES:
            raise TransportFailed(f"another relay process sends a part of {length:,} bytes")
        return await response.content.readexactly(length)
    except (aiohttp.ClientError, OSError, asyncio.IncompleteReadError) as exc:
        raise TransportFailed(repr(exc)) from exc


async def _chunks(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Until its end, which may be that of the other process: then there is more to be asked for."""
    try:
        async for chunk in response.content.iter_any():
            yield chunk
    except (aiohttp.ClientError, OSError):
        return
    finally:
        response.close()
