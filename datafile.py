"""From the bytes of a training file to values, each with its line: JSON lines, a JSON array, CSV, plain text.

Streams: memory holds one value, whatever the file's size, and a bad one is an error in its place. What a value means is
dataset.py's. The standard library only.
"""

import codecs
import csv
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import IO, Any, Generic, Literal, TypeVar

MAX_LINE_BYTES = 4_000_000  # a line or value longer than this is refused rather than held in memory
PASSAGE_CHARS = 2000  # of plain text, that make a row
READ_BYTES = 2**16
SHOWN_CHARS = 300  # of one error: it may quote the file
SHOWN_ERRORS, SHOWN_OF_CODE = 20, 3
SUMMED_UP = 5
BOM = b"\xef\xbb\xbf"  # editors on Windows put it first
SEPARATORS = ",;\t"
COLUMNS = frozenset(
    {"prompt", "completion", "text", "instruction", "input", "output", "system", "messages", "file_name"}
)
Kind = Literal["jsonl", "json", "csv", "text"]
BY_SUFFIX: dict[str, Kind] = {".csv": "csv", ".tsv": "csv", ".txt": "text", ".md": "text", ".text": "text"}


@dataclass(frozen=True)
class RowError:
    line: int  # from 1
    code: str
    message: str

    @property
    def where(self) -> str:
        return f"line {self.line}"


@dataclass(frozen=True)
class FileError:
    """Of an archive."""

    name: str  # within it, or its own
    code: str
    message: str

    @property
    def where(self) -> str:
        return self.name


E = TypeVar("E", RowError, FileError)


@dataclass
class Checked(Generic[E]):
    """What a look at a file has found; what more there is to say of its kind is said by who looks."""

    rows: int = 0  # that are sound
    counts: Counter[str] = field(default_factory=Counter)  # errors by code
    errors: list[E] = field(default_factory=list)  # the first SHOWN_ERRORS, and the first few of each code

    def add(self, error: E) -> None:
        self.counts[error.code] += 1
        if len(self.errors) < SHOWN_ERRORS or self.counts[error.code] <= SHOWN_OF_CODE:
            self.errors.append(error)

    @property
    def ok(self) -> bool:
        return self.rows > 0 and not self.counts

    def by_code(self) -> str:
        return ", ".join(f"{count:,} {code}" for code, count in self.counts.most_common())

    def shown(self) -> str:
        """The first few, and one of each code in any case."""
        firsts = {error.code: at for at, error in reversed(list(enumerate(self.errors)))}.values()
        order = sorted(range(len(self.errors)), key=lambda at: (at not in firsts, at))
        picked = [self.errors[at] for at in sorted(order[: max(SUMMED_UP, len(firsts))])]
        more = self.counts.total() - len(picked)
        return "; ".join(f"{e.where}: {e.message}" for e in picked) + (f"; and {more:,} more" if more > 0 else "")


@dataclass(frozen=True)
class Passage:
    """Of plain text. `last`: the text ends with it."""

    text: str
    last: bool


Value = tuple[int, Any]  # the line where it begins, and a decoded JSON value, a Passage or a RowError


def kind_of(path: Path, name: str = "") -> Kind:
    """By the file's name where that says it, else by how it begins."""
    if by_name := BY_SUFFIX.get(PurePath(name).suffix.lower()):
        return by_name
    with path.open("rb") as file:
        start = file.read(READ_BYTES).removeprefix(BOM).lstrip()
    if start.startswith(b"["):
        return "json"
    head = start.partition(b"\n")[0].decode(errors="replace").strip()
    return "csv" if not start.startswith(b"{") and _separator(head) else "jsonl"


def values(path: Path, name: str = "") -> Iterator[Value]:
    """Every value of the file, in its order."""
    with path.open("rb") as file:
        yield from read(file, kind_of(path, name))


def read(file: IO[bytes], kind: Kind) -> Iterator[Value]:
    return {"jsonl": _json_lines, "json": _json_array, "csv": _csv, "text": _text}[kind](file)


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """Each line with its number; None for one that is too long, which is skipped."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
            yield number, None
        else:
            yield number, line.removeprefix(BOM) if number == 1 else line


def _too_long(line: int) -> RowError:
    return RowError(line, "line_too_long", f"longer than {MAX_LINE_BYTES:,} bytes")


# --- JSON ------------------------------------------------------------------------------------------------------------


def _json_lines(file: IO[bytes]) -> Iterator[Value]:
    for number, line in _lines(file):
        if line is None:
            yield number, _too_long(number)
        elif line.strip():
            yield number, _json(number, line)


def _json(number: int, line: bytes) -> Any:
    try:
        value = DECODER.decode(line.decode())
        if b"\\ud" in line.lower():  # an escape may name half of a surrogate pair, which no tokenizer takes
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        return _not_utf8(number)
    except UnicodeEncodeError as exc:
        return RowError(number, "bad_escape", f"\\u{ord(exc.object[exc.start]):x} is half of a character, alone")
    except (ValueError, RecursionError) as exc:
        return RowError(number, "not_json", f"not JSON: {exc}"[:SHOWN_CHARS])
    return value


def _not_utf8(number: int) -> RowError:
    return RowError(number, "not_utf8", "not UTF-8: save the file as UTF-8")


def _json_array(file: IO[bytes]) -> Iterator[Value]:
    """One array of rows, as data sets are often published. Behind a value that is no JSON nothing can be told apart."""
    window = _Window(file)
    opened = False
    try:
        while True:
            window.skip(" \t\r\n," if opened else " \t\r\n")
            if not window.left:
                if not window.more():
                    yield window.line, RowError(window.line, "not_json", "the array does not end: its ] is missing")
                    return
            elif not opened:
                opened = True
                window.advance(1)  # [
            elif window.text[window.at] == "]":
                return
            else:
                line = window.line
                try:
                    value, end = DECODER.raw_decode(window.text, window.at)
                except (ValueError, RecursionError) as exc:
                    if window.left > MAX_LINE_BYTES:
                        yield line, _too_long(line)
                        return
                    if not window.more():
                        yield line, RowError(line, "not_json", f"not JSON: {exc}"[:SHOWN_CHARS])
                        return
                    continue
                yield line, _half(line, value, window.text[window.at : end]) or value
                window.advance(end - window.at)
    except UnicodeDecodeError:
        yield window.line, _not_utf8(window.line)


class _Window:
    """Text of a file, of which the part before `at` is done with."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.line = "", 0, 1

    @property
    def left(self) -> int:
        return len(self.text) - self.at

    def more(self) -> bool:
        """False at the end of the file. Raises UnicodeDecodeError."""
        data = self._file.read(READ_BYTES)
        self.text, self.at = self.text[self.at :] + self._decoder.decode(data, final=not data), 0
        return bool(data)

    def skip(self, characters: str) -> None:
        end = self.at
        while end < len(self.text) and self.text[end] in characters:
            end += 1
        self.advance(end - self.at)

    def advance(self, count: int) -> None:
        self.line += self.text.count("\n", self.at, self.at + count)
        self.at += count


