"""What a training file may look like, read row by row; the standard library only.

Both services need it: the relay refuses a bad file at upload, with line numbers, before any gpu is bothered; the gpu
turns the same rows into tokens. It knows no tokenizer and no chat template. Nothing loads whole.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_LINE_BYTES = 4_000_000  # a line longer than this is refused rather than held in memory
SHOWN_ERRORS = 20
SHOWN_CHARS = 300  # of one error: it may quote the file
ROLES = ("system", "user", "assistant")
FORMATS = (
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, '
    '{"prompt": "...", "completion": "..."} or {"text": "..."}'
)


@dataclass(frozen=True)
class Chat:
    """The model learns what the assistant says, and `weight: 0` leaves a turn out, as in the OpenAI API."""

    messages: list[dict[str, str]]  # role, content
    learn: list[bool]  # by message


@dataclass(frozen=True)
class Completion:
    """The model learns the completion. Plain text is a completion of nothing."""

    prompt: str
    completion: str


Row = Chat | Completion


@dataclass(frozen=True)
class RowError:
    line: int  # from 1
    code: str
    message: str


@dataclass
class Report:
    rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)  # errors by code
    errors: list[RowError] = field(default_factory=list)  # the first SHOWN_ERRORS of them

    def add(self, error: RowError) -> None:
        self.counts[error.code] += 1
        if len(self.errors) < SHOWN_ERRORS:
            self.errors.append(error)

    @property
    def ok(self) -> bool:
        return self.rows > 0 and not self.counts

    def summary(self) -> str:
        """One message for a person: how many, and the first few by line."""
        if not self.counts:
            return f"{self.rows} rows" if self.rows else f"the file has no rows: each line is {FORMATS}"
        bad = self.counts.total()
        shown = "; ".join(f"line {e.line}: {e.message}" for e in self.errors[:5])
        more = f"; and {bad - 5} more" if bad > 5 else ""
        return f"{bad} of {self.rows + bad} lines can't be used: {shown}{more}"


def check(path: Path) -> Report:
    report = Report()
    for _, row in read(path):
        if isinstance(row, RowError):
            report.add(row)
        else:
            report.rows += 1
    return report


def read(path: Path) -> Iterator[tuple[int, Row | RowError]]:
    """Every line that is not blank, with its number from 1."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES)
                yield number, RowError(number, "line_too_long", f"longer than {MAX_LINE_BYTES:,} bytes")
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # editors on Windows put a byte order mark first
            if line.strip():
                yield number, _row(number, line)


def _row(number: int, line: bytes) -> Row | RowError:
    try:
        value = json.loads(line.decode(), parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
        if b"\\ud" in line.lower():  # an escape may name half of a surrogate pair, which no tokenizer takes
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        return RowError(number, "not_utf8", "not UTF-8: save the file as UTF-8")
    except UnicodeEncodeError as exc:
        return RowError(number, "bad_escape", f"\\u{ord(exc.object[exc.start]):x} is half of a character, alone")
    except (ValueError, RecursionError) as exc:
        return RowError(number, "not_json", f"not JSON: {exc}"[:SHOWN_CHARS])
    try:
        return parse(value)
    except ValueError as exc:
        code, message = exc.args
        return RowError(number, code, message[:SHOWN_CHARS])


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is Python's, not JSON's")  # json.loads would take it


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):  # json.loads would keep the last one, and nobody would know
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return value


def parse(value: Any) -> Row:
    """One decoded line. Raises ValueError(code, message)."""
    if not isinstance(value, dict):
        raise ValueError("not_an_object", f"a {type(value).__name__}, not an object: each line is {FORMATS}")
    if "messages" in value:
        return _chat(value["messages"])
    if "completion" in value:
        prompt, completion = value.get("prompt"), value["completion"]
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise ValueError("bad_completion", "'prompt' and 'completion' must both be strings")
        if not completion:
            raise ValueError("nothing_to_learn", "'completion' is empty")
        return Completion(prompt, completion)
    if "text" in value:
        if not isinstance(value["text"], str) or not value["text"]:
            raise ValueError("bad_text", "'text' must be a string that is not empty")
        return Completion("", value["text"])
    found = ", ".join(f"'{k}'" for k in list(value)[:5]) or "nothing"
    raise ValueError("unknown_format", f"has {found}: each line is {FORMATS}")


def _chat(messages: Any) -> Chat:
    if not isinstance(messages, list) or not messages:
        raise ValueError("bad_messages", "'messages' must be a list that is not empty")
    clean, learn = [], []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise ValueError("bad_message", f"{where} is no object with 'role' and 'content'")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError("bad_role", f"{where}.role is {role!r}: use {', '.join(ROLES)}")
        if not isinstance(content, str) or not content:
            raise ValueError("bad_content", f"{where}.content must be a string that is not empty")
        weight = message.get("weight", 1)
        if type(weight) is not int or weight not in (0, 1):
            raise ValueError("bad_weight", f"{where}.weight is {weight!r}: use 0 or 1")
        clean.append({"role": role, "content": content})
        learn.append(role == "assistant" and bool(weight))
    if not any(learn):
        raise ValueError("nothing_to_learn", "no assistant message to learn from")
    return Chat(clean, learn)
