"""What deploy/ ships besides nginx.conf, read by the tools that it is for, or held against the code's own settings."""

import getpass
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml

from relay.safety import check_safe
from relay.settings import SETTINGS, from_env
from tests.conftest import ROOT
from tests.deploy.conftest import program
from tests.deploy.front import DOMAIN, Nginx

DEPLOY = ROOT / "deploy"
SECRETS = ROOT / "docs/operations/secrets.md"
OPEN = ("RELAY_INTERNAL_URL",)
SCRIPTS = [*DEPLOY.rglob("*.sh"), DEPLOY / "imfine", ROOT / ".ci/run"]


def test_shellcheck_has_nothing_to_say() -> None:
    done = subprocess.run([program("shellcheck"), *map(str, SCRIPTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    others = [str(ROOT / "setup.sh"), str(ROOT / "web/build.sh")]
    done = subprocess.run([program("shellcheck"), "--severity=warning", *others], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --- systemd ---


@pytest.mark.parametrize("name", ["imfine-relay", "imfine-backup"])
def test_systemd_takes_the_unit_and_finds_it_closed(tmp_path: Path, name: str) -> None:
    analyze = program("systemd-analyze")
    text = (DEPLOY / f"systemd/{name}.service").read_text()
    text = text.replace("/opt/imfine/current/.venv/bin/python", "/bin/sh")  # what is run must exist
    unit = tmp_path / f"{name}.service"
    unit.write_text(text)
    done = subprocess.run([analyze, "verify", "--man=no", str(unit)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    safety = [analyze, "security", "--offline=true", "--threshold=25", str(unit)]  # of 100
    done = subprocess.run(safety, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_systemd_takes_the_timer_of_the_backup(tmp_path: Path) -> None:
    for name in ("imfine-backup.timer", "imfine-backup.service"):
        shutil.copy(DEPLOY / "systemd" / name, tmp_path)
    command = [program("systemd-analyze"), "verify", "--man=no", str(tmp_path / "imfine-backup.timer")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_setting_that_a_file_names_exists() -> None:
    known = {setting.name for setting in SETTINGS}
    for path in (p for p in DEPLOY.rglob("*") if p.is_file()):
        named = set(re.findall(r"RELAY_[A-Z_]*[A-Z]\b", path.read_text()))
        assert named <= known, path


# --- compose ---


COMPOSED = ["compose.yaml", "compose.production.yaml"]


def composed(name: str) -> dict[str, Any]:
    text = (DEPLOY / name).read_text()
    filled = re.sub(r"\$\{(\w+):-([^}]*)\}", r"\2", text)
    found = yaml.safe_load(re.sub(r"\$\{(\w+):\?[^}]*\}", r"the-\1", filled))
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("name", COMPOSED)
def test_compose_takes_its_file(tmp_path: Path, name: str) -> None:
    """By the specification's schema, by podman-compose, and by docker itself where that is installed."""
    schema = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*schema, str(DEPLOY / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    folder, podman = tmp_path / "deploy", tmp_path / "podman"
    shutil.copytree(DEPLOY, folder, ignore=shutil.ignore_patterns("secrets", ".env"))
    secrets = ["sh", str(folder / "secrets.sh"), str(folder / "secrets/relay.env"), "/data/relay", "production"]
    subprocess.run(secrets, check=True)
    podman.write_text("#!/bin/sh\necho podman version 5.0.0\n")  # nothing more is asked of it
    podman.chmod(0o755)
    tools = [[sys.executable, "-m", "podman_compose", "--podman-path", str(podman)]]
    docker = shutil.which("docker")
    if docker and subprocess.run([docker, "compose", "version"], capture_output=True).returncode == 0:
        tools.append([docker, "compose"])
    for tool in tools:
        command = [*tool, "-f", str(folder / name), "config"]
        env = {"PATH": os.environ["PATH"], "DOMAIN": "fine.example", "EMAIL": "somebody@example.com"}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert yaml.safe_load(done.stdout)["services"]["nginx"]["environment"]["DOMAIN"] == "fine.example"
        done = subprocess.run(command, env={**env, "DOMAIN": ""}, capture_output=True, text=True)
        assert "the name that people type" in done.stderr


@pytest.mark.parametrize("name", COMPOSED)
def test_the_composed_relays_are_such_that_start_and_trust_nginx_alone(name: str) -> None:
    services = composed(name)["services"]
    nginx, relays = services["nginx"], {s: v for s, v in services.items() if re.fullmatch(r"relay(-\d)?", s)}
    assert len(relays) == (1 if name == "compose.yaml" else 2)
    for service in (*relays.values(), *([services["flower"]] if "flower" in services else [])):
        settings = from_env({key: str(value) for key, value in service["environment"].items() if key[:5] == "RELAY"})
        check_safe(settings)
        (trusted,) = settings.trusted_proxies
        assert str(trusted.network_address) == nginx["networks"]["inside"]["ipv4_address"]
    places = [f"{relay['networks']['inside']['ipv4_address']}:8000" for relay in relays.values()]
    assert nginx["environment"]["RELAYS"] == " ".join(places)
    assert [s for s, service in services.items() if "ports" in service] == ["nginx"]
    assert nginx["ports"] == ["80:80", "443:443"]


@pytest.mark.parametrize("name", COMPOSED)
def test_addresses_that_are_given_are_never_given_to_others(name: str) -> None:
    found = composed(name)
    (pool,) = found["networks"]["inside"]["ipam"]["config"]
    subnet, others = ip_network(pool["subnet"]), ip_network(pool["ip_range"])
    given = [v["networks"]["inside"] for v in found["services"].values() if isinstance(v["networks"], dict)]
    addresses = [ip_address(pool["gateway"]), *(ip_address(place["ipv4_address"]) for place in given)]
    assert len(set(addresses)) == len(addresses)
    assert all(address in subnet and address not in others for address in addresses)


@pytest.mark.parametrize("name", COMPOSED)
def test_files_that_are_mounted_exist_and_volumes_are_declared(name: str) -> None:
    found = composed(name)
    for service in found["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in found["volumes"], volume
        if "build" in service:
            assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).exists()


@pytest.mark.parametrize("name", COMPOSED)
def test_nothing_composed_has_a_secret_of_its_own(name: str) -> None:
    for service in composed(name)["services"].values():
        assert not [
            key for key in service.get("environment", {}) if re.search("KEY|TOKEN|PASS|_URL", key) if key not in OPEN
        ]
    assert {"deploy/secrets/", "deploy/.env"} <= set((ROOT / ".gitignore").read_text().splitlines())


def test_in_production_each_service_is_bounded_closed_and_watched() -> None:
    services = composed("compose.production.yaml")["services"]
    for name, service in services.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert "mem_limit" in service, name
        assert "healthcheck" in service or name == "certbot"  # nginx goes on without it for weeks
        assert re.search(r":.*\d", service["image"]) or "build" in service, "a version is named"
        for other, how in dict(
            service.get("depends_on") if isinstance(service.get("depends_on"), dict) else {}
        ).items():
            assert how == {"condition": "service_healthy"}
            assert "healthcheck" in services[other]


def test_the_images_pg_dump_is_of_the_servers_version() -> None:
    image = composed("compose.production.yaml")["services"]["postgres"]["image"]
    version, debian = re.fullmatch(r"postgres:(\d+)-(\w+)", image).groups()  # type: ignore[union-attr]
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert f"postgresql-client-{version} " in dockerfile
    assert f"-slim-{debian}\n" in dockerfile


def test_the_image_holds_all_that_the_relay_imports(tmp_path: Path) -> None:
    last = (DEPLOY / "Dockerfile").read_text().replace("\\\n", "").split("\nFROM ")[-1]
    for line in re.findall(r"^COPY (?!--from)(.+)$", last, re.MULTILINE):
        *sources, target = line.split()
        for source in sources:
            into = target.endswith("/")
            place = tmp_path / target / Path(source).name if into else tmp_path / target
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, place)
    command = [sys.executable, "-c", "import relay.__main__, relay.migrate, relay.peft_import"]
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- scripts ---


def test_in_containers_certbot_gets_and_renews_the_certificate_and_nginx_takes_it_up(tmp_path: Path) -> None:
    """certbot is a double, which asks nginx for the proof; the folders /deploy and /etc are the test's."""
    deploy, folder = tmp_path / "deploy", tmp_path / "n"
    shutil.copytree(DEPLOY, deploy, ignore=shutil.ignore_patterns("secrets", ".env"))
    script = (deploy / "certbot.sh").read_text()
    (deploy / "certbot.sh").write_text(script.replace("/deploy/", f"{deploy}/"))
    nginx = Nginx(folder, ["http://127.0.0.1:1"])
    for file in (folder / "tls").iterdir():
        file.unlink()
    (tmp_path / "bin").mkdir()
    certbot = tmp_path / "bin/certbot"
    certbot.write_text(  # the name leads here at the second attempt only
        f'#!/bin/sh\n[ "$1" = renew ] || [ -e "{tmp_path}/tried" ] || {{ touch "{tmp_path}/tried"; exit 1; }}\n'
        f'exec "{sys.executable}" "{ROOT}/tests/doubles/certbot.py" "$@"\n'
    )
    certbot.chmod(0o755)
    env = {**nginx.env, "NGINX_CONF": str(nginx.conf), "NGINX_USER": "root", "LOOK_S": "0.1", "EMAIL": "you@localhost"}
    env |= {"LIVE": f"{tmp_path}/etc/letsencrypt/live/imfine", "AGAIN_S": "0.1"}
    env |= {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "DOUBLE_ROOT": str(tmp_path)}
    served = folder / "tls/fullchain.pem"

    def seen() -> str:
        return ssl.get_server_certificate((DOMAIN, nginx.https_port), timeout=5)

    def until_new(old: str) -> str:
        deadline = time.monotonic() + 20
        while (now := answered(seen)) == old or now != served.read_text():
            assert time.monotonic() < deadline
        return now

    (renewal,) = re.findall(r"`docker compose exec -T certbot (certbot renew .+?)`", SECRETS.read_text())
    processes = [subprocess.Popen(["sh", deploy / "nginx/serve.sh"], env=env)]
    try:
        own = answered(seen)  # nginx's own, until there is a better one
        processes.append(subprocess.Popen(["sh", deploy / "certbot.sh"], env=env))
        first = until_new(own)
        subprocess.run(["sh", "-c", renewal], env=env, check=True)
        second = until_new(first)
        served.write_text(own)  # as when the volume was lost, or the power in the middle
        until_new(own)
        assert served.read_text() == second
    finally:
        for process in reversed(processes):
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


def test_a_certificate_whose_key_is_anothers_is_replaced_and_a_good_pair_stays(tmp_path: Path) -> None:
    def first() -> tuple[str, str]:
        subprocess.run(
            ["sh", DEPLOY / "certificate.sh", "first", DOMAIN], env={**os.environ, "TLS_DIR": str(tmp_path)}, check=True
        )
        return (tmp_path / "fullchain.pem").read_text(), (tmp_path / "privkey.pem").read_text()

    made = first()
    assert first() == made
    (tmp_path / "fullchain.pem").unlink()
    other = first()
    assert other[1] != made[1]
    (tmp_path / "privkey.pem").write_text(made[1])
    assert first() not in (made, other)


def test_settings_are_data_to_the_command_too(tmp_path: Path) -> None:
    """`imfine`, with its places in a folder here and a program that shows its environment."""
    python = tmp_path / "current/.venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nenv\n")
    python.chmod(0o755)
    url = "postgresql+asyncpg://a:$(touch x)`id`;b@h/d?ssl=require&x='y'"
    lines = f"# a comment\n\nRELAY_DATABASE_URL={url}\nRELAY_LOG_LEVEL=\"info\"\nRELAY_ADMIN_KEY='two words'"
    (tmp_path / "relay.env").write_text(lines)
    script = (DEPLOY / "imfine").read_text().replace("user=imfine", f"user={getpass.getuser()}")
    script = script.replace("/opt/imfine", str(tmp_path)).replace("/etc/imfine", str(tmp_path))
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    told = dict(line.split("=", 1) for line in done.stdout.splitlines() if line.startswith("RELAY_"))
    assert told == {"RELAY_DATABASE_URL": url, "RELAY_LOG_LEVEL": "info", "RELAY_ADMIN_KEY": "two words"}
    assert not (tmp_path / "current/x").exists()


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
    assert "database.env is not there" in make("database-password").stderr


def test_the_secrets_of_production_belong_together_and_are_made_once(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    command = ["sh", str(DEPLOY / "secrets.sh"), str(folder / "relay.env"), "/data/relay", "production"]

    def make() -> dict[str, str]:
        subprocess.run(command, check=True)
        assert all(file.stat().st_mode & 0o777 == 0o600 for file in folder.iterdir())
        lines = [line for file in sorted(folder.iterdir()) for line in file.read_text().splitlines()]
        return dict(line.split("=", 1) for line in lines)

    made = make()
    assert make() == made
    check_safe(from_env(made))
    secrets = [made[name] for name in ("POSTGRES_PASSWORD", "RABBITMQ_DEFAULT_PASS", "RELAY_FLOWER_PASSWORD")]
    assert len({*secrets, made["RELAY_METRICS_TOKEN"]}) == 4
    assert all(len(secret) >= 40 for secret in secrets)
    assert f":{secrets[0]}@postgres" in made["RELAY_DATABASE_URL"]
    assert f":{secrets[1]}@rabbitmq" in made["RELAY_BROKER_URL"]
    assert "RELAY_DATABASE_URL" not in (folder / "flower.env").read_text()
    (folder / "relay.env").unlink()  # as if it was cut off before
    assert make() == made | {"RELAY_METRICS_TOKEN": make()["RELAY_METRICS_TOKEN"]}


def test_the_machines_first_script_is_small_and_asks_for_what_it_needs() -> None:
    script = DEPLOY / "ec2/user-data.sh"
    assert script.stat().st_size < 16_000  # EC2's limit is 16 KB
    done = subprocess.run(["bash", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "DOMAIN is empty" in done.stderr
