"""The relay and the gpu service as child processes: start, watch, stop. Knows their names and logs, not their APIs."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
STOP_S = 5.0  # a service that takes longer to stop is killed; both are made to survive that
LOG_LINES = 15
PR_SET_PDEATHSIG = 1


class Died(Exception):
    """A service ended by itself. The message shows the last lines of its log."""


class Service:
    def __init__(self, name: str, module: str, arguments: list[str], env: Mapping[str, str], log: Path) -> None:
        self.name = name
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            # A session of its own: Ctrl-C reaches the demo alone, which stops the services in order.
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", module, *arguments],
                cwd=ROOT,
                env={**os.environ, **env, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent(),
            )

    def check(self) -> None:
        """Raises Died."""
        status = self._process.poll()
        if status is not None:
            how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            lines = self._log.read_text(errors="replace").splitlines()[-LOG_LINES:]
            shown = "\n".join(f"    {line}" for line in lines)
            raise Died(f"the {self.name} {how}. The end of {self._log}:\n{shown}")

    def ask_to_stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def stopped(self, deadline: float) -> None:
        """Wait until it has stopped, and kill it past the deadline (of time.monotonic)."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            # The whole group, with what the service may have started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def stop(services: list[Service]) -> None:
    deadline = time.monotonic() + STOP_S
    for service in reversed(services):
        service.ask_to_stop()
    for service in services:
        service.stopped(deadline)


def _die_with_parent() -> Callable[[], None] | None:
    """Linux can end a child whose parent was killed; elsewhere it is left to the user."""
    if sys.platform != "linux":
        return None
    libc, parent = ctypes.CDLL(None), os.getpid()

    def before_exec() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we could ask
            os._exit(1)

    return before_exec


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just left is free
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
