"""The database: the only place that opens it. Reads and writes are transactions, and writes are one at a time.

SQLite has one writer anyway. On PostgreSQL each write transaction begins by taking a lock that all relay processes
share, so that what holds on one holds on the other: what a write has looked at stays so until it is committed.
Knows the tables' schema, not what they mean. docs/decisions/0013-one-writer.md
"""

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from sqlalchemy import Connection, Row, Select, Table, event, literal, make_url, tuple_
from sqlalchemy.exc import DBAPIError, InvalidatePoolError, StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from relay import errors, migrate

log = logging.getLogger("relay.store")

BUSY_TIMEOUT_MS = 10_000  # another process (the command line, another relay) may be writing
WRITER = 0x696D66696E65  # PostgreSQL's advisory lock: who holds it writes
CONNECT_S = 5.0
ANSWER_S = 60.0  # of one statement; a server that says nothing for so long is as good as gone
STUCK_S = 60  # a transaction of a process that stands still ends, or nobody else would ever write
CONNECTIONS, MORE_CONNECTIONS = 10, 10  # of one process, kept and at most beside those

# SQLSTATEs: https://www.postgresql.org/docs/current/errcodes-appendix.html
BUSY = ("55P03", "57014", "40001", "40P01")  # a lock or a statement took too long; two waited for each other
AWAY = ("08", "53", "57")  # no connection; no resources; shut down, or not up yet
UNFIT = "22"  # a value that a column can't hold

Clock = Callable[[], float]  # unix seconds


class Store:
    def __init__(self, url: str) -> None:
        self._url = url
        self._engine = _engine(url)
        if self._engine.dialect.name == "postgresql":
            view = self._engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        else:
            view = self._engine
        self._reader, self._writer = view, self._engine.execution_options(relay_write=True)
        self._turn = asyncio.Lock()  # within this process writers queue up fairly, and wait on one connection

    @property
    def is_shared(self) -> bool:
        """Several relay processes may work on it side by side."""
        return self._engine.dialect.name == "postgresql"

    async def open(self) -> None:
        """Brings the database to this version's tables. Raises NewerDatabase, DatabaseBusy, DatabaseAway."""
        engine = _engine(self._url, answer_s=None)  # its connection checks no foreign keys, and has time
        migrator = engine.execution_options(relay_write=True, relay_migrates=True)
        try:
            async with self._turn, _transaction(migrator) as db:
                await db.run_sync(migrate.forwards)
        finally:
            await engine.dispose()

    async def close(self) -> None:
        await self._engine.dispose()

    @contextlib.asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """One consistent view. Raises DatabaseBusy, DatabaseAway."""
        async with _transaction(self._reader) as db:
            yield db

    @contextlib.asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """All or nothing, and on disk when the block is left. Raises DatabaseBusy, DatabaseAway.

        DatabaseAway may come of a connection that broke in the very moment of the commit: then it may stand.
        """
        async with self._turn, _transaction(self._writer) as db:
            yield db


async def one_page(
    db: AsyncConnection,
    query: Select[Any],
    table: Table,
    last: Row[Any] | None,
    limit: int,
    *,
    newest_first: bool = True,
) -> tuple[Sequence[Row[Any]], bool]:
    """Rows in the order of their making, and whether there are more; those behind `last`, with which a page ended."""
    key = tuple_(table.c.created_at, table.c.id)
    if last is not None:
        end = tuple_(literal(last.created_at), literal(last.id))
        query = query.where(key < end if newest_first else key > end)
    order = [column.desc() if newest_first else column.asc() for column in (table.c.created_at, table.c.id)]
    rows = (await db.execute(query.order_by(*order).limit(limit + 1))).all()
    return rows[:limit], len(rows) > limit


def _engine(url: str, answer_s: float | None = ANSWER_S) -> AsyncEngine:
    if make_url(url).get_backend_name() == "sqlite":
        engine = create_async_engine(url, hide_parameters=True)  # errors are logged, what is stored is not
        event.listen(engine.sync_engine, "connect", _prepare_sqlite)
        event.listen(engine.sync_engine, "begin", _begin_sqlite)
        return engine
    session = {
        "application_name": "im-fine-relay",
        "lock_timeout": str(BUSY_TIMEOUT_MS),
        "idle_in_transaction_session_timeout": f"{STUCK_S}s",
        "tcp_keepalives_idle": "30",  # what stands between may forget a connection that is quiet
        "jit": "off",  # every query here is short
    }
    engine = create_async_engine(
        url,
        hide_parameters=True,
        pool_size=CONNECTIONS,
        max_overflow=MORE_CONNECTIONS,
        pool_timeout=BUSY_TIMEOUT_MS / 1000,
        connect_args={"timeout": CONNECT_S, "command_timeout": answer_s, "server_settings": session},
    )
    event.listen(engine.sync_engine, "checkout", _check_open)
    event.listen(engine.sync_engine, "begin", _begin_postgresql)
    return engine


@contextlib.asynccontextmanager
async def _transaction(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """What the database does wrong is raised in our own errors; what the block raises goes through."""
    try:
        async with contextlib.AsyncExitStack() as stack:
            try:
                db = await stack.enter_async_context(engine.begin())
            except OSError as exc:
                raise _away(repr(exc)) from exc
            yield db
    except TimeoutError as exc:
        raise _away(repr(exc)) from exc
    except PoolTimeout as exc:
        raise errors.DatabaseBusy("the database is busy: too much waits for it. Try again in a moment.") from exc
    except StatementError as exc:
        if known := _meaning(exc):
            raise known from exc
        raise


def _meaning(exc: StatementError) -> errors.RelayError | None:
    """None: a fault of ours."""
    code, sqlstate = getattr(exc.orig, "sqlite_errorcode", 0) & 0xFF, str(getattr(exc.orig, "sqlstate", None) or "")
    if code == sqlite3.SQLITE_BUSY or sqlstate in BUSY:
        message = "the database is busy: another process has been writing to it for long. Try again in a moment."
        return errors.DatabaseBusy(message)
    lost = isinstance(exc, DBAPIError) and exc.connection_invalidated
    if lost or sqlstate.startswith(AWAY) or isinstance(exc.orig, OSError):
        return _away(str(exc.orig))
    if sqlstate.startswith(UNFIT):
        log.warning("a value can't be stored (SQLSTATE %s)", sqlstate)
        return errors.InvalidRequest(
            "something in the request can't be stored: a text is too long or holds a NUL character, or a number is "
            "too large"
        )
    return None


def _away(why: str) -> errors.DatabaseAway:
    log.warning("the database can't be reached: %s", why.partition("\n")[0])  # which may name a host
    return errors.DatabaseAway("the database can't be reached at the moment. Try again in a few seconds.")


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


def _check_open(connection: Any, _record: Any, _proxy: Any) -> None:
    """A server that was restarted has closed all of them, which costs no question to find out."""
    if connection.driver_connection.is_closed():
        raise InvalidatePoolError("the server has closed this connection")


def _begin_postgresql(connection: Connection) -> None:
    """The lock first: what is read after it is what the writer before has left."""
    options = connection.get_execution_options()
    if options.get("relay_migrates", False):
        connection.exec_driver_sql("SET LOCAL lock_timeout = 0")  # another process may migrate, which takes its time
    if options.get("relay_write", False):
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITER})")
