"""An S3 of the tests' own: moto's server, on a free port of loopback."""

import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from relay.settings import Settings

START_S = 60.0
KEY_ID, SECRET = "AKIAOFTHETESTS000000", "the-secret-of-the-tests"


class S3Server:
    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id=KEY_ID,
            aws_secret_access_key=SECRET,
            config=Config(proxies={}, retries={"max_attempts": 1}),
        )

    def start(self) -> None:
        """What it holds is in its memory: after a stop it is empty."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + START_S
        while not self._answers():
            assert self._process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def _answers(self) -> bool:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(f"{self.url}/moto-api/data.json", timeout=5):
                return True
        except OSError:
            return False

    def stop(self) -> None:
        self.client.close()  # its connections; it may be used again
        if self._process:
            self._process.kill()
            self._process.wait(30)

    def new(self) -> str:
        """The name of a fresh bucket."""
        name = f"relay-{secrets.token_hex(6)}"
        self.client.create_bucket(Bucket=name)
        return name

    def settings(self, bucket: str) -> dict[str, Any]:
        return {
            "blobs_url": f"s3://{bucket}/of/relay",
            "s3_endpoint": self.url,
            "s3_access_key_id": KEY_ID,
            "s3_secret_access_key": SECRET,
        }

    def keys(self, bucket: str) -> list[str]:
        """Below the relay's prefix."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        found = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        assert all(key.startswith("of/relay/") for key in found)
        return [key.removeprefix("of/relay/") for key in found]

    def content(self, bucket: str, key: str) -> bytes:
        body: bytes = self.client.get_object(Bucket=bucket, Key=f"of/relay/{key}")["Body"].read()
        return body


def settings_of(folder: Path, bucket: dict[str, Any]) -> Settings:
    return Settings(data_dir=folder, **bucket)


def environment(settings: dict[str, Any]) -> dict[str, str]:
    """As variables."""
    return {f"RELAY_{name.upper()}": str(value) for name, value in settings.items()}
