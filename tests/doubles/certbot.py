"""certbot without Let's Encrypt: asks for the proof by http as that does, makes a certificate, calls the deploy hook.

Under the folder that DOUBLE_ROOT names. `certonly` is remembered, and `renew` repeats it.
"""

import argparse
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

ROOT = Path(os.environ["DOUBLE_ROOT"])
LIVE, ORDER = ROOT / "etc/letsencrypt/live/imfine", ROOT / "etc/letsencrypt/order.json"


def prove(domain: str, webroot: Path) -> None:
    """The proof must come back from the domain, on the port that stands for 80."""
    folder = webroot / ".well-known/acme-challenge"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "token").write_text("the proof")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    url = f"http://{domain}:{os.environ['HTTP_PORT']}/.well-known/acme-challenge/token"
    with opener.open(url, timeout=10) as answer:
        assert answer.read() == b"the proof"
    (folder / "token").unlink()


def issue(order: dict[str, str]) -> None:
    prove(order["domain"], Path(order["webroot_path"]))
    LIVE.mkdir(parents=True, exist_ok=True)
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "90", "-subj", f"/CN={order['domain']}", "-addext", f"subjectAltName=DNS:{order['domain']}"]
    command += ["-keyout", str(LIVE / "privkey.pem"), "-out", str(LIVE / "fullchain.pem")]
    subprocess.run(command, check=True, capture_output=True)
    subprocess.run(order["deploy_hook"], shell=True, check=True, env={**os.environ, "RENEWED_LINEAGE": str(LIVE)})


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=["certonly", "renew"])
    for flag in ("non-interactive", "agree-tos", "webroot", "keep-until-expiring", "force-renewal"):
        parser.add_argument(f"--{flag}", action="store_true")
    for name in ("email", "domain", "cert-name", "webroot-path", "deploy-hook"):
        parser.add_argument(f"--{name}")
    asked = parser.parse_args()
    if asked.verb == "certonly":
        assert asked.agree_tos
        assert asked.non_interactive
        ORDER.parent.mkdir(parents=True, exist_ok=True)
        ORDER.write_text(json.dumps({k: v for k, v in vars(asked).items() if isinstance(v, str)}))
        if LIVE.exists() and asked.keep_until_expiring:
            return 0
    elif not asked.force_renewal:
        return 0
    issue(json.loads(ORDER.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
