"""deploy/backup.sh, as systemd's timer and compose's service run it: real backups of a real data folder."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.deploy.machine import Machine
from tests.deploy.test_operations import block

SCRIPT = ROOT / "deploy/backup.sh"


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """Of a relay that was started once."""
    (tmp_path / "backups").mkdir()
    env = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "RELAY_DATA_DIR": str(tmp_path / "data"), "KEEP": "2"}
    subprocess.run([sys.executable, "-m", "relay", "keys", "list"], cwd=ROOT, env=env, check=True, capture_output=True)
    return env


def backup(folder: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", SCRIPT, folder / "backups"], cwd=ROOT, env=env, capture_output=True, text=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "backups").iterdir())


def test_the_last_ones_are_kept_and_what_others_made_too(tmp_path: Path, env: dict[str, str]) -> None:
    for name in ("nightly-20200101-030000.tar", "nightly-20200102-030000.tar", "before-abc.tar"):
        (tmp_path / "backups" / name).write_text("an older one")
    done = backup(tmp_path, env)
    assert done.returncode == 0, done.stderr
    before, older, new = names(tmp_path)
    assert (before, older) == ("before-abc.tar", "nightly-20200102-030000.tar")
    assert (tmp_path / "backups" / new).stat().st_mode & 0o777 == 0o600
    restored = {**env, "RELAY_DATA_DIR": str(tmp_path / "restored")}
    command = [sys.executable, "-m", "relay", "restore", str(tmp_path / "backups" / new)]
    subprocess.run(command, cwd=ROOT, env=restored, check=True, capture_output=True)
    assert (tmp_path / "restored/admin.key").read_text() == (tmp_path / "data/admin.key").read_text()


def test_one_that_fails_says_so_and_removes_nothing(tmp_path: Path, env: dict[str, str]) -> None:
    older = [f"nightly-2020010{day}-030000.tar" for day in range(1, 6)]
    for name in older:
        (tmp_path / "backups" / name).write_text("an older one")
    (tmp_path / "data/relay.db").unlink()
    done = backup(tmp_path, env)
    assert done.returncode != 0
    assert "no database" in done.stderr
    assert names(tmp_path) == older


@pytest.mark.parametrize("keep", ["0", "-1", "all"])
def test_it_does_not_keep_none(tmp_path: Path, env: dict[str, str], keep: str) -> None:
    done = backup(tmp_path, {**env, "KEEP": keep})
    assert (done.returncode, "whole number above 0" in done.stderr) == (2, True)
    assert names(tmp_path) == []


def test_in_a_container_one_is_made_a_day_and_a_failure_leaves_a_mark(tmp_path: Path, env: dict[str, str]) -> None:
    database = tmp_path / "data/relay.db"
    database.rename(tmp_path / "away.db")
    command = ["sh", str(SCRIPT), str(tmp_path / "backups"), "nightly"]
    process = subprocess.Popen(command, cwd=ROOT, env={**env, "LOOK_S": "0.2"}, stderr=subprocess.DEVNULL)
    try:
        until(lambda: names(tmp_path) == ["failed"])
        (tmp_path / "away.db").rename(database)
        until(lambda: "failed" not in names(tmp_path))
        time.sleep(1)
        assert len(names(tmp_path)) == 1, "the one of today is enough"
    finally:
        process.terminate()
        process.wait(10)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 40
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_installed_service_backs_up(machine: Machine) -> None:
    backups = machine.root / "var/backups/imfine"
    before = set(backups.iterdir())
    machine.sh(block("README.md", "systemctl start imfine-backup"))
    (new,) = set(backups.iterdir()) - before
    assert new.name.startswith("nightly-")
    new.unlink()  # other tests count them
    assert "enable imfine-backup.timer" in machine.asked()
