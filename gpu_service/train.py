"""The one training loop. `run` reads top to bottom and yields after every micro-batch: that is one slice.

It knows the trained tensors and the optimizer; what they learn is a Learner's, and of leases, threads and HTTP it knows
nothing. The caller keeps its random state apart from everybody else's between slices. Trained tensors are fp32 copies
of their own, so the base model goes on serving beside it, unchanged.
"""

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from adapter import LoraMeta
from gpu_service import optimizer as optimizers
from gpu_service import trainable
from gpu_service.artifacts import Adapter
from gpu_service.course import EXPLODED, Course
from gpu_service.data import epoch_order
from gpu_service.device import Device
from gpu_service.errors import BadRequest
from gpu_service.layers import Selection
from gpu_service.lora import Lora
from gpu_service.optimizer import Optimizer
from gpu_service.plan import MOMENTS_BYTES, Plan
from gpu_service.prefix import Chosen, Working
from gpu_service.probe import Ready, fit
from gpu_service.samples import Prompt
from gpu_service.trainable import Trainable, Weights

LEFT_OUT = 30  # steps in a row whose gradient overflows: the scaler halves 30 times, and then it is not the scale


class Diverged(BadRequest):
    code = "training_diverged"


S = TypeVar("S")
D = TypeVar("D", bound=Sized)


@dataclass(frozen=True)
class Job(Generic[S, D]):
    """All that one run needs; prepared off the device thread. `S` and `D`: a model's source and a data set's kind."""

    source: S
    selection: Selection
    plan: Plan
    store: D
    validation: D | None
    seed: int
    prompts: tuple[Prompt, ...] = ()
    begin: Adapter | None = None  # of the tuned model that is trained further, on the CPU


@dataclass(frozen=True)
class Progress:
    """After a slice. `train_loss` only after an optimizer step; `valid_loss` and `answers` once those are whole."""

    step: int  # optimizer steps done
    tokens: int  # seen so far, padding not counted
    train_loss: float | None = None
    gradient_norm: float | None = None
    learning_rate: float | None = None
    valid_loss: float | None = None
    answers: tuple[str, ...] | None = None  # to the job's prompts
    ended_early: bool = False  # said with the validation that ends it


@dataclass(frozen=True)
class State:
    """A run between two optimizer steps, copied to the CPU: all that `run` needs to go on from there, plan apart."""

    course: Course
    scaler: dict[str, float]  # of the gradients; empty without one
    tensors: dict[str, Tensor]  # weights, best weights, the optimizer's state, and the random states
    copy_s: float = 0.0  # that the run stood still for it

    @property
    def step(self) -> int:
        return self.course.step


@dataclass(frozen=True)
class Trained:
    """On the CPU, in fp32, relative to the base model alone."""

    full: dict[str, Tensor]
    lora: dict[str, Lora]
    tokens: int
    meta: dict[str, LoraMeta] = field(default_factory=dict)
    changes: dict[str, tuple[float, float]] = field(default_factory=dict)  # norms: how far it moved, what it was
    course: Course = field(default_factory=Course)


Report = Ready | Chosen | Working | Progress | State | Trained  # what a run says after a slice


class Learner(Protocol):
    """How wrong the trained tensors are about some rows; it was made with them."""

    advice: str  # where a single row does not fit into memory
    unit: float  # of its loss: course.py

    def prepare(self) -> Generator[Chosen | Working, None, None]:
        """What is computed once, before the first step."""
        ...

    def loss(self, rows: Sequence[int], epoch: int) -> Tensor:
        """A scalar: summed over whatever `weight` counts, so that it does not matter how a batch is cut."""
        ...

    def weight(self, rows: Sequence[int]) -> int: ...

    def seen(self, rows: Sequence[int]) -> int:
        """Tokens, or what stands for them."""
        ...

    def validation_loss(self, rows: Sequence[int]) -> float:
        """Their share of the loss of the validation data."""
        ...

    def trial(self, rows: int) -> Tensor:
        """A loss of so many of the rows that need most memory."""
        ...

    def needs_bytes(self, rows: int) -> int:
        """At most, of a slice of so many of those, beside what is held already."""
        ...

    def answers(self) -> Generator[None, None, list[str]]:
        """To the job's prompts, a step at a time; draws nothing from the global random state."""
        ...


