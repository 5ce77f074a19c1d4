"""The frames of the dial-out, and its flow control, between two ends without a network."""

import asyncio
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

import frames
from frames import CHUNK_BYTES, WINDOW_BYTES, AnswerHead, Kind, ProtocolError, RequestHead, Stream, StreamOver


class Ends:
    """Two ends of one stream; a frame that one sends is fed to the other at once."""

    def __init__(self) -> None:
        self.sent: list[tuple[Kind, int]] = []  # kind and length of payload
        self.relay = Stream(7, self._to_gpu)
        self.gpu = Stream(7, self._to_relay)

    async def _to_gpu(self, frame: bytes) -> None:
        self._feed(self.gpu, frame)

    async def _to_relay(self, frame: bytes) -> None:
        self._feed(self.relay, frame)

    def _feed(self, stream: Stream, frame: bytes) -> None:
        kind, number, payload = frames.unpack(frame)
        assert number == 7
        self.sent.append((kind, len(payload)))
        stream.feed(kind, payload)


async def read_all(stream: Stream) -> bytes:
    body = b""
    while chunk := await stream.read():
        body += chunk
    return body


@given(kind=st.sampled_from(Kind), stream=st.integers(0, 2**32 - 1), payload=st.binary(max_size=200))
def test_a_frame_comes_out_as_it_went_in(kind: Kind, stream: int, payload: bytes) -> None:
    assert frames.unpack(frames.pack(kind, stream, payload)) == (kind, stream, payload)


def test_the_header_is_what_the_description_says() -> None:
    assert frames.pack(Kind.DATA, 258, b"fine") == b"\x03\x00\x00\x01\x02fine"


@pytest.mark.parametrize("frame", [b"", b"\x03\x00", b"\x00\x00\x00\x00\x01", b"\x07\x00\x00\x00\x01", bytes(2**17)])
def test_what_is_no_frame_is_refused(frame: bytes) -> None:
    with pytest.raises(ProtocolError):
        frames.unpack(frame)


async def test_a_body_longer_than_the_window_arrives_whole_while_it_is_read() -> None:
    ends, body = Ends(), bytes(range(256)) * 4096
    reading = asyncio.create_task(read_all(ends.relay))
    await ends.gpu.write(body)
    await ends.gpu.end()
    assert await reading == body
    assert max(length for kind, length in ends.sent if kind is Kind.DATA) <= CHUNK_BYTES


async def test_a_writer_waits_for_a_reader_who_does_not_read() -> None:
    ends = Ends()
    writing = asyncio.create_task(ends.gpu.write(bytes(3 * WINDOW_BYTES)))
    await asyncio.sleep(0.01)
    assert sum(length for _, length in ends.sent) == WINDOW_BYTES
    assert len(await ends.relay.read()) == WINDOW_BYTES
    await asyncio.sleep(0.01)
    assert sum(length for kind, length in ends.sent if kind is Kind.DATA) == 2 * WINDOW_BYTES
    writing.cancel()


async def test_a_waiting_writer_and_a_waiting_reader_hear_that_it_is_over() -> None:
    ends = Ends()
    writing = asyncio.create_task(ends.gpu.write(bytes(2 * WINDOW_BYTES)))
    reading = asyncio.create_task(ends.gpu.read())
    await asyncio.sleep(0.01)
    await ends.relay.reset("the caller left")
    for task in (writing, reading):
        with pytest.raises(StreamOver, match="the caller left"):
            await task


async def test_what_arrived_before_the_end_can_still_be_read() -> None:
    ends = Ends()
    await ends.gpu.write(b"half an ans")
    await ends.gpu.reset("the gpu broke off")
    assert await ends.relay.read() == b"half an ans"
    with pytest.raises(StreamOver):
        await ends.relay.read()


async def test_heads_arrive_and_one_that_is_too_long_ends_the_stream() -> None:
    ends = Ends()
    await ends.gpu.start(Kind.HEAD, AnswerHead(status=200, headers={"content-type": "text/plain"}))
    assert (await ends.relay.head()).status == 200
    with pytest.raises(StreamOver):
        await ends.relay.start(
            Kind.OPEN, RequestHead(method="GET", target="/", headers=dict.fromkeys(map(str, range(20)), "x" * 8000))
        )


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (Kind.DATA, bytes(WINDOW_BYTES + 1)),
        (Kind.DATA, b""),
        (Kind.CREDIT, b"12345"),
        (Kind.HEAD, b'{"status": 99, "headers": {}}'),
        (Kind.HEAD, b'{"status": 200, "headers": {}, "more": 1}'),
        (Kind.OPEN, b"{}"),
    ],
)
async def test_breaking_the_rules_is_noticed(kind: Kind, payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        Ends().relay.feed(kind, payload)


@pytest.mark.parametrize("kind", [Kind.HEAD, Kind.DATA])
async def test_nothing_may_follow_an_end(kind: Kind) -> None:
    ends = Ends()
    await ends.gpu.start(Kind.HEAD, AnswerHead(status=200, headers={}))
    await ends.gpu.end()
    with pytest.raises(ProtocolError):
        ends.relay.feed(kind, b"x")


async def test_credit_is_what_the_other_end_says() -> None:
    ends = Ends()
    await ends.gpu.write(bytes(WINDOW_BYTES))
    writing = asyncio.create_task(ends.gpu.write(b"fine"))
    await asyncio.sleep(0.01)
    ends.gpu.feed(Kind.CREDIT, struct.pack(">I", 3))
    await asyncio.sleep(0.01)
    assert ends.sent[-1] == (Kind.DATA, 3)
    writing.cancel()
