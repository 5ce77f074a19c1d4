"""Jobs under whatever order of claims, writes, losses, restarts and words of their owners: the state machine of
tables.py, held by a real relay with a real database while hypothesis chooses what happens next."""

import asyncio
import hashlib
import json
import shutil
import tempfile
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import ColumnElement, Row, Select, func, select

import wire
from relay.leases import MAX_ATTEMPTS
from relay.store import Store
from relay.tables import LEASED, OPEN, checkpoints, job_events, jobs, models
from tests.postgres import Postgres
from tests.relay.conftest import ADMIN_KEY, CHAT_ROW, ENROL_TOKEN, Clock, Relay, running_relay
from tests.relay.double_gpu import BASE, DoubleGpu, failed, held, result_of

T = TypeVar("T")
IN_MEMORY = Path("/dev/shm")  # no power fails here, and waiting for a disk takes most of the time
LEASE_S = 30.0
GPUS_AT_MOST = 3
ANY = st.integers(0, 10**6)  # which of those that there are: taken modulo their number
WRITES = ["report", "checkpoint", "finish", "fail", "retry", "release", "blob"]
STATUSES = (*OPEN, "succeeded", "failed", "cancelled")


@dataclass
class Given:
    """A lease that a gpu once had. Old ones are kept: a gpu that was gone for long speaks of them."""

    gpu: "Machine"
    grant: wire.GrantLease
    seq: int = 0
    step: int = 0
    told: list[int] = field(default_factory=list)  # numbers of events that were acknowledged


class Machine:
    """One gpu, and the leases that it thinks it has."""

    def __init__(self, double: DoubleGpu) -> None:
        self.double = double
        self.holds: dict[str, Given] = {}

    def leases(self) -> list[wire.HeldLease]:
        return [held(given.grant) for given in self.holds.values()]


