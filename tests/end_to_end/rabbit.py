"""A RabbitMQ of a test's own, from Debian's package, on free ports and in a folder of its own."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.end_to_end.stack import free_port

SERVER = "/usr/lib/rabbitmq/bin/rabbitmq-server"
START_S = 120.0


class Rabbit:
    def __init__(self, folder: Path, **settings: str) -> None:
        """`settings` are RABBITMQ_... variables. `env` is for programs that are to find it."""
        if not Path(SERVER).exists():
            message = "rabbitmq-server is not installed"
            pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
        self._folder, self.port, self._epmd = folder, free_port(), free_port()
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}//"
        self.process: subprocess.Popen[bytes] | None = None
        for name in ("home", "mnesia", "log"):
            (folder / name).mkdir(parents=True)
        (folder / "plugins").write_text("[].")
        own = {
            "HOME": folder / "home",
            "RABBITMQ_NODENAME": f"imfine-{self.port}@localhost",
            "RABBITMQ_NODE_PORT": self.port,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_DIST_PORT": free_port(),
            "RABBITMQ_MNESIA_BASE": folder / "mnesia",
            "RABBITMQ_LOG_BASE": folder / "log",
            "RABBITMQ_ENABLED_PLUGINS_FILE": folder / "plugins",
            "RABBITMQ_CONFIG_FILE": folder / "rabbitmq",
            "ERL_EPMD_PORT": self._epmd,
            "ERL_EPMD_ADDRESS": "127.0.0.1",
        }
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RABBITMQ_")}
        self.env = {name: str(value) for name, value in own.items()} | settings
        self._env = kept | self.env

    def start(self) -> None:
        with (self._folder / "out").open("ab") as out:
            self.process = subprocess.Popen(
                [SERVER], env=self._env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        deadline = time.monotonic() + START_S
        while not self._listens():
            assert self.process.poll() is None, (self._folder / "out").read_text()
            assert time.monotonic() < deadline, (self._folder / "out").read_text()
            time.sleep(0.1)

    def _listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True

    def stop(self) -> None:
        """As when its machine is shut down: what it was given is on disk."""
        assert self.process
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """As with a disk or a machine that hangs: connections stay, and nothing is answered."""
        assert self.process
        os.killpg(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self.process.pid, signal.SIGCONT)

    def close(self) -> None:
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if epmd := shutil.which("epmd"):
            subprocess.run([epmd, "-kill"], env=self._env, capture_output=True, check=False)
