"""One leased job from grant to result: fetch, tokenise, train, report, upload, finish.

Knows what to do in which order; the link knows how to say it, the worker how to compute it.
"""

import asyncio
import logging
import shutil
import time
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import wire
from adapter import AdapterMeta
from gpu_service import artifacts, costs, layers, train
from gpu_service import plan as plans
from gpu_service.artifacts import Adapter, BlobCache
from gpu_service.checkpoints import Stored
from gpu_service.data import TokenStore
from gpu_service.device import Device
from gpu_service.errors import GpuError, OutOfMemory, RelayUnavailable
from gpu_service.lease import Lease, Often, persist
from gpu_service.link import LeaseLost, Link, NotEnrolled, Refused
from gpu_service.models import Models
from gpu_service.prefix import Chosen, Working
from gpu_service.worker import Worker

log = logging.getLogger(__name__)

LEAVING_S = 20.0  # for the last checkpoints when the service stops
FLUSH_S = 1.0  # between reports of progress
UNEXPECTED = wire.JobError(message="The gpu failed; its log says why.", code="internal_error", retry=True)
MOST_EVENTS = 500  # of one report
STATE_BYTES_PER_PARAM = 12  # of a checkpoint: the weight and AdamW's two moments, in fp32
OVERHEAD_BYTES = 2**18  # of headers, descriptions and random states, at most


Reason = Literal["paused", "drained", "leaving"]


class GivenBack(Exception):
    """The run stopped on purpose, after a checkpoint where one could be made."""


@dataclass
class Run:
    """A lease in work. `lease` is set while it trains: only then is there anything to checkpoint."""

    task: asyncio.Task[None] | None = None
    phase: Literal["preparing", "training", "ending"] = "preparing"
    lease: Lease | None = None
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