def _half(line: int, value: Any, text: str) -> RowError | None:
    """Of a surrogate pair: JSON can name it, no tokenizer takes it."""
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as exc:
            return RowError(line, "bad_escape", f"\\u{ord(exc.object[exc.start]):x} is half of a character, alone")
    return None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is Python's, not JSON's")  # the decoder would take it


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):  # the decoder would keep the last one, and nobody would know
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return value


DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_no_duplicates)


# --- CSV and text ----------------------------------------------------------------------------------------------------


def _separator(head: str) -> str | None:
    """What parts the columns of a header line that names columns we know; one column needs none."""
    for separator in SEPARATORS:
        names = [name.strip().strip('"').lower() for name in head.split(separator)]
        if len(names) > 1 and COLUMNS & set(names):
            return separator
    return "," if head.strip().strip('"').lower() == "text" else None


def _csv(file: IO[bytes]) -> Iterator[Value]:
    """Rows by the names in the first line."""
    csv.field_size_limit(MAX_LINE_BYTES)
    bad: list[RowError] = []
    begins = 0  # the line of the row that is being read, once it has begun

    def decoded() -> Iterator[str]:
        nonlocal begins
        for number, line in _lines(file):
            if line is None:
                bad.append(_too_long(number))
                continue
            try:
                text = line.decode()
            except UnicodeDecodeError:
                bad.append(_not_utf8(number))
                continue
            begins = begins or number
            yield text

    lines = decoded()
    head = next((line for line in lines if line.strip()), "")
    separator = _separator(head.strip())
    if separator is None:
        if head or bad:
            names = "prompt,completion or instruction,input,output or text"
            yield 1, RowError(1, "no_header", f"the first line must name the columns: {names}")
        return
    [columns] = csv.reader([head.strip()], delimiter=separator)
    columns = [column.strip().lower() for column in columns]
    reader = csv.reader(lines, delimiter=separator, strict=True)
    while True:
        begins, error = 0, None
        try:
            cells = next(reader, None)
        except csv.Error as exc:
            error = RowError(begins, "bad_csv", f"not CSV: {exc}; is a quote missing?")
        yield from ((one.line, one) for one in bad)
        bad.clear()
        if error:
            yield begins, error  # where the next row begins can't be told
            return
        if cells is None:
            return
        if cells:
            yield begins, _cells(begins, columns, cells)


def _cells(line: int, columns: list[str], cells: list[str]) -> Any:
    if len(cells) > len(columns):
        return RowError(line, "bad_csv", f"has {len(cells)} columns, and the first line names {len(columns)}")
    return dict(zip(columns, cells, strict=False))


def _text(file: IO[bytes]) -> Iterator[Value]:
    waiting: tuple[int, str] | None = None
    for line, found in _passages(file):
        if isinstance(found, RowError):
            yield line, found
            continue
        if waiting:
            yield waiting[0], Passage(waiting[1], last=False)
        waiting = line, found
    if waiting:
        yield waiting[0], Passage(waiting[1].rstrip(), last=True)


def _passages(file: IO[bytes]) -> Iterator[tuple[int, str | RowError]]:
    """Paragraphs gathered up to PASSAGE_CHARS; a longer one is cut at the end of a line, or of a word."""
    held, begins = "", 1
    for number, raw in _lines(file):
        if raw is None:
            yield number, _too_long(number)
            continue
        try:
            line = raw.decode().replace("\r\n", "\n")
        except UnicodeDecodeError:
            yield number, _not_utf8(number)
            continue
        ends = not line.strip() and len(held) >= PASSAGE_CHARS // 2
        if held.strip() and (ends or len(held) + len(line) > PASSAGE_CHARS):
            yield begins, held
            held = ""
        if not held.strip():
            held, begins = "", number
        held, at = held + line, 0
        while len(held) - at > PASSAGE_CHARS:
            cut = held.rfind(" ", at + PASSAGE_CHARS // 2, at + PASSAGE_CHARS) + 1 or at + PASSAGE_CHARS
            yield begins, held[at:cut]
            at = cut
        held = held[at:]
    if held.strip():
        yield begins, held
