"""Generations for the page: each waits for a gpu, its frames are numbered, and a reader who was cut off comes back.

A generation belongs to who asked. It lives in this process alone, for as long as somebody reads it and KEEP_S more;
other relay processes ask this one (hop.py). Who waits stands in the line of all who wait for that base model
(lines.py). Knows nothing of HTTP.
"""

import asyncio
import contextlib
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Hashable
from typing import Any

from relay import errors
from relay.gpus import Gpus
from relay.lines import Line, Lines, Place
from relay.metrics import Metrics
from relay.proxy import Ask, Opened, Proxy
from relay.transport import Endpoint
from relay.waiting import attempt

log = logging.getLogger("relay.generations")

KEEP_S = 30.0
TRY_EVERY_S = 1.0
SOON_S = 0.1
MAX_BUFFER_BYTES = 64 * 2**20  # of one user's answers: ten pictures of 1024 x 1024 take 31
MAX_OPEN = 16  # of one user
PICTURE_HEAD_CHARS = 60
ELSEWHERE = re.compile(r"gen-([0-9a-f]{16})-[0-9a-f]{24}")


class Generation:
    """Frames as they came, each numbered from 1, for any number of readers."""

    def __init__(self, owner: str, relay_id: str | None = None) -> None:
        home = f"{relay_id.removeprefix('relay-')}-" if relay_id else ""
        self.id = f"gen-{home}{secrets.token_hex(12)}"
        self.owner = owner
        self.over = False
        self.readers = 0
        self.visits = 0  # how often a reader came
        self.bytes = 0
        self.told: tuple[int, str] | None = None  # place and reason, as last said
        self.task: asyncio.Task[None] | None = None
        self._frames: list[bytes] = []
        self._latest: dict[Hashable, int] = {}
        self._news = asyncio.Event()

    def say(self, data: str, instead_of: Hashable = None) -> None:
        """`instead_of`: of the frames of this name only the last is kept, for readers who come back."""
        frame = f"id: {len(self._frames) + 1}\ndata: {data}\n\n".encode()
        if instead_of is not None:
            if (before := self._latest.get(instead_of)) is not None:
                self.bytes -= len(self._frames[before])
                self._frames[before] = b""
            self._latest[instead_of] = len(self._frames)
        self.bytes += len(frame)
        self._frames.append(frame)
        self._tell()

    def tell_place(self, place: int, reason: str) -> None:
        if self.told != (place, reason):
            self.told = (place, reason)
            self.say(json.dumps({"type": "waiting", "place": place, "reason": reason}))

    def end(self) -> None:
        self.over = True
        self._tell()

    async def read(self, after: int) -> AsyncIterator[bytes]:
        """All frames past number `after`, then new ones until the end."""
        while True:
            news = self._news
            if after < len(self._frames):
                fresh, after = b"".join(self._frames[after:]), len(self._frames)
                if fresh:
                    yield fresh
            elif self.over:
                return
            else:
                await news.wait()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