class Jobs:
    """The leases that this gpu holds, each a task."""

    def __init__(
        self,
        folder: Path,
        link: Link,
        worker: Worker,
        models: Models,
        device: Device,
        cache: BlobCache,
        often: Often = Often(),  # noqa: B008
    ) -> None:
        self._often = often
        self._folder, self._link, self._worker = folder, link, worker
        self._models, self._device, self._cache = models, device, cache
        self._runs: dict[tuple[str, int], Run] = {}
        self._loading: set[asyncio.Task[None]] = set()
        self._reporters: dict[str, Reporter] = {}  # by job, of the leases that run
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed: its leases are gone

    def draining(self) -> bool:
        """As the relay told it: nothing new is taken."""
        return self._worker.draining

    def held(self) -> list[wire.HeldLease]:
        return [wire.HeldLease(job_id=job_id, fence=fence) for job_id, fence in self._runs]

    def views(self) -> list["JobView"]:
        """May be called from any thread."""
        return [reporter.view() for reporter in list(self._reporters.values())]

    def obey(self, command: wire.Command) -> None:
        match command:
            case wire.GrantLease():
                self.start(command)
            case wire.CancelLease():
                if (run := self._runs.get((command.job_id, command.fence))) and run.task:
                    run.reason = None
                    run.task.cancel()
            case wire.PauseLease():
                if run := self._runs.get((command.job_id, command.fence)):
                    run.give_back("paused")
            case wire.Drain():
                self._worker.draining = True
                for run in self._runs.values():
                    run.give_back("drained")
            case wire.Undrain():
                self._worker.draining = False
            case wire.LoadModel():
                task = asyncio.create_task(self._load(command.model))
                self._loading.add(task)
                task.add_done_callback(self._loading.discard)

    def start(self, grant: wire.GrantLease) -> None:
        """Once per lease: a grant may be said twice."""
        lease = (grant.job.job_id, grant.fence)
        if lease not in self._runs:
            run = self._runs[lease] = Run()
            run.task = asyncio.create_task(self._run(grant, run), name=f"job {grant.job.job_id}")
            run.task.add_done_callback(lambda _: self._runs.pop(lease, None))
            if self._worker.draining:  # it was granted before the relay knew; the run begins, and gives it back
                asyncio.get_running_loop().call_soon(run.give_back, "drained")

    async def _load(self, model: str) -> None:
        try:
            await self._worker.load(model)
        except Exception:  # the relay asks again where somebody still waits
            log.exception("%s could not be loaded", model)

    async def aclose(self) -> None:
        """Checkpoints first, within LEAVING_S; what is left then is broken off. Cancelled, it breaks off at once."""
        for run in self._runs.values():
            run.give_back("leaving")
        tasks = [run.task for run in self._runs.values() if run.task]
        try:
            if tasks:
                await asyncio.wait(tasks, timeout=LEAVING_S)
        finally:
            tasks += self._loading
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, grant: wire.GrantLease, run: Run) -> None:
        spec = grant.job
        folder = self._folder / f"{spec.job_id}-{grant.fence}"
        reporter = Reporter(self._link, spec.job_id, spec.base_model, grant.fence)
        self._reporters[spec.job_id] = reporter
        lease = Lease(self._link, self._cache, spec, grant.fence, reporter, self._often)
        result: wire.JobResult | None = None
        log.info("job %s begins", spec.job_id)
        try:
            async with reporter:
                try:
                    adapter = await self._train(spec, folder, reporter, lease, run)
                    run.phase, run.lease = "ending", None
                    refs = await asyncio.to_thread(artifacts.save, folder / "adapter", adapter)
                    result = wire.JobResult(
                        fence=grant.fence,
                        adapter=refs,
                        trained_tokens=adapter.meta.trained_tokens,
                        hyperparameters=adapter.meta.hyperparameters,
                    )
                    for ref in refs.files:
                        path = folder / "adapter" / ref.name
                        await persist(self._link, lambda: self._link.upload(spec.job_id, grant.fence, ref, path))  # noqa: B023
                        with suppress(OSError):  # a convenience: it is then served from here without a fetch
                            await asyncio.to_thread(self._cache.add, path)
                except GivenBack:
                    log.info("job %s is given back: %s", spec.job_id, run.reason)
                except asyncio.CancelledError:
                    if run.reason is None or run.phase != "preparing" or reporter.is_lost:
                        raise
                    task = asyncio.current_task()
                    assert task
                    task.uncancel()  # nothing has been trained yet that could be kept
                except GpuError as exc:
                    log.warning("job %s failed: %s", spec.job_id, exc.message)
                    result = wire.JobResult(fence=grant.fence, error=self._error(exc, run))
                except Exception:  # the job ends here, whatever it was
                    log.exception("job %s failed", spec.job_id)
                    result = wire.JobResult(fence=grant.fence, error=UNEXPECTED)
                await reporter.flush()
            if result:
                await self._finish(spec.job_id, result)
            elif run.reason:
                await lease.release(run.reason)
            log.info("job %s ended", spec.job_id)
        except LeaseLost:
            log.info("job %s is not ours any more", spec.job_id)
        finally:
            self._reporters.pop(spec.job_id, None)
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    def _error(self, exc: GpuError, run: Run) -> wire.JobError:
        """Out of memory, as the estimate said before: one with as much as that may do better, and this one never."""
        too_large = isinstance(exc, OutOfMemory) and run.needed_bytes > self._device.memory_bytes()
        return exc.for_job().model_copy(update={"needed_bytes": run.needed_bytes if too_large else None})

    async def _finish(self, job_id: str, result: wire.JobResult) -> None:
        try:
            await persist(self._link, lambda: self._link.finish(job_id, result))
        except Refused as exc:  # silence would have the relay give the same lease again, and so on without an end
            log.warning("job %s: %s", job_id, exc.message)
            error = wire.JobError(message=exc.message[:4000], code=exc.code, retry=True)
            await persist(
                self._link, lambda: self._link.finish(job_id, wire.JobResult(fence=result.fence, error=error))
            )

    async def _train(self, spec: wire.JobSpec, folder: Path, reporter: "Reporter", lease: Lease, run: Run) -> Adapter:
        plans.refuse_unbuilt(spec)
        source = self._models.source(spec.base_model)
        selection = await asyncio.to_thread(layers.select, source.tensors, spec.layers, tied=source.tied)
        length = plans.max_length(spec.hyperparameters.max_length_tokens, source)
        async with AsyncExitStack() as stack:
            stack.enter_context(self._cache.keep(spec.training_file.sha256))

            async def tokenised(ref: wire.FileRef, param: str) -> TokenStore:
                path = await persist(self._link, lambda: self._link.fetch(ref, self._cache))
                return await asyncio.to_thread(
                    TokenStore.build, path, folder / param, source.tokenizer, length, name=ref.name, param=param
                )

            store = await tokenised(spec.training_file, "training_file")
            validation = await tokenised(spec.validation_file, "validation_file") if spec.validation_file else None
        found = await lease.newest(selection, source.revision)
        if found and found.plan.steps_per_epoch != -(-len(store) // found.plan.batch_rows):
            reporter.say("The checkpoint does not fit this data: the job begins at its beginning.", level="warn")
            found = None
        plan = (
            found.plan
            if found
            else plans.resolve(
                spec.hyperparameters,
                source,
                selection,
                store,
                length,
                self._device,
                fits=self._models.fits(source.id, selection.quantize),
            )
        )
        cost = source.cost(selection, plan.micro_rows, store.report.longest, self._device.precision.dtype.itemsize)
        run.needed_bytes = cost.total
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
        flops = costs.training_flops(selection, source.tensors, tied=source.tied)
        per_s = self._worker.flops_per_s(source.id)
        await lease.reserve(
            STATE_BYTES_PER_PARAM * selection.n_trainable + OVERHEAD_BYTES,
            cost.adapter_bytes + OVERHEAD_BYTES,
            flops * int(store.lengths.sum()) * plan.n_epochs / per_s if per_s else 0.0,
        )
        made_on = f"{self._device.torch.type} {self._device.precision.name}"
        before_s, train_loss, valid_loss, start = 0.0, None, None, None
        if found:
            start, before_s = found.state, found.elapsed_s
            train_loss, valid_loss = start.train_loss, start.valid_loss
            lease.goes_on(found, made_on)
        first_step = start.step if start else 0
        job = train.Job(source, selection, plan, store, validation, spec.seed)
        started = time.monotonic()
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(lease)
            progress = await stack.enter_async_context(
                aclosing(self._worker.train(job, start=start, wanted=lease.wanted))  # type: ignore[type-var]
            )
            run.phase, run.lease = "training", lease
            async for item in progress:
                elapsed_s = time.monotonic() - started
                if isinstance(item, train.State):
                    lease.take(Stored(item, plan, before_s + elapsed_s, made_on, self._link.now()))
                    if run.reason:
                        await lease.settled()
                        lease.says_what_is_lost(item.step)
                        raise GivenBack
                    continue
                if isinstance(item, Working):
                    if run.reason:  # nothing has been trained since the last checkpoint
                        raise GivenBack
                    continue
                if isinstance(item, Chosen):
                    plan, chosen = self._cached(item, plan, reporter, goes_on=start is not None)
                    continue
                if isinstance(item, train.Trained):
                    trained = item
                    break
                if item.train_loss is not None or item.valid_loss is not None:
                    train_loss = item.train_loss if item.train_loss is not None else train_loss
                    valid_loss = item.valid_loss if item.valid_loss is not None else valid_loss
                    left_s = elapsed_s / max(1, item.step - first_step) * (plan.total_steps - item.step)
                    reporter.metrics(item, plan, before_s + elapsed_s, left_s)
        meta = AdapterMeta(
            family=source.family,
            base_model=source.id,
            base_revision=source.revision,
            tied=source.tied,
            layers=spec.layers,
            lora={t.tensor.name: t.meta for t in selection.lora},
            tensors={t.name: t.shape for t in [*selection.full, *(t.tensor for t in selection.lora)]},
            hyperparameters=chosen,
            created_at=self._link.now(),
            trained_tokens=trained.tokens,
            training_loss=train_loss,
            validation_loss=valid_loss,
        )
        return Adapter(meta, trained.full, trained.lora)

    def _cached(
        self, choice: Chosen, plan: plans.Plan, reporter: "Reporter", *, goes_on: bool
    ) -> tuple[plans.Plan, wire.Hyperparameters]:
        """The plan with what was chosen, which is then kept; and its hyperparameters."""
        what = "is kept on disk" if choice.cached else "is computed in every step"
        reporter.say(f"What the frozen layers put out {what}: {choice.why}.", data={"prefix_cache": choice.cached})
        if goes_on and choice.cached is not plan.prefix_cache:
            reporter.say("It was otherwise before the checkpoint: results agree but for rounding.", level="warn")
        plan = replace(plan, prefix_cache=choice.cached)
        return plan, plan.chosen()


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
        self.is_lost = False
        self._loss: float | None = None
        self._progress: tuple[int, int, float] | None = None  # step, steps in all, seconds left

    async def __aenter__(self) -> "Reporter":
        owner = asyncio.current_task()
        assert owner
        self._owner = owner
        self._task = asyncio.create_task(self._loop())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        if self.is_lost and kind is asyncio.CancelledError:
            raise LeaseLost

    def view(self) -> JobView:
        step, total_steps, eta_s = self._progress or (0, 0, None)
        return JobView(self._job_id, self._model, step, total_steps, self._loss, eta_s)

    def say(self, message: str, *, level: Literal["info", "warn"] = "info", data: dict[str, Any] | None = None) -> None:
        self._add(message, "message", level, data or {})

    def metrics(self, item: train.Progress, plan: plans.Plan, elapsed_s: float, left_s: float) -> None:
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

    def lost(self) -> None:
        """The lease is another's now: the work on it ends."""
        self.is_lost = True
        self._owner.cancel()

    async def _loop(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            try:
                await self.flush()
            except LeaseLost:
                self.lost()
                return
