"""peft's files in a zip: read from a stranger within bounds, and written as a stream. Nothing is unpacked to a path."""

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import archive
from relay import tensor_file
from relay.peft import CONFIG, WEIGHTS
from relay.peft_import import MAX_CONFIG_BYTES, CannotImport
from relay.tensor_file import Shaped

MAX_ENTRIES = 100
MAX_DIRECTORY_BYTES = 2**18
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
DATE = (1980, 1, 1, 0, 0, 0)  # the same content is the same zip


@dataclass(frozen=True)
class Found:
    """peft's two files in a zip."""

    config: zipfile.ZipInfo
    weights: zipfile.ZipInfo


def find(opened: zipfile.ZipFile) -> Found:
    """At the top of the zip, or in one folder of it. Raises CannotImport for what no honest zip has."""
    entries = _sound(opened)
    found = {}
    for name in (CONFIG, WEIGHTS):
        matching = [entry for entry in entries if PurePosixPath(entry.filename).name == name]
        if len(matching) != 1:
            raise CannotImport(
                f"the zip has {len(matching)} files {name}, and needs one: zip what save_pretrained wrote"
            )
        [found[name]] = matching
    if PurePosixPath(found[CONFIG].filename).parent != PurePosixPath(found[WEIGHTS].filename).parent:
        raise CannotImport(f"{CONFIG} and {WEIGHTS} lie in different folders of the zip")
    return Found(found[CONFIG], found[WEIGHTS])


def _sound(opened: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """All entries. Raises CannotImport for what no honest zip has."""
    entries = opened.infolist()
    if len({entry.filename for entry in entries}) < len(entries):
        raise CannotImport("the zip has two entries of one name")
    if archive.overlapping(entries):
        raise CannotImport("the zip is damaged: entries of it overlap")
    for entry in entries:
        if bad := archive.fault(entry):
            raise CannotImport(f"an entry of the zip, {entry.filename[:100]!r}, {bad.message}")
        if PurePosixPath(entry.filename).suffix.lower() in PICKLES:
            raise CannotImport(
                f"the zip has pickled weights, {entry.filename[:100]!r}, which can run code and are not read: save "
                "with safe_serialization=True, as peft does by itself"
            )
    return entries


def find_tensors(opened: zipfile.ZipFile) -> zipfile.ZipInfo:
    """The one safetensors file of a zip. Raises CannotImport."""
    entries = _sound(opened)
    found = [entry for entry in entries if PurePosixPath(entry.filename).suffix.lower() == ".safetensors"]
    if len(found) != 1:
        raise CannotImport(f"the zip has {len(found)} safetensors files, and needs one: send the file by itself")
    return found[0]


def opened(path: Path) -> zipfile.ZipFile:
    """Raises CannotImport, before a directory of millions of entries is read."""
    try:
        return archive.opened(path, MAX_ENTRIES, MAX_DIRECTORY_BYTES)
    except archive.BadZip as exc:
        raise CannotImport(f"{exc.message}; send the folder that save_pretrained wrote as one zip") from exc


def config_of(opened: zipfile.ZipFile, found: Found) -> bytes:
    content = io.BytesIO()
    copy(opened, found.config, content, MAX_CONFIG_BYTES)
    return content.getvalue()


def copy(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, to: IO[bytes], limit_bytes: int) -> None:
    """Raises CannotImport for one that is larger than allowed, whatever it says of itself, or damaged."""
    try:
        for piece in archive.pieces(opened, entry, limit_bytes):
            to.write(piece)
    except archive.BadZip as exc:
        raise CannotImport(f"{entry.filename[:100]!r} in the zip: {exc.message}") from exc


def write(to: IO[bytes], config: Mapping[str, Any], tensors: Mapping[str, Shaped]) -> None:
    """Stored and not packed: numbers hardly shrink."""
    with zipfile.ZipFile(to, "w", zipfile.ZIP_STORED) as out:
        out.writestr(zipfile.ZipInfo(CONFIG, DATE), json.dumps(config, indent=2))
        with out.open(zipfile.ZipInfo(WEIGHTS, DATE), "w", force_zip64=True) as file:
            tensor_file.write(file.write, tensors)
