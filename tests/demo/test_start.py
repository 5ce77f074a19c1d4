"""What `python -m demo` says when it can't start: one line, status 1, nothing left running."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from demo.services import ROOT


def demo(data: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "demo"],
        cwd=ROOT,
        env=os.environ | {"DATA": str(data), "TOUR": "0", "RELAY_PORT": "0", "GPU_PORT": "0"} | env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_a_taken_port_is_said_with_the_setting_that_changes_it(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = str(listener.getsockname()[1])
        assert f"port {taken} is taken" in demo(tmp_path, RELAY_PORT=taken, GPU_PORT=free_port())
        assert "make demo GPU_PORT=" in demo(tmp_path, RELAY_PORT=free_port(), GPU_PORT=taken)


def test_too_little_disk_is_said_before_anything_is_written(tmp_path: Path) -> None:
    line = demo(tmp_path / "data", RELAY_PORT=free_port(), GPU_PORT=free_port(), DEMO_NEED_BYTES=str(10**18))
    assert "too little disk: 1,000,000,000,000 MB are needed" in line
    assert not list((tmp_path / "data").iterdir())


def test_a_port_that_is_no_port_is_refused_by_name(tmp_path: Path) -> None:
    assert "RELAY_PORT is '0': use a number from 1 to 65535" in demo(tmp_path)
    assert "GPU_PORT is 'x'" in demo(tmp_path, RELAY_PORT=free_port(), GPU_PORT="x")
