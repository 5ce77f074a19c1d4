"""What the rows of a training file mean; the standard library only.

Both services need it: the relay refuses a bad file at upload, with line numbers, before any gpu is bothered; the gpu
turns the same rows into tokens. It knows no tokenizer and no chat template. Nothing loads whole.
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datafile import SHOWN_CHARS, SHOWN_ERRORS, Checked, Passage, RowError, values

ROLES = ("system", "user", "assistant", "tool")
# Who speaks in ShareGPT's rows, in our words.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
FORMATS = (
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, '
    '{"prompt": "...", "completion": "..."}, {"instruction": "...", "output": "..."}, {"conversations": [...]} or '
    '{"text": "..."}'
)


@dataclass(frozen=True)
class Chat:
    """The model learns what the assistant says, and `weight: 0` leaves a turn out, as in the OpenAI API."""

    messages: list[dict[str, Any]]  # role, content, and of tools what the template may want
    learn: list[bool]  # by message
    tools: list[Any] | None = None  # that the assistant may call, as the template gets them


@dataclass(frozen=True)
class Completion:
    """The model learns the completion. Plain text is a completion of nothing."""

    prompt: str
    completion: str
    ends: bool = True  # the model learns to stop there; a passage of a longer text goes on


Row = Chat | Completion


@dataclass
class Report(Checked[RowError]):
    kinds: Counter[str] = field(default_factory=Counter)  # of rows
    duplicates: int = 0
    duplicate_lines: list[int] = field(default_factory=list)  # the first SHOWN_ERRORS of them
    compared: int = 0  # rows that duplicates were looked for among: the first so many
    characters: int = 0

    def summary(self) -> str:
        """One message for a person: how many of which kind, and the first few by line."""
        if not self.counts:
            return f"{self.rows} rows" if self.rows else f"the file has no rows: each line is {FORMATS}"
        bad = self.counts.total()
        kinds = f" ({self.by_code()})" if len(self.counts) > 1 else ""
        return f"{bad:,} of {self.rows + bad:,} lines can't be used{kinds}: {self.shown()}"

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "rows": self.rows,
            "kinds": dict(self.kinds),
            "characters": self.characters,
            "errors": dict(self.counts),
            "first_errors": [{"line": e.line, "code": e.code, "message": e.message} for e in self.errors],
            "duplicates": self.duplicates,
            "duplicate_lines": self.duplicate_lines,
            "compared_rows": self.compared,
        }


def check(path: Path, name: str = "") -> Report:
    """All of a file. Memory does not grow with it: duplicates are looked for among the first million rows or so."""
    report, seen = Report(), _Seen()
    for line, row in read(path, name):
        if isinstance(row, RowError):
            report.add(row)
            continue
        report.rows += 1
        content = as_line(row)
        report.kinds[_kind(row)] += 1
        report.characters += _characters(row)
        found = seen.add(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") or 1)
        report.compared += found is not None
        if found:
            report.duplicates += 1
            if len(report.duplicate_lines) < SHOWN_ERRORS:
                report.duplicate_lines.append(line)
    return report


def sample(path: Path, name: str, rows: int, most: int, most_bytes: int) -> list[tuple[int, dict[str, Any]]]:
    """Of a sound file with so many rows: every n-th as JSON with its line, so that they come from all of it."""
    every, found, size_bytes = max(1, -(-rows // most)), list[tuple[int, dict[str, Any]]](), 0
    for index, (line, row) in enumerate(read(path, name)):
        if index % every or isinstance(row, RowError):
            continue
        value = as_json(row)
        size_bytes += len(json.dumps(value))
        if size_bytes > most_bytes and found:
            break
        found.append((line, value))
    return found


class _Seen:
    """A set of 64-bit numbers above 0 in 32 MB at most: open addressing, doubled until it is full."""

    MOST_SLOTS = 2**22

    def __init__(self) -> None:
        self._slots, self._held = array("Q", bytes(8 * 2**12)), 0

    def add(self, number: int) -> bool | None:
        """Whether it was there. None: it was not, and there is no room left."""
        at = self._find(number)
        if self._slots[at]:
            return True
        if 4 * self._held >= 3 * len(self._slots):
            if len(self._slots) >= self.MOST_SLOTS:
                return None
            old, self._slots = self._slots, array("Q", bytes(2 * 8 * len(self._slots)))
            for known in old:
                if known:
                    self._slots[self._find(known)] = known
            at = self._find(number)
        self._slots[at] = number
        self._held += 1
        return False

    def _find(self, number: int) -> int:
        """Its slot, or the empty one where it belongs."""
        mask = len(self._slots) - 1
        at = number & mask
        while self._slots[at] not in (0, number):
            at = (at + 1) & mask
        return at


def as_json(row: Row) -> dict[str, Any]:
    """A row that reads as this one again, passages of text aside."""
    if isinstance(row, Completion):
        return {"prompt": row.prompt, "completion": row.completion} if row.prompt else {"text": row.completion}
    learned = zip(row.messages, row.learn, strict=True)
    messages = [m if learn or m["role"] != "assistant" else {**m, "weight": 0} for m, learn in learned]
    return {"messages": messages} | ({"tools": row.tools} if row.tools else {})


def as_line(row: Row) -> bytes:
    """As it stands in a file of JSON lines."""
    return json.dumps(as_json(row), ensure_ascii=False).encode() + b"\n"


def _kind(row: Row) -> str:
    return "chat" if isinstance(row, Chat) else "completion" if row.prompt else "text"


def _characters(row: Row) -> int:
    if isinstance(row, Completion):
        return len(row.prompt) + len(row.completion)
    return sum(len(message["content"]) for message in row.messages)


def read(path: Path, name: str = "") -> Iterator[tuple[int, Row | RowError]]:
    """Every row with the line where it begins. `name` is the file's own, which may say its kind."""
    for line, value in values(path, name):
        if isinstance(value, RowError):
            yield line, value
        elif isinstance(value, Passage):
            yield line, Completion("", value.text, ends=value.last)
        else:
            yield line, _row(line, value)


