"""A lease's checkpoints on their way to the relay: what is said, what is said again, and what is only complained of."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import wire
from gpu_service.artifacts import BlobCache
from gpu_service.checkpoints import Stored
from gpu_service.course import Course
from gpu_service.lease import Lease, Often
from gpu_service.link import Refused, RelayFull
from gpu_service.plan import Plan
from gpu_service.train import State

PLAN = Plan(
    n_epochs=1,
    batch_rows=1,
    micro_rows=1,
    learning_rate=1e-4,
    multiplier=1.0,
    max_length_tokens=8,
    steps_per_epoch=9,
    warmup_steps=1,
)
SPEC = wire.JobSpec(
    job_id="job",
    base_model="m",
    layers=[wire.LayerSpec()],
    hyperparameters=wire.Hyperparameters(),
    seed=1,
    training_file=wire.FileRef(name="rows", sha256="c" * 64, bytes=3),
)


class RecordingLink:
    """Stands where the relay's job routes are: keeps chunks, and answers what a test sets."""

    def __init__(self) -> None:
        self.chunks: dict[str, bytes] = {}
        self.uploads = 0
        self.said: list[wire.Message] = []
        self.answer: Callable[[wire.Message], None] = lambda message: None

    async def put(self, target: str, sha256: str, path: Path, *, anew: bool = False) -> None:
        assert target == f"/gpu/jobs/job/chunks/{sha256}?fence=2"
        if anew or sha256 not in self.chunks:
            self.chunks[sha256] = await asyncio.to_thread(path.read_bytes)
            self.uploads += 1

    async def fetch(self, ref: wire.ChunkRef, cache: BlobCache) -> Path:
        async def content() -> AsyncIterator[bytes]:
            yield self.chunks[ref.sha256]

        return await cache.store(ref.sha256, ref.bytes, content())

    async def post(self, target: str, message: wire.Message) -> None:
        self.said.append(message)
        self.answer(message)


class Told:
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.is_lost = False

    def say(self, message: str, *, level: Literal["info", "warn"] = "info") -> None:
        self.warnings += [message] if level == "warn" else []

    def lost(self) -> None:
        self.is_lost = True


def a_lease(link: Any, folder: Path, told: Told, spec: wire.JobSpec = SPEC) -> Lease:
    lease = Lease(link, BlobCache(folder, 2**30), spec, 2, told, Often(every_s=1000))
    lease._hash = "d" * 64
    return lease


def stored(step: int) -> Stored:
    tensors = {"weight.w": torch.full((3 * 2**20,), float(step)), "random.cpu": torch.get_rng_state()}
    return Stored(State(Course(step=step, tokens=step, train_loss=1.0), {}, tensors), PLAN, 1.0, "cpu fp32", 1.0)


async def test_a_checkpoint_is_told_after_all_its_chunks_and_each_is_what_its_name_says(tmp_path: Path) -> None:
    link, told = RecordingLink(), Told()
    async with a_lease(link, tmp_path, told) as lease:
        lease.take(stored(4))
        await lease.settled()
    (message,) = link.said
    assert isinstance(message, wire.CheckpointStored)
    named = [chunk for file in message.checkpoint.files for chunk in file.chunks]
    assert {chunk.sha256 for chunk in named} == link.chunks.keys()
    assert all(chunk.bytes <= wire.MAX_CHUNK_BYTES for chunk in named)
    assert all(hashlib.sha256(content).hexdigest() == name for name, content in link.chunks.items())
    assert not told.warnings


async def test_a_chunk_that_the_relay_lost_is_uploaded_again_and_nothing_else(tmp_path: Path) -> None:
    link, told = RecordingLink(), Told()

    def one_is_missing_at_first(message: wire.Message) -> None:
        if len(link.said) == 1:
            link.chunks.popitem()
            refused = Refused("a chunk is missing")
            refused.reason = "blob_missing"
            raise refused

    link.answer = one_is_missing_at_first
    async with a_lease(link, tmp_path, told) as lease:
        lease.take(stored(4))
        await lease.settled()
    assert len(link.said) == 2
    assert link.uploads == len(link.chunks) + 1
    assert not told.warnings