class Generations:
    def __init__(
        self,
        proxy: Proxy,
        gpus: Gpus,
        lines: Lines,
        metrics: Metrics,
        relay_id: str | None = None,
        keep_s: float = KEEP_S,
    ) -> None:
        """`relay_id`: this process, where there are several; their ids say where an answer is."""
        self._relay_id = relay_id
        self._proxy = proxy
        self._gpus = gpus
        self._metrics = metrics
        self._keep_s = keep_s
        self._all: dict[str, Generation] = {}
        self._lines = lines

    def start(self, owner: str, ask: Ask) -> Generation:
        """Raises TooMany."""
        if sum(g.owner == owner and not g.over for g in self._all.values()) >= MAX_OPEN:
            raise errors.TooMany(f"{MAX_OPEN} answers are under way already: wait for one, or stop one")
        generation = Generation(owner, self._relay_id)
        self._all[generation.id] = generation
        generation.say(json.dumps({"type": "started", "id": generation.id}))
        generation.task = asyncio.create_task(self._run(generation, ask), name=generation.id)
        self._forget_later(generation)  # for who leaves before reading anything
        return generation

    def get(self, owner: str, generation_id: str) -> Generation:
        """Raises NotFound."""
        found = self._all.get(generation_id)
        if found is None or found.owner != owner:
            message = (
                f"no answer '{generation_id[:50]}' is under way: it is kept {self._keep_s:.0f} s for who was cut off"
            )
            raise errors.NotFound(message)
        return found

    def elsewhere(self, generation_id: str) -> str | None:
        """The other relay process that has it, going by its id."""
        found = ELSEWHERE.fullmatch(generation_id)
        home = f"relay-{found[1]}" if found and self._relay_id else None
        return None if home == self._relay_id else home

    async def frames(self, generation: Generation, after: int) -> AsyncIterator[bytes]:
        """For one reader. When the last one has left, the generation is kept a while, then stopped."""
        generation.readers += 1
        generation.visits += 1
        try:
            async for frame in generation.read(after):
                yield frame
        finally:
            generation.readers -= 1
            self._forget_later(generation)

    def stop(self, generation: Generation) -> None:
        """At once: the gpu sees the connection go."""
        self._all.pop(generation.id, None)
        if generation.task:
            generation.task.cancel()

    async def close(self) -> None:
        tasks = [g.task for g in self._all.values() if g.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _forget_later(self, generation: Generation) -> None:
        asyncio.get_running_loop().call_later(self._keep_s, self._forget, generation, generation.visits)

    def _forget(self, generation: Generation, visits: int) -> None:
        if not generation.readers and generation.visits == visits:  # nobody has come back since
            self.stop(generation)

    async def _run(self, generation: Generation, ask: Ask) -> None:
        try:
            opened = await self._opened(generation, ask)
            with opened.held:
                await self._pass_on(generation, opened)
        except errors.RelayError as exc:
            generation.say(json.dumps(exc.body()))
        except Exception:
            log.exception("%s failed", generation.id)
            generation.say(json.dumps(errors.RelayError("the relay has a fault; its log says more").body()))
        finally:
            generation.end()

    async def _pass_on(self, generation: Generation, opened: Opened) -> None:
        if opened.rest is None:  # no stream: an error of the gpu's own
            generation.say(json.dumps(_body(opened.first)))
            return
        async for frames in opened.rest:
            for frame in frames.replace(b"\r\n", b"\n").split(b"\n\n"):
                lines = [line[5:].lstrip() for line in frame.decode().split("\n") if line.startswith("data:")]
                if lines:
                    generation.say("\ndata: ".join(lines), _picture(lines[0]))
            if generation.bytes > MAX_BUFFER_BYTES // MAX_OPEN:  # with less, all that may be under way have room
                self._keep_within(generation.owner)

    def _keep_within(self, owner: str) -> None:
        """What has ended, and nobody reads, goes before its time. Raises TooLarge where that is not enough."""
        theirs = [g for g in self._all.values() if g.owner == owner]
        held = sum(g.bytes for g in theirs)
        for old in theirs:
            if held > MAX_BUFFER_BYTES and old.over and not old.readers:
                held -= old.bytes
                self.stop(old)
        if held > MAX_BUFFER_BYTES:
            raise errors.TooLarge(f"your answers here are longer than {MAX_BUFFER_BYTES:,} bytes: ask for less")

    async def _opened(self, generation: Generation, ask: Ask) -> Opened:
        """A gpu's answer, however long that takes."""
        began = time.monotonic()
        try:
            with (
                self._lines.joined(ask.base_model, ask.caller, "page") as (line, place),
                self._gpus.waiting_for(ask.base_model),
            ):
                return await self._in_turn(generation, ask, line, place)
        finally:
            self._metrics.waited["page"].observe(time.monotonic() - began)

    async def _in_turn(self, generation: Generation, ask: Ask, line: Line, place: Place) -> Opened:
        def chosen(to: Endpoint) -> None:
            generation.told = None
            generation.say(json.dumps({"type": "reading", "gpu": to.name}))
            line.serve(place)  # the next may try while this one's prompt is read

        while True:
            if line.is_first(place):
                opened, line.reason = await attempt(self._proxy, self._gpus, ask, chosen)
                if opened:
                    return opened
                line.rejoin(place)  # if a gpu was chosen for it in vain
            elif generation.told is None:
                await asyncio.sleep(SOON_S)  # those in front are most likely on their way
                if line.is_first(place):
                    continue
            rank = line.rank(place)
            generation.tell_place(rank, line.reason)
            await _moved(line, place, rank)


async def _moved(line: Line, place: Place, rank: int) -> None:
    """Until there is something new to say or to try."""
    reason = line.reason
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(TRY_EVERY_S):
            while line.rank(place) == rank and line.reason == reason:
                await line.moved.wait()


def _picture(data: str) -> int | None:
    """Which picture of several this frame shows, if it does: each takes the place of what was seen of it before."""
    if not data.startswith('{"type":') or "image_generation." not in data[:PICTURE_HEAD_CHARS]:
        return None
    shown = json.loads(data)
    return shown["index"] if isinstance(shown.get("index"), int) else None


def _body(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return errors.GpuUnreachable("the gpu answered with something that is not JSON. Try again.").body()
