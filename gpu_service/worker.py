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
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch

from gpu_service import artifacts, costs, image, kernels, prepare, train
from gpu_service import decoder as decoders
from gpu_service.artifacts import Adapter
from gpu_service.cache import Whole
from gpu_service.decoder import Decoder
from gpu_service.device import Device, give_back, translate
from gpu_service.errors import BadRequest, GpuError, OutOfMemory, Stopping, TooBusy
from gpu_service.metrics import Metrics
from gpu_service.models import Base, Models
from gpu_service.prefix import Shelf
from gpu_service.rows import Dials, Rows, join
from gpu_service.sampling import Sampling
from gpu_service.scheduler import Scheduler
from gpu_service.settings import Settings
from gpu_service.text import Engine, Event, Finish, Request, Served
from gpu_service.train import Job

log = logging.getLogger(__name__)

PREFILL_CHUNK_TOKENS = 256  # of a prompt, in one step; the others get a token in between
PREFILL_CHUNK_TOKENS_GPU = 2048

PROBE_TOKENS = 64  # of the pass that measures how fast a model runs here

T = TypeVar("T")
Report = prepare.Report  # what a run says after a slice


@dataclass(frozen=True)
class AdapterFiles:
    """A tuned model's files on disk, by name; `id` changes with their content."""

    id: str
    files: Mapping[str, Path]


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


