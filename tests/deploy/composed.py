"""compose.production.yaml on this machine: only docker is a double.

PostgreSQL and RabbitMQ are real and made as their images make them; what is ours runs as processes with the environment
that the file gives them; nginx is real.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx2

from tests.conftest import ROOT
from tests.deploy.front import Nginx
from tests.end_to_end.rabbit import Rabbit
from tests.end_to_end.stack import free_port
from tests.postgres import Postgres

RABBITMQ = "/usr/lib/rabbitmq/bin"
SUDO = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift 2; done # -u NAME
exec "$@"
"""


class Composed:
    def __init__(self, root: Path) -> None:
        self.root, self.deploy = root, root / "deploy"
        shutil.copytree(ROOT / "deploy", self.deploy, ignore=shutil.ignore_patterns("secrets", ".env"))
        for folder in ("bin", "data", "backups"):
            (root / folder).mkdir()
        for name, text in (
            ("docker", f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/tests/doubles/docker.py" "$@"\n'),
            ("sudo", SUDO),
        ):
            (root / "bin" / name).write_text(text)
            (root / "bin" / name).chmod(0o755)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RELAY_", "PG", "RABBITMQ_"))}
        self.env = kept | {
            "PATH": f"{root}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "DOUBLE_ROOT": str(root),
        }
        self.postgres = Postgres(port=free_port())
        self.rabbit: Rabbit | None = None
        self.ports = {name: free_port() for name in ("relay-1", "relay-2", "flower")}
        relays = [f"http://127.0.0.1:{self.ports[name]}" for name in ("relay-1", "relay-2")]
        self.nginx = Nginx(root / "nginx", relays, FLOWER=f"127.0.0.1:{self.ports['flower']}")

    def start(self, *, secrets: str, up: str) -> None:
        """By the commands of the documents."""
        self.sh(secrets)
        self.postgres.start()
        self.env |= {"PGHOST": str(self.postgres.folder), "PGPORT": str(self.postgres.port), "PGUSER": "postgres"}
        init = ["psql", "-q", "-v", "ON_ERROR_STOP=1", "--no-psqlrc", "-d", "postgres", "-f", "postgres/init.sql"]
        made = {"POSTGRES_PASSWORD": self.secret("database", "POSTGRES_PASSWORD")}
        subprocess.run(init, cwd=self.deploy, env=self.env | made, check=True)
        self.rabbit = Rabbit(
            self.root / "rabbit",
            RABBITMQ_DEFAULT_USER="imfine",
            RABBITMQ_DEFAULT_PASS=self.secret("broker", "RABBITMQ_DEFAULT_PASS"),
        )
        self.rabbit.start()
        self.env |= self.rabbit.env | {"PATH": f"{RABBITMQ}:{self.env['PATH']}"}
        self._name_places()
        self.sh(up)

    def _name_places(self) -> None:
        assert self.rabbit
        loopback = {"RELAY_HOST": "127.0.0.1", "RELAY_TRUSTED_PROXIES": "127.0.0.1"}
        ports = {name: {"RELAY_PORT": str(self.ports[name])} | loopback for name in ("relay-1", "relay-2")}
        code = self.root / "code"  # as the image has it
        code.mkdir()
        for name in ("relay", "web", *(path.name for path in ROOT.glob("*.py"))):
            (code / name).symlink_to(ROOT / name)
        (code / "deploy").symlink_to(self.deploy)
        places = {
            "code": str(code),
            "replace": {
                "postgres:5432": f"127.0.0.1:{self.postgres.port}",
                "rabbitmq:5672": f"127.0.0.1:{self.rabbit.port}",
                "127.0.0.1:5555": f"127.0.0.1:{self.ports['flower']}",
                "127.0.0.1:8000": f"127.0.0.1:{self.ports['relay-1']}",
                "relay-1:8000": f"127.0.0.1:{self.ports['relay-1']}",
                "relay-2:8000": f"127.0.0.1:{self.ports['relay-2']}",
                "/data/": f"{self.root}/data/",
                "/backups": f"{self.root}/backups",
            },
            "services": {**ports, "flower": loopback, "backup": {"PYTHON": sys.executable}},
            "more": {"flower": ["--port", str(self.ports["flower"])]},
        }
        (self.root / "places.json").write_text(json.dumps(places))

    def sh(self, script: str) -> str:
        """As a person in the folder deploy would."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            env=self.env,
            cwd=self.deploy,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}\n{self.log('relay-1')}"
        return done.stdout

    def secret(self, file: str, name: str) -> str:
        lines = (self.deploy / f"secrets/{file}.env").read_text().splitlines()
        (value,) = (line.removeprefix(f"{name}=") for line in lines if line.startswith(f"{name}="))
        return value

    def log(self, name: str) -> str:
        file = self.root / f"{name}.log"
        return file.read_text(errors="replace")[-3000:] if file.exists() else ""

    def until_ready(self) -> None:
        for name in ("relay-1", "relay-2"):
            self.until_answers(name, "/readyz")

    def until_answers(self, name: str, path: str) -> None:
        """A relay, or Flower, which answers 401."""
        deadline = time.monotonic() + 90
        while not self._answers(f"http://127.0.0.1:{self.ports[name]}{path}"):
            assert time.monotonic() < deadline, self.log(name)
            time.sleep(0.1)

    def _answers(self, url: str) -> bool:
        try:
            return httpx2.get(url, trust_env=False).status_code in (200, 401)
        except httpx2.TransportError:
            return False

    def close(self) -> None:
        if (self.root / "places.json").exists():
            subprocess.run([self.root / "bin/docker", "compose", "close"], env=self.env, cwd=self.deploy, check=False)
        if self.rabbit:
            self.rabbit.close()
        self.postgres.close()
