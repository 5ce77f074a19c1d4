"""A bucket that speaks S3's API, by obstore: https://developmentseed.org/obstore/. Nothing else here imports it.

Every request is signed with the SHA-256 of its body, so the server refuses what was damaged on its way. What the
library raises becomes StorageUnavailable, and its words go to the log without what a server quotes of a request.
"""

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import AsyncIterator, Awaitable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from relay import errors
from relay.settings import Settings

if TYPE_CHECKING:
    from obstore import ObjectMeta

log = logging.getLogger("relay.s3")

T = TypeVar("T")

CHUNK_BYTES = 2**18
PART_BYTES, PARTS, PARTS_AT_ONCE = 8 * 2**20, 9000, 4  # S3 takes 10,000 parts
SHORT_S = 15.0  # a request without a body, its repetitions included; some of them are made with the writer's lock
LONG = "6h"  # a request with its body: what stands still ends after QUIET
QUIET = "60s"
RETRIES, RETRY_S = 4, timedelta(seconds=10)  # of each request; 503 SlowDown and 5xx, with a growing pause


@dataclass(frozen=True)
class Object:
    key: str
    bytes: int
    at: float  # when it was stored, in unix seconds


class S3:
    def __init__(self, settings: Settings) -> None:
        url = urlsplit(settings.blobs_url)
        given: dict[str, Any] = {
            "endpoint": settings.s3_endpoint,
            "region": settings.s3_region,
            "access_key_id": settings.s3_access_key_id,
            "secret_access_key": settings.s3_secret_access_key,
        }
        self._store = S3Store(
            url.netloc,
            prefix=url.path.strip("/") or None,
            client_options={
                "allow_http": settings.s3_endpoint.startswith("http://"),
                "connect_timeout": "5s",
                "read_timeout": QUIET,
                "timeout": LONG,
            },
            retry_config={
                "max_retries": RETRIES,
                "retry_timeout": RETRY_S,
                "backoff": {
                    "init_backoff": timedelta(milliseconds=100),
                    "max_backoff": timedelta(seconds=3),
                    "base": 2,
                },
            },
            **{name: value for name, value in given.items() if value},
        )

    async def put(self, key: str, content: bytes | Path) -> None:
        """Whole or not at all. A large file goes in parts, which are no object before the last has arrived."""
        size_bytes = await asyncio.to_thread(os.path.getsize, content) if isinstance(content, Path) else len(content)
        part_bytes = max(PART_BYTES, size_bytes // PARTS + 1)
        putting = obstore.put_async(self._store, key, content, chunk_size=part_bytes, max_concurrency=PARTS_AT_ONCE)
        with _translated():
            await (putting if isinstance(content, Path) else _soon(putting))

    async def get(self, key: str) -> AsyncIterator[bytes]:
        """Raises FileNotFoundError before the first chunk."""
        with _translated():
            got = await _soon(obstore.get_async(self._store, key))

        async def chunks() -> AsyncIterator[bytes]:
            with _translated():
                async for chunk in got.stream(min_chunk_size=CHUNK_BYTES):
                    yield bytes(chunk)

        return chunks()

    async def entries(self, prefix: str) -> list[Object]:
        """One folder's, which are few."""
        with _translated():
            return _objects(await _soon(obstore.list(self._store, prefix, chunk_size=1000).collect_async()))

    async def pages(self, prefix: str) -> AsyncIterator[Sequence[Object]]:
        """A thousand at once."""
        with _translated():
            async for page in obstore.list(self._store, prefix, chunk_size=1000):
                yield _objects(page)

    async def delete(self, keys: Collection[str]) -> None:
        """Those that are not there are no mistake."""
        if keys:
            with _translated(), contextlib.suppress(FileNotFoundError):
                await _soon(obstore.delete_async(self._store, list(keys)))


async def _soon(work: Awaitable[T]) -> T:
    async with asyncio.timeout(SHORT_S):
        return await work


def _objects(page: Iterable["ObjectMeta"]) -> list[Object]:
    return [Object(found["path"], found["size"], found["last_modified"].timestamp()) for found in page]


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as exc:
        if "NoSuchBucket" in str(exc):
            raise _unavailable("there is no such bucket") from exc
        raise
    except TimeoutError as exc:
        raise _unavailable("no answer in time") from exc
    except BaseError as exc:
        raise _unavailable(_told(exc)) from exc


def _told(exc: BaseException) -> str:
    """Status and code alone: servers quote key ids and what was signed."""
    said = str(exc)
    status, code = re.search(r"status code: (\d+[\w ]*)", said), re.search(r"<Code>(\w{1,60})</Code>", said)
    return " ".join([type(exc).__name__, *(found[1] for found in (status, code) if found)])


def _unavailable(why: str) -> errors.StorageUnavailable:
    log.warning("the bucket of the blobs: %s", why)
    return errors.StorageUnavailable(
        f"the storage of files and models does not answer as it should ({why}): try again later"
    )