class Training:
    """A run under way, with random state of its own."""

    def __init__(
        self, job: train.Job, stream: Stream[Report], start: train.State | None, wanted: Callable[[], bool]
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
        self._adapter_bytes = settings.adapter_bytes
        self._compiled = settings.data_dir / "compiled"
        self._scheduler = Scheduler(settings.train_share)
        budget_bytes = int(settings.kv_share * max(device.free_bytes() - models.weights_bytes(), 0))  # they come later
        chunk_tokens = PREFILL_CHUNK_TOKENS if device.torch.type == "cpu" else PREFILL_CHUNK_TOKENS_GPU
        self._text = Engine(budget_bytes, chunk_tokens, device.precision.dtype, device.torch)
        self.metrics = self._measured()
        self._shelf = Shelf(settings.data_dir / "prefix", settings.prefix_bytes)
        self._pictures = image.Pictures()
        self._trainings: list[Training] = []
        self._served: dict[str, Served] = {}
        self._speeds: dict[str, float] = {}  # flops a second, by model
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()  # least recently used first
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
        return self._speeds.get(model)

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
            self._post(lambda: self._admit(wanted, stream))
            async for item in stream.read():
                yield item

    async def draw(self, wanted: image.Wanted) -> AsyncIterator[image.Shown]:
        """Previews, and each picture once. Whoever stops reading stops them within one step. Raises as `generate`."""
        stream: Stream[image.Shown] = Stream(lambda item: item.preview is None, len(wanted.seeds))
        with self._live(stream, wanted.caller):
            self._post(lambda: self._admit_pictures(wanted, stream))
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
        self, job: train.Job, *, start: train.State | None = None, wanted: Callable[[], bool] = lambda: False
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
        metrics.ask("kv_held_bytes", "Set aside for keys and values.", lambda: text.vitals.held_bytes)
        metrics.ask("kv_budget_bytes", "What there is for keys and values.", lambda: text.budget_bytes)
        metrics.ask("trainings", "Training runs on the device.", lambda: len(self._trainings))
        metrics.ask("device_free_bytes", "Memory that is free.", self._device.free_bytes)
        metrics.ask("device_memory_bytes", "Memory that there is.", lambda: self._device.wire().memory_bytes)
        return metrics

    # --- the device thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            self._read_inbox(wait=not self._text and not self._pictures and not self._trainings)
            kind = self._scheduler.choose(text=bool(self._text), image=bool(self._pictures), train=self._may_train())
            if kind is None:
                continue
            start = time.perf_counter()
            if kind == "text":
                self._text_step()
            elif kind == "image":
                self._pictures.step()
            else:
                self._slice(self._trainings[0])
            took_s = time.perf_counter() - start
            self._scheduler.ran(kind, took_s)
            self.metrics.ran(kind, took_s)
        stopping = Stopping("This gpu is stopping.")
        self._fail_live(stopping)
        for training in self._trainings:
            training.stream.send(stopping)

    def _fail_live(self, error: BaseException) -> None:
        self._text.fail_all(error)
        self._pictures.fail_all(error)

    def _load(self, model: str) -> None:
        if self._models.makes_pictures(model):
            self._models.load_pictures(model)
        else:
            self._serve(self._models.load(model))

    def _may_train(self) -> bool:
        """A streamed run begins once nobody uses its model any more; from then on nobody can."""
        if not self._trainings:
            return False
        training = self._trainings[0]
        model = training.job.source.id
        if training.steps is None and training.job.plan.stream_layers:
            self._models.withhold(model)
            if self._text.uses(model):
                return False
            self._served.pop(model, None)
            self._text.forget()
        return True

    def _ended(self, training: Training) -> None:
        self._trainings.remove(training)
        if training.job.plan.stream_layers:
            training.steps = None  # its weights, before the model comes back
            self._models.restore(training.job.source.id)

    def _text_step(self) -> None:
        try:
            self._text.step()
        except Exception as exc:  # the thread serves everybody: it must outlive what went wrong between the rows
            log.exception("a step failed")
            self._text.fail_all(translate(exc))
        n_read, n_written = self._text.take_counts()
        self.metrics.read.inc(n_read)
        self.metrics.written.inc(n_written)

    def _read_inbox(self, *, wait: bool) -> None:
        try:
            while True:
                self._inbox.get(block=wait)()
                wait = False
        except queue.Empty:
            return

    def _admit(self, wanted: Generation, stream: Stream[Event]) -> None:
        if stream.closed:
            return
        try:
            base = self._models.load(wanted.base_model)
            request = Request(
                served=self._serve(base),
                adapter=self._adapter(wanted.adapter, base) if wanted.adapter else None,
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
                request = self._text.shortened(request)
            needs, budget = self._text.needs_bytes(request), self._text.budget_bytes
            if needs > budget:
                raise BadRequest(
                    f"Keys and values of this request would take {needs / 1e6:,.0f} MB, and this gpu has "
                    f"{budget / 1e6:,.0f} MB for them: ask for fewer tokens (max_tokens) or shorten the prompt.",
                    param="max_tokens",
                    code="does_not_fit",
                )
            self._text.add(request)
        except Exception as exc:  # handed to the caller, who waits for the first token
            if not isinstance(exc, GpuError):
                log.exception("a generation could not start")
            stream.send(translate(exc))

    def _admit_pictures(self, wanted: image.Wanted, stream: Stream[image.Shown]) -> None:
        if stream.closed:
            return
        try:
            base = self._models.load_pictures(wanted.base_model)
            self._pictures.add(image.Request(base, wanted, stream.send, lambda: stream.closed))
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
                    training.steps = prepare.steps(
                        training.job,
                        self._device,
                        self._shelf,
                        lambda: self._resident(training.job),
                        start=training.start,
                        wanted=training.wanted,
                    )
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

    def _resident(self, job: Job) -> tuple[Base, Decoder]:
        decoder = self._serve(self._models.load(job.source.id)).decoder
        return self._models.load(job.source.id, job.selection.quantize), decoder

    def _serve(self, base: Base) -> Served:
        source = base.source
        if source.id not in self._served:
            decoder = decoders.build(source.family, source.config, self._device.torch)
            # Elsewhere memory that is given back piece by piece may be of no use to what is larger.
            joined = join(base.weights, decoder.same_input()) if self._device.torch.type == "cpu" else {}
            served = Served(
                source.id,
                decoder,
                base.weights,
                source.tokenizer,
                source.stop_ids,
                base.quantized,
                kernels.choose([w for w in base.weights.values() if w.dim() == 2], self._compiled),
                joined,
            )
            self._served[source.id] = served
            self._speeds[source.id] = costs.forward_flops(source.tensors, tied=source.tied) / token_s(
                served.decoder, Rows(served.weights, quantized=served.quantized), self._device.torch
            )
        return self._served[source.id]

    def _adapter(self, wanted: AdapterFiles, base: Base) -> Adapter:
        """On the device, in the base's precision; the least recently used leave when the budget is spent."""
        if wanted.id in self._adapters:
            self._adapters.move_to_end(wanted.id)
            return self._adapters[wanted.id]
        adapter = artifacts.load(wanted.files, base.source.tensors)
        if adapter.meta.base_revision not in ("", base.source.revision):
            # The same weights have one revision as a folder and another from the hub: no reason to refuse.
            log.warning("%s has another revision here than the one that this adapter was trained on", base.source.id)
        adapter = adapter.served(self._device.torch, self._device.precision.dtype, base.whole)
        self._adapters[wanted.id] = adapter
        while len(self._adapters) > 1 and sum(a.n_bytes for a in self._adapters.values()) > self._adapter_bytes:
            self._adapters.popitem(last=False)
        return adapter


def _random_state() -> tuple[torch.Tensor, torch.Tensor | None]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return torch.get_rng_state(), cuda


def _set_random_state(state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


@torch.inference_mode()
def token_s(decoder: Decoder, rows: Rows, device: torch.device) -> float:
    """Seconds that a token takes in a short prompt; of two passes the second counts."""
    ids, seconds = torch.ones((1, PROBE_TOKENS), dtype=torch.long, device=device), 0.0
    for _ in range(2):
        start = time.perf_counter()
        attention = Whole(PROBE_TOKENS, device)
        h = decoder.layers(decoder.embed(ids, rows, attention), 0, decoder.n_layers, rows, attention)
        decoder.unembed(decoder.final_norm(h, rows), rows).sum().item()  # waits for the device
        seconds = time.perf_counter() - start
    return seconds / PROBE_TOKENS
