"""A machine in a folder: install.sh as it is, real nginx, a real relay; systemd and Let's Encrypt are doubles."""

import os
import ssl
import stat
import subprocess
import sys
import time
from pathlib import Path

import httpx2

from tests.conftest import ROOT
from tests.deploy.front import DOMAIN
from tests.end_to_end.stack import free_port

SUDO = '#!/bin/sh\nexec "$@"\n'


class Machine:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.relay_port, self.http_port, self.https_port = free_port(), free_port(), free_port()
        self.url = f"https://{DOMAIN}:{self.https_port}"
        self.data, self.etc = root / "var/lib/imfine/data", root / "etc/imfine"
        user = subprocess.run(["id", "-un"], check=True, capture_output=True, text=True).stdout.strip()
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RELAY_")}
        self.env = kept | {
            "PATH": f"{root}/bin:{root}/usr/local/bin:{os.environ['PATH']}",
            "ROOT": str(root),
            "DOUBLE_ROOT": str(root),
            "VENV": str(Path(sys.prefix)),
            "SERVICE_USER": user,
            "WEB_USER": user,
            "ADDRESSES": "127.0.0.1",
            "HTTP_PORT": str(self.http_port),
            "HTTPS_PORT": str(self.https_port),
            "STATE": str(root / "var/lib/nginx"),
            "PID": str(root / "run/nginx.pid"),
            "ERROR_LOG": str(root / "var/log/nginx.log"),
            "TLS_DIR": str(self.etc / "tls"),
        }
        for folder in ("bin", "run", "var/lib/nginx", "var/log"):
            (root / folder).mkdir(parents=True)
        for name in ("systemctl", "certbot"):
            self._program(name, f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/tests/doubles/{name}.py" "$@"\n')
        self._program("sudo", SUDO)
        self.etc.mkdir(parents=True)
        (self.etc / "relay.env").write_text(f'RELAY_PORT="{self.relay_port}"\n')

    def _program(self, name: str, text: str) -> None:
        path = self.root / "bin" / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def install(self, source: Path = ROOT) -> str:
        said = self.sh(f"sh {source}/deploy/install.sh {DOMAIN} somebody@{DOMAIN}")
        self.until_certified()
        return said

    def sh(self, script: str, given: str = "") -> str:
        """As a person at the machine would. Its places are in a folder here, so the script's are too."""
        for path in ("/opt/imfine", "/etc/imfine", "/var/lib/imfine", "/var/backups/imfine"):
            script = script.replace(f" {path}", f" {self.root}{path}")
        done = subprocess.run(
            ["bash", "-euc", script],
            env=self.env,
            cwd=self.root,
            input=given,
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}\n{self.log()}"
        return done.stdout

    def log(self) -> str:
        file = self.root / "run/imfine-relay.service.log"
        return file.read_text()[-2000:] if file.exists() else ""

    def asked(self) -> list[str]:
        """Of systemd."""
        return (self.root / "run/asked").read_text().splitlines()

    def close(self) -> None:
        subprocess.run([self.root / "bin/systemctl", "close"], env=self.env, check=True)

    def until_ready(self) -> None:
        deadline = time.monotonic() + 30
        while self.get("/readyz").status_code != 200:
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)

    # --- asking it, by its certificate alone ---

    def until_certified(self) -> None:
        """A reload takes a moment: for a while old workers of nginx accept connections beside the new."""
        deadline = time.monotonic() + 20
        while self._served() != (self.etc / "tls/fullchain.pem").read_text() or self._workers() > (os.cpu_count() or 1):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def _workers(self) -> int:
        pid = (self.root / "run/nginx.pid").read_text().strip()
        return len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())

    def _served(self) -> str:
        return ssl.get_server_certificate((DOMAIN, self.https_port), timeout=10)

    def secret(self, name: str) -> str:
        return (self.data / name).read_text().strip()

    def get(self, path: str, key: str = "") -> httpx2.Response:
        context = ssl.create_default_context(cafile=str(self.etc / "tls/fullchain.pem"))
        headers = {"authorization": f"Bearer {key}"} if key else {}
        with httpx2.Client(base_url=self.url, verify=context, trust_env=False, timeout=20) as client:
            return client.get(path, headers=headers)

    def files(self) -> dict[str, bytes]:
        """All that was installed, but what runs in it."""
        kept = [p for part in ("opt", "etc", "usr") for p in (self.root / part).rglob("*")]
        return {
            str(p.relative_to(self.root)): p.read_bytes()
            for p in kept
            if p.is_file() and not p.is_symlink() and "__pycache__" not in p.parts
        }
