"""One lease of a batch on the tiny model: what is answered, what is handed in, and what is one row's own fault."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import wire
from gpu_service import batch
from gpu_service.answering import Answering, Tuned
from gpu_service.artifacts import BlobCache, file_ref
from gpu_service.batch import BatchRun, Pace
from gpu_service.errors import GpuError, OutOfMemory, RelayUnavailable
from gpu_service.finetune import GivenBack, Run
from gpu_service.link import Refused
from gpu_service.worker import Generation, Worker
from tests.conftest import TINY

CHAT: Any = "/v1/chat/completions"


class RecordingLink:
    """Stands where the relay's job routes are: keeps chunks and what was told, and answers what a test sets."""

    def __init__(self) -> None:
        self.chunks: dict[str, bytes] = {}
        self.told: list[str] = []  # parts, in the order in which they were heard
        self.answer: Callable[[wire.Message], None] = lambda message: None

    async def put(self, target: str, sha256: str, path: Path, *, anew: bool = False) -> None:
        assert target == f"/gpu/jobs/batch/chunks/{sha256}?fence=2"
        self.chunks[sha256] = await asyncio.to_thread(path.read_bytes)

    async def post(self, target: str, message: wire.Message) -> None:
        assert isinstance(message, wire.PartStored)
        assert target == "/gpu/jobs/batch/parts"
        assert len(self.chunks[message.sha256]) == message.bytes <= wire.MAX_CHUNK_BYTES
        self.answer(message)
        self.told.append(message.sha256)

    async def fetch(self, ref: wire.FileRef, cache: BlobCache) -> Path:
        path = cache.path(ref.sha256)
        assert path
        return path

    @property
    def answers(self) -> list[wire.RowAnswer]:
        lines = [line for sha256 in self.told for line in self.chunks[sha256].splitlines()]
        return [wire.RowAnswer.model_validate_json(line) for line in lines]


class Told:
    def __init__(self) -> None:
        self.done: list[int] = []

    def say(self, message: str, **more: Any) -> None: ...

    def answered(self, done: int, total: int, here: int, failed: int, tokens: int, elapsed_s: float) -> None:
        self.done.append(done)


class Sick:
    """A worker that fails as a test says, on its way to the real one."""

    def __init__(self, worker: Worker, failing: Callable[[Generation], GpuError | None]) -> None:
        self._worker, self._failing = worker, failing

    async def generate_behind(self, wanted: Generation) -> AsyncIterator[Any]:
        if error := self._failing(wanted):
            raise error
        async with aclosing(self._worker.generate_behind(wanted)) as events:  # type: ignore[type-var]
            async for event in events:
                yield event


def body(number: int, **more: Any) -> dict[str, Any]:
    return {"model": TINY, "messages": [{"role": "user", "content": f"Say {number}"}], "max_tokens": 3, **more}


class Leased:
    def __init__(
        self,
        worker: Worker,
        folder: Path,
        bodies: list[dict[str, Any]],
        done: Any = (),
        *,
        is_last_try: bool = False,
        **pace: Any,
    ) -> None:
        self.link, self.told, self.run = RecordingLink(), Told(), Run()
        cache, file = BlobCache(folder / "blobs", 2**30), folder / "rows.jsonl"
        rows = [{"custom_id": f"row-{n}", "method": "POST", "url": CHAT, "body": b} for n, b in enumerate(bodies)]
        file.write_text("\n".join(map(json.dumps, rows)))
        cache.add(file)
        spec = wire.BatchSpec(
            job_id="batch",
            base_model=TINY,
            endpoint=CHAT,
            input_file=file_ref(file),
            total=len(rows),
            done=list(done),
            is_last_try=is_last_try,
        )
        self.tokenizing = ThreadPoolExecutor(max_workers=1)
        grant, parts = wire.GrantBatch(fence=2, job=spec), (cache, self.tokenizing)
        link, models, told = self.link, worker._models, self.told
        chosen = Pace(**{"rows": 4, "every_s": 0.05, **pace})
        self.make: Callable[[Any], BatchRun] = lambda worker: BatchRun(
            link,  # type: ignore[arg-type]
            worker,
            models,
            *parts,
            grant,
            told,  # type: ignore[arg-type]
            chosen,
        )
        self.worker = worker

    async def answer(self, worker: Any = None) -> None:
        try:
            await self.make(worker or self.worker).run(self.run)
        finally:
            self.tokenizing.shutdown()


