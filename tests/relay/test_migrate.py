"""Databases of every age come to this version's tables, and lose nothing."""

import asyncio
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, create_engine
from sqlalchemy.ext.asyncio import create_async_engine

from relay import errors, migrate, tables
from relay.store import Store
from tests.conftest import ROOT
from tests.postgres import Postgres

T = TypeVar("T")


async def opened(path: Path) -> None:
    await Database(f"sqlite+aiosqlite:///{path}").open()


class Database:
    """Of either kind, without tables so far."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def open(self) -> None:
        store = Store(self.url)
        try:
            await store.open()
        finally:
            await store.close()

    async def run(self, work: Callable[[Connection], T]) -> T:
        engine = create_async_engine(self.url)
        try:
            async with engine.begin() as db:
                return await db.run_sync(work)
        finally:
            await engine.dispose()

    async def execute(self, *statements: str) -> None:
        await self.run(lambda db: [db.exec_driver_sql(statement) for statement in statements])

    async def rows(self, query: str) -> list[tuple[object, ...]]:
        return [tuple(row) for row in await self.run(lambda db: db.exec_driver_sql(query).fetchall())]

    async def before_migrations(self) -> None:
        """As a relay left it before there were migrations, and before keys had rules."""
        await self.run(lambda db: migrate.run(db, "0001"))
        await self.execute("DROP TABLE key_rules", "DROP TABLE alembic_version")
        await self.execute("INSERT INTO users (id, name, created_at) VALUES ('user-1', 'ada', 1.5)")


@pytest.fixture(params=["sqlite", "postgresql"])
def of_any_kind(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    if request.param == "sqlite":
        yield Database(f"sqlite+aiosqlite:///{tmp_path / 'relay.db'}")
        return
    server: Postgres = request.getfixturevalue("postgres")
    name = server.new(empty=True)
    yield Database(server.url(name))
    server.drop(name)


def execute(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as db:
        for statement in statements:
            db.execute(statement)
        db.commit()


def rows(path: Path, query: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as db:
        return db.execute(query).fetchall()


async def test_the_migrations_lead_to_exactly_the_tables(of_any_kind: Database) -> None:
    await of_any_kind.open()
    differ = await of_any_kind.run(lambda db: compare_metadata(MigrationContext.configure(db), tables.metadata))
    assert differ == []


async def test_a_database_from_before_migrations_keeps_its_rows_and_gets_what_it_lacks(of_any_kind: Database) -> None:
    await of_any_kind.before_migrations()
    await of_any_kind.open()
    assert await of_any_kind.rows("SELECT id, name, created_at FROM users") == [("user-1", "ada", 1.5)]
    assert await of_any_kind.rows("SELECT count(*) FROM key_rules") == [(0,)]
    assert await of_any_kind.rows("SELECT version_num FROM alembic_version") == [(migrate.revisions()[-1],)]


async def test_processes_that_start_at_once_bring_it_forward_once(of_any_kind: Database) -> None:
    await of_any_kind.before_migrations()
    await asyncio.gather(*(of_any_kind.open() for _ in range(4)))
    assert await of_any_kind.rows("SELECT id FROM users") == [("user-1",)]
    assert await of_any_kind.rows("SELECT version_num FROM alembic_version") == [(migrate.revisions()[-1],)]


async def test_a_database_is_copied_before_it_is_changed_and_only_then(tmp_path: Path) -> None:
    path, copy = tmp_path / "relay.db", tmp_path / "relay.db.before-migration"
    await opened(path)
    await opened(path)
    assert not copy.exists()
    path.unlink()
    await Database(f"sqlite+aiosqlite:///{path}").before_migrations()
    await opened(path)
    assert rows(copy, "SELECT name FROM users") == [("ada",)]
    assert rows(copy, "SELECT name FROM sqlite_master WHERE name = 'alembic_version'") == []
    assert copy.stat().st_mode & 0o077 == 0


async def test_a_database_of_a_later_version_is_refused_untouched(of_any_kind: Database) -> None:
    await of_any_kind.open()
    await of_any_kind.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(errors.NewerDatabase, match="9999"):
        await of_any_kind.open()
    assert await of_any_kind.rows("SELECT version_num FROM alembic_version") == [("9999",)]


def test_the_relay_does_not_start_on_a_later_database_and_says_so_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "relay.db"
    asyncio.run(opened(path))
    execute(path, "UPDATE alembic_version SET version_num = '9999'")
    ended = subprocess.run(
        [sys.executable, "-m", "relay", "serve"],
        cwd=ROOT,
        env={
            "PATH": os.environ["PATH"],
            "RELAY_DATA_DIR": str(tmp_path / "data"),
            "RELAY_DATABASE_URL": f"sqlite+aiosqlite:///{path}",
            "RELAY_PORT": "0",
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert "9999" in ended.stderr


async def test_a_migration_that_would_break_a_reference_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "relay.db"
    engine = create_engine(f"sqlite:///{path}")  # which does not look at references by itself
    with engine.begin() as db:
        migrate.run(db, "0001")
    engine.dispose()
    execute(path, "DROP TABLE key_rules", "DROP TABLE alembic_version")
    execute(
        path,
        "INSERT INTO keys (id, owner, sha256, prefix, created_at) VALUES ('key-1', 'nobody', 'x', 'y', 1)",
    )
    with pytest.raises(errors.RelayError, match="point nowhere"):
        await opened(path)
    assert rows(path, "SELECT name FROM sqlite_master WHERE name IN ('alembic_version', 'key_rules')") == []


def test_a_database_that_is_up_to_date_does_not_load_alembic(tmp_path: Path) -> None:
    code = (
        "import asyncio, sys\nfrom relay.store import Store\n"
        "async def main():\n    store = Store(sys.argv[1])\n    await store.open()\n    await store.close()\n"
        "asyncio.run(main())\nprint('alembic' in sys.modules)"
    )
    url = f"sqlite+aiosqlite:///{tmp_path / 'relay.db'}"
    said = [
        subprocess.run([sys.executable, "-c", code, url], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    ]
    assert said == ["True\n", "False\n"]


async def test_blobs_that_an_older_database_names_are_named_in_the_index(of_any_kind: Database) -> None:
    await of_any_kind.run(lambda db: migrate.run(db, "0007"))
    blob = '{"name": "x", "sha256": "%s", "bytes": %d}'
    a, b, c, d, e = (letter * 64 for letter in "abcde")
    manifest = f'{{"files": [{{"chunks": [{blob % (c, 3)}, {blob % (c, 3)}]}}]}}'

    def job(job_id: str, status: str) -> str:
        return (
            "INSERT INTO jobs (id, owner, status, base_model, layers, hyperparameters, seed, training_file,"
            " training_blob, validation_blob, created_at, fence, attempts)"
            f" VALUES ('{job_id}', 'user-1', '{status}', 'lab/base', '[]', '{{}}', 1, 'file-1',"
            f" '{blob % (b, 2)}', 'null', 1, 0, 0)"
        )

    await of_any_kind.execute(
        "INSERT INTO users (id, name, created_at) VALUES ('user-1', 'ada', 1.5)",
        "INSERT INTO base_models (id, family, n_layers, context_tokens, created_at)"
        " VALUES ('lab/base', 'llama', 1, 1, 1)",
        "INSERT INTO files (id, owner, filename, purpose, bytes, sha256, rows, created_at)"
        f" VALUES ('file-1', 'user-1', 'x', 'fine-tune', 1, '{a}', 1, 1)",
        job("ftjob-open", "paused"),
        job("ftjob-over", "succeeded"),
        "INSERT INTO checkpoints (job_id, step, fence, bytes, manifest, created_at)"
        f" VALUES ('ftjob-open', 7, 1, 3, '{manifest}', 1)",
        f"INSERT INTO checkpoint_chunks (job_id, step, sha256) VALUES ('ftjob-open', 7, '{c}')",
        "INSERT INTO models (id, owner, base_model, job_id, adapter, created_at)"
        f" VALUES ('ft:1', 'user-1', 'lab/base', 'ftjob-over', '{{\"files\": [{blob % (d, 4)}]}}', 1)",
        f"INSERT INTO job_reports (job_id, name, sha256, bytes) VALUES ('ftjob-over', 'report.json', '{e}', 5)",
    )
    await of_any_kind.open()
    assert await of_any_kind.rows("SELECT sha256, kind, holder, owner, bytes FROM blob_refs ORDER BY sha256") == [
        (a, "file", "file-1", "user-1", 1),
        (b, "job", "ftjob-open", "user-1", 2),
        (c, "checkpoint", "ftjob-open/7", "user-1", 3),
        (d, "model", "ft:1", "user-1", 4),
        (e, "report", "ftjob-over", "user-1", 5),
    ]
