"""A PostgreSQL of the tests' own, from Debian's package, in a folder of its own; whether one runs already is the same.

It listens on a socket in that folder alone, and writes nothing through to the disk: no power fails here.
"""

import asyncio
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import pytest

from relay.store import Store

T = TypeVar("T")
ADMIN, USER, TEMPLATE = "postgres", "relay", "template_relay"
START_S = 60.0
OPTIONS = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "autovacuum": "off",
    "shared_buffers": "32MB",
    "max_connections": "200",
    "max_wal_size": "2GB",
    "timezone": "UTC",
}


def programs() -> Path:
    """Where the newest server's programs are; they are on nobody's PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    if not found:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("postgresql is not installed")
    return found[-1].parent


class Postgres:
    def __init__(self, *, port: int | None = None, **options: str) -> None:
        """With a `port` it listens there too, for who has the password. Fails, or skips, where it is not installed."""
        self._programs, self.port, self._options = programs(), port, OPTIONS | options
        self.folder = Path(tempfile.mkdtemp(prefix="im-fine-pg-"))  # short: a socket's path has a limit
        self.password = secrets.token_hex(8)
        self.process: subprocess.Popen[bytes] | None = None
        # It refuses to run as root, and need not: the folder is its user's.
        self._user = "postgres" if os.getuid() == 0 else None
        if self._user:
            shutil.chown(self.folder, self._user, self._user)
        self._how: dict[str, Any] = {
            "cwd": self.folder,
            "user": self._user,
            "group": self._user,
            "extra_groups": [] if self._user else None,
            "env": {"PATH": os.environ["PATH"], "LC_ALL": "C"},
            "stdin": subprocess.DEVNULL,
        }
        (self.folder / "password").write_text(self.password)
        (self.folder / "password").chmod(0o644)  # nobody else gets into the folder
        self._run("initdb", "-D", "data", "-U", ADMIN, "-E", "UTF8", "--locale=C", "-N", "--pwfile=password", "-A")

    def _run(self, program: str, *arguments: str) -> None:
        more = ("scram-sha-256", "--auth-local=trust") if arguments[-1] == "-A" else ()
        done = subprocess.run(
            [self._programs / program, *arguments, *more], capture_output=True, check=False, **self._how
        )
        assert done.returncode == 0, done.stderr.decode()

    def start(self) -> None:
        listen = {"listen_addresses": "127.0.0.1", "port": str(self.port)} if self.port else {"listen_addresses": ""}
        options = self._options | listen | {"unix_socket_directories": str(self.folder)}
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [self._programs / "postgres", "-D", "data", *(f"--{name}={value}" for name, value in options.items())],
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self._how,
            )
        deadline = time.monotonic() + START_S
        while not self._answers():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)

    def _answers(self) -> bool:
        ready = [str(self._programs / "pg_isready"), "-q", "-h", str(self.folder), "-p", str(self.port or 5432)]
        return subprocess.run(ready, check=False).returncode == 0

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-3000:]

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT cuts every connection off, as a restart does; SIGQUIT is what a crash is to others."""
        assert self.process
        self.process.send_signal(how)
        self.process.wait(30)

    def close(self) -> None:
        if self.process and self.process.poll() is None:
            self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- databases ---

    def url(self, name: str, *, tcp: bool = False) -> str:
        """As RELAY_DATABASE_URL has it."""
        if tcp:
            return f"postgresql+asyncpg://{USER}:{self.password}@127.0.0.1:{self.port}/{name}"
        return f"postgresql+asyncpg://{USER}@/{name}?host={self.folder}" + (f"&port={self.port}" if self.port else "")

    def execute(
        self, statement: str, *values: object, database: str = "postgres", user: str = USER
    ) -> list[asyncpg.Record]:
        """On a connection, a loop and a thread of its own, for a test may have a loop already."""

        async def once() -> list[asyncpg.Record]:
            db = await asyncpg.connect(host=str(self.folder), port=self.port or 5432, user=user, database=database)
            try:
                return list(await db.fetch(statement, *values))
            finally:
                await db.close()

        return apart(once)

    def make_template(self) -> None:
        """And the relay's user, who may make databases and nothing else."""
        self.execute(f"CREATE ROLE {USER} LOGIN CREATEDB PASSWORD '{self.password}'", user=ADMIN)
        self.execute(f"CREATE DATABASE {TEMPLATE}")

        async def migrate() -> None:
            store = Store(self.url(TEMPLATE))
            await store.open()
            await store.close()

        apart(migrate)

    def new(self, *, empty: bool = False) -> str:
        """The name of a fresh database, with this version's tables unless told otherwise."""
        name = f"relay_{secrets.token_hex(6)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {'template0' if empty else TEMPLATE}")
        return name

    def drop(self, name: str) -> None:
        self.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


def apart(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(work())).result()
