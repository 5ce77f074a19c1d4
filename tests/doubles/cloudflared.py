"""What cloudflared prints for a quick tunnel, after its documentation and its users' logs; it tunnels nothing.

Files in the folder CLOUDFLARED_DOUBLE tell it what to do wrong: `error` (words with which it gives up), `die_after_s`.
"""

import os
import secrets
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ["CLOUDFLARED_DOUBLE"])


def log(level: str, message: str) -> None:
    print(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ')} {level} {message}", file=sys.stderr, flush=True)


def main() -> None:
    assert sys.argv[1:4] == ["tunnel", "--no-autoupdate", "--url"], sys.argv
    (FOLDER / "target").write_text(sys.argv[4])
    log(
        "INF",
        "Thank you for trying Cloudflare Tunnel. Doing so, without a Cloudflare account, is a quick way to try it",
    )
    log("INF", "Requesting new quick Tunnel on trycloudflare.com...")
    if (FOLDER / "error").exists():
        print((FOLDER / "error").read_text(), file=sys.stderr, flush=True)
        sys.exit(1)
    url = f"https://d0ub-{secrets.token_hex(4)}.trycloudflare.com"
    rule = "+" + "-" * 92 + "+"
    for line in (
        rule,
        "|  Your quick Tunnel has been created! Visit it at (it may take some time to be reachable):  |",
        f"|  {url}".ljust(93) + "|",
        rule,
        "Cannot determine default configuration path. No file [config.yml config.yaml] in [~/.cloudflared]",
        "Initial protocol quic",
        "Registered tunnel connection connIndex=0 connection=0123 event=0 ip=192.0.2.1 location=icn01 protocol=quic",
    ):
        log("INF", line)
    if (FOLDER / "die_after_s").exists():
        time.sleep(float((FOLDER / "die_after_s").read_text()))
        log("ERR", "Initiating shutdown error=edge gone")
        sys.exit(1)
    for i in range(10_000):  # more than a pipe holds, if nobody reads
        log("WRN", f"Retrying connection in up to 2s connIndex={i} event=0 ip=192.0.2.1 {'x' * 60}")
    time.sleep(600)


if __name__ == "__main__":
    main()
