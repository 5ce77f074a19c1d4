"""Services are real processes here: small modules written for the case."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from demo import services
from demo.services import ROOT, STOP_S, Died, Service

PATIENT = "import time; print('ready'); time.sleep(600)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready'); time.sleep(600)"
BROKEN = "print('loading'); raise SystemExit('the disk is on fire')"


def start(folder: Path, name: str, code: str) -> Service:
    (folder / f"{name}.py").write_text(code)
    return Service(name, name, [], {"PYTHONPATH": str(folder)}, folder / f"{name}.log")


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_ready(log: Path) -> bool:
    return "ready" in log.read_text()


def is_gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except FileNotFoundError:
        return True
    return state == "Z"  # dead, and only waiting for an init that takes its time


def test_services_stop_at_once_when_asked_and_are_killed_when_they_do_not(tmp_path: Path) -> None:
    patient, stubborn = start(tmp_path, "patient", PATIENT), start(tmp_path, "stubborn", STUBBORN)
    until(lambda: is_ready(tmp_path / "patient.log") and is_ready(tmp_path / "stubborn.log"))
    started = time.monotonic()
    services.stop([patient])
    assert time.monotonic() - started < 1
    services.stop([stubborn])
    assert time.monotonic() - started < STOP_S + 2
    with pytest.raises(Died, match="stubborn was killed by signal 9"):
        stubborn.check()


def test_a_service_that_died_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    broken = start(tmp_path, "broken", BROKEN)

    def check() -> bool:
        broken.check()
        return False

    with pytest.raises(Died) as died:
        until(check)
    assert "the broken ended with status 1" in str(died.value)
    assert "broken.log" in str(died.value)
    assert "loading\n    the disk is on fire" in str(died.value)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends the children of a killed parent")
def test_services_do_not_outlive_a_parent_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text("import os, time; print(os.getpid(), 'ready'); time.sleep(600)")
    log = tmp_path / "child.log"
    code = (
        "import time; from pathlib import Path; from demo.services import Service;"
        f"Service('child', 'child', [], {{'PYTHONPATH': {str(tmp_path)!r}}}, Path({str(log)!r})); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as parent:
        until(lambda: log.exists() and is_ready(log))
        parent.send_signal(signal.SIGKILL)
    until(lambda: is_gone(int(log.read_text().split()[0])))


def test_a_port_is_free_until_somebody_listens_there() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        listener.listen()
        assert not services.is_free(port)
    assert services.is_free(port)
