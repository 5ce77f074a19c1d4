"""A process that has imported the gpu service, torch and all, and forks a fresh one for each line that it reads.

So a gpu that a test kills, and the one that takes its place, cost a fraction of a second instead of an import. In: one
JSON object `{"env", "log"}` a line. Out: `{"pid"}`, and later `{"pid", "status"}` when that process has ended.
It starts no thread before it forks: a forked copy of a lock that another thread held would be locked for ever.
"""

import json
import os
import select
import signal
import socket
import sys
import threading
from typing import Any

import gpu_service.__main__ as service
import gpu_service.train  # noqa: F401  what the service imports late, here early


def say(**what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def be_a_gpu(env: dict[str, str], log: str) -> None:
    """Never returns."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    null, out = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for file, number in ((null, 0), (out, 1), (out, 2)):
        os.dup2(file, number)
    os.environ.clear()
    os.environ.update(env)
    status = 70
    try:
        status = service.main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # as __main__ ends


def reap() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        say(pid=pid, status=os.waitstatus_to_exitcode(status))


def main() -> None:
    waking, woken = socket.socketpair()
    for end in (waking, woken):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waking.fileno())
    say(ready=True)
    asked = b""
    while True:
        for ready in select.select([0, woken.fileno()], [], [])[0]:
            if ready != 0:
                woken.recv(4096)
                reap()
                continue
            data = os.read(0, 2**16)
            if not data:
                return  # the tests are over
            *lines, asked = (asked + data).split(b"\n")
            for line in lines:
                assert threading.active_count() == 1
                order = json.loads(line)
                if pid := os.fork():
                    say(pid=pid)
                else:
                    be_a_gpu(order["env"], order["log"])


if __name__ == "__main__":
    main()
