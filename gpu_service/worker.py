"""The one thread that owns the device. It runs what the scheduler chooses, and hands results to the event loop.

Everything that touches a tensor happens here: loading weights, steps of text, slices of training. The rest of the
service talks to it by posting closures and reading streams. It knows nothing of HTTP or the relay.
"""

import asyncio
import contextvars
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Generic, Literal, TypeVar

import torch

from gpu_service import image, learn_pictures, prepare, train
from gpu_service.decoder import Decoder
from gpu_service.device import Device, give_back, translate
from gpu_service.errors import BadRequest, GpuError, OutOfMemory, Stopping, TooBusy
from gpu_service.learn_pictures import PictureJob
from gpu_service.learn_text import TextJob
from gpu_service.metrics import Metrics
from gpu_service.models import Base, Models
from gpu_service.prefix import Shelf
from gpu_service.resident import AdapterFiles, Resident
from gpu_service.rows import Dials
from gpu_service.sampling import Sampling
from gpu_service.scheduler import Kind, Scheduler
from gpu_service.settings import Settings
from gpu_service.text import Engine, Event, Finish, Request
from gpu_service.tuned import PLAIN

log = logging.getLogger(__name__)

PREFILL_CHUNK_TOKENS = 256  # of a prompt, in one step; the others get a token in between
PREFILL_CHUNK_TOKENS_GPU = 2048

T = TypeVar("T")
Report = train.Report  # what a run says after a slice


@dataclass(frozen=True)
class Generation:
    """What a caller asks for, by names."""

    base_model: str
    adapter: AdapterFiles | None
    prompt: list[int]
    sampling: Sampling
    dials: Dials | None
    n: int = 1
    tell_prompt: bool = False
    caller: str = ""
    alone: bool = False
    shorten: bool = False  # nobody named `max_tokens`: fewer will do where there is no room for so many


class Stream(Generic[T]):
    """From the device thread to one reader on the event loop. Closing it tells the device thread to stop."""

    def __init__(self, is_last: Callable[[T], bool], n_last: int = 1) -> None:
        """Ends after `n_last` items for which `is_last` holds."""
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[T | BaseException] = asyncio.Queue()
        self._is_last, self._n_last = is_last, n_last
        self.closed = False

    def send(self, item: T | BaseException) -> None:
        """Called on the device thread. An exception ends the stream."""
        if not self.closed:
            # The loop may be gone already when the process is on its way out.
            with _unless_closed():
                self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def read(self) -> AsyncIterator[T]:
        left = self._n_last
        try:
            while left:
                item = await self._queue.get()
                if isinstance(item, BaseException):
                    raise item
                left -= self._is_last(item)
                yield item
        finally:
            self.closed = True


@contextmanager
def _unless_closed() -> Iterator[None]:
    try:
        yield
    except RuntimeError:
        log.debug("the event loop has closed")


AnyJob = TextJob | PictureJob


class Training:
    """A run under way, with random state of its own."""

    def __init__(
        self, job: AnyJob, stream: Stream[Report], start: train.State | None, wanted: Callable[[], bool]
    ) -> None:
        self.job, self.stream, self.start, self.wanted = job, stream, start, wanted
        self.steps: Iterator[Report] | None = None
        self.step_s, self.tokens = 0.0, None if start else 0  # since the last optimizer step; counted so far
        self._random: tuple[torch.Tensor, torch.Tensor | None] | None = None

    @contextmanager
    def own_random_state(self) -> Iterator[None]:
        """Serving draws from the global state between slices; neither may disturb the other."""
        outside = _random_state()
        if self._random:
            _set_random_state(self._random)
        try:
            yield
        finally:
            self._random = _random_state()
            _set_random_state(outside)