async def test_only_rows_that_nobody_has_answered_are_and_each_once(worker: Worker, tmp_path: Path) -> None:
    done = [wire.RowSpan(first=0, last=1), wire.RowSpan(first=5, last=5)]
    lease = Leased(worker, tmp_path, [body(n) for n in range(9)], done)
    await lease.answer()
    assert sorted(answer.row for answer in lease.link.answers) == [2, 3, 4, 6, 7, 8]
    assert lease.told.done[-1] == 9
    assert lease.run.phase == "ending"


async def test_a_rows_answer_is_what_a_live_caller_gets(worker: Worker, tmp_path: Path) -> None:
    asked = body(1, temperature=0, max_tokens=12, logprobs=True, n=2, dials={"mlp": 0.9})
    lease = Leased(worker, tmp_path, [asked])
    await lease.answer()
    (ours,) = lease.link.answers

    async def none(model: str) -> Tuned | None:
        return None

    with ThreadPoolExecutor(max_workers=1) as tokenizing:
        prepared = await Answering(worker._models, tokenizing, none).chat(json.dumps(asked).encode(), "ada")
        live = await prepared.whole(worker.generate(prepared.wanted))
    assert ours.status_code == 200
    assert ours.body["choices"] == live["choices"]
    assert ours.body["usage"] == live["usage"]


async def test_a_rows_own_error_is_its_answer(worker: Worker, tmp_path: Path) -> None:
    bodies = [body(0), body(1, max_tokens=0), body(2, nonsense=1), body(3) | {"model": "other"}, body(4, n=99)]
    lease = Leased(worker, tmp_path, bodies)
    await lease.answer()
    statuses = {answer.row: answer.status_code for answer in lease.link.answers}
    assert statuses == {0: 200, 1: 400, 2: 400, 3: 404, 4: 400}


async def test_a_row_that_fails_again_and_again_is_an_error_where_others_succeed(
    worker: Worker, tmp_path: Path
) -> None:
    tries: list[int] = []

    def failing(wanted: Generation) -> GpuError | None:
        if wanted.sampling.max_tokens != 7:
            return None
        tries.append(1)
        return OutOfMemory("no room")

    lease = Leased(worker, tmp_path, [body(0, max_tokens=7), *(body(n) for n in range(1, 12))])
    await lease.answer(Sick(worker, failing))
    statuses = {answer.row: answer.status_code for answer in lease.link.answers}
    assert (len(tries), statuses.pop(0), set(statuses.values())) == (len(batch.AGAIN_S) + 1, 503, {200})


async def test_where_no_row_succeeds_the_gpu_is_at_fault_and_no_row_is_spoilt(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "AGAIN_S", (0.01,))
    lease = Leased(worker, tmp_path, [body(n) for n in range(6)])
    with pytest.raises(OutOfMemory):
        await lease.answer(Sick(worker, lambda wanted: OutOfMemory("no room")))
    assert not lease.link.answers


async def test_at_the_last_try_a_row_takes_its_error_and_the_batch_ends(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "AGAIN_S", (0.01,))
    done = [wire.RowSpan(first=0, last=3)]
    lease = Leased(worker, tmp_path, [body(n) for n in range(5)], done, is_last_try=True)
    await lease.answer(Sick(worker, lambda wanted: OutOfMemory("no room")))
    assert [(answer.row, answer.status_code) for answer in lease.link.answers] == [(4, 503)]
    assert lease.run.phase == "ending"


