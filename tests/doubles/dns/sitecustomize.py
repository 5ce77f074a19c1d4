"""This machine's name service, as a hostile one would be: put first on PYTHONPATH, Python loads it at its start.

NAMES_DOUBLE is a JSON file: name -> [address, port] where every look-up leads; each is noted in `<file>.asked`.
uvloop resolves names past Python, so asyncio's own loop stands in for it.
"""

import asyncio
import json
import os
import socket
import sys
from pathlib import Path
from types import ModuleType
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
plain: Any = ModuleType("uvloop")
plain.new_event_loop = asyncio.new_event_loop
sys.modules["uvloop"] = plain