class Jobs(RuleBasedStateMachine):
    """No rule says what must come of it: the oracle is the row as it stood before, and the invariants."""

    def __init__(self, database: str = "") -> None:
        super().__init__()
        self.loop = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self.folder = Path(tempfile.mkdtemp(prefix="im-fine-jobs-", dir=IN_MEMORY if IN_MEMORY.is_dir() else None))
        self.clock = Clock()
        self.stack = AsyncExitStack()
        self.serving = AsyncExitStack()
        self.gpus: list[Machine] = []
        self.given: list[Given] = []
        self.jobs: list[str] = []
        self.was: dict[str, Row[Any]] = {}  # the rows as the last invariant saw them
        self.database = database
        self.store = Store(database or f"sqlite+aiosqlite:///{self.folder / 'relay.db'}")

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.loop.run(coroutine)

    def teardown(self) -> None:
        async def close() -> None:
            await self.stack.aclose()
            await self.serving.aclose()
            await self.store.close()

        self.run(close())
        self.loop.close()
        shutil.rmtree(self.folder)

    @initialize()
    def start(self) -> None:
        async def start() -> None:
            await self._serve()
            made = await self.relay.http.post("/api/keys", json={"user": "other", "name": "theirs"})
            self.keys = [ADMIN_KEY, made.json()["key"]]
            self.files: list[str] = []
            for key in self.keys:
                upload = {"data": {"purpose": "fine-tune"}, "files": {"file": ("rows.jsonl", CHAT_ROW.encode())}}
                self.files.append((await self._ask(key, "POST", "/v1/files", **upload)).json()["id"])
            await self._enrol()

        self.run(start())
        self.a_user_creates_a_job(0)
        self.a_gpu_beats(0, obeys=True)

    async def _serve(self) -> None:
        changes = {"lease_s": LEASE_S, "heartbeat_s": 0.2, "database_url": self.database}
        serving = running_relay(self.folder, self.clock, **changes)
        self.relay: Relay = await self.serving.enter_async_context(serving)
        for gpu in self.gpus:
            gpu.double.http.base_url = httpx2.URL(self.relay.url)

    async def _ask(self, key: str, method: str, path: str, **more: Any) -> httpx2.Response:
        return await self.relay.http.request(method, path, headers={"authorization": f"Bearer {key}"}, **more)

    async def _enrol(self) -> None:
        double = DoubleGpu(self.relay.url, ENROL_TOKEN, self.clock, (BASE,))
        self.stack.push_async_callback(double.http.aclose)
        double.url = "http://127.0.0.1:9"  # alive is enough for jobs; nobody can reach it
        assert (await double.enrol()).status_code == 200
        self.gpus.append(Machine(double))

    # --- what may happen ---

    @rule(owner=st.integers(0, 1))
    def a_user_creates_a_job(self, owner: int) -> None:
        asked = {"model": BASE, "training_file": self.files[owner]}
        made = self.run(self._ask(self.keys[owner], "POST", "/v1/fine_tuning/jobs", json=asked))
        assert made.status_code == 200, made.text
        self.jobs.append(made.json()["id"])

    @precondition(lambda self: len(self.gpus) < GPUS_AT_MOST)
    @rule()
    def a_gpu_enrols(self) -> None:
        self.run(self._enrol())

    @rule(which=ANY, obeys=st.booleans())
    def a_gpu_beats(self, which: int, obeys: bool) -> None:
        """It takes what it is given. Told to stop or to pause it may be slow, and go on."""
        gpu = self.gpus[which % len(self.gpus)]

        async def beat() -> list[wire.Command]:
            return (await gpu.double.beat(*gpu.leases())).commands

        for command in self.run(beat()):
            if isinstance(command, wire.GrantLease):
                given = Given(gpu, command)
                gpu.holds[command.job.job_id] = given
                self.given.append(given)
            elif isinstance(command, wire.CancelLease):
                assert not self.stands(gpu, command.job_id, command.fence), "told to drop what is its own"
                mine = gpu.holds.get(command.job_id)
                if obeys and mine and mine.grant.fence == command.fence:
                    del gpu.holds[command.job_id]
            elif isinstance(command, wire.PauseLease) and obeys:
                self.write(gpu.holds[command.job_id], "release", reason="paused")

    @rule(which=ANY, keeps=st.booleans())
    def a_gpu_comes_back_under_a_new_epoch(self, which: int, keeps: bool) -> None:
        """Its tunnel's URL has changed and it goes on, or it is another process that knows of nothing."""
        gpu = self.gpus[which % len(self.gpus)]
        if not keeps:
            gpu.holds.clear()
        assert self.run(gpu.double.enrol(gpu.leases())).status_code == 200

    @rule(which=ANY)
    def a_gpu_says_goodbye(self, which: int) -> None:
        gpu = self.gpus[which % len(self.gpus)]
        assert self.run(gpu.double.call("POST", "/gpu/goodbye", wire.Goodbye(reason="it ends"))).status_code == 200
        gpu.holds.clear()
        assert self.run(gpu.double.enrol()).status_code == 200

    @rule(which=ANY, what=st.lists(st.sampled_from(WRITES), min_size=1, max_size=3))
    def a_gpu_writes_of_any_lease_it_ever_had(self, which: int, what: list[str]) -> None:
        for one in what if self.given else ():  # no precondition: how soon a grant comes must not change what is drawn
            self.write(self.given[-1 - which % len(self.given)], one)

    @rule(what=st.lists(st.sampled_from(WRITES), min_size=1, max_size=4))
    def gpus_write_of_what_they_hold(self, what: list[str]) -> None:
        for given in [given for gpu in self.gpus for given in gpu.holds.values()]:
            for one in what:
                self.write(given, one)

    @precondition(lambda self: self.jobs)
    @rule(which=ANY, word=st.sampled_from(["cancel", "pause", "resume"]))
    def its_owner_speaks(self, which: int, word: str) -> None:
        job_id = self.jobs[which % len(self.jobs)]
        before = self.job(job_id)
        for key in self.keys:  # one of them is its owner's; to the other there is no such job
            answer = self.run(self._ask(key, "POST", f"/v1/fine_tuning/jobs/{job_id}/{word}"))
            if answer.status_code != 404:
                break
        assert answer.status_code == (200 if before.status in OPEN else 409), answer.text
        if answer.status_code == 200 and word == "cancel":
            assert self.job(job_id).status == "cancelled"

    @rule(which=ANY, on=st.booleans())
    def a_gpu_is_drained_or_not(self, which: int, on: bool) -> None:
        path = f"/api/gpus/{self.gpus[which % len(self.gpus)].double.by.gpu_id}/drain"
        answer = self.run(self._ask(ADMIN_KEY, "POST" if on else "DELETE", path))
        assert answer.status_code in (200, 404), answer.text  # 404: it has been silent for too long

    @rule(seconds=st.sampled_from([1.0, LEASE_S - 1, LEASE_S + 1, 3 * LEASE_S]))
    def time_goes_by(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(knows=st.booleans())
    def a_lease_is_over_and_its_job_dealt_out_again(self, knows: bool) -> None:
        """To the same gpu or another; one that does not know it has lost the first goes on under it."""
        self.clock.advance(LEASE_S + 1)
        for which, gpu in enumerate(self.gpus):
            if not knows:
                gpu.holds.clear()
            self.a_gpu_beats(which, obeys=True)

    @rule()
    def the_relay_is_started_anew(self) -> None:
        async def restart() -> None:
            await self.serving.aclose()
            await self._serve()

        self.run(restart())
        for row in self.rows(select(jobs)):
            assert row.status not in LEASED or row.lease_until > self.clock(), "no term of grace"

    # --- a write of a gpu, and what it must do ---

    def write(self, given: Given, what: str, reason: Any = "drained") -> None:
        job_id, fence, double = given.grant.job.job_id, given.grant.fence, given.gpu.double
        before, stands = self.job(job_id), self.stands(given.gpu, job_id, fence)
        repeats = False
        if what == "report":
            event = wire.JobEvent(seq=given.seq, at=self.clock(), message=f"said under fence {fence}")
            answer = self.run(double.report(given.grant, event))
        elif what == "checkpoint":
            answer = self.run(self._checkpoint(given))
        elif what == "release":
            said = wire.Release(fence=fence, reason=reason)
            answer = self.run(double.call("POST", f"/gpu/jobs/{job_id}/release", said))
        elif what == "blob":
            answer = self.run(double.upload(given.grant, b"the trained tensors"))
        else:
            blob = b"the trained tensors"
            result = result_of(given.grant, blob) if what == "finish" else failed(given.grant, retry=what == "retry")
            repeats = (before.fence, before.last_gpu_id) == (fence, double.by.gpu_id) and bool(
                before.result and before.result == json.loads(result.model_dump_json())
            )
            if stands and what == "finish":
                assert self.run(double.upload(given.grant, blob)).status_code == 200
            answer = self.run(double.finish(given.grant, result))
        if repeats and before.status == "queued" and answer.status_code == 409:
            return  # it was dealt out again between the look and the write
        assert (answer.status_code == 200) == (stands or repeats), (what, answer.status_code, answer.text, before)
        if not stands:
            assert repeats or answer.status_code == 409, answer.text
            return
        if what == "report":
            given.told.append(given.seq)
            given.seq += 1
        if what in ("finish", "fail", "retry", "release"):
            given.gpu.holds.pop(job_id, None)
        if what == "finish":
            assert self.job(job_id).status == "succeeded"

    async def _checkpoint(self, given: Given) -> httpx2.Response:
        chunk = f"{given.grant.job.job_id} {given.grant.fence} {given.step}".encode()
        sha256, double, job_id = hashlib.sha256(chunk).hexdigest(), given.gpu.double, given.grant.job.job_id
        target = f"/gpu/jobs/{job_id}/chunks/{sha256}?fence={given.grant.fence}"
        uploaded = await double.call("PUT", target, chunk)
        if uploaded.status_code != 200:
            return uploaded
        given.step += 1
        ref = wire.ChunkRef(sha256=sha256, bytes=len(chunk))
        file = wire.ChunkedFile(name="state.json", sha256=sha256, bytes=len(chunk), chunks=[ref])
        loss = 1.0 / given.step if given.step % 2 else None
        made = wire.Checkpoint(step=given.step, total_steps=99, validation_loss=loss, made_on="a test", files=[file])
        said = wire.CheckpointStored(fence=given.grant.fence, checkpoint=made)
        return await double.call("POST", f"/gpu/jobs/{job_id}/checkpoints", said)

    def stands(self, gpu: Machine, job_id: str, fence: int) -> bool:
        """Whether that lease is this gpu's now. Only the clock, which a rule moves, could take it away meanwhile."""
        job, by = self.job(job_id), gpu.double.by
        return bool(
            job.status in LEASED
            and (job.fence, job.gpu_id, job.gpu_epoch) == (fence, by.gpu_id, by.epoch)
            and job.lease_until > self.clock()
        )

    # --- what holds all the time ---

    def rows(self, query: Select[Any]) -> Sequence[Row[Any]]:
        async def read() -> Sequence[Row[Any]]:
            async with self.store.read() as db:
                found: Sequence[Row[Any]] = (await db.execute(query)).all()
                return found

        return self.run(read())

    def job(self, job_id: str) -> Row[Any]:
        (row,) = self.rows(select(jobs).where(jobs.c.id == job_id))
        return row

    @invariant()
    def each_job_is_in_one_state_and_looks_like_it(self) -> None:
        holders = []
        for job in self.rows(select(jobs)) if self.jobs else ():
            assert job.status in STATUSES
            lease = (job.gpu_id, job.gpu_epoch, job.lease_until, job.leased_at)
            assert all(x is not None for x in lease) if job.status in LEASED else not any(lease), job
            assert (job.finished_at is not None) == (job.status not in OPEN)
            assert job.attempts <= MAX_ATTEMPTS
            assert (job.fine_tuned_model is not None) == (job.status == "succeeded")
            assert (job.error is not None) == (job.status == "failed")
            holders += [job.gpu_id] if job.gpu_id else []
        assert len(holders) == len(set(holders)), "a gpu has two jobs"

    @invariant()
    def fences_rise_and_what_is_over_stays_over(self) -> None:
        for job_id in self.jobs:
            job, was = self.job(job_id), self.was.get(job_id)
            if was is not None:
                assert job.fence >= was.fence
                if was.status not in OPEN:
                    assert job == was
                elif job.status in LEASED and was.status not in LEASED:
                    assert job.fence > was.fence
            self.was[job_id] = job

    @invariant()
    def a_success_is_one_model_and_checkpoints_are_of_open_jobs(self) -> None:
        if not self.jobs:
            return
        made = {row.job_id for row in self.rows(select(models.c.job_id))}
        assert made == {row.id for row in self.rows(select(jobs.c.id).where(jobs.c.status == "succeeded"))}
        kept = select(checkpoints.c.job_id, func.count().label("n")).group_by(checkpoints.c.job_id)
        for row in self.rows(kept):
            assert self.job(row.job_id).status in OPEN
            assert row.n <= 3

    @invariant()
    def what_was_acknowledged_is_there_once(self) -> None:
        for given in self.given:
            mine: ColumnElement[bool] = job_events.c.job_id == given.grant.job.job_id
            mine &= (job_events.c.fence == given.grant.fence) & job_events.c.seq.is_not(None)
            rows = self.rows(select(job_events.c.seq).where(mine).order_by(job_events.c.seq))
            assert [row.seq for row in rows] == given.told


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_job_keeps_to_its_states_whatever_happens_in_whatever_order(
    kind: str, request: pytest.FixtureRequest
) -> None:
    chosen = settings(
        max_examples=8 if kind == "sqlite" else 3,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    if kind == "sqlite":
        run_state_machine_as_test(Jobs, settings=chosen)
        return
    server: Postgres = request.getfixturevalue("postgres")

    class OnThatServer(Jobs):
        def __init__(self) -> None:
            super().__init__(server.url(server.new()))

    run_state_machine_as_test(OnThatServer, settings=chosen)
