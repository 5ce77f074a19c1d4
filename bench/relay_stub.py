"""The stub gpu of `bench.relay`, a process of its own: enrols and beats over the real protocol, and computes nothing.

Below HTTP it is one asyncio protocol, so that it is not what the bench measures. A request is let in by its signature,
which is verified, or by the stub's own key, as a gpu does. An answer is whole and at once, or N_FRAMES frames, PACE_S
apart, each of which says its number.
"""

import asyncio
import gc
import json
import os
import secrets
import sys
import time
from typing import Any

import aiohttp
import httptools
import uvloop

import wire

N_FRAMES = 64
PACE_S = 0.02
MODEL = "bench/stub"
WHOLE = json.dumps(
    {
        "id": "chatcmpl-stub",
        "object": "chat.completion",
        "created": 1,
        "model": MODEL,
        "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "I'm fine, thank you."}}
        ],
        "usage": {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11},
    }
).encode()


def _whole(status: bytes, body: bytes) -> bytes:
    head = b"HTTP/1.1 " + status + b"\r\ncontent-type: application/json\r\ncontent-length: "
    return head + str(len(body)).encode() + b"\r\n\r\n" + body


def _frame(number: int) -> bytes:
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    data = {**chunk, "choices": [{"index": 0, "finish_reason": None, "delta": {"content": f"{number} "}}]}
    text = b"data: " + json.dumps(data).encode() + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(text), text)


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
FRAMES = [_frame(number) for number in range(N_FRAMES)]
END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
ANSWER = _whole(b"200 OK", WHOLE)
REFUSED = _whole(b"401 Unauthorized", json.dumps(wire.error_body("not signed", type="invalid_request_error")).encode())


class Enrolled:
    """The gpu's side of the protocol: enrolment, heartbeats, signatures, the challenge."""

    def __init__(self, relay_url: str, enrol_token: str, key: str) -> None:
        self._relay_url, self._enrol_token, self._bearer = relay_url, enrol_token, f"Bearer {key}"
        self._seen = wire.SeenNonces()
        self._reply: wire.EnrolReply | None = None
        self._offset_s = 0.0

    async def enrol(self, session: aiohttp.ClientSession, url: str) -> None:
        device = wire.Device(
            kind="cpu", name="stub", memory_bytes=1, free_bytes=1, precision="fp32", precision_why="a bench"
        )
        request = wire.EnrolRequest(
            instance=secrets.token_hex(16),
            process=secrets.token_hex(8),
            name="stub",
            url=url,
            tunnel="none",
            device=device,
            families=["llama"],
            models=self._models(),
        )
        headers = {"authorization": f"Bearer {self._enrol_token}"}
        target = f"{self._relay_url}/gpu/enrol"
        async with session.post(target, data=request.model_dump_json(), headers=headers) as response:
            assert response.status == 200, await response.text()
            self._reply = wire.EnrolReply.model_validate_json(await response.read())
        self._offset_s = self._reply.relay_time - time.monotonic()

    async def beat(self, session: aiohttp.ClientSession) -> None:
        while True:
            body = wire.Heartbeat(free_bytes=1, models=self._models(), leases=[], active_requests=0)
            data = body.model_dump_json().encode()
            signed = wire.sign(
                self.reply.signing_key, self.by, "POST", "/gpu/heartbeat", wire.body_sha256(data), self._now()
            )
            async with session.post(f"{self._relay_url}/gpu/heartbeat", data=data, headers=signed) as response:
                assert response.status == 200, await response.text()

    @property
    def reply(self) -> wire.EnrolReply:
        assert self._reply
        return self._reply

    @property
    def by(self) -> wire.SignedBy:
        return wire.SignedBy(gpu_id=self.reply.gpu_id, epoch=self.reply.epoch)

    def admits(self, method: str, target: str, headers: dict[str, str], body: bytes) -> bool:
        if headers.get("authorization") == self._bearer:
            return True
        try:
            key = self.reply.signing_key
            promised = wire.verify(key, self.by, method, target, headers, self._now(), self._seen)
        except (wire.BadSignature, AssertionError):
            return False
        return promised == wire.body_sha256(body)

    def proof(self, body: bytes) -> bytes:
        nonce = wire.Challenge.model_validate_json(body).nonce
        return json.dumps({"proof": wire.challenge_proof(self.reply.signing_key, nonce, self.by)}).encode()

    def _now(self) -> float:
        return time.monotonic() + self._offset_s

    @staticmethod
    def _models() -> list[wire.OfferedModel]:
        return [wire.OfferedModel(id=MODEL, family="llama", n_layers=1, context_tokens=128, loaded=True)]


class Connection(asyncio.Protocol):
    """One caller's connection. httptools calls the methods that begin with `on_`."""

    def __init__(self, enrolled: Enrolled) -> None:
        self._enrolled = enrolled
        self._loop = asyncio.get_running_loop()
        self._next: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._parser = httptools.HttpRequestParser(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._next:
            self._next.cancel()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._target, self._body = b"", b""
        self._headers: dict[str, str] = {}

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode().lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        target, method = self._target.decode(), self._parser.get_method().decode()
        if not self._enrolled.admits(method, target, self._headers, self._body):
            self._transport.write(REFUSED)
        elif target == "/challenge":
            self._transport.write(_whole(b"200 OK", self._enrolled.proof(self._body)))
        elif json.loads(self._body).get("stream"):
            self._transport.write(STREAM_HEAD)
            self._send(0, self._loop.time())
        else:
            self._transport.write(ANSWER)

    def _send(self, number: int, began: float) -> None:
        self._transport.write(FRAMES[number] if number < N_FRAMES else END)
        if number < N_FRAMES:
            due = began + (number + 1) * PACE_S  # of the stream's own beginning: lateness does not add up
            self._next = self._loop.call_at(due, self._send, number + 1, began)


async def serve(relay_url: str, enrol_token: str, key: str) -> None:
    enrolled = Enrolled(relay_url, enrol_token, key)
    server = await asyncio.get_running_loop().create_server(lambda: Connection(enrolled), "127.0.0.1", 0, backlog=2048)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with aiohttp.ClientSession() as session:
        await enrolled.enrol(session, url)
        print(url, flush=True)
        await enrolled.beat(session)


if __name__ == "__main__":
    gc.freeze()  # a pause of ours would count as lateness of what is measured
    uvloop.run(serve(sys.argv[1], os.environ["BENCH_ENROL_TOKEN"], os.environ["BENCH_GPU_KEY"]))