def run(
    job: Job[S, D],
    base: Weights,
    learner: Callable[[Trainable], Learner],
    device: Device,
    *,
    start: State | None = None,
    wanted: Callable[[], bool] = lambda: False,
) -> Iterator[Report]:
    """Train, one micro-batch per `next`; the last thing yielded is what came of it.

    From `start` it goes on as if it had never stopped: on the same kind of device and in the same precision bit for
    bit. Between two slices `wanted` is asked; where it says yes the state follows, as of the last whole step. `Ready`
    comes before the first step, and its plan is the one that holds. What is computed once comes after that trial, so
    that memory runs out in the first minute or not at all. Raises Diverged when the loss is no longer a number, or has
    risen out of reach.
    """
    torch.manual_seed(job.seed)
    plan, n_rows = job.plan, len(job.store)
    earlier = trainable.on_device(job.begin, base.device) if job.begin else None
    trained = trainable.build(job.selection, base, job.seed, earlier)
    named = trained.named
    parameters = list(named.values())
    learns = learner(trained)
    optimizer = Optimizer(plan, named)
    scaler = torch.amp.GradScaler(device.torch.type, enabled=device.precision.scaler)
    best = {name: p.detach().clone() for name, p in named.items()} if plan.early_stop_patience else {}
    course = Course(unit=learns.unit)
    order: list[int] = []
    left_out = 0  # steps in a row whose gradient was no number

    def state(earlier: tuple[Course, dict[str, Tensor]] | None = None) -> State:
        began = time.perf_counter()
        at, random = earlier or (course.copy(), _random())
        tensors = _captured(named, best, optimizer) | random
        return State(at, scaler.state_dict(), tensors, time.perf_counter() - began)

    def sampled() -> Generator[Progress | State, None, None]:
        found = learns.answers()
        while True:
            try:
                next(found)
            except StopIteration as over:
                course.answered(over.value)
                break
            yield Progress(course.step, course.tokens)
            if wanted():
                yield state()  # as before the answers, which are then begun again
        yield Progress(course.step, course.tokens, answers=tuple(course.last_answers))

    if start:
        _restore(start, named, best, optimizer, scaler)
        course = start.course.copy()
    else:
        # Discarded: no step is taken, and the random state is what it was.
        def attempt(micro: int) -> None:
            moments = [torch.empty_like(p) for p in parameters for _ in range(MOMENTS_BYTES[plan.optimizer] // 4)]
            learns.trial(micro).backward()  # type: ignore[no-untyped-call]
            del moments
            for parameter in parameters:
                parameter.grad = None

        trying = fit(plan, attempt, learns.needs_bytes, device, advice=learns.advice)
        while True:
            try:
                next(trying)
            except StopIteration as over:
                ready: Ready = over.value
                break
            for parameter in parameters:
                parameter.grad = None
            yield Progress(0, 0)
        plan = ready.plan
        yield ready
    yield from learns.prepare()

    while not course.ended_early:
        step = course.step
        epoch, index_in_epoch = divmod(step, plan.steps_per_epoch)
        if job.validation and course.validations <= epoch:
            total_loss = 0.0
            for micro in _cut(list(range(len(job.validation))), plan.micro_rows):
                with torch.no_grad():
                    total_loss += learns.validation_loss(micro)
                yield Progress(step, course.tokens)
                if wanted():
                    yield state()  # as before the validation, which is then run as a whole
            if not math.isfinite(total_loss):
                raise _diverged(f"The validation loss is {total_loss}", step, plan)
            if course.validate(total_loss, plan.early_stop_patience):
                for name, tensor in best.items():
                    tensor.copy_(named[name].detach())
            yield Progress(step, course.tokens, valid_loss=total_loss, ended_early=course.ended_early)
            if wanted():
                yield state()
            continue
        if job.prompts and course.sampled_at != step and _samples_are_due(plan, step):
            yield from sampled()
        if step == plan.total_steps:
            break
        if index_in_epoch == 0 or not order:
            order = epoch_order(n_rows, job.seed, epoch)
        micros = _cut(order[index_in_epoch * plan.batch_rows :][: plan.batch_rows], plan.micro_rows)
        # The mean is over all that counts in the whole batch, however it is cut into micro-batches.
        weight = learns.weight([row for micro in micros for row in micro])
        # What a state in mid-step goes back to: no weight has changed yet.
        beginning = (course.copy(), _random()) if len(micros) > 1 else None
        total_loss = 0.0
        for index, micro in enumerate(micros):
            loss = learns.loss(micro, epoch) / weight
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total_loss += loss.item()
            course.tokens += learns.seen(micro)
            if index + 1 < len(micros):
                yield Progress(step, course.tokens)
                if wanted():
                    yield state(beginning)
        if not math.isfinite(total_loss):
            raise _diverged(f"The loss is {total_loss}", step + 1, plan)
        optimizer.set_rate(plan.rate(step))
        scaler.unscale_(optimizer.torch)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, plan.max_gradient_norm or math.inf))
        left_out = 0 if math.isfinite(norm) else left_out + 1
        if left_out > (LEFT_OUT if device.precision.scaler else 0):  # with a scaler such a step is left out
            raise _diverged(f"The gradient's norm is {norm}", step + 1, plan)
        scaler.step(optimizer.torch)
        scaler.update()
        optimizer.torch.zero_grad(set_to_none=True)
        course.stepped(total_loss, plan.rate(step), norm if math.isfinite(norm) else 0.0)
        if course.has_exploded:
            raise _diverged(f"The loss has risen by more than {EXPLODED:g}, to {total_loss:.3g},", step + 1, plan)
        yield Progress(step + 1, course.tokens, total_loss, norm, plan.rate(step))
        if wanted():
            yield state()

    if not all(bool(parameter.isfinite().all()) for parameter in parameters):
        raise _diverged("A weight is no number", course.step, plan)
    if course.best_loss is not None:
        with torch.no_grad():
            for name, tensor in best.items():
                named[name].copy_(tensor)
    if job.prompts and best:
        yield from sampled()  # of the weights that are kept
    changes = {}
    for name in [*trained.full, *trained.lora]:
        changes[name] = trainable.change(name, base, trained, earlier)
        yield Progress(course.step, course.tokens)
    found = trainable.result(job.selection, trained, base, earlier)
    yield Trained(found.full, found.lora, course.tokens, found.meta, changes, course)


