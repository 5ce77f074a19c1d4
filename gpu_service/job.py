"""The leases that this gpu holds, from grant to result: commands, endings, the hand-over of what came of it.

What a job does in between is finetune.py's, or batch.py's; the link knows how to say it.
"""

import asyncio
import logging
import shutil
from concurrent.futures import Executor
from contextlib import suppress
from pathlib import Path

import wire
from gpu_service import artifacts
from gpu_service.artifacts import BlobCache
from gpu_service.batch import BatchRun, Pace
from gpu_service.device import Device
from gpu_service.errors import GpuError, OutOfMemory
from gpu_service.finetune import GivenBack, Outcome, Run
from gpu_service.finetune_pictures import PictureTune
from gpu_service.finetune_text import TextTune
from gpu_service.lease import Lease, Often, persist, release
from gpu_service.link import LeaseLost, Link, Refused
from gpu_service.models import Models
from gpu_service.reporter import JobView, Reporter
from gpu_service.worker import Worker

log = logging.getLogger(__name__)

LEAVING_S = 20.0  # for the last checkpoints when the service stops
UNEXPECTED = wire.JobError(message="The gpu failed; its log says why.", code="internal_error", retry=True)


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
        tokenizing: Executor,
        pace: Pace,
        often: Often = Often(),  # noqa: B008
    ) -> None:
        self._often, self._tokenizing, self._pace = often, tokenizing, pace
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

    def views(self) -> list[JobView]:
        """May be called from any thread."""
        return [reporter.view() for reporter in list(self._reporters.values())]

    def obey(self, command: wire.Command) -> None:
        match command:
            case wire.GrantLease() | wire.GrantBatch():
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

    def start(self, grant: wire.GrantLease | wire.GrantBatch) -> None:
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

    async def _run(self, grant: wire.GrantLease | wire.GrantBatch, run: Run) -> None:
        spec = grant.job
        folder = self._folder / f"{spec.job_id}-{grant.fence}"
        reporter = Reporter(self._link, self._device, spec.job_id, spec.base_model, grant.fence)
        self._reporters[spec.job_id] = reporter
        result: wire.JobResult | None = None
        log.info("job %s begins", spec.job_id)
        try:
            async with reporter:
                try:
                    if isinstance(grant, wire.GrantBatch):
                        result = await self._answered(grant, reporter, run)
                    else:
                        result = await self._tuned(grant, folder, reporter, run)
                except GivenBack:
                    log.info("job %s is given back: %s", spec.job_id, run.reason)
                except asyncio.CancelledError:
                    if run.reason is None or run.phase != "preparing" or reporter.is_lost:
                        raise
                    task = asyncio.current_task()
                    assert task
                    task.uncancel()  # nothing has been made yet that could be kept
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
                await release(self._link, spec.job_id, grant.fence, run.reason)
            log.info("job %s ended", spec.job_id)
        except LeaseLost:
            log.info("job %s is not ours any more", spec.job_id)
        finally:
            self._reporters.pop(spec.job_id, None)
            # The relay, told of the end, has the lease cancelled that is still reported: not before the folder is gone.
            await asyncio.shield(asyncio.create_task(asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)))

    async def _tuned(self, grant: wire.GrantLease, folder: Path, reporter: Reporter, run: Run) -> wire.JobResult:
        spec = grant.job
        lease = Lease(self._link, self._cache, spec, grant.fence, reporter, self._often)
        kind = PictureTune if self._models.makes_pictures(spec.base_model) else TextTune
        tune = kind(self._link, self._worker, self._models, self._device, self._cache, spec, folder)
        outcome = await tune.run(reporter, lease, run)
        run.phase, run.lease = "ending", None
        return await self._hand_in(spec.job_id, grant.fence, folder, outcome)

    async def _answered(self, grant: wire.GrantBatch, reporter: Reporter, run: Run) -> wire.JobResult:
        parts = self._link, self._worker, self._models, self._cache, self._tokenizing
        await BatchRun(*parts, grant, reporter, self._pace).run(run)
        return wire.JobResult(fence=grant.fence)

    def _error(self, exc: GpuError, run: Run) -> wire.JobError:
        """Out of memory, as the estimate said before: one with as much as that may do better, and this one never."""
        too_large = isinstance(exc, OutOfMemory) and run.needed_bytes > self._device.memory_bytes()
        return exc.for_job().model_copy(update={"needed_bytes": run.needed_bytes if too_large else None})

    async def _hand_in(self, job_id: str, fence: int, folder: Path, outcome: Outcome) -> wire.JobResult:
        """Everything that the result names is at the relay then."""
        refs = await asyncio.to_thread(artifacts.save, folder / "adapter", outcome.adapter)
        reports = await asyncio.to_thread(outcome.write_reports, folder)
        for ref, path in [*((ref, folder / "adapter" / ref.name) for ref in refs.files), *reports]:
            await persist(self._link, lambda: self._link.upload(job_id, fence, ref, path))  # noqa: B023
        for ref in refs.files:
            with suppress(OSError):  # a convenience: it is then served from here without a fetch
                await asyncio.to_thread(self._cache.add, folder / "adapter" / ref.name)
        return wire.JobResult(
            fence=fence,
            adapter=refs,
            trained_tokens=outcome.adapter.meta.trained_tokens,
            hyperparameters=outcome.adapter.meta.hyperparameters,
            reports=[ref for ref, _ in reports],
        )

    async def _finish(self, job_id: str, result: wire.JobResult) -> None:
        try:
            await persist(self._link, lambda: self._link.finish(job_id, result))
        except Refused as exc:  # silence would have the relay give the same lease again, and so on without an end
            log.warning("job %s: %s", job_id, exc.message)
            error = wire.JobError(message=exc.message[:4000], code=exc.code, retry=True)
            await persist(
                self._link, lambda: self._link.finish(job_id, wire.JobResult(fence=result.fence, error=error))
            )