def _row(line: int, value: Any) -> Row | RowError:
    try:
        return parse(value)
    except ValueError as exc:
        code, message = exc.args
        return RowError(line, code, message[:SHOWN_CHARS])


def parse(value: Any) -> Row:
    """One decoded line. Raises ValueError(code, message)."""
    if not isinstance(value, dict):
        raise ValueError("not_an_object", f"a {type(value).__name__}, not an object: each line is {FORMATS}")
    if "messages" in value:
        return _chat(value["messages"], value.get("tools"))
    if "conversations" in value:
        return _chat(_spoken(value["conversations"]), None)
    if "instruction" in value:
        return _instruction(value)
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


def _instruction(value: Mapping[str, Any]) -> Row:
    """Alpaca's: what is to be done, with what, and the answer."""
    fields = {name: value.get(name) or "" for name in ("system", "instruction", "input", "output")}
    for name, text in fields.items():
        if not isinstance(text, str) or (not text and name in ("instruction", "output")):
            raise ValueError("bad_instruction", f"'{name}' must be a string that is not empty")
    asked = "\n\n".join(text for text in (fields["instruction"], fields["input"]) if text)
    turns = [("system", fields["system"]), ("user", asked), ("assistant", fields["output"])]
    return _chat([{"role": role, "content": text} for role, text in turns if text], None)


def _spoken(turns: Any) -> Any:
    """ShareGPT's: `from` and `value`."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("bad_messages", "'conversations' must be a list of objects with 'from' and 'value'")
    if all("role" in turn for turn in turns):
        return turns
    for index, turn in enumerate(turns):
        if not isinstance(turn.get("from"), str) or turn["from"] not in SPEAKERS:
            raise ValueError(
                "bad_role", f"conversations[{index}].from is {turn.get('from')!r}: use {', '.join(SPEAKERS)}"
            )
    return [
        {"role": SPEAKERS[turn["from"]], "content": turn.get("value"), **{k: turn[k] for k in ("weight",) if k in turn}}
        for turn in turns
    ]


def _chat(messages: Any, tools: Any) -> Chat:
    if not isinstance(messages, list) or not messages:
        raise ValueError("bad_messages", "'messages' must be a list that is not empty")
    if tools is not None and not isinstance(tools, list):
        raise ValueError("bad_tools", "'tools' must be a list")
    clean, learn = [], []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise ValueError("bad_message", f"{where} is no object with 'role' and 'content'")
        role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
        if role not in ROLES:
            raise ValueError("bad_role", f"{where}.role is {role!r}: use {', '.join(ROLES)}")
        if calls and (role != "assistant" or not isinstance(calls, list)):
            raise ValueError("bad_tools", f"{where}.tool_calls must be a list, in an assistant's message")
        if content is None and calls:
            content = ""
        if not isinstance(content, str) or not (content or calls):
            raise ValueError("bad_content", f"{where}.content must be a string that is not empty")
        weight = message.get("weight", 1)
        if type(weight) is not int or weight not in (0, 1):
            raise ValueError("bad_weight", f"{where}.weight is {weight!r}: use 0 or 1")
        more = {key: message[key] for key in ("tool_calls", "tool_call_id", "name") if message.get(key)}
        clean.append({"role": role, "content": content, **more})
        learn.append(role == "assistant" and bool(weight))
    if not any(learn):
        raise ValueError("nothing_to_learn", "no assistant message to learn from")
    return Chat(clean, learn, tools or None)
