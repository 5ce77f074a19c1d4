"""What is said to a gpu: every request signed, every failure in our own errors. Nobody else calls a gpu.

Knows no database and does not choose which gpu.
"""

import asyncio
import contextlib
import hmac
import json
import re
import secrets
from collections.abc import AsyncIterator, Callable, Mapping

from pydantic import ValidationError

import wire
from relay import errors
from relay.transport import Answer, Endpoint, Transport, TransportFailed

ASK_TIMEOUT_S = 15.0  # of a short question, not of a generation
ASK_LIMIT_BYTES = 2**20
PAGE_TIMEOUT_S = 5.0
PAGE_BYTES = 2**13  # enough of a tunnel's own page to find its error number
OURS = ("application/json", "text/event-stream")  # what a gpu answers with; tunnels answer with pages
NGROK_MEANS = {
    "ERR_NGROK_3200": "the tunnel is offline",
    "ERR_NGROK_8012": "the tunnel is up, but the service behind it is not",
    "ERR_NGROK_727": "the tunnel's monthly quota is spent",
}


class GpuAnswer:
    """A gpu's own answer: never a tunnel's page."""

    def __init__(self, answer: Answer, to: Endpoint) -> None:
        self._answer = answer
        self._to = to
        self.status = answer.status
        self.headers: Mapping[str, str] = answer.headers
        self.is_stream = self.headers.get("content-type", "").startswith("text/event-stream")

    async def chunks(self) -> AsyncIterator[bytes]:
        """Raises GpuUnreachable when the connection breaks."""
        try:
            async for chunk in self._answer.chunks():
                yield chunk
        except TransportFailed as exc:
            raise _unreachable(self._to, "the connection broke") from exc

    async def read(self, limit_bytes: int) -> bytes:
        """The whole body."""
        body = bytearray()
        async for chunk in self.chunks():
            body += chunk
            if len(body) > limit_bytes:
                raise _unreachable(self._to, f"its answer is longer than {limit_bytes:,} bytes")
        return bytes(body)

    def close(self) -> None:
        self._answer.close()


class GpuClient:
    def __init__(self, transport: Transport, clock: Callable[[], float]) -> None:
        self._transport = transport
        self._clock = clock

    async def send(
        self, to: Endpoint, method: str, target: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> GpuAnswer:
        """Signed. Returns with the headers of the answer. Raises GpuUnreachable, also when a tunnel answered itself."""
        by = wire.SignedBy(gpu_id=to.gpu_id, epoch=to.epoch)
        signed = wire.sign(to.signing_key, by, method, target, wire.body_sha256(body), self._clock())
        try:
            answer = await self._transport.request(to, method, target, {**(headers or {}), **signed}, body)
        except TransportFailed as exc:
            raise _unreachable(to, "no connection") from exc
        try:
            if reason := await _not_the_gpu(answer):
                raise _unreachable(to, reason)
        except BaseException:
            answer.close()
            raise
        return GpuAnswer(answer, to)

    async def ask(self, to: Endpoint, method: str, target: str, message: object) -> tuple[int, bytes]:
        """A short question with a short answer: status and body. Raises GpuUnreachable."""
        body = json.dumps(message).encode()
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                answer = await self.send(to, method, target, body, {"content-type": "application/json"})
                try:
                    return answer.status, await answer.read(ASK_LIMIT_BYTES)
                finally:
                    answer.close()
        except TimeoutError as exc:
            raise _unreachable(to, f"no answer in {ASK_TIMEOUT_S:.0f} s") from exc

    async def challenge(self, to: Endpoint) -> bool:
        """Whether the gpu that was enrolled is the one behind its URL. Raises GpuUnreachable."""
        nonce = secrets.token_hex(16)
        status, body = await self.ask(to, "POST", "/challenge", wire.Challenge(nonce=nonce).model_dump())
        if status != 200:
            return False
        try:
            proof = wire.ChallengeReply.model_validate_json(body).proof
        except ValidationError:
            return False
        expected = wire.challenge_proof(to.signing_key, nonce, wire.SignedBy(gpu_id=to.gpu_id, epoch=to.epoch))
        return hmac.compare_digest(proof.encode(), expected.encode())


async def _not_the_gpu(answer: Answer) -> str | None:
    """Why this is not our gpu speaking, or None. Tunnels say by header or by page what is wrong with them."""
    ours = answer.headers.get("content-type", "").lower().startswith(OURS)
    if ours and "ngrok-error-code" not in answer.headers and answer.status != 401:
        return None
    if ours and answer.status == 401:
        return "it does not know our signature; it must enrol again"  # what we send is signed: not the caller's fault
    found = answer.headers.get("ngrok-error-code", "")
    if not found:
        page = bytearray()
        with contextlib.suppress(TransportFailed, TimeoutError):
            async with asyncio.timeout(PAGE_TIMEOUT_S):
                async for chunk in answer.chunks():
                    page += chunk
                    if len(page) > PAGE_BYTES:
                        break
        match = re.search(rb"ERR_NGROK_\d+", page)
        found = match.group().decode() if match else ""
    if found:
        return f"{NGROK_MEANS.get(found, 'the tunnel answered itself')} ({found})"
    return f"something that is no gpu answered with status {answer.status}"


def _unreachable(to: Endpoint, why: str) -> errors.GpuUnreachable:
    return errors.GpuUnreachable(f"gpu {to.name!r} can't be reached: {why}. Try again in a moment.")
