"""Brings a database to this version's tables, in one transaction of the caller's.

Knows the order of the steps, not what they change.

Alembic is imported only when there is something to do: a relay at rest does not carry it.
"""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from sqlalchemy import Connection, inspect, text

from relay import errors

MIGRATIONS = Path(__file__).with_name("migrations")
VERSIONS = MIGRATIONS / "versions"


def revisions() -> list[str]:
    """Of this code, the oldest first: files are named by number."""
    return sorted(path.name.partition("_")[0] for path in VERSIONS.glob("[0-9]*_*.py"))


def forwards(db: Connection) -> None:
    """To the last revision. The write lock must be held, and on SQLite foreign keys be off. Raises NewerDatabase."""
    known, found = revisions(), inspect(db).get_table_names()
    at = db.scalar(text("SELECT version_num FROM alembic_version")) if "alembic_version" in found else None
    if at == known[-1]:
        return
    if at is not None and at not in known:
        raise errors.NewerDatabase(
            f"the database is at revision {at}, and this version of the relay knows none after {known[-1]}: "
            "install the later version again, or start with a copy from before it"
        )
    if found and db.dialect.name == "sqlite":
        _copy(db)
    run(db, known[-1])
    if db.dialect.name == "sqlite" and db.exec_driver_sql("PRAGMA foreign_key_check").first() is not None:
        raise errors.RelayError("a migration would leave rows that point nowhere: the database is left as it was")


def run(db: Connection, target: str) -> None:
    """From wherever it is to `target`."""
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext
    from alembic.script import ScriptDirectory

    script = ScriptDirectory(str(MIGRATIONS), version_locations=[str(VERSIONS)])
    with EnvironmentContext(
        Config(), script, fn=lambda at, _: script._upgrade_revs(target, at), destination_rev=target
    ) as steps:
        steps.configure(connection=db, render_as_batch=True, transactional_ddl=True)
        steps.run_migrations()


def _copy(db: Connection) -> None:
    """The database as it was before, beside itself; the last such copy is kept."""
    if not db.engine.url.database or db.engine.url.database == ":memory:":
        return
    source = Path(db.engine.url.database)
    target = source.with_name(source.name + ".before-migration")
    part = target.with_name(target.name + ".part")
    part.unlink(missing_ok=True)
    part.touch(mode=0o600)
    with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(part)) as new:
        old.backup(new)
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
