"""One leased job from grant to result: fetch, tokenise, train, report, upload, finish.

Knows what to do in which order; the link knows how to say it, the worker how to compute it.
"""

import asyncio
import logging
import shutil
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import wire
from gpu_service import artifacts, costs, layers, train
from gpu_service.artifacts import Adapter, AdapterMeta, BlobCache, LoraMeta
from gpu_service.data import TokenStore
from gpu_service.device import Device
from gpu_service.errors import GpuError, RelayUnavailable
from gpu_service.link import LeaseLost, Link, NotEnrolled, Pauses, Refused
from gpu_service.models import Models
from gpu_service.worker import Worker

log = logging.getLogger(__name__)

FLUSH_S = 1.0  # between reports of progress
UNEXPECTED = wire.JobError(message="The gpu failed; its log says why.", code="internal_error", retry=True)
MOST_EVENTS = 500  # of one report


class Jobs:
    """The leases that this gpu holds, each a task."""

    def __init__(
        self, folder: Path, link: Link, worker: Worker, models: Models, device: Device, cache: BlobCache
    ) -> None:
        self._folder, self._link, self._worker = folder, link, worker
        self._models, self._device, self._cache = models, device, cache
        self._tasks: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._reporters: dict[str, Reporter] = {}  # by job, of the leases that run
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed: its leases are gone

    def held(self) -> list[wire.HeldLease]:
        return [wire.HeldLease(job_id=job_id, fence=fence) for job_id, fence in self._tasks]

    def views(self) -> list["JobView"]:
        """May be called from any thread."""
        return [reporter.view() for reporter in list(self._reporters.values())]

    def start(self, grant: wire.GrantLease) -> None:
        """Once per lease: a grant may be said twice."""
        lease = (grant.job.job_id, grant.fence)
        if lease not in self._tasks:
            task = asyncio.create_task(self._run(grant), name=f"job {grant.job.job_id}")
            self._tasks[lease] = task
            task.add_done_callback(lambda _: self._tasks.pop(lease, None))

    def cancel(self, lease: wire.CancelLease) -> None:
        if task := self._tasks.get((lease.job_id, lease.fence)):
            task.cancel()

    async def aclose(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, grant: wire.GrantLease) -> None:
        spec = grant.job
        folder = self._folder / f"{spec.job_id}-{grant.fence}"
        reporter = Reporter(self._link, spec.job_id, spec.base_model, grant.fence)
        self._reporters[spec.job_id] = reporter
        log.info("job %s begins", spec.job_id)
        try:
            async with reporter:
                try:
                    adapter = await self._train(spec, folder, reporter)
                    refs = await asyncio.to_thread(artifacts.save, folder / "adapter", adapter)
                    result = wire.JobResult(
                        fence=grant.fence,
                        adapter=refs,
                        trained_tokens=adapter.meta.trained_tokens,
                        hyperparameters=adapter.meta.hyperparameters,
                    )
                    for ref in refs.files:
                        path = folder / "adapter" / ref.name
                        await self._persist(lambda: self._link.upload(spec.job_id, grant.fence, ref, path))  # noqa: B023
                        with suppress(OSError):  # a convenience: it is then served from here without a fetch
                            await asyncio.to_thread(self._cache.add, path)
                except GpuError as exc:
                    log.warning("job %s failed: %s", spec.job_id, exc.message)
                    result = wire.JobResult(fence=grant.fence, error=exc.for_job())
                except Exception:  # the job ends here, whatever it was
                    log.exception("job %s failed", spec.job_id)
                    result = wire.JobResult(fence=grant.fence, error=UNEXPECTED)
                await reporter.flush()
            await self._finish(spec.job_id, result)
            log.info("job %s ended", spec.job_id)
        except LeaseLost:
            log.info("job %s is not ours any more", spec.job_id)
        finally:
            self._reporters.pop(spec.job_id, None)
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def _finish(self, job_id: str, result: wire.JobResult) -> None:
        try:
            await self._persist(lambda: self._link.finish(job_id, result))
        except Refused as exc:  # silence would have the relay give the same lease again, and so on without an end
            log.warning("job %s: %s", job_id, exc.message)
            error = wire.JobError(message=exc.message[:4000], code=exc.code, retry=True)
            await self._persist(lambda: self._link.finish(job_id, wire.JobResult(fence=result.fence, error=error)))

    async def _train(self, spec: wire.JobSpec, folder: Path, reporter: "Reporter") -> Adapter:
        source = self._models.source(spec.base_model)
        selection = await asyncio.to_thread(layers.select, source.tensors, spec.layers, tied=source.tied)
        length = train.max_length(spec.hyperparameters.max_length_tokens, source)
        async with AsyncExitStack() as stack:
            stack.enter_context(self._cache.keep(spec.training_file.sha256))

            async def tokenised(ref: wire.FileRef, name: str) -> TokenStore:
                path = await self._persist(lambda: self._link.fetch(ref, self._cache))
                return await asyncio.to_thread(
                    TokenStore.build, path, folder / name, source.tokenizer, length, param=name
                )

            store = await tokenised(spec.training_file, "training_file")
            validation = await tokenised(spec.validation_file, "validation_file") if spec.validation_file else None
        plan = train.plan(spec.hyperparameters, source, selection, store, length, self._device)
        cost = source.cost(selection, plan.micro_rows, store.report.longest, self._device.precision.dtype.itemsize)
        reporter.say(f"Training data: {store.report.summary()}.")
        reporter.say(f"Training {costs.summary(selection, cost)}, on {self._device.name}.")
        for note in selection.notes:
            reporter.say(note)
        chosen = plan.chosen()
        reporter.say(
            f"{plan.total_steps} steps: {plan.n_epochs} epochs of {plan.steps_per_epoch}, {plan.batch_rows} rows each, "
            f"peak learning rate {plan.learning_rate:g}.",
            data={"hyperparameters": chosen.model_dump(), "total_steps": plan.total_steps},
        )
        job = train.Job(source, selection, plan, store, validation, spec.seed)
        started, train_loss, valid_loss = time.monotonic(), None, None
        async with aclosing(self._worker.train(job)) as progress:  # type: ignore[type-var]
            async for item in progress:
                if isinstance(item, train.Trained):
                    trained = item
                    break
                if item.train_loss is not None or item.valid_loss is not None:
                    train_loss = item.train_loss if item.train_loss is not None else train_loss
                    valid_loss = item.valid_loss if item.valid_loss is not None else valid_loss
                    reporter.metrics(item, plan, time.monotonic() - started)
        meta = AdapterMeta(
            family=source.family,
            base_model=source.id,
            base_revision=source.revision,
            layers=spec.layers,
            lora={t.tensor.name: LoraMeta(rank=t.rank, alpha=t.alpha) for t in selection.lora},
            tensors={t.name: t.shape for t in [*selection.full, *(t.tensor for t in selection.lora)]},
            hyperparameters=chosen,
            created_at=self._link.now(),
            trained_tokens=trained.tokens,
            training_loss=train_loss,
            validation_loss=valid_loss,
        )
        return Adapter(meta, trained.full, trained.lora)

    async def _persist(self, attempt: Callable[[], Awaitable[Any]]) -> Any:
        """Until it works. What can't be said now may be said when the relay is back; LeaseLost ends it."""
        pauses = Pauses()
        while True:
            try:
                return await attempt()
            except RelayUnavailable as exc:
                log.warning("%s Trying again.", exc.message)
                await asyncio.sleep(next(pauses))
            except NotEnrolled:
                await asyncio.sleep(next(pauses))
                await self._link.wait_enrolled()