class Worker:
    def __init__(self, settings: Settings, device: Device, models: Models) -> None:
        self._device, self._models = device, models
        self._max_waiting = settings.max_waiting
        self._resident = Resident(device, models, settings.data_dir / "compiled", settings.adapter_bytes)
        self._scheduler = Scheduler(settings.train_share)
        budget_bytes = int(settings.kv_share * max(device.free_bytes() - models.weights_bytes(), 0))  # they come later
        chunk_tokens = PREFILL_CHUNK_TOKENS if device.torch.type == "cpu" else PREFILL_CHUNK_TOKENS_GPU
        self._text = Engine(budget_bytes, chunk_tokens, device.precision.dtype, device.torch)
        # Of a batch: nobody waits for it, and its memory is what a training would have taken.
        self._behind = Engine(budget_bytes, chunk_tokens, device.precision.dtype, device.torch)
        self.metrics = self._measured()
        self._shelf = Shelf(settings.data_dir / "prefix", settings.prefix_bytes)
        self._pictures = image.Pictures()
        self._trainings: list[Training] = []
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = self._refusing = False
        self.draining = False  # no new generations; those under way go on
        self._active: Counter[str] = Counter()  # generations accepted and not ended, by caller; of the event loop
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)

    # --- called from the event loop ----------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends after the step or slice under way; everybody who waits is told."""
        self._stopping = True
        self._post(lambda: None)
        self._thread.join(timeout=30)

    def refuse(self) -> None:
        """From now on every answer under way ends with an error, and so does every new one."""
        self._refusing = True
        self._post(lambda: self._fail_live(Stopping("This gpu is stopping.")))

    def flops_per_s(self, model: str) -> float | None:
        """What this device does with this model, measured when it was loaded; None before that."""
        return self._resident.flops_per_s.get(model)

    @property
    def active_requests(self) -> int:
        """Generations accepted and not ended. May be called from any thread."""
        return sum(tuple(self._active.values()))  # a copy: the event loop may change it meanwhile

    async def load(self, model: str) -> None:
        await self._call(lambda: self._load(model))

    async def generate(self, wanted: Generation) -> AsyncIterator[Event]:
        """Pieces of text, and for each answer a Finish. Whoever stops reading stops them within one step.

        Raises TooBusy, OutOfMemory, BadRequest for what can never fit, and BadAdapter.
        """
        stream: Stream[Event] = Stream(lambda item: isinstance(item, Finish), wanted.n)
        with self._live(stream, wanted.caller):
            self._post(lambda: self._admit(wanted, stream, self._text))
            async for item in stream.read():
                yield item

    async def generate_behind(self, wanted: Generation) -> AsyncIterator[Event]:
        """As `generate`, for a job: in steps that are taken when nobody waits, or from the share that training has.

        How many there are at once is for the job to bound. Raises as `generate`, but TooBusy.
        """
        if self._refusing:
            raise Stopping("This gpu is stopping.")
        stream: Stream[Event] = Stream(lambda item: isinstance(item, Finish), wanted.n)
        self._post(lambda: self._admit(wanted, stream, self._behind))
        try:
            async for item in stream.read():
                yield item
        finally:
            stream.closed = True

    def picture_s(self, model: str) -> float | None:
        """Of one pass for one picture of the native size, measured when the model was loaded; None before that."""
        return self._resident.picture_s.get(model)

    async def draw(self, wanted: image.Wanted, adapter: AdapterFiles | None = None) -> AsyncIterator[image.Shown]:
        """Previews, and each picture once. Whoever stops reading stops them within one step. Raises as `generate`."""
        stream: Stream[image.Shown] = Stream(lambda item: item.preview is None, len(wanted.seeds))
        with self._live(stream, wanted.caller):
            self._post(lambda: self._admit_pictures(wanted, adapter, stream))
            async for item in stream.read():
                yield item

    @contextmanager
    def _live(self, stream: Stream[T], caller: str) -> Iterator[None]:
        """For as long as somebody reads. Raises Stopping, TooBusy; also where one caller would take more than half."""
        if self._refusing:
            raise Stopping("This gpu is stopping.")
        if self.draining:
            raise Stopping("This gpu is being drained: ask another, or again later.")
        if self.active_requests >= self._max_waiting:
            raise TooBusy(f"{self.active_requests} generations are under way here: try again in a moment.")
        if self._active[caller] >= (self._max_waiting + 1) // 2:
            raise TooBusy(f"You have {self._active[caller]} generations under way here: wait until one ends.")
        self._active[caller] += 1
        try:
            yield
        finally:
            stream.closed = True
            self._active[caller] -= 1
            self._active += Counter()  # forgets who has none

    async def train(
        self, job: AnyJob, *, start: train.State | None = None, wanted: Callable[[], bool] = lambda: False
    ) -> AsyncIterator[Report]:
        """Progress after each slice, then what was trained. Whoever stops reading stops the run after its slice.

        `start` is where to go on from. `wanted` is asked on the device thread at each step: True has the state follow.
        """
        stream: Stream[Report] = Stream(lambda item: isinstance(item, train.Trained))
        self._post(lambda: self._trainings.append(Training(job, stream, start, wanted)))
        try:
            async for item in stream.read():
                yield item
        finally:
            stream.closed = True

    async def _call(self, work: Callable[[], T]) -> T:
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return  # nobody waits any more
            try:
                future.set_result(work())
            except Exception as exc:  # handed to whoever asked
                future.set_exception(translate(exc))

        self._post(run)
        return await asyncio.wrap_future(future)

    def _post(self, work: Callable[[], None]) -> None:
        context = contextvars.copy_context()  # what goes wrong there is logged under the request's id
        self._inbox.put(lambda: context.run(work))

    def _measured(self) -> Metrics:
        metrics, text = Metrics(), self._text
        metrics.ask("active_requests", "Generations accepted and not ended.", lambda: self.active_requests)
        metrics.ask("waiting", "Of those, the ones that wait for memory.", lambda: text.vitals.waiting)
        metrics.ask("rows", "Answers that are written in the same step.", lambda: text.vitals.rows)
        metrics.ask("batch_rows", "Of a batch, the ones that are written at once.", lambda: self._behind.vitals.rows)
        metrics.ask("kv_held_bytes", "Set aside for keys and values.", lambda: text.vitals.held_bytes)
        metrics.ask("kv_budget_bytes", "What there is for keys and values.", lambda: text.budget_bytes)
        metrics.ask("trainings", "Training runs on the device.", lambda: len(self._trainings))
        metrics.ask("device_free_bytes", "Memory that is free.", self._device.free_bytes)
        metrics.ask("device_memory_bytes", "Memory that there is.", lambda: self._device.wire().memory_bytes)
        return metrics

    # --- the device thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            self._read_inbox(wait=not any((self._text, self._pictures, self._trainings, self._behind)))
            unhurried = self._may_train() or bool(self._behind)
            kind = self._scheduler.choose(text=bool(self._text), image=bool(self._pictures), train=unhurried)
            if kind is None:
                continue
            start, did = time.perf_counter(), self._do(kind)
            took_s = time.perf_counter() - start
            self._scheduler.ran(kind, took_s)
            self.metrics.ran(did, took_s)
        stopping = Stopping("This gpu is stopping.")
        self._fail_live(stopping)
        self._behind.fail_all(stopping)
        for training in self._trainings:
            training.stream.send(stopping)

    def _do(self, kind: Kind) -> Kind | Literal["batch"]:
        """A step or a slice; which it was. A gpu holds one job at a time: it does not train and answer a batch."""
        if kind == "text":
            self._text_step(self._text)
        elif kind == "image":
            self._pictures.step()
        elif self._behind:
            self._text_step(self._behind)
            if not self._behind:
                self._behind.forget()
            return "batch"
        else:
            self._slice(self._trainings[0])
        return kind

    def _fail_live(self, error: BaseException) -> None:
        self._text.fail_all(error)
        self._pictures.fail_all(error)

    def _load(self, model: str) -> None:
        if self._models.makes_pictures(model):
            self._resident.painter(model)
        else:
            self._resident.text(model)

    def _may_train(self) -> bool:
        """A streamed run begins once nobody uses its model any more; from then on nobody can."""
        if not self._trainings:
            return False
        training = self._trainings[0]
        model = training.job.source.id
        if training.steps is None and training.job.plan.stream_layers:
            self._models.withhold(model)
            if self._text.uses(model) or self._behind.uses(model):
                return False
            self._resident.forget(model)
            self._text.forget()
        return True

    def _ended(self, training: Training) -> None:
        self._trainings.remove(training)
        if training.job.plan.stream_layers:
            training.steps = None  # its weights, before the model comes back
            self._models.restore(training.job.source.id)

    def _text_step(self, engine: Engine) -> None:
        try:
            engine.step()
        except Exception as exc:  # the thread serves everybody: it must outlive what went wrong between the rows
            log.exception("a step failed")
            engine.fail_all(translate(exc))
        n_read, n_written = engine.take_counts()
        self.metrics.read.inc(n_read)
        self.metrics.written.inc(n_written)

    def _read_inbox(self, *, wait: bool) -> None:
        try:
            while True:
                self._inbox.get(block=wait)()
                wait = False
        except queue.Empty:
            return

    def _admit(self, wanted: Generation, stream: Stream[Event], engine: Engine) -> None:
        if stream.closed:
            return
        try:
            base = self._models.load(wanted.base_model)
            request = Request(
                served=self._resident.text(wanted.base_model),
                adapter=self._resident.adapter(wanted.adapter, base) if wanted.adapter else None,
                adapter_id=wanted.adapter.id if wanted.adapter else None,
                dials=wanted.dials,
                prompt=wanted.prompt,
                sampling=wanted.sampling,
                n=wanted.n,
                tell_prompt=wanted.tell_prompt,
                caller=wanted.caller,
                alone=wanted.alone,
                send=stream.send,
                cancelled=lambda: stream.closed,
            )
            if wanted.shorten:
                request = engine.shortened(request)
            needs, budget = engine.needs_bytes(request), engine.budget_bytes
            if needs > budget:
                raise BadRequest(
                    f"Keys and values of this request would take {needs / 1e6:,.0f} MB, and this gpu has "
                    f"{budget / 1e6:,.0f} MB for them: ask for fewer tokens (max_tokens) or shorten the prompt.",
                    param="max_tokens",
                    code="does_not_fit",
                )
            engine.add(request)
        except Exception as exc:  # handed to the caller, who waits for the first token
            if not isinstance(exc, GpuError):
                log.exception("a generation could not start")
            stream.send(translate(exc))

    def _admit_pictures(self, wanted: image.Wanted, files: AdapterFiles | None, stream: Stream[image.Shown]) -> None:
        if stream.closed:
            return
        try:
            base = self._resident.painter(wanted.base_model)
            tuned = self._resident.tuned(files, base) if files else PLAIN
            self._pictures.add(image.Request(base, wanted, stream.send, lambda: stream.closed, tuned))
        except Exception as exc:  # handed to the caller, who waits for the first picture
            if not isinstance(exc, GpuError):
                log.exception("a picture could not start")
            stream.send(translate(exc))

    def _slice(self, training: Training) -> None:
        item: Report | BaseException
        began = time.perf_counter()
        try:
            if training.stream.closed:
                raise StopIteration
            with training.own_random_state():
                if training.steps is None:
                    training.steps = self._steps(training)
                    training.start = None  # it has been copied
                item = next(training.steps)
            self._count(training, item, time.perf_counter() - began)
            if isinstance(item, train.Trained):
                self._ended(training)
        except StopIteration:
            self._ended(training)
            return
        except Exception as exc:  # the run ends here, whatever it was
            log.exception("a training run failed")
            self._ended(training)
            item = translate(exc)
            if isinstance(item, OutOfMemory):
                self._text.forget()
                give_back(self._device.torch)
        training.stream.send(item)

    def _steps(self, training: Training) -> Iterator[Report]:
        job, start, wanted = training.job, training.start, training.wanted
        if isinstance(job, PictureJob):
            model = job.source.id
            return learn_pictures.steps(
                job, self._device, lambda: self._resident.painter(model), start=start, wanted=wanted
            )
        return prepare.steps(job, self._device, self._shelf, partial(self._trained_on, job), start=start, wanted=wanted)

    def _count(self, training: Training, item: Report, took_s: float) -> None:
        training.step_s += took_s
        if not isinstance(item, train.Progress):
            return
        if training.tokens is not None:  # else it went on from a checkpoint, and this is where it stands
            self.metrics.trained.inc(max(0, item.tokens - training.tokens))
        training.tokens = item.tokens
        if item.train_loss is not None:
            self.metrics.train_step.observe(training.step_s)
            training.step_s = 0.0

    def _trained_on(self, job: TextJob) -> tuple[Base, Decoder]:
        decoder = self._resident.text(job.source.id).decoder
        return self._models.load(job.source.id, job.selection.quantize), decoder


def _random_state() -> tuple[torch.Tensor, torch.Tensor | None]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return torch.get_rng_state(), cuda


def _set_random_state(state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
