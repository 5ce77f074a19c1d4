"""A relay as a process of its own, for what only a process can show: kill -9, signals, memory."""

import asyncio
import os
import re
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from pathlib import Path

import httpx2

ROOT = Path(__file__).parents[2]


def environment(folder: Path, **changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}
    ours = {
        "RELAY_DATA_DIR": str(folder),
        "RELAY_PORT": "0",
        "RELAY_ALLOW_LOOPBACK_GPUS": "1",
        "PYTHONWARNINGS": "error",
    }
    return kept | ours | changes


async def run(folder: Path, *arguments: str, **changes: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one command."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, cwd=ROOT, env=environment(folder, **changes), stdout=PIPE, stderr=PIPE
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


class RelayProcess:
    def __init__(self, folder: Path, before: Sequence[str] = (), **changes: str) -> None:
        """`before`: a command that makes a place for the relay and then becomes it."""
        self.folder = folder
        self._before = before
        self.changes = changes
        self.log = ""
        self.url = ""
        self._process: Process | None = None
        self._reading: asyncio.Task[None] | None = None

    @property
    def process(self) -> Process:
        assert self._process
        return self._process

    async def start(self) -> None:
        """On the same port as before, if there was a before."""
        self.log = ""
        self._process = await asyncio.create_subprocess_exec(
            *(*self._before, sys.executable, "-m", "relay", "serve"),
            cwd=ROOT,
            env=environment(self.folder, **self.changes),
            stderr=PIPE,
        )
        self._reading = asyncio.create_task(self._read())
        async with asyncio.timeout(60):
            while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", self.log)):
                assert self._process.returncode is None, self.log
                await asyncio.sleep(0.02)
        self.url, self.changes = found.group(), {**self.changes, "RELAY_PORT": found.group(1)}
        async with httpx2.AsyncClient(trust_env=False, verify=False) as http:
            assert (await http.get(f"{self.url}/healthz", timeout=20)).status_code == 200

    async def _read(self) -> None:
        assert self.process.stderr
        while line := await self.process.stderr.readline():
            self.log += line.decode()

    async def stop(self, how: signal.Signals = signal.SIGKILL) -> int:
        if self.process.returncode is None:
            self.process.send_signal(how)
        status = await self.process.wait()
        if self._reading:
            await self._reading
        return status

    def secret(self, name: str) -> str:
        return (self.folder / name).read_text().strip()
