"""Loaded by schemathesis: its requests to gpu routes go out signed, as those of the gpu that SIGNED_AS tells of.

The sender stays a gpu that is known; what it says is nonsense.
"""

import json
import os
import re
import time
from typing import Any

import requests
import schemathesis

import wire

ME = json.loads(os.environ["SIGNED_AS"])
BY = wire.SignedBy(gpu_id=ME["gpu_id"], epoch=ME["epoch"])
SHA256 = re.compile(r"/(?:blobs|chunks)/([0-9a-f]{64})\b")


class Signed(requests.auth.AuthBase):
    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        target, body = request.path_url, request.body or b""
        promised = SHA256.search(target)  # of an upload, whatever comes
        whole = body.encode() if isinstance(body, str) else body
        assert isinstance(whole, bytes), "nothing here is sent in pieces"
        sha256 = promised[1] if promised else wire.body_sha256(whole)
        request.headers.update(wire.sign(ME["key"], BY, str(request.method), target, sha256, time.time()))
        return request


@schemathesis.hook
def before_call(_context: Any, _case: Any, kwargs: dict[str, Any]) -> None:
    kwargs["auth"] = Signed()
