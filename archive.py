"""Zips from strangers: opened within bounds, entries judged by their names, and inflated no further than allowed.

Both services need it, for adapters and for pictures. Nothing is unpacked to a path. The standard library only.
"""

import io
import itertools
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

COPY_BYTES = 2**20
SHOWN_NAME_CHARS = 200
MAGIC = (b"PK\x03\x04", b"PK\x05\x06")  # an entry, or none
UTF8_FLAG = 0x800
# The end of the central directory, and the record that stands before it in zips past 4 GB.
END, END_BYTES, MAX_COMMENT_BYTES = b"PK\x05\x06", 22, 2**16
LOCATOR, LOCATOR_BYTES = b"PK\x06\x07", 20
END64, END64_BYTES = b"PK\x06\x06", 56
HEADER_BYTES = 30  # of an entry, before its name
# What zipfile raises for bytes that are no zip, or a damaged one.
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    ValueError,
    OverflowError,
    RuntimeError,  # NotImplementedError too
)


class BadZip(ValueError):
    """`code` and `message`, as of a training file's errors."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code, self.message = code, message

    def __str__(self) -> str:
        return self.message


def is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) in MAGIC


def opened(path: Path, most_entries: int, most_directory_bytes: int) -> zipfile.ZipFile:
    """Raises BadZip, before a directory of millions of entries is read."""
    entries, directory_bytes = _directory(path)
    if entries > most_entries or directory_bytes > most_directory_bytes:
        raise BadZip("too_many_entries", f"the zip has more than {most_entries:,} entries, which is the limit here")
    try:
        archive = zipfile.ZipFile(path)
    except DAMAGE as exc:
        raise _damaged(exc) from exc
    if len(archive.filelist) > most_entries:  # the count at its end is only what the zip says
        archive.close()
        raise BadZip("too_many_entries", f"the zip has more than {most_entries:,} entries, which is the limit here")
    return archive


def _damaged(exc: Exception) -> BadZip:
    return BadZip("damaged_zip", f"the zip is damaged: {exc}"[:SHOWN_NAME_CHARS])


def _directory(path: Path) -> tuple[int, int]:
    """Entries and bytes of the central directory as zipfile will find them, or more."""
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        start = max(0, size - END_BYTES - MAX_COMMENT_BYTES)
        file.seek(start)
        tail = file.read()
        at = tail.rfind(END)
        if at < 0 or len(tail) - at < END_BYTES:
            raise BadZip("no_zip", "the file is no zip, or its end is missing: send it again, whole")
        entries, directory_bytes = struct.unpack("<HI", tail[at + 10 : at + 16])
        locator_at = start + at - LOCATOR_BYTES
        if locator_at < END64_BYTES:
            return entries, directory_bytes
        file.seek(locator_at - END64_BYTES)
        record, locator = file.read(END64_BYTES), file.read(LOCATOR_BYTES)
    if not locator.startswith(LOCATOR):
        return entries, directory_bytes
    [record_at] = struct.unpack("<Q", locator[8:16])
    if not record.startswith(END64) or record_at != locator_at - END64_BYTES:  # readers would not agree on which counts
        raise BadZip("damaged_zip", "the zip is damaged: its end contradicts itself")
    entries64, bytes64 = struct.unpack("<QQ", record[32:48])
    return max(entries, entries64), max(directory_bytes, bytes64)


def name_of(entry: zipfile.ZipInfo) -> str:
    """In composed letters, as everybody but macOS writes them; older macOS does not say that its names are UTF-8."""
    name = entry.filename
    if not entry.flag_bits & UTF8_FLAG and not name.isascii():
        try:
            name = name.encode("cp437").decode()
        except UnicodeError:
            name = entry.filename
    return unicodedata.normalize("NFC", name)


def fault(entry: zipfile.ZipInfo) -> BadZip | None:
    """What no honest zip has, by the name and the header of an entry."""
    name, path = entry.filename, PurePosixPath(entry.filename)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        return BadZip("leads_out", "leads out of the zip")
    if not name_of(entry).isprintable():
        return BadZip("bad_name", "has a name with unprintable characters")
    if stat.S_ISLNK(entry.external_attr >> 16):
        return BadZip("link", "is a link: put the file itself into the zip")
    if entry.flag_bits & 1:
        return BadZip("encrypted", "is encrypted: make the zip without a password")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return BadZip("bad_compression", "is packed in a way that is not read here: zip it plainly (deflate)")
    return None


def overlapping(entries: Sequence[zipfile.ZipInfo]) -> zipfile.ZipInfo | None:
    """One that begins before another ends: the same bytes, to be inflated again and again."""
    ordered = sorted(entries, key=lambda entry: entry.header_offset)
    for entry, following in itertools.pairwise(ordered):
        if entry.header_offset + HEADER_BYTES + entry.compress_size > following.header_offset:
            return following
    return None


def reading(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, limit_bytes: int) -> IO[bytes]:
    """Its content. Reading raises BadZip past so many bytes, whatever the header says, and for damage."""
    if entry.file_size > limit_bytes:
        raise _too_large(limit_bytes)
    try:
        return io.BufferedReader(_Bounded(archive.open(entry), limit_bytes))
    except DAMAGE as exc:
        raise _damaged(exc) from exc


def pieces(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, limit_bytes: int) -> Iterator[bytes]:
    """As `reading`."""
    with reading(archive, entry, limit_bytes) as file:
        while piece := file.read(COPY_BYTES):
            yield piece


def _too_large(limit_bytes: int) -> BadZip:
    return BadZip("too_many_bytes", f"is larger than {limit_bytes:,} bytes, which is the limit here")


class _Bounded(io.RawIOBase):
    def __init__(self, file: IO[bytes], limit_bytes: int) -> None:
        self._file, self._limit_bytes, self._left_bytes = file, limit_bytes, limit_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer)
        try:
            data = self._file.read(len(view))
        except DAMAGE as exc:
            raise _damaged(exc) from exc
        self._left_bytes -= len(data)
        if self._left_bytes < 0:
            raise _too_large(self._limit_bytes)
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()