def _samples_are_due(plan: Plan, step: int) -> bool:
    """Before and after the training, and every so many steps between."""
    return step in (0, plan.total_steps) or (plan.samples_every_steps > 0 and step % plan.samples_every_steps == 0)


WEIGHT, BEST = "weight", "best"
CPU_RANDOM, CUDA_RANDOM = "random.cpu", "random.cuda"


def state_specs(selection: Selection, plan: Plan) -> dict[str, optimizers.Spec]:
    """Key -> shape and type, of the numbers in a State; the random states are left out."""
    shapes = trainable.shapes(selection)
    kinds = (WEIGHT, BEST) if plan.early_stop_patience else (WEIGHT,)
    weights = {f"{kind}.{name}": (shape, torch.float32) for kind in kinds for name, shape in shapes.items()}
    return weights | optimizers.specs(plan, shapes)


def _random() -> dict[str, Tensor]:
    tensors = {CPU_RANDOM: torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors[CUDA_RANDOM] = torch.cuda.get_rng_state()
    return tensors


def _captured(named: dict[str, Tensor], best: dict[str, Tensor], optimizer: Optimizer) -> dict[str, Tensor]:
    """Copies on the CPU."""
    tensors: dict[str, Tensor] = {}
    for kind, held in ((WEIGHT, named), (BEST, best)):
        tensors |= {f"{kind}.{n}": t.detach().to("cpu", copy=True).contiguous() for n, t in held.items()}
    return tensors | optimizer.captured()


@torch.no_grad()
def _restore(
    start: State,
    named: dict[str, Tensor],
    best: dict[str, Tensor],
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    for kind, held in ((WEIGHT, named), (BEST, best)):
        for name, tensor in held.items():
            tensor.copy_(start.tensors[f"{kind}.{name}"])
    optimizer.restore(start.tensors)
    if start.scaler:
        scaler.load_state_dict(start.scaler)
    torch.set_rng_state(start.tensors[CPU_RANDOM])
    if torch.cuda.is_available() and CUDA_RANDOM in start.tensors:
        torch.cuda.set_rng_state(start.tensors[CUDA_RANDOM])


def _diverged(what: str, step: int, plan: Plan) -> Diverged:
    rate = plan.learning_rate * plan.rate_factor
    return Diverged(
        f"{what} at step {step}: lower the learning rate (it is {rate:g}), raise warmup_ratio, set "
        "max_gradient_norm to 1 where it is off, or check the data.",
        param="hyperparameters",
    )


def _cut(rows: list[int], size: int) -> list[list[int]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]
