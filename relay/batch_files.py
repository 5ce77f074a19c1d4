"""The two files of a batch that has ended, out of its own file and the parts that came: answers, and errors.

Each row of the batch stands in one of them, once, in the batch's order. Made again they are the same to the byte. Knows
no database. https://platform.openai.com/docs/guides/batch
"""

import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

import batchfile
import wire
from relay import errors

log = logging.getLogger("relay.batch_files")

OPEN_AT_ONCE = 64  # parts: rows come nearly in their order, and not all may have room on this disk
Put = Callable[[bytes], None]
Reach = Callable[[int], AbstractContextManager[Path]]  # a part by its number, there for as long as it is read


@dataclass(frozen=True)
class Part:
    """What the lines of a blob say."""

    rows: frozenset[int]
    completed: int
    failed: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


def read_part(path: Path) -> Part:
    """Blocks. Raises InvalidRequest for what is no part."""
    rows, completed, used = set[int](), 0, [0, 0, 0]
    try:
        with path.open("rb") as file:
            for line in file:
                answer = wire.RowAnswer.model_validate_json(line)
                if answer.row in rows:
                    raise errors.InvalidRequest(f"row {answer.row} stands twice in the part", param="sha256")
                rows.add(answer.row)
                completed += answer.status_code == 200
                used = [old + new for old, new in zip(used, _usage(answer.body), strict=True)]
    except FileNotFoundError:
        message = f"part {path.name} is not stored here: upload it, then say this again"
        raise errors.InvalidRequest(message, param="sha256", code="blob_missing") from None
    except ValidationError as exc:
        raise errors.InvalidRequest(f"line {len(rows) + 1} of the part is no answer", param="sha256") from exc
    if not rows:
        raise errors.InvalidRequest("the part has no rows", param="sha256")
    return Part(frozenset(rows), completed, len(rows) - completed, *used)


def _usage(body: dict[str, Any]) -> tuple[int, int, int]:
    """Tokens of the prompt, those known of it, and of the answer; 0 where an error has none."""
    told = body.get("usage")
    usage: dict[str, Any] = told if isinstance(told, dict) else {}
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else 0
    found = [usage.get("prompt_tokens"), cached, usage.get("completion_tokens")]
    prompt, known, completion = (n if isinstance(n, int) and 0 <= n <= wire.MAX_COUNT else 0 for n in found)
    return prompt, known, completion


def write(
    batch_id: str,
    rows: Path,
    n_parts: int,
    reach: Reach,
    missing: tuple[str, str],
    put_answer: Put,
    put_error: Put,
) -> tuple[int, int]:
    """How many lines went to `put_answer`, and how many to `put_error`.

    `missing`: the code and the message of rows without an answer. Blocks: it reads everything through. Raises
    FileNotFoundError where `rows` is gone; a part that is gone leaves its rows without an answer.
    """
    counts, at = [0, 0], _index(n_parts, reach)
    with ExitStack() as stack:
        opened = dict[int, IO[bytes]]()
        for row in batchfile.rows(rows):
            assert isinstance(row, batchfile.Row), "it was checked when it came"
            line: dict[str, Any] = {"id": _line_id(batch_id, row.number), "custom_id": row.custom_id}
            good = False
            if place := at.get(row.number):
                part, begins, length = place
                if part not in opened:
                    if len(opened) >= OPEN_AT_ONCE:
                        stack.close()
                        opened.clear()
                    opened[part] = stack.enter_context(stack.enter_context(reach(part)).open("rb"))
                opened[part].seek(begins)
                answer = json.loads(opened[part].read(length))
                good = answer["status_code"] == 200
                line["response"] = {key: answer[key] for key in ("status_code", "request_id", "body")}
                line["error"] = None
            else:
                line |= {"response": None, "error": {"code": missing[0], "message": missing[1]}}
            (put_answer if good else put_error)(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            counts[not good] += 1
    return counts[0], counts[1]


def _index(n_parts: int, reach: Reach) -> dict[int, tuple[int, int, int]]:
    """Where each row's answer is: the part, where in it, and how long."""
    found = dict[int, tuple[int, int, int]]()
    for number in range(n_parts):
        begins = 0
        try:
            with reach(number) as path, path.open("rb") as file:
                for line in file:
                    found.setdefault(json.loads(line)["row"], (number, begins, len(line)))
                    begins += len(line)
        except FileNotFoundError:  # a disk that was restored without it: its rows are told as missing
            log.error("part %d of a batch is gone", number)
    return found


def _line_id(batch_id: str, row: int) -> str:
    return f"batch_req_{hashlib.sha256(f'{batch_id}/{row}'.encode()).hexdigest()[:24]}"
