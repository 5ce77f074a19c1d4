"""The file of a batch: JSON lines, each a request with the name under which its caller finds the answer again.

Checked by the relay when it comes, and read by a gpu, which must count the rows alike. What is in a body beyond its
model is for the gpu to judge, row by row. The standard library only.
https://platform.openai.com/docs/guides/batch
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datafile import Checked, RowError, read

MAX_ROWS = 50_000
MAX_ID_CHARS = 512
MOST_ANSWERS = 8  # to one row
USUAL_TOKENS = {"/v1/chat/completions": 256, "/v1/completions": 16}  # of an answer, where no smaller limit is named
NEEDS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}  # by endpoint, and what a body must have
FIELDS = {"custom_id", "method", "url", "body"}


@dataclass(frozen=True)
class Row:
    number: int  # from 0; lines that are empty don't count
    line: int  # from 1
    custom_id: str
    url: str
    body: dict[str, Any]

    @property
    def model(self) -> str:
        return str(self.body["model"])

    @property
    def tokens(self) -> int:
        """That its answers will likely have: a guess, for its share of the gpus' time."""
        usual, n = USUAL_TOKENS[self.url], self.body.get("n")
        limits = [self.body.get("max_completion_tokens"), self.body.get("max_tokens")]
        least = min([usual, *(limit for limit in limits if isinstance(limit, int) and limit > 0)])
        return least * (n if isinstance(n, int) and 1 <= n <= MOST_ANSWERS else 1)


@dataclass
class Report(Checked[RowError]):
    url: str = ""  # of all rows
    model: str = ""  # likewise
    tokens: int = 0  # of all answers, likely

    def summary(self) -> str:
        """One message for a person, with line numbers."""
        if not self.counts:
            return f"{self.rows:,} rows" if self.rows else "the file has no rows: each line is a request, as JSON"
        return f"{self.counts.total():,} lines can't be used: {self.shown()}"


def rows(path: Path) -> Iterator[Row | RowError]:
    """Every row in its order; a bad one is an error in its place. Memory holds one."""
    with path.open("rb") as file:
        for number, (line, value) in enumerate(read(file, "jsonl")):
            yield value if isinstance(value, RowError) else _row(number, line, value)


def check(path: Path) -> Report:
    """All that can be said of a file without a model. Blocks: it reads the file through."""
    report, seen = Report(), dict[str, int]()
    for row in rows(path):
        if isinstance(row, RowError):
            report.add(row)
            continue
        report.rows += 1
        report.tokens += row.tokens
        report.url, report.model = report.url or row.url, report.model or row.model
        if report.rows > MAX_ROWS:
            report.add(RowError(row.line, "too_many_rows", f"a batch has {MAX_ROWS:,} rows at most: make several"))
            break
        if (first := seen.setdefault(row.custom_id, row.line)) != row.line:
            message = f"custom_id '{row.custom_id[:100]}' stands in line {first} already: each is there once"
            report.add(RowError(row.line, "duplicate_custom_id", message))
        if row.url != report.url:
            message = f"url is '{row.url}', and '{report.url}' before: a batch has one"
            report.add(RowError(row.line, "mismatched_url", message))
        if row.model != report.model:
            message = f"model is '{row.model[:100]}', and '{report.model[:100]}' before: a batch has one"
            report.add(RowError(row.line, "mismatched_model", message))
    return report


def _row(number: int, line: int, value: Any) -> Row | RowError:
    def wrong(message: str) -> RowError:
        return RowError(line, "invalid_row", message)

    if not isinstance(value, dict):
        return wrong('a row is an object: {"custom_id": ..., "method": "POST", "url": ..., "body": {...}}')
    if more := value.keys() - FIELDS:
        return wrong(f"'{min(more)[:100]}' is no field of a row: they are {', '.join(sorted(FIELDS))}")
    custom_id, url, body = value.get("custom_id"), value.get("url"), value.get("body")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_ID_CHARS:
        return wrong(f"custom_id: use a text of 1 to {MAX_ID_CHARS} characters")
    if value.get("method") != "POST":
        return wrong("method: use 'POST'")
    if not isinstance(url, str) or url not in NEEDS:
        return wrong(f"url: use {' or '.join(repr(known) for known in NEEDS)}")
    if not isinstance(body, dict):
        return wrong(f"body: give the object that {url} takes")
    if not isinstance(body.get("model"), str) or not body["model"]:
        return wrong("body.model: name a model")
    if not body.get(NEEDS[url]):
        return wrong(f"body.{NEEDS[url]}: is missing")
    if body.get("stream"):
        return wrong("body.stream: leave it out, for nobody listens")
    return Row(number, line, custom_id, url, body)


def spans(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Row numbers as few ranges, both ends included."""
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


def members(ranges: Iterable[tuple[int, int]]) -> set[int]:
    return {number for first, last in ranges for number in range(first, last + 1)}
