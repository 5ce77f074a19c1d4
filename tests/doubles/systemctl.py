"""systemctl without systemd: does what the installed units say, under the folder that DOUBLE_ROOT names.

Knows simple, oneshot and forking services, Environment, EnvironmentFile, StateDirectory and drop-ins: what ours use.
`close` is our own word: everything ends.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(os.environ["DOUBLE_ROOT"])
UNITS = ROOT / "etc/systemd/system"
RUN = ROOT / "run"


def values(unit: str) -> dict[str, str]:
    """The last of each key; an empty one of a drop-in clears, which comes to the same."""
    found: dict[str, str] = {}
    for file in (UNITS / unit, *sorted((UNITS / f"{unit}.d").glob("*.conf"))):
        for line in file.read_text().splitlines() if file.exists() else ():
            if "=" in line and not line.startswith("#"):
                key, _, value = line.partition("=")
                found[key] = value
    return found


def environment(unit: dict[str, str]) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RELAY_")}
    clean |= dict([unit["Environment"].split("=", 1)] if "Environment" in unit else [])
    if file := unit.get("EnvironmentFile"):
        told = dict(line.split("=", 1) for line in Path(file).read_text().splitlines() if "=" in line)
        clean |= {name: re.sub(r"^([\"'])(.*)\1$", r"\2", value) for name, value in told.items()}
    return clean


def pid(name: str) -> int | None:
    file = RUN / f"{name.removesuffix('.service')}.pid"
    try:
        number = int(file.read_text())
        os.kill(number, 0)
    except (FileNotFoundError, ValueError, ProcessLookupError):
        return None
    return number


def stop(name: str) -> None:
    if number := pid(name):
        os.kill(number, signal.SIGTERM)
        while pid(name):
            time.sleep(0.02)


def start(name: str) -> None:
    unit = values(name)
    if before := unit.get("ExecStartPre"):
        subprocess.run(shlex.split(before), check=True)
    command = shlex.split(unit["ExecStart"])
    if "daemon on;" in unit["ExecStart"]:
        subprocess.run(command, check=True)  # it writes its own pid
        return
    if unit.get("Type") == "oneshot":
        subprocess.run(command, cwd=unit["WorkingDirectory"], env=environment(unit), check=True)
        return
    with (RUN / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            cwd=unit["WorkingDirectory"],
            env=environment(unit),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    (RUN / f"{name.removesuffix('.service')}.pid").write_text(str(process.pid))


def main() -> int:
    RUN.mkdir(exist_ok=True)
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    verb, names = words[0], [n if n.endswith((".service", ".timer")) else f"{n}.service" for n in words[1:]]
    with (RUN / "asked").open("a") as asked:
        asked.write(" ".join(words) + "\n")
    if verb == "is-active":
        return 0 if all(map(pid, names)) else 3
    for name in names:
        if verb in ("restart", "stop"):
            stop(name)
        if verb in ("restart", "start"):
            start(name)
        if verb == "reload":
            subprocess.run(shlex.split(values(name)["ExecReload"]), check=True)
    if verb == "close":
        for file in RUN.glob("*.pid"):
            stop(file.stem)
    return 0


if __name__ == "__main__":
    sys.exit(main())
