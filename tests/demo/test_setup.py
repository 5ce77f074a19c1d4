"""setup.sh in a folder of its own, with real venvs and real pip; packages are tiny wheels made here."""

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
BASE_PYTHON = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The set-up's files with requirements that install in a second; the path has a space in it."""
    folder = tmp_path / "a clone"
    for name in ("relay", "gpu_service", "demo"):
        (folder / name).mkdir(parents=True)
        (folder / name / "requirements.txt").write_text("")
    (folder / "relay" / "requirements-pictures.txt").write_text("")
    (folder / "demo" / "requirements.txt").write_text("tinymodel==1.0\n")
    (folder / "requirements.txt").write_text("-r relay/requirements.txt\ntorch==1.0\n")
    (folder / "requirements-dev.txt").write_text("-r requirements.txt\ntinytool==1.0\n")
    shutil.copy(ROOT / "setup.sh", folder)
    return folder


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in ("torch", "tinymodel", "tinytool"):
        info = f"{name}-1.0.dist-info"
        with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    return folder


def environment(**more: str) -> dict[str, str]:
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "SETUP_")) and k not in ("DATA", "PYTHON")
    }
    return clean | {"PIP_CONFIG_FILE": os.devnull, "PYTHON": str(BASE_PYTHON)} | more


def set_up(clone: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        ["sh", str(clone / "setup.sh"), *arguments],
        cwd=clone.parent,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stdout + done.stderr
    return done


def fails_with_one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def offline(wheels: Path) -> dict[str, str]:
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}


def fake_python(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_a_finished_set_up_is_believed_and_takes_no_time(clone: Path, wheels: Path) -> None:
    first = set_up(clone, "dev", **offline(wheels), HOME="")
    assert first.returncode == 0, first.stderr + (clone / "data" / "setup.log").read_text()
    for module in ("torch", "tinymodel", "tinytool"):
        assert subprocess.run([clone / ".venv/bin/python", "-c", f"import {module}"]).returncode == 0

    started = time.monotonic()
    for kind in ("dev", "run"):  # a set-up for tests serves a local run too
        again = set_up(clone, kind, PIP_NO_INDEX="1")
        assert (again.returncode, again.stdout) == (0, "")
    assert time.monotonic() - started < 3

    (clone / "requirements.txt").write_text("torch==1.0\ntinytool==2.0\n")
    assert "pip failed: ERROR: No matching distribution found for tinytool==2.0" in fails_with_one_line(
        set_up(clone, **offline(wheels))
    )
    (clone / "requirements.txt").write_text("torch==1.0\n")
    assert set_up(clone, PIP_NO_INDEX="1").returncode == 0  # what stood before still stands


def test_a_set_up_that_was_killed_starts_again_from_nothing(clone: Path, wheels: Path) -> None:
    cut_off = subprocess.Popen(
        ["sh", str(clone / "setup.sh")],
        env=environment(**offline(wheels)),
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    while not (clone / ".venv" / "changing").exists():
        assert cut_off.poll() is None
        time.sleep(0.01)
    os.killpg(cut_off.pid, signal.SIGKILL)
    cut_off.communicate()
    (clone / ".venv" / "left-over").write_text("")

    again = set_up(clone, **offline(wheels))
    assert again.returncode == 0, again.stderr
    assert "The last set-up was cut off: starting again." in again.stdout
    assert not (clone / ".venv" / "left-over").exists()


def test_two_set_ups_at_once_do_not_spoil_each_other(clone: Path) -> None:
    (clone / ".venv").mkdir()
    (clone / ".venv" / "changing").write_text(f"{os.getpid()}\n")
    assert f"another set-up is running (process {os.getpid()})" in fails_with_one_line(set_up(clone))
    assert (clone / ".venv" / "changing").exists()


def test_without_network_one_line_says_so_and_names_the_log(clone: Path) -> None:
    done = set_up(clone, PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_RETRIES="1")
    line = fails_with_one_line(done)
    assert "no network" in line
    assert "data/setup.log" in line
    assert "127.0.0.1" in (clone / "data" / "setup.log").read_text()
    assert not (clone / ".venv" / "ready-run").exists()


def test_the_torch_index_is_used_for_torch_alone(clone: Path, wheels: Path) -> None:
    set_up(clone, **offline(wheels), TORCH_INDEX="http://127.0.0.1:9/torch")
    commands = [line for line in (clone / "data" / "setup.log").read_text().splitlines() if line.startswith("---")]
    assert [("127.0.0.1:9/torch" in line) for line in commands] == [True, False, False]


def test_too_little_disk_says_what_is_needed_and_what_is_free(clone: Path) -> None:
    line = fails_with_one_line(set_up(clone, SETUP_NEED_MB="999999999"))
    assert "999999999 MB are needed" in line
    assert "MB are free" in line
    assert not (clone / ".venv").exists()


def test_an_old_python_is_named_with_what_to_install(clone: Path, tmp_path: Path) -> None:
    old = fake_python(tmp_path / "python3", 'case "$2" in *print*) echo 3.9.18 ;; *) exit 1 ;; esac')
    line = fails_with_one_line(set_up(clone, PYTHON=old))
    assert "Python 3.11 or newer is needed; found Python 3.9.18" in line
    assert "apt install python3" in line


def test_no_python_at_all_is_said(clone: Path) -> None:
    assert "found none that runs at /nowhere/python3" in fails_with_one_line(set_up(clone, PYTHON="/nowhere/python3"))


def test_a_python_without_the_venv_module_is_told_apart(clone: Path, tmp_path: Path) -> None:
    bare = fake_python(tmp_path / "python3", f'case "$2" in *ensurepip*) exit 1 ;; esac; exec "{BASE_PYTHON}" "$@"')
    assert "apt install python3-venv" in fails_with_one_line(set_up(clone, PYTHON=bare))


def test_a_shim_that_does_not_run_is_passed_over(clone: Path, wheels: Path, tmp_path: Path) -> None:
    shims = tmp_path / "shims"
    shims.mkdir()
    fake_python(shims / "python3", "echo 'no such version' >&2; exit 127")
    path = f"{shims}:{BASE_PYTHON.parent}:{os.environ['PATH']}"
    done = set_up(clone, **offline(wheels), PYTHON="", PATH=path)
    assert done.returncode == 0, done.stderr
    assert str(shims) not in done.stdout
