"""Blobs that nothing names any more go (refs.py), and never before it stands that nothing names them.

A transaction that ends a row says which blobs it named. Once it is committed, a second one looks again and sets them
aside: cut off before it, a blob is left over, which the sweep gets; cut off within it, it is brought back, for with its
connection it may have lost the lock that kept others from naming it. They go once it has ended well. Who names a blob
again finds it in a transaction too, before that one or after it, and so has it or sends it anew.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Collection, Coroutine
from typing import Any, TypeVar

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from relay import errors, refs
from relay.blobs import Blobs
from relay.store import Clock, Store

log = logging.getLogger("relay.sweep")

T = TypeVar("T")

EVERY_S = 3600.0
YOUNG_S = 3600.0  # what a lost lease left of a checkpoint may be asked for again by the next
AT_ONCE = 500  # blobs that one query asks about


@contextlib.asynccontextmanager
async def letting_go(store: Store, blobs: Blobs) -> AsyncIterator[tuple[AsyncConnection, set[str]]]:
    """A transaction, and a set for the blobs that it may leave without a name. They go once it stands.

    Raises what the transaction raises: that they can't be removed now is no failure of it.
    """
    gone = set[str]()
    async with store.write() as db:
        yield db, gone
    try:
        await remove_unnamed(store, blobs, gone)
    except (SQLAlchemyError, OSError, errors.RelayError):
        log.exception("blobs that nothing names are left to the sweep")


async def remove_unnamed(store: Store, blobs: Blobs, shas: Collection[str], older_than: float = math.inf) -> int:
    """Those of the blobs that nothing names; how many. `older_than` is a unix time."""
    removed, asked = 0, sorted(shas)
    for at in range(0, len(asked), AT_ONCE):
        some, aside = asked[at : at + AT_ONCE], list[str]()
        try:
            async with store.write() as db:
                unnamed = sorted(set(some) - await refs.named(db, some))
                await _to_its_end(blobs.set_aside(unnamed, older_than, aside))
        except BaseException:
            await _to_its_end(blobs.bring_back(aside))
            raise
        await blobs.drop(aside)
        removed += len(aside)
    return removed


async def _to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Also when we are cancelled: what it has begun goes on, and must not go on without the lock."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


async def sweep(store: Store, blobs: Blobs, clock: Clock) -> int:
    """What was left behind by checkpoints and results that nobody finished, or by a crash; how many."""
    removed = 0
    older_than = clock() - YOUNG_S
    old = await blobs.older_than(older_than)
    for at in range(0, len(old), AT_ONCE):
        some = old[at : at + AT_ONCE]
        async with store.read() as db:  # nearly always there is none, and reading disturbs nobody
            unnamed = set(some) - await refs.named(db, some)
        if unnamed:
            removed += await remove_unnamed(store, blobs, unnamed, older_than)
    if left := await blobs.left_aside(older_than):
        async with store.write() as db:
            named = await refs.named(db, sorted(set(left.values())))
            await blobs.bring_back([aside for aside, sha256 in left.items() if sha256 in named])
    return removed


async def keep_sweeping(store: Store, blobs: Blobs, clock: Clock) -> None:
    """At the start and every hour, until it is cancelled."""
    while True:
        try:
            if removed := await sweep(store, blobs, clock):
                log.info("%d blobs that nothing named are gone", removed)
        except Exception:
            log.exception("a sweep of the blobs failed; the next is in %.0f s", EVERY_S)  # the relay must live on
        await asyncio.sleep(EVERY_S)
