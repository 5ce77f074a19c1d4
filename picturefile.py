"""Training data made of pictures: a zip of PNG, JPEG and WebP files, with captions or without any.

Both services need it: the relay refuses a bad zip at upload, by file names, before any gpu is bothered; the gpu reads
the same pictures in the same order. Captions come from a metadata.jsonl or metadata.csv beside the pictures, as Hugging
Face's imagefolder has them, or from a .txt of the same name, as kohya's scripts do. One picture at a time is in memory.
"""

import hashlib
import statistics
import zipfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

import archive
import datafile
import picture
from datafile import SHOWN_ERRORS, Checked, FileError

if TYPE_CHECKING:
    from PIL.Image import Image

SHOWN_NAME_CHARS = 200
MOST_PICTURES = 10_000
MOST_ENTRIES = 45_000  # macOS adds one to each file, and captions are files
MOST_DIRECTORY_BYTES = 2**24
MOST_PICTURE_BYTES = 48 * 2**20
MOST_METADATA_BYTES = 64 * 2**20
MOST_CAPTION_CHARS = 2000
CAPTION_BYTES = 2**16  # of a caption's file
# What all of it may grow to; pictures hardly shrink in a zip, and each pixel costs time.
EXPANSION, EXPANSION_BYTES = 20, 2**28
MOST_PIXELS = 10**10
PICTURES = {".png", ".jpg", ".jpeg", ".jfif", ".webp"}
OTHER_PICTURES = {".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".svg", ".jxl", ".jp2", ".psd", ".dng"}
METADATA = {"metadata.jsonl", "metadata.csv"}
CAPTIONS = (".txt", ".caption")
TEXTS = ("text", "caption", "prompt")  # of metadata, what the caption may be called
LITTER = {"__macosx", "thumbs.db", "desktop.ini", "icon\r"}  # and whatever begins with a dot
HOW = (
    "put PNG, JPEG or WebP files into a zip, each with its caption in a .txt of the same name, or all captions in a "
    'metadata.jsonl with lines like {"file_name": "1.png", "text": "..."}; or no captions at all, for one concept'
)


@dataclass(frozen=True)
class Picture:
    name: str  # within the zip
    caption: str  # "" where the data set has none at all
    width: int  # in pixels, upright
    height: int


@dataclass
class Report(Checked[FileError]):
    captioned: int = 0
    repaired: Counter[str] = field(default_factory=Counter)  # what is mended when they are read
    repaired_names: dict[str, list[str]] = field(default_factory=dict)  # the first SHOWN_ERRORS of each
    formats: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0  # the same bytes again
    duplicate_names: list[str] = field(default_factory=list)  # the first SHOWN_ERRORS of them
    ignored: int = 0  # files that are neither pictures nor captions
    ignored_names: list[str] = field(default_factory=list)
    characters: int = 0  # of captions
    sides: "array[int]" = field(default_factory=lambda: array("H"))  # the shorter one of each picture
    largest_side: int = 0

    def summary(self) -> str:
        """One message for a person: how many of which kind, and the first few by name."""
        if not self.counts:
            return f"{self.rows} pictures" if self.rows else f"the zip has no pictures: {HOW}"
        bad = self.counts.total()
        errors = "1 error" if bad == 1 else f"{bad:,} errors"
        return f"the zip has {errors} ({self.by_code()}) beside {self.rows:,} sound pictures: {self.shown()}"

    def told(self) -> dict[str, Any]:
        """As JSON."""
        sides = self.sides
        return {
            "kind": "pictures",
            "rows": self.rows,
            "captioned": self.captioned,
            "characters": self.characters,
            "errors": dict(self.counts),
            "first_errors": [{"name": e.name, "code": e.code, "message": e.message} for e in self.errors],
            "repaired": dict(self.repaired),
            "repaired_names": self.repaired_names,
            "formats": dict(self.formats),
            "duplicates": self.duplicates,
            "duplicate_names": self.duplicate_names,
            "ignored": self.ignored,
            "ignored_names": self.ignored_names,
            "smallest_side": min(sides, default=None),
            "median_side": int(statistics.median(sides)) if sides else None,  # of the shorter ones
            "largest_side": self.largest_side or None,
        }


def is_zip(path: Path, name: str = "") -> bool:
    """By how the file begins; its name says nothing."""
    return archive.is_zip(path)


def check(path: Path, name: str = "") -> Report:
    """All of a zip, each picture unpacked once."""
    report = Report()
    try:
        with archive.opened(path, MOST_ENTRIES, MOST_DIRECTORY_BYTES) as opened:
            _check(_Contents(opened, path.stat().st_size, report.add), report)
    except archive.BadZip as exc:
        report.add(FileError(name or "the zip", exc.code, exc.message))
    return report


def _check(contents: "_Contents", report: Report) -> None:
    known: dict[bytes, picture.Seen | FileError] = {}
    for name in contents.names:
        try:
            data = contents.read(name)
            key = hashlib.blake2b(data, digest_size=16).digest()
            again = key in known
            found = known[key] if again else known.setdefault(key, contents.seen(data))
        except archive.BadZip as exc:
            report.add(FileError(shown(name), exc.code, exc.message))
            continue
        if isinstance(found, FileError):
            report.add(replace(found, name=shown(name)))
        elif name not in contents.blamed:
            _count(report, found, contents.captions.get(name, ""))
            for what in found.mended:
                names = report.repaired_names.setdefault(what, [])
                if len(names) < SHOWN_ERRORS:
                    names.append(shown(name))
            report.duplicates += again
            if again and len(report.duplicate_names) < SHOWN_ERRORS:
                report.duplicate_names.append(shown(name))
    report.ignored = len(contents.ignored)
    report.ignored_names = [shown(name) for name in contents.ignored[:SHOWN_ERRORS]]


def _count(report: Report, found: picture.Seen, caption: str) -> None:
    report.rows += 1
    report.captioned += bool(caption)
    report.characters += len(caption)
    report.repaired.update(found.mended)
    report.formats[found.format] += 1
    report.sides.append(min(found.width, found.height))
    report.largest_side = max(report.largest_side, found.width, found.height)


def pictures(path: Path) -> list[Picture]:
    """Of a sound zip, by name; only headers are read. Raises ValueError for one that `check` finds fault with."""
    found = []
    with _sound(path) as opened:
        contents = _Contents(opened, path.stat().st_size, _raise)
        for name in contents.names:
            try:
                width, height = picture.size(contents.read(name))
            except picture.BadPicture as exc:
                raise ValueError(f"{shown(name)}: {exc.message}") from exc
            found.append(Picture(name, contents.captions.get(name, ""), width, height))
    return found


def read(path: Path, pictures: Sequence[Picture]) -> "Iterator[tuple[Picture, Image | FileError]]":
    """Some of them, in the order given: upright, RGB on white. One is in memory at a time."""
    with _sound(path) as opened:
        entries = {archive.name_of(entry): entry for entry in opened.infolist()}
        for wanted in pictures:
            entry = entries.get(wanted.name)
            try:
                if entry is None:
                    raise archive.BadZip("no_such_file", "is not in the zip")
                yield wanted, picture.decoded(_content(opened, entry, MOST_PICTURE_BYTES))
            except (archive.BadZip, picture.BadPicture) as exc:
                yield wanted, FileError(shown(wanted.name), exc.code, exc.message)


def sample(path: Path, most: int, most_bytes: int, side: int) -> list[dict[str, Any]]:
    """Every n-th picture of a sound zip with its caption, as a small one in a data URL."""
    found, size_bytes = list[dict[str, Any]](), 0
    with _sound(path) as opened:
        contents = _Contents(opened, path.stat().st_size, _raise)
        for name in contents.names[:: max(1, -(-len(contents.names) // most))]:
            data = contents.read(name)
            width, height = picture.size(data)
            url, caption = picture.thumbnail(data, side), contents.captions.get(name, "")
            size_bytes += len(url) + len(caption)
            if size_bytes > most_bytes and found:
                break
            found.append({"name": name, "caption": caption, "width": width, "height": height, "thumbnail": url})
    return found


def shown(name: str) -> str:
    return name if len(name) <= SHOWN_NAME_CHARS else f"...{name[-SHOWN_NAME_CHARS:]}"


def _sound(path: Path) -> zipfile.ZipFile:
    return archive.opened(path, MOST_ENTRIES, MOST_DIRECTORY_BYTES)


def _raise(error: FileError) -> None:
    raise ValueError(f"{error.name}: {error.message}")


def _content(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, limit_bytes: int) -> bytes:
    with archive.reading(opened, entry, limit_bytes) as file:
        return file.read()


class _Contents:
    """Which pictures a zip has, and their captions. What is wrong with them goes to `add`."""

    def __init__(self, opened: zipfile.ZipFile, size_bytes: int, add: Callable[[FileError], None]) -> None:
        self._opened, self._add = opened, add
        self._left_bytes = EXPANSION * size_bytes + EXPANSION_BYTES
        self._left_pixels = MOST_PIXELS
        self._entries: dict[str, zipfile.ZipInfo] = {}
        self.captions: dict[str, str] = {}
        self.blamed: set[str] = set()  # pictures with an error of their caption's
        self.ignored: list[str] = []
        self._list()
        self.names = sorted(name for name in self._entries if self._suffix(name) in PICTURES)
        if len(self.names) > MOST_PICTURES:
            raise archive.BadZip(
                "too_many_pictures", f"the zip has {len(self.names):,} pictures: {MOST_PICTURES:,} are the limit here"
            )
        self._caption()

    def read(self, name: str) -> bytes:
        """Raises BadZip."""
        data = _content(self._opened, self._entries[name], min(MOST_PICTURE_BYTES, self._left_bytes))
        self._left_bytes -= len(data)
        return data

    def seen(self, data: bytes) -> picture.Seen | FileError:
        """An error of no name yet; as an exception it would hold the bytes. BadZip once there are too many pixels."""
        try:
            head = picture.head(data)
            self._left_pixels -= head.width * head.height
            if self._left_pixels < 0:
                raise archive.BadZip(
                    "too_many_pixels",
                    f"more than {MOST_PIXELS / 1e6:,.0f} megapixels in all: make the pictures smaller",
                )
            return picture.seen(data)
        except picture.BadPicture as exc:
            return FileError("", exc.code, exc.message)

    @staticmethod
    def _suffix(name: str) -> str:
        return PurePosixPath(name).suffix.lower()

    def _blame(self, name: str, code: str, message: str) -> None:
        self.blamed.add(name)
        self._add(FileError(shown(name), code, message))

    def _list(self) -> None:
        entries = self._opened.infolist()
        if twice := archive.overlapping(entries):
            raise archive.BadZip("overlapping", f"the zip has entries that overlap: {shown(twice.filename)!r}")
        for entry in entries:
            name = archive.name_of(entry)
            bad, passed_over = archive.fault(entry), entry.is_dir() or _is_litter(name)
            if bad and (bad.code == "leads_out" or not passed_over):
                self._blame(ascii(name)[1:-1] if bad.code == "bad_name" else name, bad.code, bad.message)
            elif passed_over:
                continue
            elif name in self._entries:
                self._blame(name, "named_twice", "is in the zip twice")
            else:
                self._entries[name] = entry

    # --- captions ---

    def _caption(self) -> None:
        metadata = [name for name in self._entries if PurePosixPath(name).name.lower() in METADATA]
        told = set(metadata)
        for name in metadata:
            self._read_metadata(name)
        for name in self.names:
            beside = [f"{PurePosixPath(name).with_suffix(suffix)}" for suffix in CAPTIONS]
            for text in (text for text in beside if text in self._entries):
                told.add(text)
                if name not in self.captions and name not in self.blamed:
                    self._read_text(text, name)
        if told:
            for name in self.names:
                if name not in self.captions and name not in self.blamed:
                    self._blame(name, "no_caption", "has no caption, and others have one")
        for name in sorted(self._entries.keys() - set(self.names) - told):
            if self._suffix(name) in OTHER_PICTURES:
                self._blame(name, "unknown_format", "is no PNG, JPEG or WebP: save it as one of these")
            elif PurePosixPath(name).name.lower() == "metadata.parquet":
                self._blame(name, "bad_metadata", "is not read here: save it as metadata.jsonl")
            else:
                self.ignored.append(name)

    def _read_metadata(self, name: str) -> None:
        entry, folder = self._entries[name], PurePosixPath(name).parent
        kind: datafile.Kind = "csv" if self._suffix(name) == ".csv" else "jsonl"
        try:
            with archive.reading(self._opened, entry, min(MOST_METADATA_BYTES, self._left_bytes)) as file:
                for line, value in datafile.read(file, kind):
                    self._row(name, folder, line, value)
                self._left_bytes -= entry.file_size
        except archive.BadZip as exc:
            self._blame(name, exc.code, exc.message)

    def _row(self, name: str, folder: PurePosixPath, line: int, value: Any) -> None:
        if isinstance(value, datafile.RowError):
            self._blame(name, value.code, f"line {line}: {value.message}")
            return
        file_name = value.get("file_name") if isinstance(value, dict) else None
        if not isinstance(file_name, str) or not file_name:
            self._blame(name, "bad_metadata", f'line {line}: needs "file_name" and "text"')
            return
        of = normalize("NFC", str(folder / file_name))
        if of not in self._entries or self._suffix(of) not in PICTURES:
            self._blame(name, "no_such_file", f"line {line}: {shown(file_name)!r} is no picture in the zip")
        elif of in self.captions or of in self.blamed:
            self._blame(of, "captioned_twice", f"has a second caption, in line {line} of {shown(name)}: leave one")
        else:
            self._take(of, next((value[key] for key in TEXTS if key in value), None))

    def _read_text(self, text: str, of: str) -> None:
        try:
            content = _content(self._opened, self._entries[text], min(CAPTION_BYTES, self._left_bytes))
            self._left_bytes -= len(content)
            self._take(of, content.removeprefix(datafile.BOM).decode())
        except UnicodeDecodeError:
            self.blamed.add(of)
            self._blame(text, "not_utf8", "is not UTF-8: save it as UTF-8")
        except archive.BadZip as exc:
            self.blamed.add(of)
            self._blame(text, exc.code, exc.message)

    def _take(self, of: str, text: Any) -> None:
        caption = " ".join(text.split()) if isinstance(text, str) else ""
        if not caption:
            self._blame(of, "empty_caption", "has an empty caption: say what it shows")
        elif len(caption) > MOST_CAPTION_CHARS:
            self._blame(
                of, "caption_too_long", f"has a caption of {len(caption):,} characters: at most {MOST_CAPTION_CHARS:,}"
            )
        else:
            self.captions[of] = caption


def _is_litter(name: str) -> bool:
    """What systems leave in folders."""
    return any(part.startswith(".") or part.lower() in LITTER for part in PurePosixPath(name).parts)
