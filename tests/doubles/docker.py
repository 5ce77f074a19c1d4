"""docker compose without containers: what is ours runs as processes, on the places that DOUBLE_ROOT/places.json names.

Reads deploy/compose.production.yaml in the folder where it is called. Knows `up -d`, `build`, `ps`, `stop`, `restart`,
`run` and `exec`, as the documents have them. PostgreSQL and RabbitMQ are there already; `exec` in one is the program
with the variables that lead there, which nothing else has. `close` is our own word: everything ends.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(os.environ["DOUBLE_ROOT"])
PLACES: dict[str, Any] = json.loads(
    (ROOT / "places.json").read_text()
)  # services: variables; replace: texts; code: a folder
OURS = ("relay-1", "relay-2", "worker", "beat", "flower")
FILE = Path(sys.argv[3] if sys.argv[2] == "-f" else "compose.production.yaml")


def moved(text: str) -> str:
    if str(ROOT) in text:
        return text
    for of_container, here in PLACES["replace"].items():
        text = text.replace(of_container, here)
    return text


def services() -> dict[str, Any]:
    assert "COMPOSE_FILE=compose.production.yaml" in (FILE.parent / ".env").read_text().splitlines()
    text = re.sub(r"\$\{(\w+):-([^}]*)\}", r"\2", FILE.read_text())
    return dict(yaml.safe_load(text)["services"])


def environment(name: str, service: dict[str, Any]) -> dict[str, str]:
    of_servers = () if "build" not in service else ("PG", "RABBITMQ_", "ERL_")
    found = {k: v for k, v in os.environ.items() if not k.startswith(("RELAY_", *of_servers))}
    found["PYTHONDONTWRITEBYTECODE"] = "1"  # the image's
    for file in service.get("env_file", ()):
        lines = (FILE.parent / file).read_text().splitlines()
        found |= {key: moved(value) for key, value in (line.split("=", 1) for line in lines)}
    found |= {key: moved(str(value)) for key, value in service.get("environment", {}).items()}
    return found | dict(PLACES["services"].get(name, {}))


def command(words: list[str]) -> list[str]:
    return [sys.executable if word == "python" else moved(word) for word in words]


def pid(name: str) -> int | None:
    try:
        number = int((ROOT / f"{name}.pid").read_text())
        os.kill(number, 0)
    except (FileNotFoundError, ProcessLookupError):
        return None
    return number


def stop(name: str) -> None:
    if number := pid(name):
        os.kill(number, signal.SIGTERM)
        while pid(name):
            time.sleep(0.05)


def start(name: str, service: dict[str, Any]) -> None:
    env = environment(name, service)
    said = json.dumps([service, env], sort_keys=True)
    file = ROOT / f"{name}.started"
    if pid(name) and file.read_text() == said:
        return
    stop(name)
    run = [*command(service.get("command", ["python", "-m", "relay", "serve"])), *PLACES["more"].get(name, [])]
    with (ROOT / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            run, cwd=PLACES["code"], env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    file.write_text(said)
    (ROOT / f"{name}.pid").write_text(str(process.pid))
    if name == "relay-1":  # the others wait until it is healthy
        (test,) = [part for part in service["healthcheck"]["test"] if "urlopen" in part]
        deadline = time.monotonic() + 90
        while subprocess.run([sys.executable, "-c", moved(test)], stderr=subprocess.DEVNULL).returncode:
            assert time.monotonic() < deadline, (ROOT / f"{name}.log").read_text()[-3000:]
            time.sleep(0.1)


def main() -> int:
    verb, *rest = sys.argv[4:] if sys.argv[2] == "-f" else sys.argv[2:]
    while rest and rest[0].startswith("-"):
        rest.pop(0)
    if verb == "close":
        for name in OURS:
            stop(name)
        return 0
    known = services()
    if verb in ("exec", "run"):
        service = known[rest[0]]
        return subprocess.run(command(rest[1:]), cwd=PLACES["code"], env=environment(rest[0], service)).returncode
    if verb in ("stop", "restart"):
        for name in rest:
            stop(name)
    if verb in ("up", "restart"):
        for name in rest or OURS:
            start(name, known[name])
    assert verb in ("up", "restart", "stop", "build", "ps"), verb
    return 0


if __name__ == "__main__":
    sys.exit(main())