async def test_asked_to_end_it_hands_in_what_is_finished_and_gives_the_rest_back(
    worker: Worker, tmp_path: Path
) -> None:
    long = [body(n, max_tokens=400, ignore_eos=True) for n in range(2, 40)]
    lease = Leased(worker, tmp_path, [body(0), body(1), *long], every_s=60)
    working = asyncio.create_task(lease.answer())
    async with asyncio.timeout(30):
        while not (lease.run.lease and lease.run.lease._n_good == 2):  # type: ignore[attr-defined]  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert not lease.link.told, "no part is due yet"
    lease.run.give_back("paused")
    with pytest.raises(GivenBack):
        await asyncio.wait_for(working, 10)
    assert {0, 1} <= {answer.row for answer in lease.link.answers} < set(range(40))


async def test_a_part_is_told_as_it_was_until_it_is_heard(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_service.link.RETRY_S", (0.01, 0.02))
    lease, said = Leased(worker, tmp_path, [body(n) for n in range(12)]), list[str]()

    def deaf_at_first(message: wire.Message) -> None:
        assert isinstance(message, wire.PartStored)
        said.append(message.sha256)
        if len(said) < 4:
            raise RelayUnavailable("away")

    lease.link.answer = deaf_at_first
    await lease.answer()
    assert len(set(said[:4])) == 1
    assert sorted(answer.row for answer in lease.link.answers) == list(range(12))


async def test_a_quota_that_is_full_fails_the_batch_with_its_reason(worker: Worker, tmp_path: Path) -> None:
    lease = Leased(worker, tmp_path, [body(n) for n in range(3)])

    def full(message: wire.Message) -> None:
        refused = Refused("it does not fit")
        refused.reason = "quota_exceeded"
        raise refused

    lease.link.answer = full
    with pytest.raises(Refused) as caught:
        await lease.answer()
    assert caught.value.for_job().code == "quota_exceeded"


async def test_an_answer_that_no_part_can_hold_is_that_rows_error(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "MAX_CHUNK_BYTES", 2000)
    asked = [body(0), body(1, max_tokens=40, ignore_eos=True, logprobs=True, top_logprobs=20)]
    lease = Leased(worker, tmp_path, asked)
    await lease.answer()
    answers = {answer.row: answer for answer in lease.link.answers}
    assert (answers[0].status_code, answers[1].status_code) == (200, 400)
    assert answers[1].body["error"]["code"] == "answer_too_large"


async def test_a_live_request_passes_by_the_rows_of_a_batch(worker: Worker, tmp_path: Path) -> None:
    """Sixteen rows under way that do not end: the live one ends, and is never put off for two of their steps."""
    lease = Leased(worker, tmp_path, [body(n, max_tokens=400, ignore_eos=True) for n in range(64)], rows=16)
    working = asyncio.create_task(lease.answer())
    order: list[str] = []
    took = worker._do

    def noted(kind: Any) -> Any:
        did = took(kind)
        order.append(did)
        return did

    async with asyncio.timeout(60):
        while worker._behind.vitals.rows < 8:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        worker._do = noted  # type: ignore[method-assign]

        async def none(model: str) -> Tuned | None:
            return None

        with ThreadPoolExecutor(max_workers=1) as tokenizing:
            raw = json.dumps(body(0, max_tokens=30, ignore_eos=True)).encode()
            prepared = await Answering(worker._models, tokenizing, none).chat(raw, "ada")
            await prepared.whole(worker.generate(prepared.wanted))
    began, ended = order.index("text"), len(order) - order[::-1].index("text")
    beside = order[began:ended]
    assert "batch" in beside, "the batch goes on"
    assert not any(pair == ("batch", "batch") for pair in pairwise(beside))
    assert worker.active_requests == 0, "its rows are nobody's live requests"
    lease.run.give_back("leaving")
    with pytest.raises(GivenBack):
        await working
