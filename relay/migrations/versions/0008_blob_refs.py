"""One table says which rows name which blobs; it is filled from the rows that there are."""

import json
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

OPEN = "('queued', 'leased', 'running', 'finalizing', 'paused')"
AT_ONCE = 1000


def upgrade() -> None:
    refs = op.create_table(
        "blob_refs",
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=12), nullable=False),
        sa.Column("holder", sa.String(length=400), nullable=False),
        sa.Column("owner", sa.String(length=40), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["owner"], ["users.id"]),
        sa.PrimaryKeyConstraint("sha256", "kind", "holder"),
    )
    op.create_index("blob_refs_by_holder", "blob_refs", ["kind", "holder"])
    op.create_index("blob_refs_by_owner", "blob_refs", ["owner", "kind", "bytes"])
    rows: list[dict[str, Any]] = []
    for kind, holder, owner, blobs in _named():
        rows += [
            {"sha256": b["sha256"], "kind": kind, "holder": holder, "owner": owner, "bytes": b["bytes"]} for b in blobs
        ]
        if len(rows) >= AT_ONCE:
            op.bulk_insert(refs, rows)
            rows = []
    op.bulk_insert(refs, rows)
    op.drop_table("checkpoint_chunks")
    op.drop_index("job_reports_by_blob", "job_reports")


def _named() -> Iterator[tuple[str, str, str, list[dict[str, Any]]]]:
    """Kind, holder, owner, and blobs without a repetition."""
    db = op.get_bind()
    for row in db.execute(sa.text("SELECT id, owner, sha256, bytes FROM files")).all():
        yield "file", row.id, row.owner, [{"sha256": row.sha256, "bytes": row.bytes}]
    data = f"SELECT id, owner, training_blob, validation_blob, continue_from FROM jobs WHERE status IN {OPEN}"  # noqa: S608
    for row in db.execute(sa.text(data)).all():
        found = [_json(blob) for blob in (row.training_blob, row.validation_blob)]
        found += (_json(row.continue_from) or {"adapter": {"files": []}})["adapter"]["files"]
        yield "job", row.id, row.owner, _once([blob for blob in found if blob])
    for row in db.execute(sa.text("SELECT id, owner, adapter FROM models")).all():
        yield "model", row.id, row.owner, _once(_json(row.adapter)["files"])
    reports = "SELECT r.job_id, j.owner, r.sha256, r.bytes FROM job_reports r JOIN jobs j ON j.id = r.job_id ORDER BY 1"
    for (job_id, owner), of_job in groupby(db.execute(sa.text(reports)).all(), lambda row: (row.job_id, row.owner)):
        yield "report", job_id, owner, _once([{"sha256": row.sha256, "bytes": row.bytes} for row in of_job])
    stored = "SELECT c.job_id, c.step, j.owner, c.manifest FROM checkpoints c JOIN jobs j ON j.id = c.job_id"
    for row in db.execute(sa.text(stored)).all():
        chunks = [chunk for file in _json(row.manifest)["files"] for chunk in file["chunks"]]
        yield "checkpoint", f"{row.job_id}/{row.step}", row.owner, _once(chunks)


def _json(value: Any) -> Any:
    """SQLite has it as text, where null is a word."""
    return json.loads(value) if isinstance(value, str) else value


def _once(blobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({blob["sha256"]: blob for blob in blobs}.values())
