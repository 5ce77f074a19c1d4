"""Which models a user may name: every base model that was ever offered, and their own tuned ones."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Row, Select, delete, exists, select
from sqlalchemy.ext.asyncio import AsyncConnection

import wire
from relay import errors, refs
from relay.blobs import Blobs
from relay.jobs import drop_reports
from relay.settings import Settings
from relay.shared import Shared
from relay.store import Clock, Store
from relay.sweep import letting_go
from relay.tables import base_models, gpus, models, offers, users

NAMED_IN_ERRORS = 20
MEMORY_S = 2.0  # how long another process's deletion of a model may go unnoticed by a live request
MOST_REMEMBERED = 10_000


@dataclass(frozen=True)
class Model:
    id: str
    base: str  # its own id, if it is a base model
    family: str
    n_layers: int
    context_tokens: int
    created_at: float
    owner: str | None  # a user's name; None: everybody's
    available: bool  # a request would find a gpu: alive, reachable, with the base model

    @property
    def is_tuned(self) -> bool:
        return self.id != self.base


class Models:
    def __init__(
        self, store: Store, blobs: Blobs, settings: Settings, clock: Clock, reachable: Callable[[], Collection[str]]
    ) -> None:
        """`reachable` names the gpus that can be reached now."""
        self._store = store
        self._blobs = blobs
        self._settings = settings
        self._clock = clock
        self._reachable = reachable
        self._bases_known: dict[tuple[str, str], tuple[str, float]] = {}  # by user and model; until when it is good
        self._looks: Shared[tuple[str, str, int], str] = Shared()
        self._deletions = 0  # by this process: a look that began before one is not remembered

    async def visible(self, owner: str) -> list[Model]:
        """Base models first, then the user's own tuned ones, the newest first."""
        async with self._store.read() as db:
            bases = {r.id: self._base(r) for r in await db.execute(self._bases().order_by(base_models.c.id))}
            mine = select(models, users.c.name).join(users, users.c.id == models.c.owner)
            rows = await db.execute(mine.where(models.c.owner == owner).order_by(models.c.created_at.desc()))
            return [*bases.values(), *(_tuned(r, bases[r.base_model]) for r in rows)]

    async def resolve(self, owner: str, model_id: str) -> Model:
        """Raises ModelNotFound that names those that exist; somebody else's does not exist."""
        async with self._store.read() as db:
            found = await self._find(db, owner, model_id)
        if found is None:
            names = [m.id for m in await self.visible(owner)]
            shown = ", ".join(f"'{name}'" for name in names[:NAMED_IN_ERRORS])
            more = f" and {len(names) - NAMED_IN_ERRORS} more" if len(names) > NAMED_IN_ERRORS else ""
            there = f"there are {shown}{more}" if names else "none is here yet: start a gpu that offers one"
            raise errors.ModelNotFound(f"no model '{model_id[:200]}': {there}", param="model")
        return found

    async def base_of(self, owner: str, model_id: str) -> str:
        """The base model behind a model, for a live request: answered from memory for MEMORY_S. Raises ModelNotFound.

        What this process deletes is forgotten at once.
        """
        now, key = time.monotonic(), (owner, model_id)
        base, good_until = self._bases_known.get(key, ("", 0.0))
        if now >= good_until:
            base = await self._looks.get((*key, self._deletions), lambda: self._look_up(owner, model_id))
        return base

    async def _look_up(self, owner: str, model_id: str) -> str:
        now, deletions = time.monotonic(), self._deletions
        base = (await self.resolve(owner, model_id)).base
        if deletions == self._deletions:
            if len(self._bases_known) >= MOST_REMEMBERED:
                self._bases_known.clear()
            self._bases_known[owner, model_id] = (base, now + MEMORY_S)
        return base

    async def delete(self, owner: str, model_id: str) -> None:
        """Raises ModelNotFound, and InvalidRequest for a base model."""
        model = await self.resolve(owner, model_id)
        if not model.is_tuned:
            message = f"'{model_id}' is a base model: only tuned models can be deleted"
            raise errors.InvalidRequest(message, param="model")
        async with letting_go(self._store, self._blobs) as (db, gone):
            mine = delete(models).where(models.c.id == model_id, models.c.owner == owner)
            for job_id in (await db.execute(mine.returning(models.c.job_id))).scalars().all():
                gone |= await refs.unname(db, "model", model_id) | await drop_reports(db, job_id)
        self._deletions += 1
        self._bases_known.clear()

    async def tuned(self, model_id: str) -> wire.TunedModel:
        """What a gpu fetches, whoever owns it: it serves the relay, which has checked. Raises ModelNotFound."""
        async with self._store.read() as db:
            query = select(models.c.adapter).where(models.c.id == model_id)
            adapter = (await db.execute(query)).scalar_one_or_none()
        if adapter is None:
            raise errors.ModelNotFound(f"no tuned model '{model_id[:200]}'", param="model")
        return wire.TunedModel(id=model_id, adapter=wire.AdapterManifest.model_validate(adapter))

    async def _find(self, db: AsyncConnection, owner: str, model_id: str) -> Model | None:
        base = (await db.execute(self._bases().where(base_models.c.id == model_id))).one_or_none()
        if base is not None:
            return self._base(base)
        mine = select(models, users.c.name).join(users, users.c.id == models.c.owner)
        row = (await db.execute(mine.where(models.c.id == model_id, models.c.owner == owner))).one_or_none()
        if row is None:
            return None
        return _tuned(
            row, self._base((await db.execute(self._bases().where(base_models.c.id == row.base_model))).one())
        )

    def _bases(self) -> Select[Any]:
        since = self._clock() - self._settings.alive_s
        offered = exists().where(
            offers.c.model_id == base_models.c.id,
            gpus.c.id == offers.c.gpu_id,
            gpus.c.last_seen_at >= since,
            gpus.c.id.in_(self._reachable()),
        )
        return select(base_models, offered.correlate(base_models).label("available"))

    @staticmethod
    def _base(row: Row[Any]) -> Model:
        return Model(
            id=row.id,
            base=row.id,
            family=row.family,
            n_layers=row.n_layers,
            context_tokens=row.context_tokens,
            created_at=row.created_at,
            owner=None,
            available=bool(row.available),
        )


def _tuned(row: Row[Any], base: Model) -> Model:
    return replace(base, id=row.id, created_at=row.created_at, owner=row.name)
