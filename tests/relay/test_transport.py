"""Where a gpu's URL may lead when it is connected to, whatever its name led to before."""

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from relay.transport import Endpoint, GuardedResolver, TransportFailed, TunnelTransport, is_public

NAME = "name.ngrok-free.app"
PUBLIC = "93.184.216.34"
NOT_PUBLIC = [
    "127.0.0.1",
    "0.0.0.0",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",  # metadata
    "100.64.0.1",  # carrier-grade NAT, and metadata at some hosts
    "192.0.0.192",
    "168.63.129.16",
    "224.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::7f00:1",  # IPv4-compatible
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:93.184.216.34",
    "64:ff9b::a9fe:a9fe",  # NAT64
    "64:ff9b:1::1",
    "2002:7f00:1::",  # 6to4
    "2001:0:7f00:1::",  # Teredo
    "fe80::1",
    "fe80::1%lo",
    "fd00:ec2::254",  # metadata
    "ff02::1",
    "not an address",
]


class Names(AbstractResolver):
    """Each look-up gets the next answer; the last one is for good."""

    def __init__(self, *answers: list[str]) -> None:
        self._answers = list(answers)
        self.asked: list[str] = []

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        self.asked.append(host)
        addresses = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in addresses
        ]

    async def close(self) -> None:
        pass


def endpoint(url: str) -> Endpoint:
    return Endpoint("gpu-1", 1, "one", "ngrok", url, "ab" * 32)


@asynccontextmanager
async def sending_by(names: Names, *, allow_loopback: bool = False) -> AsyncIterator[TunnelTransport]:
    transport = TunnelTransport(allow_loopback=allow_loopback, names=names)
    await transport.open()
    try:
        yield transport
    finally:
        await transport.close()


@asynccontextmanager
async def listening(
    answer: bytes = b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n",
) -> AsyncIterator[tuple[int, Callable[[], int]]]:
    """A port of loopback that counts who connects, and answers each request alike."""
    seen: Counter[str] = Counter()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen["connections"] += 1
        with contextlib.suppress(asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], lambda: seen["connections"]


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_it_is_no_public_address(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:4700:4700::1111"])
def test_it_is_a_public_address(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("address", ["127.0.0.1", "169.254.169.254", "10.1.2.3", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("allow_loopback", [False, True])
async def test_a_name_that_leads_inside_is_not_connected_to(address: str, allow_loopback: bool) -> None:
    names = Names([address])
    async with listening() as (port, connections), sending_by(names, allow_loopback=allow_loopback) as transport:
        with pytest.raises(TransportFailed, match="no public address"):
            await transport.request(endpoint(f"http://{NAME}:{port}"), "POST", "/v1/completions", {}, b"secret")
        assert names.asked == [NAME]
        assert connections() == 0


async def test_a_name_that_led_outside_before_is_looked_at_again_when_it_is_connected_to() -> None:
    names = Names([PUBLIC], ["127.0.0.1"])
    guarded = GuardedResolver(names, allow_loopback=False)
    assert [one["host"] for one in await guarded.resolve(NAME, 443)] == [PUBLIC]
    async with listening() as (port, connections), sending_by(names) as transport:
        with pytest.raises(TransportFailed):
            await transport.request(endpoint(f"http://{NAME}:{port}"), "GET", "/challenge", {}, b"")
        assert connections() == 0


async def test_of_several_addresses_only_the_public_ones_are_tried() -> None:
    guarded = GuardedResolver(Names(["10.0.0.1", PUBLIC, "::1"]), allow_loopback=True)
    assert [one["host"] for one in await guarded.resolve(NAME, 443)] == [PUBLIC]


@pytest.mark.parametrize("url", ["http://169.254.169.254", "http://10.0.0.1", "http://[::ffff:7f00:1]"])
async def test_an_address_in_the_url_is_not_connected_to_either(url: str) -> None:
    async with sending_by(Names([PUBLIC]), allow_loopback=True) as transport:
        with pytest.raises(TransportFailed, match="no public address"):
            await transport.request(endpoint(url), "GET", "/challenge", {}, b"")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
async def test_loopback_takes_the_setting(host: str) -> None:
    async with listening() as (port, connections):
        to = endpoint(f"http://{host}:{port}")
        async with sending_by(Names(["127.0.0.1"])) as transport:
            with pytest.raises(TransportFailed):
                await transport.request(to, "GET", "/challenge", {}, b"")
        assert connections() == 0
        async with sending_by(Names(["127.0.0.1"]), allow_loopback=True) as transport:
            answer = await transport.request(to, "GET", "/challenge", {}, b"")
            assert answer.status == 204
            answer.close()


async def test_a_redirect_is_an_answer_and_is_not_followed() -> None:
    async with listening() as (inner, inner_connections):
        redirect = (
            f"HTTP/1.1 307 Temporary Redirect\r\nLocation: http://127.0.0.1:{inner}/\r\nConnection: close\r\n\r\n"
        )
        async with listening(redirect.encode()) as (port, _), sending_by(Names([]), allow_loopback=True) as transport:
            answer = await transport.request(endpoint(f"http://127.0.0.1:{port}"), "GET", "/challenge", {}, b"")
            assert answer.status == 307
            answer.close()
        assert inner_connections() == 0
