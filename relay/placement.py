"""Which gpus may be given a job, and why a job waits. Knows nothing of leases, of users, or of whose turn it is."""

from collections.abc import Sequence
from typing import Any, Literal

from sqlalchemy import ColumnElement, FromClause, Row, and_, exists, or_, select

from relay.settings import Settings
from relay.store import Clock, Store
from relay.tables import gpus, jobs, offers

LIFE_S = 120.0  # a gpu whose runtime ends sooner gets no new job: it would hardly train a step

Reason = Literal["no_gpu", "model_not_offered", "gpu_memory", "runtime_ends", "gpus_busy"]
SAYS: dict[Reason, str] = {
    "no_gpu": "no gpu is running: start one",
    "model_not_offered": "no gpu that is running offers {model}: start one that does",
    "gpu_memory": "it needs {needed:,} bytes of gpu memory, and no gpu that offers {model} has as much: start a larger "
    "one, or cancel the job and train fewer layers or shorter rows",
    "runtime_ends": "the gpus that could take it end within two minutes: it waits for the next one",
    "gpus_busy": "the gpus that could take it have other work: it waits for its turn",
}


def idle(settings: Settings, now: float) -> ColumnElement[bool]:
    """Of a gpu: it may be given a job now."""
    holder = jobs.alias("holder")
    return and_(_alive(settings, now), *_stays(now), ~exists().where(holder.c.gpu_id == gpus.c.id).correlate(gpus))


def fits(job: FromClause) -> ColumnElement[bool]:
    """A gpu has the memory that a gpu has found the job to need; mostly none has looked."""
    return or_(job.c.needed_bytes.is_(None), _memory_bytes() >= job.c.needed_bytes)


def _alive(settings: Settings, now: float) -> ColumnElement[bool]:
    return gpus.c.last_seen_at >= now - settings.alive_s


def _stays(now: float) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return ~gpus.c.draining, gpus.c.runtime_ends_at.is_(None) | (gpus.c.runtime_ends_at >= now + LIFE_S)


def _memory_bytes() -> ColumnElement[float]:
    memory: ColumnElement[float] = gpus.c.device["memory_bytes"].as_float()
    return memory


class Placement:
    def __init__(self, store: Store, settings: Settings, clock: Clock) -> None:
        self._store = store
        self._settings = settings
        self._clock = clock

    async def waiting_for(self, found: Sequence[Row[Any]]) -> dict[str, dict[str, str]]:
        """Why those of these jobs wait that are queued, by their ids; for people and programs."""
        queued = [job for job in found if job.status == "queued"]
        if not queued:
            return {}
        now = self._clock()
        memory = _memory_bytes().label("memory_bytes")
        columns = (gpus.c.id, gpus.c.draining, gpus.c.runtime_ends_at, memory, offers.c.model_id)
        alive = select(*columns).outerjoin(offers, offers.c.gpu_id == gpus.c.id).where(_alive(self._settings, now))
        async with self._store.read() as db:
            offered = (await db.execute(alive)).all()
        return {job.id: _said(job, _reason(job, offered, now)) for job in queued}


def _reason(job: Row[Any], alive: Sequence[Row[Any]], now: float) -> Reason:
    if not alive:
        return "no_gpu"
    offering = [gpu for gpu in alive if gpu.model_id == job.base_model]
    if not offering:
        return "model_not_offered"
    large = [gpu for gpu in offering if job.needed_bytes is None or gpu.memory_bytes >= job.needed_bytes]
    if not large:
        return "gpu_memory"
    lives = [gpu for gpu in large if gpu.runtime_ends_at is None or gpu.runtime_ends_at >= now + LIFE_S]
    return "gpus_busy" if lives else "runtime_ends"


def _said(job: Row[Any], reason: Reason) -> dict[str, str]:
    return {"reason": reason, "message": SAYS[reason].format(model=f"'{job.base_model}'", needed=job.needed_bytes or 0)}