async def test_a_chunk_that_the_relay_holds_damaged_is_sent_again_once_it_is_made_again(tmp_path: Path) -> None:
    link, told = RecordingLink(), Told()
    async with a_lease(link, tmp_path / "first", told) as lease:
        lease.take(stored(4))
        await lease.settled()
    (message,) = link.said
    assert isinstance(message, wire.CheckpointStored)
    sound = dict(link.chunks)
    damaged = message.checkpoint.files[0].chunks[0].sha256
    link.chunks[damaged] = bytes(len(sound[damaged]))
    spec = SPEC.model_copy(update={"checkpoints": [message.checkpoint]})
    nothing_selected: Any = None  # it is not read that far
    async with a_lease(link, tmp_path / "second", told, spec) as lease:
        assert await lease.newest(nothing_selected, "main") is None
        assert told.warnings[0].startswith("The checkpoint of step 4 can't be used: ")
        lease.take(stored(4))
        await lease.settled()
    assert link.chunks[damaged] == sound[damaged]


async def test_a_relay_without_room_costs_one_checkpoint_and_is_told_once(tmp_path: Path) -> None:
    link, told = RecordingLink(), Told()

    def full(message: wire.Message) -> None:
        raise RelayFull("The disk is full.")

    link.answer = full
    async with a_lease(link, tmp_path, told) as lease:
        for step in (1, 2):
            lease.take(stored(step))
            await lease.settled()
        link.answer = lambda message: None
        lease.take(stored(3))
        await lease.settled()
    assert len(told.warnings) == 1
    assert "step 1" in told.warnings[0]
    last = link.said[-1]
    assert isinstance(last, wire.CheckpointStored)
    assert last.checkpoint.step == 3


async def test_a_pause_whose_checkpoint_finds_no_room_says_which_steps_are_trained_again(tmp_path: Path) -> None:
    link, told = RecordingLink(), Told()

    def full(message: wire.Message) -> None:
        raise RelayFull("The disk is full.")

    async with a_lease(link, tmp_path, told) as lease:
        lease.take(stored(4))
        await lease.settled()
        lease.says_what_is_lost(4)
        assert told.warnings == []
        link.answer = full
        lease.take(stored(9))
        await lease.settled()
        lease.says_what_is_lost(9)
    assert "stops at step 9" in told.warnings[-1]
    assert "goes on from the checkpoint of step 4" in told.warnings[-1]


async def test_checkpoints_larger_than_was_thought_are_reserved_before_they_are_sent(tmp_path: Path) -> None:
    link = RecordingLink()
    lease = a_lease(link, tmp_path, Told())
    await lease.reserve(1, 1, 1.0)
    async with lease:
        lease.take(stored(4))
        await lease.settled()
    first, again, message = link.said
    assert isinstance(first, wire.Reservation)
    assert isinstance(again, wire.Reservation)
    assert isinstance(message, wire.CheckpointStored)
    assert again.checkpoint_bytes == sum(chunk.bytes for file in message.checkpoint.files for chunk in file.chunks)
    assert (first.checkpoint_bytes, again.result_bytes) == (1, 1)


async def test_one_that_was_not_begun_gives_way_to_a_newer_one(tmp_path: Path) -> None:
    link = RecordingLink()
    async with a_lease(link, tmp_path, Told()) as lease:
        lease.take(stored(1))
        lease.take(stored(2))
        await lease.settled()
    assert [m.checkpoint.step for m in link.said if isinstance(m, wire.CheckpointStored)] == [2]


@pytest.mark.parametrize("code", ["quota_exceeded", "disk_full"])
async def test_no_room_before_the_first_step_is_the_jobs_error(code: str, tmp_path: Path) -> None:
    link = RecordingLink()

    def refuse(message: wire.Message) -> None:
        refused = Refused("No room: delete files you no longer need.")
        refused.reason = code
        raise refused

    link.answer = refuse
    with pytest.raises(Refused) as caught:
        await a_lease(link, tmp_path, Told()).reserve(1, 1, 1.0)
    assert caught.value.code == code
    assert not caught.value.for_job().retry


def test_wanted_says_yes_once(tmp_path: Path) -> None:
    lease = a_lease(RecordingLink(), tmp_path, Told())
    assert not lease.wanted()
    lease.now()
    assert [lease.wanted(), lease.wanted()] == [True, False]
