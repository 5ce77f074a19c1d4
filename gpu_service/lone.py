"""A relay beside this gpu, as a process: so a notebook alone has the page, files and fine-tuning that a relay brings.

Knows how to start, watch and stop it, and nothing of its API but /healthz.
"""

import ctypes
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx2

ROOT = Path(__file__).parent.parent
PORT = 8000
START_S = 60.0
STOP_S = 5.0
LOG_LINES = 15
PR_SET_PDEATHSIG = 1


def build_page(environment: Mapping[str, str]) -> str | None:
    """Build the page, which takes a minute the first time and nothing afterwards. Why it could not be, or None."""
    done = subprocess.run(  # noqa: S603
        ["/bin/sh", str(ROOT / "web/build.sh")],
        env={**environment, "PAGE_PYTHON": sys.executable},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    return (done.stderr.strip() or f"web/build.sh ended with status {done.returncode}") if done.returncode else None


class RelayDied(Exception):
    """The message shows the end of its log."""


class LoneRelay:
    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        """Starts it. Raises RelayDied."""
        self._folder, self._log = folder / "relay", folder / "relay.log"
        folder.mkdir(parents=True, exist_ok=True)
        env = {
            **dict.fromkeys(("RELAY_ADMIN_KEY", "RELAY_ENROL_TOKEN", "RELAY_DATABASE_URL"), ""),  # of another relay
            "RELAY_HOST": "127.0.0.1",
            "RELAY_LOG_FORMAT": "text",  # a person opens it
            "RELAY_PORT": str(PORT) if _is_free(PORT) else "0",
            "RELAY_DATA_DIR": str(self._folder),
            "RELAY_ALLOW_LOOPBACK_GPUS": "1",
        }
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "relay", "serve"],
                cwd=ROOT,
                env={**environment, **env, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the kernel's interrupt is for us; we stop it in order
                preexec_fn=_die_with_parent(),
            )
        try:
            self.url = self._wait()
        except BaseException:
            self.stop()
            raise

    def _wait(self) -> str:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            self.check()
            if found := re.search(r"the relay is at (http://\S+?),", self._log.read_text(errors="replace")):
                url = found.group(1)
                if httpx2.get(f"{url}/healthz", trust_env=False).is_success:
                    return url
            time.sleep(0.05)
        raise RelayDied(f"the relay did not answer within {START_S:.0f} s; its log is {self._log}")

    @property
    def admin_key(self) -> str:
        return (self._folder / "admin.key").read_text().strip()

    @property
    def enrol_token(self) -> str:
        return (self._folder / "enrol.token").read_text().strip()

    def check(self) -> None:
        """Raises RelayDied."""
        status = self._process.poll()
        if status is not None:
            lines = "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_LINES:])
            raise RelayDied(f"the relay ended with status {status}. The end of {self._log}:\n{lines}")

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()  # it is made to survive that
                self._process.wait()


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _die_with_parent() -> Callable[[], None] | None:
    """Linux can end a child whose parent was killed: a kernel often is."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
