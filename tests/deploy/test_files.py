"""What deploy/ ships besides nginx.conf, read by the tools that it is for, or held against the code's own settings."""

import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from relay.settings import SETTINGS, check_safe, from_env
from tests.conftest import ROOT
from tests.deploy.conftest import program
from tests.deploy.front import DOMAIN, Nginx, certificate

DEPLOY = ROOT / "deploy"
SCRIPTS = [*DEPLOY.rglob("*.sh"), DEPLOY / "imfine", ROOT / ".ci/run"]


def test_shellcheck_has_nothing_to_say() -> None:
    done = subprocess.run([program("shellcheck"), *map(str, SCRIPTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    others = [str(ROOT / "setup.sh"), str(ROOT / "web/build.sh")]
    done = subprocess.run([program("shellcheck"), "--severity=warning", *others], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --- systemd ---


def test_systemd_takes_the_unit_and_finds_it_closed(tmp_path: Path) -> None:
    analyze = program("systemd-analyze")
    text = (DEPLOY / "systemd/imfine-relay.service").read_text()
    text = text.replace("/opt/imfine/current/.venv/bin/python", "/bin/sh")  # what is run must exist
    unit = tmp_path / "imfine-relay.service"
    unit.write_text(text)
    done = subprocess.run([analyze, "verify", "--man=no", str(unit)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    safety = [analyze, "security", "--offline=true", "--threshold=25", str(unit)]  # of 100
    done = subprocess.run(safety, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_setting_that_a_file_names_exists() -> None:
    known = {setting.name for setting in SETTINGS}
    for path in (p for p in DEPLOY.rglob("*") if p.is_file()):
        named = set(re.findall(r"RELAY_[A-Z_]*[A-Z]\b", path.read_text()))
        assert named <= known, path


# --- compose ---


@pytest.fixture
def composed() -> dict[str, Any]:
    text = (DEPLOY / "compose.yaml").read_text()
    filled = re.sub(r"\$\{(\w+):-([^}]*)\}", r"\2", text)
    found = yaml.safe_load(re.sub(r"\$\{(\w+):\?[^}]*\}", r"the-\1", filled))
    assert isinstance(found, dict)
    return found


def test_compose_takes_its_file(tmp_path: Path) -> None:
    docker = shutil.which("docker")
    if not docker or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("docker compose is not installed")
    folder = tmp_path / "deploy"
    shutil.copytree(DEPLOY, folder)
    env = {"PATH": os.environ["PATH"], "DOMAIN": DOMAIN, "EMAIL": "somebody@example.com"}
    subprocess.run(["sh", folder / "secrets.sh", folder / "secrets/relay.env", "/data/relay"], check=True)
    command = [docker, "compose", "-f", str(folder / "compose.yaml"), "config", "--quiet"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_composed_relay_is_one_that_starts_and_trusts_nginx_alone(composed: dict[str, Any]) -> None:
    relay, nginx = composed["services"]["relay"], composed["services"]["nginx"]
    settings = from_env({name: str(value) for name, value in relay["environment"].items()})
    check_safe(settings)
    (trusted,) = settings.trusted_proxies
    address = nginx["networks"]["inside"]["ipv4_address"]
    assert str(trusted.network_address) == address
    assert nginx["environment"]["RELAYS"] == f"{relay['networks']['inside']['ipv4_address']}:{settings.port}"
    assert "ports" not in relay
    assert [s for s, service in composed["services"].items() if "ports" in service] == ["nginx"]


def test_files_that_are_mounted_exist_and_volumes_are_declared(composed: dict[str, Any]) -> None:
    for service in composed["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in composed["volumes"], volume
        if "build" in service:
            assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).exists()


def test_nothing_composed_has_a_secret_of_its_own(composed: dict[str, Any]) -> None:
    for service in composed["services"].values():
        assert not [name for name in service.get("environment", {}) if re.search("KEY|TOKEN|PASSWORD", name)]
    assert "deploy/secrets/" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_image_holds_all_that_the_relay_imports(tmp_path: Path) -> None:
    last = (DEPLOY / "Dockerfile").read_text().split("\nFROM ")[-1]
    for line in re.findall(r"^COPY (?!--from)(.+)$", last, re.MULTILINE):
        *sources, target = line.split()
        for source in sources:
            place = tmp_path / target if target != "./" else tmp_path / source
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, place)
    command = [sys.executable, "-c", "import relay.__main__, relay.migrate, relay.peft_import"]
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- scripts ---


def test_in_a_container_nginx_takes_up_a_renewed_certificate(tmp_path: Path) -> None:
    nginx = Nginx(tmp_path / "n", ["http://127.0.0.1:1"])
    for file in (tmp_path / "n/tls").iterdir():
        file.unlink()
    env = {**nginx.env, "NGINX_CONF": str(nginx.conf), "NGINX_USER": "root", "LOOK_S": "0.1"}
    served = tmp_path / "n/tls/fullchain.pem"

    def seen() -> str:
        return ssl.get_server_certificate((DOMAIN, nginx.https_port), timeout=5)

    process = subprocess.Popen(["sh", DEPLOY / "nginx/serve.sh"], env=env)
    try:
        first = answered(seen)
        assert first == served.read_text()
        renewed = certificate(tmp_path / "renewed")
        hook = {**env, "RENEWED_LINEAGE": str(renewed.parent), "RELOAD": "true"}
        subprocess.run(["sh", DEPLOY / "certificate.sh"], env=hook, check=True)
        deadline = time.monotonic() + 10
        while answered(seen) != renewed.read_text():
            assert time.monotonic() < deadline
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(10)


def answered(seen: Callable[[], str]) -> str:
    deadline = time.monotonic() + 10
    while True:
        try:
            return seen()
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_secrets_are_made_once_and_anew_one_by_one(tmp_path: Path) -> None:
    file, data = tmp_path / "relay.env", tmp_path / "data"
    data.mkdir()

    def make(*what: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["sh", DEPLOY / "secrets.sh", file, data, *what], capture_output=True, text=True)

    assert make().returncode == 0
    first = file.read_text()
    assert make().returncode == 0
    assert file.read_text() == first
    assert file.stat().st_mode & 0o777 == 0o600
    assert make("metrics-token").returncode == 0
    assert file.read_text() != first
    assert from_env(dict(line.split("=", 1) for line in file.read_text().splitlines())).data_dir == data
    (data / "admin.key").write_text("x")
    assert make("admin-key").returncode == 0
    assert not (data / "admin.key").exists()
    file.write_text(file.read_text() + "RELAY_ADMIN_KEY=sk-fine-set-by-hand\n")
    assert "take that line out" in make("admin-key").stderr
    assert "there is no password" in make("password").stderr


def test_the_machines_first_script_is_small_and_asks_for_what_it_needs() -> None:
    script = DEPLOY / "ec2/user-data.sh"
    assert script.stat().st_size < 16_000  # EC2's limit is 16 KB
    done = subprocess.run(["bash", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "DOMAIN is empty" in done.stderr
