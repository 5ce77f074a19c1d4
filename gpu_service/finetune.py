"""One fine-tune: fetch, plan, train, and what came of it as an adapter and a report.

Knows what to do in which order; the worker knows how to compute it, the reporter how to word it. What differs between
models of text and those that make pictures is theirs: finetune_text.py and finetune_pictures.py.
"""

import asyncio
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

import wire
from adapter import AdapterMeta
from gpu_service import artifacts, costs, layers, report, train, trainable
from gpu_service.artifacts import Adapter, BlobCache, file_ref
from gpu_service.checkpoints import Stored
from gpu_service.data import TokenStore
from gpu_service.device import Device
from gpu_service.layers import Selection
from gpu_service.lease import Lease, persist
from gpu_service.link import Link
from gpu_service.models import Models, Source
from gpu_service.picture_data import PictureStore
from gpu_service.plan import Plan
from gpu_service.prefix import Chosen, Working
from gpu_service.probe import Ready
from gpu_service.reporter import Reporter
from gpu_service.samples import Prompt
from gpu_service.sd import PictureSource
from gpu_service.worker import AnyJob, Worker

SAID_EVERY_S = 10.0  # of the rows that are brought into form
OVERHEAD_BYTES = 2**20  # of headers, descriptions, curves, reports and random states, at most

Reason = Literal["paused", "drained", "leaving"]
S = TypeVar("S", Source, PictureSource)
D = TypeVar("D", TokenStore, PictureStore)


class GivenBack(Exception):
    """The run stopped on purpose, after a checkpoint where one could be made."""


class Keeping(Protocol):
    """What stores how far the work is."""

    def now(self) -> None:
        """At the next occasion; then the work ends."""


@dataclass
class Run:
    """A lease in work. `lease` is set while it works: only then is there anything to keep."""

    task: asyncio.Task[None] | None = None
    phase: Literal["preparing", "working", "ending"] = "preparing"
    lease: Keeping | None = None
    reason: Reason | None = None  # why it is to be given back
    needed_bytes: int = 0  # of the device's memory, as estimated

    def give_back(self, reason: Reason) -> None:
        """Once. What has been trained to its end is better delivered than given back."""
        if self.reason or self.phase == "ending":
            return
        self.reason = reason
        if self.lease:
            self.lease.now()
        elif self.task:
            self.task.cancel()


@dataclass(frozen=True)
class Outcome:
    adapter: Adapter
    report: dict[str, Any]

    def write_reports(self, folder: Path) -> list[tuple[wire.FileRef, Path]]:
        found = []
        for name, render in ((wire.REPORT_JSON, report.as_json), (wire.REPORT_HTML, report.as_html)):
            (folder / name).write_bytes(render(self.report))
            found.append((file_ref(folder / name), folder / name))
        return found


@dataclass(frozen=True)
class Data(Generic[D]):
    """What a run learns from and is asked."""

    store: D
    validation: D | None
    prompts: Sequence[Prompt]
    begin: Adapter | None


