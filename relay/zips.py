"""peft's files in a zip: read from a stranger within bounds, and written as a stream. Nothing is unpacked to a path."""

import io
import json
import stat
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from relay import tensor_file
from relay.peft import CONFIG, WEIGHTS
from relay.peft_import import MAX_CONFIG_BYTES, CannotImport
from relay.tensor_file import Shaped

MAX_ENTRIES = 100
MAX_DIRECTORY_BYTES = 2**18
COPY_BYTES = 2**20
END = b"PK\x05\x06"  # of the central directory
END_BYTES, MAX_COMMENT_BYTES = 22, 2**16
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
DATE = (1980, 1, 1, 0, 0, 0)  # the same content is the same zip


@dataclass(frozen=True)
class Found:
    """peft's two files in a zip."""

    config: zipfile.ZipInfo
    weights: zipfile.ZipInfo


def find(archive: zipfile.ZipFile) -> Found:
    """At the top of the zip, or in one folder of it. Raises CannotImport for what no honest zip has."""
    entries = archive.infolist()
    if len({entry.filename for entry in entries}) < len(entries):
        raise CannotImport("the zip has two entries of one name")
    for entry in entries:
        path = PurePosixPath(entry.filename)
        if path.is_absolute() or ".." in path.parts or "\\" in entry.filename or ":" in entry.filename:
            raise CannotImport(f"the zip has an entry that leads out of it: {entry.filename[:100]!r}")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise CannotImport(f"the zip has a link: {entry.filename[:100]!r}")
        if path.suffix.lower() in PICKLES:
            raise CannotImport(
                f"the zip has pickled weights, {entry.filename[:100]!r}, which can run code and are not read: save "
                "with safe_serialization=True, as peft does by itself"
            )
    found = {}
    for name in (CONFIG, WEIGHTS):
        matching = [entry for entry in entries if PurePosixPath(entry.filename).name == name]
        if len(matching) != 1:
            raise CannotImport(
                f"the zip has {len(matching)} files {name}, and needs one: zip what save_pretrained wrote"
            )
        [found[name]] = matching
        if matching[0].flag_bits & 1 or matching[0].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise CannotImport(f"{name} is encrypted, or packed in a way that is not read here: zip it plainly")
    if PurePosixPath(found[CONFIG].filename).parent != PurePosixPath(found[WEIGHTS].filename).parent:
        raise CannotImport(f"{CONFIG} and {WEIGHTS} lie in different folders of the zip")
    return Found(found[CONFIG], found[WEIGHTS])


def opened(path: Path) -> zipfile.ZipFile:
    """Raises CannotImport, before a directory of millions of entries is read."""
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - END_BYTES - MAX_COMMENT_BYTES))
        tail = file.read()
    at = tail.rfind(END)
    if at < 0 or len(tail) - at < END_BYTES:
        raise CannotImport("the file is no zip: send the folder that save_pretrained wrote as one")
    entries, directory_bytes = struct.unpack("<HI", tail[at + 10 : at + 16])
    if entries > MAX_ENTRIES or directory_bytes > MAX_DIRECTORY_BYTES:
        raise CannotImport(f"the zip has more than {MAX_ENTRIES} entries: peft's folder has a handful")
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as exc:
        raise CannotImport(f"the zip is damaged: {exc}") from exc


def config_of(archive: zipfile.ZipFile, found: Found) -> bytes:
    content = io.BytesIO()
    copy(archive, found.config, content, MAX_CONFIG_BYTES)
    return content.getvalue()


def copy(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, to: IO[bytes], limit_bytes: int) -> None:
    """Raises CannotImport for one that is larger than allowed, whatever it says of itself, or damaged."""
    too_large = CannotImport(f"{entry.filename[:100]!r} is larger than {limit_bytes:,} bytes, which is the limit here")
    if entry.file_size > limit_bytes:
        raise too_large
    copied = 0
    try:
        with archive.open(entry) as file:
            while piece := file.read(COPY_BYTES):
                copied += len(piece)
                if copied > limit_bytes:
                    raise too_large
                to.write(piece)
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, zlib.error) as exc:
        raise CannotImport(f"the zip is damaged: {exc}") from exc


def write(to: IO[bytes], config: Mapping[str, Any], tensors: Mapping[str, Shaped]) -> None:
    """Stored and not packed: numbers hardly shrink."""
    with zipfile.ZipFile(to, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo(CONFIG, DATE), json.dumps(config, indent=2))
        with archive.open(zipfile.ZipInfo(WEIGHTS, DATE), "w", force_zip64=True) as file:
            tensor_file.write(file.write, tensors)
