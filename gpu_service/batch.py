"""One lease of a batch: rows that nobody has answered are answered as live requests are, and handed in as parts.

A part is a blob of finished rows. From the relay's word on it counts, so what is lost with this gpu is what came since.
Knows no HTTP; how a body becomes an answer is answering.py's.
"""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import batchfile
import wire
from datafile import RowError
from gpu_service.answering import Answering, Tuned
from gpu_service.answers import UNEXPECTED
from gpu_service.artifacts import BlobCache
from gpu_service.errors import BadAdapter, BadBlob, BadRequest, GpuError, ModelUnreadable, Stopping, Withheld
from gpu_service.finetune import GivenBack, Run
from gpu_service.lease import NO_ROOM, persist
from gpu_service.link import Link, Refused
from gpu_service.models import Models
from gpu_service.reporter import Reporter
from gpu_service.resident import AdapterFiles
from gpu_service.worker import Worker

log = logging.getLogger(__name__)

PART_BYTES = 2**20  # a part is handed in at once when it has so many
PART_EVERY_S = 10.0  # and else after so long: what is lost with a gpu
MOST_WAITING_BYTES = 32 * 2**20  # of answers that the relay does not take; then no new rows begin
TRIES = 3  # of a part that the relay misses
AGAIN_S = (1.0, 15.0, 60.0)  # how long a row that failed, and could be another time, waits for another to succeed
Rows = Iterator[batchfile.Row | RowError]
OURS = (BadAdapter, BadBlob, ModelUnreadable, Stopping, Withheld)  # no row's fault


@dataclass(frozen=True, kw_only=True)
class Pace:
    rows: int  # that are answered at once
    every_s: float = 0.0  # between parts; 0: PART_EVERY_S


