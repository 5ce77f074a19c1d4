"""Which rows name which blobs: the one table that says whether a blob lives, and what of it counts as whose.

Whoever writes a row that names blobs says so here in the same transaction, and takes it back in the one that ends the
row. Does not know what a blob or a holder is. sweep.py removes what nothing names, inside a write: there is one writer
at a time (store.py), so who finds a blob inside a write of theirs may name it.

kind          holder                  its blobs
file          a file's id             its content
job           a job's id              its data, and the model that it goes on from, while it is not over
chunk         a job's id              of a checkpoint on its way, which has no manifest yet
checkpoint    a job's id/step         its chunks
result        a job's id              of an adapter on its way
model         a tuned model's id      its adapter
report        a job's id              its reports, while its model is here
part          a batch's id            answers, until its files are written
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Literal

from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

import wire
from relay.tables import blob_refs

Kind = Literal["file", "job", "chunk", "checkpoint", "result", "model", "report", "part"]


async def name(db: AsyncConnection, kind: Kind, holder: str, owner: str, blobs: Mapping[str, int]) -> None:
    """Blobs by SHA-256, with their bytes. Safe to repeat."""
    if not blobs:
        return
    same = blob_refs.c.sha256.in_(list(blobs)) & (blob_refs.c.kind == kind) & (blob_refs.c.holder == holder)
    await db.execute(delete(blob_refs).where(same))
    whose = {"kind": kind, "holder": holder, "owner": owner}
    await db.execute(insert(blob_refs), [{**whose, "sha256": sha, "bytes": size} for sha, size in blobs.items()])


async def unname(db: AsyncConnection, kind: Kind, *holders: str) -> set[str]:
    """What they named; nothing else may name it now."""
    theirs = delete(blob_refs).where(blob_refs.c.kind == kind, blob_refs.c.holder.in_(holders))
    return set((await db.execute(theirs.returning(blob_refs.c.sha256))).scalars())


async def unname_owned(db: AsyncConnection, owner: str) -> set[str]:
    """What anything of this user's named, whatever kind it is."""
    theirs = delete(blob_refs).where(blob_refs.c.owner == owner)
    return set((await db.execute(theirs.returning(blob_refs.c.sha256))).scalars())


async def named(db: AsyncConnection, shas: Collection[str]) -> set[str]:
    """Those among them that anything names."""
    return set((await db.execute(select(blob_refs.c.sha256).where(blob_refs.c.sha256.in_(shas)))).scalars())


async def all_named(db: AsyncConnection) -> set[str]:
    return set((await db.execute(select(blob_refs.c.sha256).distinct())).scalars())


def sizes(files: Iterable[wire.FileRef | None]) -> dict[str, int]:
    return {file.sha256: file.bytes for file in files if file}