class FineTune(ABC, Generic[S, D]):
    """What all fine-tunes have in common; below stands what differs by the kind of model."""

    def __init__(
        self,
        link: Link,
        worker: Worker,
        models: Models,
        device: Device,
        cache: BlobCache,
        spec: wire.JobSpec,
        folder: Path,
    ) -> None:
        self._link, self._worker, self._models, self._device = link, worker, models, device
        self._cache, self._spec, self._folder = cache, spec, folder

    async def run(self, reporter: Reporter, lease: Lease, run: Run) -> Outcome:
        """Raises GivenBack once a checkpoint that was asked for is stored, and GpuError for whatever fails the job."""
        spec = self._spec
        source = self._source()
        selection = await asyncio.to_thread(layers.select, source.tensors, spec.layers, tied=source.tied)
        data = await self._fetch(source, reporter)
        found = await lease.newest(selection, source.revision)
        if found and found.plan.steps_per_epoch != -(-len(data.store) // found.plan.batch_rows):
            reporter.say("The checkpoint does not fit this data: the job begins at its beginning.", level="warn")
            found = None
        plan = found.plan if found else self._plan(source, selection, data)
        plan = replace(plan, rate_factor=spec.rate_factor)
        run.needed_bytes = self._cost(source, selection, data, plan).total
        self._introduce(reporter, source, selection, data, plan)
        await self._reserve(lease, source, selection, data, plan)
        made_on = f"{self._device.torch.type} {self._device.precision.name}"
        before_s = found.elapsed_s if found else 0.0
        if found:
            lease.goes_on(found, made_on)
        prompts = tuple(data.prompts)
        if plan.stream_layers and prompts:
            reporter.say("Streamed layers are never all here, so there are no answers to prompts.")
            prompts = ()
        job = self._job(source, selection, plan, replace(data, prompts=prompts))
        started = said_at = time.monotonic()
        trained: train.Trained | None = None
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(lease)
            start = found.state if found else None
            progress = await stack.enter_async_context(
                aclosing(self._worker.train(job, start=start, wanted=lease.wanted))  # type: ignore[type-var]
            )
            run.phase, run.lease = "working", lease
            async for item in progress:
                elapsed_s = before_s + time.monotonic() - started
                match item:
                    case Working():
                        if run.reason:  # nothing has been trained since the last checkpoint
                            raise GivenBack
                        if time.monotonic() - said_at > SAID_EVERY_S:
                            said_at = time.monotonic()
                            reporter.say(f"Before the first step: {100 * item.done // max(1, item.of)} % is prepared.")
                    case Chosen():
                        reporter.begins(start.step if start else 0)
                        self._say_chosen(reporter, item, plan, goes_on=start is not None)
                        plan = replace(plan, prefix_cache=item.cached)
                    case Ready():
                        plan = replace(plan, micro_rows=item.plan.micro_rows)
                        reporter.begins(0)
                        _say_ready(reporter, item)
                    case train.State() if item.course.is_rising and not run.reason:
                        lease.skip()  # what is stored last must be worth going on from
                    case train.State():
                        lease.take(Stored(item, plan, elapsed_s, made_on, self._link.now()))
                        if run.reason:
                            await lease.settled()
                            lease.says_what_is_lost(item.step)
                            raise GivenBack
                    case train.Trained():
                        trained = item
                        break
                    case train.Progress():
                        if item.train_loss is not None or item.valid_loss is not None or item.answers is not None:
                            reporter.metrics(item, plan, prompts, elapsed_s)
        assert trained, "a run ends with what it trained, or raises"
        if plan.early_stop_patience:
            _say_best(reporter, trained, plan)
        elapsed_s = before_s + time.monotonic() - started
        adapter = self._adapter(source, data, plan, trained)
        told = self._told(source, selection, data, plan, trained, elapsed_s)
        return Outcome(adapter, await asyncio.to_thread(report.build, told))

    # --- what differs by the kind of model ----------------------------------------------------------------------------

    @abstractmethod
    def _source(self) -> S: ...

    @abstractmethod
    async def _fetch(self, source: S, reporter: Reporter) -> Data[D]:
        """Fetched and brought into form; files that other jobs let go stay for that long."""

    @abstractmethod
    def _plan(self, source: S, selection: Selection, data: Data[D]) -> Plan: ...

    @abstractmethod
    def _job(self, source: S, selection: Selection, plan: Plan, data: Data[D]) -> AnyJob: ...

    @abstractmethod
    def _cost(self, source: S, selection: Selection, data: Data[D], plan: Plan) -> costs.Estimate: ...

    @abstractmethod
    def _estimated_s(self, source: S, selection: Selection, data: Data[D], plan: Plan) -> float:
        """Of the whole job on this gpu; 0: not known."""

    @abstractmethod
    def _say_chosen(self, reporter: Reporter, choice: Chosen, plan: Plan, *, goes_on: bool) -> None: ...

    # --- what all have ------------------------------------------------------------------------------------------------

    async def _fetched(self, ref: wire.FileRef) -> Path:
        path: Path = await persist(self._link, lambda: self._link.fetch(ref, self._cache))
        return path

    async def _begin(self, source: S) -> Adapter | None:
        if not self._spec.continue_from:
            return None
        refs = self._spec.continue_from.adapter.files
        with self._cache.keep(*(ref.sha256 for ref in refs)):
            files = {ref.name: await self._fetched(ref) for ref in refs}
            return await asyncio.to_thread(artifacts.load, files, source.tensors)

    def _introduce(self, reporter: Reporter, source: S, selection: Selection, data: Data[D], plan: Plan) -> None:
        reporter.say(f"Training data: {data.store.report.summary()}.")
        reporter.say(f"Training {self._summary(source, selection, data, plan)}, on {self._device.name}.")
        if self._spec.continue_from:
            reporter.say(f"It begins at {self._spec.continue_from.id}, and the new model is whole without it.")
        for note in selection.notes:
            reporter.say(note)
        reporter.say(
            f"{plan.total_steps} steps: {plan.n_epochs} epochs of {plan.steps_per_epoch}, {plan.batch_rows} rows each, "
            f"peak learning rate {plan.learning_rate * plan.rate_factor:g}, {plan.schedule}, {plan.optimizer}.",
            data={"hyperparameters": plan.chosen().model_dump(), "total_steps": plan.total_steps},
        )

    def _summary(self, source: S, selection: Selection, data: Data[D], plan: Plan) -> str:
        return costs.summary(selection, self._cost(source, selection, data, plan))

    async def _reserve(self, lease: Lease, source: S, selection: Selection, data: Data[D], plan: Plan) -> None:
        specs = train.state_specs(selection, plan).values()
        await lease.reserve(
            sum(prod(shape) * dtype.itemsize for shape, dtype in specs) + OVERHEAD_BYTES,
            trainable.result_bytes(selection, data.begin) + OVERHEAD_BYTES,
            self._estimated_s(source, selection, data, plan),
        )

    def _adapter(self, source: S, data: Data[D], plan: Plan, trained: train.Trained) -> Adapter:
        shapes = {t.name: t.shape for t in source.tensors}
        earlier: list[wire.LayerSpec] = data.begin.meta.layers if data.begin else []
        course = trained.course
        meta = AdapterMeta(
            family=source.family,
            base_model=source.id,
            base_revision=source.revision,
            tied=source.tied,
            layers=[*earlier, *(spec for spec in self._spec.layers if spec not in earlier)],
            lora=trained.meta,
            tensors={name: shapes[name] for name in [*trained.full, *trained.lora]},
            hyperparameters=plan.chosen(),
            created_at=self._link.now(),
            trained_tokens=trained.tokens,
            training_loss=course.train_loss,
            validation_loss=course.best_loss if plan.early_stop_patience else course.valid_loss,
        )
        return Adapter(meta, trained.full, trained.lora)

    def _told(
        self,
        source: S,
        selection: Selection,
        data: Data[D],
        plan: Plan,
        trained: train.Trained,
        elapsed_s: float,
    ) -> report.Told:
        return report.Told(
            job_id=self._spec.job_id,
            base_model=source.id,
            continued_from=self._spec.continue_from.id if self._spec.continue_from else None,
            device=f"{self._device.name}, {self._device.precision.name}",
            summary=self._summary(source, selection, data, plan),
            layers=self._spec.layers,
            hyperparameters=plan.chosen(),
            training=data.store.report,
            validation=data.validation.report if data.validation else None,
            prompts=data.prompts,
            course=trained.course,
            changes=trained.changes,
            elapsed_s=elapsed_s,
            at=self._link.now(),
            kept_best=plan.early_stop_patience > 0,
        )


async def beside(build: Callable[..., D], say: Callable[[int], None]) -> D:
    """In a thread, which says how far it is, and does not outlive whoever waits for it."""
    loop, said_at, unwanted = asyncio.get_running_loop(), time.monotonic(), threading.Event()

    def told(rows: int) -> None:
        nonlocal said_at
        if unwanted.is_set():
            raise asyncio.CancelledError
        if time.monotonic() - said_at > SAID_EVERY_S:
            said_at = time.monotonic()
            loop.call_soon_threadsafe(say, rows)

    work = asyncio.create_task(asyncio.to_thread(build, told=told))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        unwanted.set()
        await asyncio.wait({work})  # the folder that it writes to is about to go
        raise


def _say_ready(reporter: Reporter, ready: Ready) -> None:
    rows, peak = ready.plan.micro_rows, f"{ready.peak_bytes / 1e6:,.0f} MB"
    if rows == ready.asked_rows:
        reporter.say(f"A trial with the {rows} longest rows fits: it took {peak} beside what is held anyway.")
        return
    reporter.say(
        f"{ready.asked_rows} of the longest rows at once do not fit: each step now works on {rows} at a time, "
        f"which took {peak} in a trial, and adds them up. The result is the same within rounding.",
        level="warn",
        data={"hyperparameters": ready.plan.chosen().model_dump()},
    )


def _say_best(reporter: Reporter, trained: train.Trained, plan: Plan) -> None:
    course = trained.course
    if course.ended_early:
        reporter.say(f"The validation loss has not fallen {course.in_vain} times in a row: the training ends here.")
    if course.best_loss is not None:
        reporter.say(
            f"The result is that of step {course.best_step} of {plan.total_steps}, which had the lowest validation "
            f"loss, {course.best_loss:.4f}."
        )
