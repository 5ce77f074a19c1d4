"""The database: the only place that opens it. Reads and writes are transactions; writes are one at a time on SQLite.

Knows the tables' schema, not what they mean.
"""

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Callable
from typing import Any

from sqlalchemy import Connection, event, make_url
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from relay import errors, migrate

BUSY_TIMEOUT_MS = 10_000  # another process (the command line) may be writing

Clock = Callable[[], float]  # unix seconds


class Store:
    def __init__(self, url: str) -> None:
        self._engine = create_async_engine(url, hide_parameters=True)  # errors are logged, what is stored is not
        self._writer = self._engine.execution_options(relay_write=True)
        # SQLite lets writers in at random; within this process they queue up fairly.
        self._turn = asyncio.Lock() if make_url(url).get_backend_name() == "sqlite" else contextlib.nullcontext()
        if make_url(url).get_backend_name() == "sqlite":
            event.listen(self._engine.sync_engine, "connect", _prepare_sqlite)
            event.listen(self._engine.sync_engine, "begin", _begin_sqlite)

    async def open(self) -> None:
        """Brings the database to this version's tables. Raises NewerDatabase."""
        migrator = self._engine.execution_options(relay_write=True, relay_migrates=True)
        try:
            async with self._turn, migrator.begin() as db:
                await db.run_sync(migrate.forwards)
        finally:
            await self._engine.dispose()  # its connection does not check foreign keys

    async def close(self) -> None:
        await self._engine.dispose()

    @contextlib.asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """One consistent view."""
        async with self._engine.connect() as db:
            yield db

    @contextlib.asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """All or nothing, and on disk when the block is left. Raises DatabaseBusy."""
        try:
            async with self._turn, self._writer.begin() as db:
                yield db
        except OperationalError as exc:
            if getattr(exc.orig, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_BUSY:
                raise
            message = "the database is busy: another process has been writing to it for long. Try again in a moment."
            raise errors.DatabaseBusy(message) from exc


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver would begin transactions on its own, and too late
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")  # what was acknowledged survives a power cut
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    if connection.get_execution_options().get("relay_migrates", False):
        connection.exec_driver_sql("PRAGMA foreign_keys=OFF")  # a table is changed by copying it; not possible later
    # A transaction that reads first and writes later could not be granted the lock then: take it at once.
    writes = connection.get_execution_options().get("relay_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
