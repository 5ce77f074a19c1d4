"""PostgreSQL into a file and back, by its own pg_dump and pg_restore. What backup.py does with a copy of SQLite's file.

They are told where the database is by their environment, for everybody on a machine may read a command line.
"""

import asyncio
import contextlib
import shutil
import time
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Callable, Collection
from pathlib import Path

from sqlalchemy import inspect, make_url, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from relay import errors, migrate
from relay.refs import all_named
from relay.settings import Settings, environment
from relay.store import Store
from relay.tables import folders

LIVES_S = 30.0  # a relay that said something within so long may be running
ASIDE = "before_restore_"  # of schemas


class BadBackup(errors.RelayError):
    """Met by whoever runs the command, never by a caller."""


def tool(name: str) -> str:
    """Raises BadBackup."""
    if found := shutil.which(name):
        return found
    raise BadBackup(
        f"{name} is not on the PATH: install PostgreSQL's client (Debian, Ubuntu: apt install postgresql-client)"
    )


async def save(settings: Settings, target: Path, link: Callable[[Collection[str]], list[str]]) -> tuple[str, list[str]]:
    """One view of the database into a file; `link` gets the blobs that this view names, while nobody can remove any.

    The revision, and what `link` returns. Raises BadBackup, NewerDatabase.
    """
    pg_dump, store = tool("pg_dump"), Store(settings.database)
    try:
        async with contextlib.AsyncExitStack() as viewing:
            async with store.write() as db:
                revision = check_revision(await _revision(db), must_be_last=True)
                view = await viewing.enter_async_context(store.read())
                await view.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))  # it waits for pg_dump
                snapshot = (await view.execute(text("SELECT pg_export_snapshot()"))).scalar_one()
                missing = link(await all_named(view))
            options = ["--format=custom", "--no-owner", "--no-privileges", f"--exclude-schema={ASIDE}*"]
            await _run(settings, pg_dump, *options, f"--snapshot={snapshot}", f"--file={target}")
    finally:
        await store.close()
    return revision, missing


async def load(settings: Settings, source: Path, *, replace: bool) -> tuple[str | None, str | None]:
    """Where what was in the database before lies now, if anything was; and the id of the folder that belongs to it.

    All or nothing. Raises BadBackup.
    """
    pg_restore, store = tool("pg_restore"), Store(settings.database)
    try:
        async with store.write() as db:
            aside = await _make_room(db, replace=replace)
        try:
            options = ["--single-transaction", "--exit-on-error", "--no-owner", "--no-privileges", "--schema=public"]
            await _run(settings, pg_restore, *options, f"--dbname={make_url(settings.database).database}", str(source))
        except BaseException:
            async with store.write() as db:
                await db.execute(text("DROP SCHEMA public CASCADE"))
                await db.execute(text(f"ALTER SCHEMA {aside} RENAME TO public" if aside else "CREATE SCHEMA public"))
            raise
        async with store.read() as db:
            return aside, (await db.execute(select(folders.c.id))).scalar_one_or_none()
    finally:
        await store.close()


async def check_room(settings: Settings, *, replace: bool) -> None:
    """Before anything is unpacked. Raises BadBackup."""
    tool("pg_restore")
    store = Store(settings.database)
    try:
        async with store.read() as db:
            found = await db.run_sync(lambda sync: inspect(sync).get_table_names())
            if found and not replace:
                raise BadBackup("the database of RELAY_DATABASE_URL is not empty: --replace moves what is there aside")
            if "relays" in found:
                seen_at = (await db.execute(text("SELECT max(seen_at) FROM relays"))).scalar_one() or 0.0
                if (ago_s := time.time() - seen_at) < LIVES_S:
                    raise BadBackup(f"a relay used the database {max(ago_s, 0):.0f} s ago: stop it first, or wait")
    finally:
        await store.close()


async def _make_room(db: AsyncConnection, *, replace: bool) -> str | None:
    """The schema that what was there is in now."""
    found = await db.run_sync(lambda sync: inspect(sync).get_table_names())
    if not found:
        return None
    assert replace, "check_room() comes first"
    aside = ASIDE + time.strftime("%Y%m%d_%H%M%S", time.gmtime())
    await db.execute(text(f"ALTER SCHEMA public RENAME TO {aside}"))
    await db.execute(text("CREATE SCHEMA public"))
    return aside


async def _revision(db: AsyncConnection) -> str | None:
    found = await db.run_sync(lambda sync: inspect(sync).get_table_names())
    if "alembic_version" not in found:
        return None
    return str((await db.execute(text("SELECT version_num FROM alembic_version"))).scalar_one())


def check_revision(at: str | None, *, must_be_last: bool = False) -> str:
    """Raises NewerDatabase, BadBackup."""
    known = migrate.revisions()
    if at is None:
        raise BadBackup("the database is of a relay from before revisions, or empty: start this version on it once")
    if at not in known:
        raise errors.NewerDatabase(
            f"the database is at revision {at}, and this version of the relay knows none after {known[-1]}: "
            "use the later version"
        )
    if must_be_last and at != known[-1]:
        raise BadBackup(f"the database is at revision {at}, of an earlier version: back it up with that one")
    return at


async def _run(settings: Settings, *command: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *command, env=environment() | _where(settings.database), stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE
    )
    try:
        _, said = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    if process.returncode:
        lines = said.decode(errors="replace").strip().splitlines() or [f"it ended with {process.returncode}"]
        raise BadBackup(f"{Path(command[0]).name} failed: {lines[0]}")


def _where(url: str) -> dict[str, str]:
    """https://www.postgresql.org/docs/current/libpq-envars.html"""
    parts = make_url(url)
    query = {name: value if isinstance(value, str) else value[0] for name, value in parts.query.items()}
    found = {
        "PGHOST": parts.host or query.get("host"),
        "PGPORT": str(parts.port or query.get("port") or "") or None,
        "PGUSER": parts.username,
        "PGPASSWORD": parts.password,
        "PGDATABASE": parts.database,
        "PGSSLMODE": query.get("ssl"),
        "PGCONNECT_TIMEOUT": "10",
    }
    return {name: str(value) for name, value in found.items() if value}
