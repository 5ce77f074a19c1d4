"""Which store of blobs the settings name: the folder, or a bucket, whose library is imported only then."""

import asyncio
from dataclasses import dataclass
from pathlib import Path

from relay import errors
from relay.blobs import CHUNK_BYTES, Blobs, Bound, FolderBlobs
from relay.settings import Settings


def blobs_of(settings: Settings) -> Blobs:
    root = folder_of(settings)
    if not settings.blobs_url:
        return FolderBlobs(root, settings.min_free_bytes)
    from relay.bucket import BucketBlobs
    from relay.s3 import S3

    return BucketBlobs(S3(settings), root, settings.min_free_bytes, settings.s3_cache_bytes)


def folder_of(settings: Settings) -> Path:
    return settings.data_dir / "blobs"


@dataclass(frozen=True)
class Copied:
    blobs: int
    bytes: int
    damaged: list[str]  # not what their names say: left where they are


async def copy_to_bucket(settings: Settings) -> Copied:
    """What the folder holds, which stays there. Safe to repeat: what the bucket has is not sent again.

    Raises StorageUnavailable, DiskFull.
    """
    to, number, size_bytes, damaged = blobs_of(settings), 0, 0, list[str]()
    await to.probe()
    to.open()
    try:
        for path in FolderBlobs(folder_of(settings)).paths():
            if await to.size_bytes(path.name) is None:
                bound = Bound(path.stat().st_size, errors.TooLarge(f"{path.name} is growing: stop the relay first"))
                async with to.incoming(bound) as incoming:
                    with path.open("rb") as file:
                        while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
                            await incoming.write(chunk)
                    await incoming.finish()
                    if incoming.sha256 != path.name:
                        damaged.append(path.name)
                        continue
                    await to.keep(incoming)
            number, size_bytes = number + 1, size_bytes + path.stat().st_size
    finally:
        to.close()
    return Copied(number, size_bytes, damaged)
