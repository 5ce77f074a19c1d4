"""This machine's name service, as a hostile one would be: put first on PYTHONPATH, Python loads it at its start.

NAMES_DOUBLE is a JSON file: name -> [address, port] where every look-up leads; each is noted in `<file>.asked`.
uvloop resolves names past Python, so the process does without it.
"""

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

FILE = Path(os.environ["NAMES_DOUBLE"])
really = socket.getaddrinfo


def getaddrinfo(host: Any, port: Any, *arguments: Any, **more: Any) -> Any:
    names = json.loads(FILE.read_text())
    if host not in names:
        return really(host, port, *arguments, **more)
    with Path(f"{FILE}.asked").open("a") as asked:
        asked.write(f"{host}\n")
    return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", tuple(names[host]))]


socket.getaddrinfo = getaddrinfo
sys.modules["uvloop"] = None  # type: ignore[assignment]
