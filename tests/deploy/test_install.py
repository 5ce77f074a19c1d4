"""deploy/install.sh: from nothing to a relay behind https, again without a change, and to another version."""

import shutil
import stat
import subprocess
from pathlib import Path

from tests.conftest import ROOT
from tests.deploy.machine import Machine


def test_it_answers_by_https_with_the_certificate_that_was_fetched(machine: Machine) -> None:
    assert machine.get("/readyz").json()["status"] == "ready"
    assert machine.get("/v1/models", machine.secret("admin.key")).status_code == 200
    fetched = (machine.root / "etc/letsencrypt/live/imfine/fullchain.pem").read_bytes()
    assert (machine.etc / "tls/fullchain.pem").read_bytes() == fetched


def test_secrets_are_its_own_and_for_their_owner_only(machine: Machine) -> None:
    for path in (
        machine.etc / "relay.env",
        machine.data / "admin.key",
        machine.data / "enrol.token",
        machine.etc / "tls/privkey.pem",
    ):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE(machine.data.stat().st_mode) == 0o700
    env = (machine.etc / "relay.env").read_text()
    token = env.split("RELAY_METRICS_TOKEN=")[1].split()[0]
    assert len(token) >= 40
    assert machine.get("/metrics", token).status_code == 200


def test_again_it_changes_nothing(machine: Machine) -> None:
    before, secret, asked = machine.files(), machine.secret("admin.key"), machine.asked()
    machine.install()
    assert machine.files() == before
    assert not [line for line in machine.asked()[len(asked) :] if line.startswith(("restart", "stop", "reload"))]
    assert machine.secret("admin.key") == secret
    assert not list((machine.root / "var/backups/imfine").iterdir())


def test_again_it_puts_the_certificate_back_where_that_was_lost(machine: Machine) -> None:
    fetched = (machine.etc / "tls/fullchain.pem").read_bytes()
    for file in (machine.etc / "tls").iterdir():
        file.unlink()
    machine.install()
    assert (machine.etc / "tls/fullchain.pem").read_bytes() == fetched


def test_another_version_comes_after_a_backup_and_keeps_everything(machine: Machine, tmp_path: Path) -> None:
    before, key = (machine.root / "opt/imfine/current").resolve(), machine.secret("admin.key")
    source = tmp_path / "later"
    for name in ("relay", "deploy", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.py"), *(ROOT / name for name in ("README.md", "LICENSE", "NOTICE"))]:
        shutil.copy(path, source)
    (source / "README.md").write_text("A later version.")
    machine.install(source)
    after = (machine.root / "opt/imfine/current").resolve()
    assert after != before
    assert (after / "README.md").read_text() == "A later version."
    assert machine.get("/v1/models", key).status_code == 200
    (backup,) = (machine.root / "var/backups/imfine").iterdir()
    assert stat.S_IMODE(backup.stat().st_mode) == 0o600


def test_what_is_missing_is_said_before_anything_is_done(tmp_path: Path) -> None:
    command = ["sh", str(ROOT / "deploy/install.sh"), "fine.example"]
    done = subprocess.run(command, env={"PATH": "/usr/bin:/bin", "ROOT": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "DOMAIN EMAIL" in done.stderr
    assert not list(tmp_path.iterdir())
