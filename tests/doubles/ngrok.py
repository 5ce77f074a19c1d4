"""The ngrok agent's local behaviour, as its documentation has it; it tunnels nothing.

`start --none --log stdout`: log lines in logfmt, and the agent API (https://ngrok.com/docs/agent/api) on this machine.
What it does wrong is told by files in the folder NGROK_DOUBLE: `error` (words that end it at start), `refuse` (words
with which it refuses an endpoint), `url` (the public URL that it lists), `requests` (how many it says it carried).
What it was started with goes into `started`, endpoints asked for into `asked`.
"""

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FOLDER = Path(os.environ["NGROK_DOUBLE"])


def said(name: str) -> str:
    path = FOLDER / name
    return path.read_text() if path.exists() else ""


def log(level: str, message: str, **more: str) -> None:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S+0000")
    rest = "".join(f" {key}={value}" for key, value in more.items())
    print(f't={stamp} lvl={level} msg="{message}"{rest}', flush=True)


class Api(BaseHTTPRequestHandler):
    names: list[str] = []  # noqa: RUF012  of the process

    def do_GET(self) -> None:
        assert self.path == "/api/tunnels", self.path
        self._answer(200, {"tunnels": [self._tunnel(name) for name in self.names], "uri": "/api/tunnels"})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        (FOLDER / "asked").write_text(json.dumps(asked))
        if words := said("refuse"):
            details = {"err": words}
            self._answer(
                502, {"error_code": 103, "status_code": 502, "msg": "failed to start tunnel", "details": details}
            )
            return
        if domain := asked.get("domain"):
            (FOLDER / "url").write_text(f"https://{domain}")
        self.names.append(asked["name"])
        self._answer(201, self._tunnel(asked["name"]))

    def _tunnel(self, name: str) -> dict[str, object]:
        count = int(said("requests") or 0)
        return {
            "name": name,
            "ID": "0123456789abcdef",
            "uri": f"/api/tunnels/{name}",
            "public_url": said("url") or "https://d0ub-1e.ngrok-free.app",
            "proto": "https",
            "config": {"addr": "http://127.0.0.1:8001", "inspect": False},
            "metrics": {"conns": {"count": count, "gauge": 0}, "http": {"count": count}},
        }

    def _answer(self, status: int, body: dict[str, object]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    assert sys.argv[1:3] == ["start", "--none"], sys.argv
    with (FOLDER / "started").open("a") as file:
        file.write(json.dumps(sys.argv[1:]) + "\n")
    if words := said("error"):
        escaped = words.replace("\n", "\\r\\n")
        for message in ("failed to reconnect session", "session closing", "terminating with error"):
            log("eror", message, obj="tunnels.session", err=f'"{escaped}"')
        print(f"ERROR:  {words}", file=sys.stderr, flush=True)
        sys.exit(1)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    log("info", "no configuration paths supplied")
    log("info", "starting web service", obj="web", addr=f"127.0.0.1:{server.server_port}", allow_hosts="[]")
    log("info", "tunnel session started", obj="tunnels.session")
    log("info", "client session established", obj="csess", id="0123456789ab")
    server.serve_forever()


if __name__ == "__main__":
    main()