@dataclass(frozen=True)
class JobView:
    """How far a job is, for a person."""

    job_id: str
    model: str
    step: int
    total_steps: int  # 0 while the data is being prepared
    loss: float | None
    eta_s: float | None


class Reporter:
    """Gathers a job's events and sends them about once a second, in order, each once.

    The last events are sent by `flush`. A lost lease cancels the task that entered the context.
    """

    def __init__(self, link: Link, job_id: str, model: str, fence: int) -> None:
        self._link, self._job_id, self._model, self._fence = link, job_id, model, fence
        self._waiting: list[wire.JobEvent] = []
        self._seq = 0
        self._lost = False
        self._loss: float | None = None
        self._progress: tuple[int, int, float] | None = None  # step, steps in all, seconds left

    async def __aenter__(self) -> "Reporter":
        owner = asyncio.current_task()
        assert owner
        self._task = asyncio.create_task(self._loop(owner))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        if self._lost and kind is asyncio.CancelledError:
            raise LeaseLost

    def view(self) -> JobView:
        step, total_steps, eta_s = self._progress or (0, 0, None)
        return JobView(self._job_id, self._model, step, total_steps, self._loss, eta_s)

    def say(self, message: str, *, level: Literal["info", "warn"] = "info", data: dict[str, Any] | None = None) -> None:
        self._add(message, "message", level, data or {})

    def metrics(self, item: train.Progress, plan: train.Plan, elapsed_s: float) -> None:
        left_s = elapsed_s / max(1, item.step) * (plan.total_steps - item.step)
        data: dict[str, Any] = {
            "step": item.step,
            "total_steps": plan.total_steps,
            "epoch": -(-item.step // plan.steps_per_epoch),
            "tokens": item.tokens,
            "elapsed_s": round(elapsed_s, 2),
            "eta_s": round(left_s, 1),
        }
        if item.valid_loss is not None:
            data["full_valid_loss"] = item.valid_loss
            text = f"Step {item.step}/{plan.total_steps}: validation loss {item.valid_loss:.4f}"
        else:
            data |= {
                "train_loss": item.train_loss,
                "learning_rate": item.learning_rate,
                "gradient_norm": item.gradient_norm,
            }
            text = f"Step {item.step}/{plan.total_steps}: training loss {item.train_loss:.4f}"
        if item.train_loss is not None:
            self._loss = item.train_loss
        self._progress = (item.step, plan.total_steps, left_s)
        self._add(text, "metrics", "info", data)

    def _add(
        self, message: str, type: Literal["message", "metrics"], level: Literal["info", "warn"], data: dict[str, Any]
    ) -> None:
        at = self._link.now()
        self._waiting.append(
            wire.JobEvent(seq=self._seq, at=at, type=type, level=level, message=message[:2000], data=data)
        )
        self._seq += 1

    async def flush(self) -> None:
        """Send what waits. Raises LeaseLost; what can't be sent now stays."""
        while self._waiting:
            some = self._waiting[:MOST_EVENTS]
            try:
                await self._link.report(self._job_id, wire.JobEvents(fence=self._fence, events=some))
            except (RelayUnavailable, NotEnrolled):
                return
            except Refused as exc:  # these events can't be told; the job itself is sound
                log.warning("job %s: %s", self._job_id, exc.message)
            del self._waiting[: len(some)]

    async def _loop(self, owner: asyncio.Task[Any]) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            try:
                await self.flush()
            except LeaseLost:
                self._lost = True
                owner.cancel()
                return