class BatchRun:
    """`now` has it end: rows under way are given up, and what is finished is handed in first."""

    def __init__(
        self,
        link: Link,
        worker: Worker,
        models: Models,
        cache: BlobCache,
        tokenizing: Executor,
        grant: wire.GrantBatch,
        reporter: Reporter,
        pace: Pace,
    ) -> None:
        self._link, self._worker, self._models, self._cache = link, worker, models, cache
        self._tokenizing, self._spec, self._fence = tokenizing, grant.job, grant.fence
        self._reporter, self._pace = reporter, pace
        self._path = f"/gpu/jobs/{grant.job.job_id}"
        self._lines: list[bytes] = []  # finished, and not handed in
        self._waiting_bytes = 0
        self._some, self._full, self._roomy, self._ending = (asyncio.Event() for _ in range(4))
        self._roomy.set()
        self._well = asyncio.Event()  # set, and replaced, by each good answer
        self._is_over = False  # nothing comes any more
        self._n_good = self._n_bad = self._tokens = 0  # of this lease
        self._stored = 0  # rows that the relay has from this lease

    def now(self) -> None:
        self._ending.set()

    async def run(self, run: Run) -> None:
        """Until the relay has an answer to every row.

        Raises GivenBack, LeaseLost, and GpuError for what fails the batch.
        """
        spec = self._spec
        done = batchfile.members((span.first, span.last) for span in spec.done)
        blobs = [spec.input_file, *(spec.tuned.adapter.files if spec.tuned else ())]
        with self._cache.keep(*(ref.sha256 for ref in blobs)):
            answering = Answering(self._models, self._tokenizing, await self._tuned())
            path: Path = await persist(self._link, lambda: self._link.fetch(spec.input_file, self._cache))
            behind = f", behind {len(done):,} that are answered" if done else ""
            self._reporter.say(f"Answering {spec.total - len(done):,} rows{behind}, {self._pace.rows} at once.")
            self._began, self._before = time.monotonic(), len(done)
            run.phase, run.lease = "working", self
            await self._answer_all(answering, batchfile.rows(path), done)
        if self._ending.is_set() and len(done) + self._stored < spec.total:
            raise GivenBack
        run.phase, run.lease = "ending", None

    async def _tuned(self) -> Callable[[str], Awaitable[Tuned | None]]:
        """Finds the batch's tuned model by its id; it was fetched, and stays as it was when the batch was made."""
        found: Tuned | None = None
        if model := self._spec.tuned:
            refs, files = model.adapter.files, {}
            for ref in refs:
                files[ref.name] = await persist(self._link, partial(self._link.fetch, ref, self._cache))
            content = "-".join(ref.sha256 for ref in refs)
            found = Tuned(model.adapter.base_model, AdapterFiles(content, files))

        async def tuned(model: str) -> Tuned | None:
            return found if self._spec.tuned and model == self._spec.tuned.id else None

        return tuned

    async def _answer_all(self, answering: Answering, rows: Rows, done: set[int]) -> None:
        """Answers on one side, parts on the other; asked to end, or at the end, the last parts are waited for."""
        feeding = asyncio.create_task(self._feed(answering, rows, done))
        storing = asyncio.create_task(self._hand_in())
        ending = asyncio.create_task(self._ending.wait())
        tasks: set[asyncio.Task[Any]] = {feeding, storing, ending}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not storing.done():
                if not feeding.done():
                    feeding.cancel()
                    await asyncio.wait({feeding})
                self._is_over = True
                self._some.set()
                self._full.set()
            await storing
            if not feeding.cancelled():
                feeding.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # --- answering ---------------------------------------------------------------------------------------------------

    async def _feed(self, answering: Answering, rows: Rows, done: set[int]) -> None:
        under_way = set[asyncio.Task[None]]()
        try:
            while row := await asyncio.to_thread(next, rows, None):
                assert isinstance(row, batchfile.Row), "the relay has checked the file"
                if row.number in done:
                    continue
                await self._roomy.wait()
                if len(under_way) >= self._pace.rows:
                    ended, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                    for task in ended:
                        task.result()
                under_way.add(asyncio.create_task(self._answer(answering, row)))
            while under_way:
                ended, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    task.result()
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    async def _answer(self, answering: Answering, row: batchfile.Row) -> None:
        """An error of the row's own is its answer. Raises GpuError for one that is this gpu's."""
        raw, good_before = json.dumps(row.body, ensure_ascii=False).encode(), self._n_good
        for again_s in (*AGAIN_S, 0.0):
            try:
                prepare = answering.chat if self._spec.endpoint == "/v1/chat/completions" else answering.completion
                prepared = await prepare(raw, self._spec.job_id)
                events: AsyncIterator[Any] = self._worker.generate_behind(prepared.wanted)
                self._take(row, 200, await prepared.whole(events))
                return
            except OURS:
                raise
            except GpuError as exc:
                if exc.status < 500:
                    self._take(row, exc.status, exc.body())
                    return
                failure: Exception = exc
            except Exception as exc:  # one row's, unless all fail
                log.exception("row %d of batch %s failed", row.number, self._spec.job_id)
                failure = exc
            with suppress(TimeoutError):
                await asyncio.wait_for(self._well.wait(), again_s)
        if self._n_good == good_before and not self._spec.is_last_try:  # nothing works here: another may do better
            raise failure
        if isinstance(failure, GpuError):
            self._take(row, failure.status, failure.body())
        else:
            self._take(row, 500, UNEXPECTED)

    def _take(self, row: batchfile.Row, status_code: int, body: dict[str, Any]) -> None:
        request_id = f"req_{secrets.token_hex(12)}"
        answer = wire.RowAnswer(row=row.number, status_code=status_code, request_id=request_id, body=body)
        line = answer.model_dump_json().encode() + b"\n"
        if len(line) > wire.MAX_CHUNK_BYTES:
            message = f"The answer has {len(line):,} bytes, which no batch takes: ask for fewer log probabilities."
            error = BadRequest(message, code="answer_too_large")
            self._take(row, error.status, error.body())
            return
        self._lines.append(line)
        if status_code == 200:
            self._n_good += 1
            self._tokens += body["usage"]["completion_tokens"]
            self._well.set()
            self._well = asyncio.Event()
        else:
            self._n_bad += 1
        self._waiting_bytes += len(line)
        self._some.set()
        if self._waiting_bytes >= PART_BYTES:
            self._full.set()
        if self._waiting_bytes >= MOST_WAITING_BYTES:
            self._roomy.clear()

    # --- handing in --------------------------------------------------------------------------------------------------

    async def _hand_in(self) -> None:
        """Ends when nothing comes any more and everything is at the relay."""
        while True:
            await self._some.wait()
            if not self._is_over:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._full.wait(), self._pace.every_s or PART_EVERY_S)
            while self._lines:
                await self._store_part()
            if self._is_over:
                return
            self._some.clear()
            self._full.clear()

    async def _store_part(self) -> None:
        """The oldest lines. Told until it is heard, for one that was heard must not be cut anew."""
        count, size = 0, 0
        while count < len(self._lines) and (not count or size + len(self._lines[count]) <= PART_BYTES):
            size += len(self._lines[count])
            count += 1
        content = b"".join(self._lines[:count])
        sha256 = await asyncio.to_thread(self._cache.put, content)
        try:
            with self._cache.keep(sha256):
                await self._told(sha256, len(content))
        finally:
            self._cache.drop([sha256])
        del self._lines[:count]
        self._waiting_bytes -= len(content)
        self._stored += count
        if self._waiting_bytes < MOST_WAITING_BYTES:
            self._roomy.set()
        elapsed_s = time.monotonic() - self._began
        done = self._before + self._stored
        self._reporter.answered(done, self._spec.total, self._stored, self._n_bad, self._tokens, elapsed_s)

    async def _told(self, sha256: str, size_bytes: int) -> None:
        path = await asyncio.to_thread(self._cache.path, sha256)
        assert path, "it is kept"
        target = f"{self._path}/chunks/{sha256}?fence={self._fence}"
        message = wire.PartStored(fence=self._fence, sha256=sha256, bytes=size_bytes)
        for left in reversed(range(TRIES)):
            try:
                await persist(self._link, lambda: self._link.put(target, sha256, path))
                await persist(self._link, lambda: self._link.post(f"{self._path}/parts", message))
                return
            except Refused as exc:
                if exc.reason in NO_ROOM:
                    raise Refused(exc.message, code=exc.reason) from exc
                if exc.reason != "blob_missing" or not left:
                    raise
