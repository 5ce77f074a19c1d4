"""The commands of docs/operations, as they stand there, on a machine that was installed."""

import re
import subprocess
from pathlib import Path

import pytest

from gpu_service import settings as gpu_settings
from relay.settings import SETTINGS
from tests.conftest import ROOT
from tests.deploy.machine import Machine

DOCS = ROOT / "docs/operations"
INDENT = 3  # of a block within a numbered step


def block(name: str, having: str) -> str:
    """The one block of commands that has these words."""
    found: list[str] = re.findall(r"^ *```sh\n(.*?)^ *```$", (DOCS / name).read_text(), re.MULTILINE | re.DOTALL)
    (one,) = {part.replace("\n" + INDENT * " ", "\n").strip() for part in found if having in part}
    return one


def ids(said: str) -> str:
    """What a `create` has made."""
    return next(line.split()[0].rstrip(",") for line in said.splitlines() if "shown this once" in line)


def status(machine: Machine, key: str) -> int:
    return machine.get("/v1/models", key).status_code


def test_the_install_command_is_the_one_that_is_tested() -> None:
    written = "sudo sh deploy/install.sh fine.example you@fine.example"
    assert block("install.md", "install.sh") == written  # installing and upgrading alike


def test_every_secret_has_its_line_in_the_table(tmp_path: Path) -> None:
    command = ["sh", str(ROOT / "deploy/secrets.sh"), str(tmp_path / "relay.env"), "/data/relay", "production"]
    subprocess.run(command, check=True)
    made = {line.split("=")[0] for file in tmp_path.iterdir() for line in file.read_text().splitlines()}
    of_gpus = {name for name in gpu_settings.TABLE if re.search("KEY|TOKEN", name)} - {"GPU_ENROL_TOKEN"}  # the relay's
    secrets = {setting.name for setting in SETTINGS if setting.is_secret} | (made - {"RELAY_DATA_DIR"}) | of_gpus
    rows = re.findall(r"^\| (.+?) \|", (DOCS / "secrets.md").read_text(), re.MULTILINE)
    told = {name for row in rows for name in re.findall(r"`([A-Z0-9_]+)`", row)}
    assert told == secrets


def test_the_relays_own_secrets_are_changed(machine: Machine) -> None:
    names = ("admin.key", "enrol.token")
    before, settings = {name: machine.secret(name) for name in names}, (machine.etc / "relay.env").read_text()
    machine.sh(block("secrets.md", "/etc/imfine/relay.env"))
    machine.until_ready()
    after = {name: machine.secret(name) for name in names}
    assert all(before[name] != after[name] for name in names)
    assert (status(machine, before["admin.key"]), status(machine, after["admin.key"])) == (401, 200)
    token = re.compile(r"RELAY_METRICS_TOKEN=(\S+)")
    (old,), (new,) = token.findall(settings), token.findall((machine.etc / "relay.env").read_text())
    assert (machine.get("/metrics", old).status_code, machine.get("/metrics", new).status_code) == (401, 200)


@pytest.mark.long  # each command is a Python that starts
@pytest.mark.parametrize("what", ["keys", "tokens"])
def test_keys_of_people_and_tokens_of_gpus_are_made_and_revoked(machine: Machine, what: str) -> None:
    *before, create, revoke = block("secrets.md", f"{what} revoke").splitlines()
    for line in before:
        machine.sh(line)
    said = machine.sh(create.replace("NAME", "dana"))
    assert what == "tokens" or status(machine, said.split()[-1]) == 200
    machine.sh(revoke.replace("ID", ids(said)))
    assert what == "tokens" or status(machine, said.split()[-1]) == 401


def test_the_certificates_key_is_changed_and_served(machine: Machine) -> None:
    key = (machine.etc / "tls/privkey.pem").read_bytes()
    machine.sh(block("secrets.md", "certbot renew"))
    machine.until_certified()
    assert (machine.etc / "tls/privkey.pem").read_bytes() != key
    assert machine.get("/readyz").status_code == 200


@pytest.mark.long
def test_a_backup_is_restored(machine: Machine) -> None:
    admin = machine.secret("admin.key")
    machine.sh(block("install.md", "imfine backup"))
    (machine.data / "admin.key").unlink()
    machine.sh(block("install.md", "imfine restore"))
    machine.until_ready()
    assert machine.secret("admin.key") == admin
    assert status(machine, admin) == 200
