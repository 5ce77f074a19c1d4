"""What a model will see of some rows: lengths in its tokens, what is cut or refused, and one example with its labels.

Tokenises what it is given, which is a part of a data set; keeps nothing. The formats of rows are dataset.py's.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

import dataset
import wire
from gpu_service.data import Tokenizer, Tokens, TrainOn, tokenize_row
from gpu_service.errors import BadRequest

MOST_ROWS = 2000
SHOWN = 20
SHOWN_TOKENS = 2000  # of the example


class LinedRow(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    line: int = Field(ge=1, le=wire.MAX_COUNT)  # of the file that it comes from
    row: dict[str, Any]


class ReportBody(BaseModel):
    """POST /v1/data/report."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    rows: list[LinedRow] = Field(min_length=1, max_length=MOST_ROWS)
    max_length_tokens: int | wire.Auto = "auto"
    train_on: Literal["completions", "all"] | wire.Auto = "auto"


def build(
    tokenizer: Tokenizer, model: str, rows: Sequence[LinedRow], max_length: int, train_on: TrainOn
) -> dict[str, Any]:
    """Raises BadRequest for a row that is none."""
    lengths: list[int] = []
    refused: list[dict[str, Any]] = []
    cut: list[int] = []
    empty: list[int] = []
    learned = 0
    example: dict[str, Any] | None = None
    for lined in rows:
        try:
            row = dataset.parse(lined.row)
        except ValueError as exc:
            raise BadRequest(f"rows: line {lined.line}: {exc.args[-1]}", param="rows") from exc
        try:
            whole = tokenize_row(tokenizer, row, wire.MAX_COUNT, train_on)
        except BadRequest as exc:
            refused.append({"line": lined.line, "message": exc.message})
            continue
        kept = Tokens(whole.ids[:max_length], whole.learn[:max_length], len(whole.ids) > max_length)
        lengths.append(len(whole.ids))
        learned += sum(kept.learn)
        if kept.truncated:
            cut.append(lined.line)
        if not any(kept.learn):
            empty.append(lined.line)
        elif example is None:
            example = {"line": lined.line, "parts": parts(tokenizer, kept)}
    return {
        "object": "data.report",
        "model": model,
        "max_length_tokens": max_length,
        "train_on": train_on,
        "rows": len(rows),
        "tokens": distribution(lengths),
        "learned_tokens": learned,
        "truncated": len(cut),
        "truncated_lines": cut[:SHOWN],
        "nothing_to_learn": len(empty),
        "nothing_to_learn_lines": empty[:SHOWN],
        "refused": len(refused),
        "first_refused": refused[:SHOWN],
        "example": example,
    }


def distribution(lengths: Sequence[int]) -> dict[str, int]:
    """Of rows in tokens, before any cut: the least, the middle, the most, and their sum."""
    ordered = sorted(lengths) or [0]

    def at(share: float) -> int:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return {
        "total": sum(lengths),
        "shortest": ordered[0],
        "p50": at(0.5),
        "p90": at(0.9),
        "p99": at(0.99),
        "longest": ordered[-1],
    }


def parts(tokenizer: Tokenizer, tokens: Tokens) -> list[dict[str, Any]]:
    """The row as the model reads it, special tokens and all, in pieces that are learned and pieces that are not."""
    marked = list(zip(tokens.ids, tokens.learn, strict=True))[:SHOWN_TOKENS]
    return [
        {"text": tokenizer.decode([token for token, _ in run], skip_special_tokens=False), "learned": learned}
        for learned, run in groupby(marked, key=lambda pair: pair[1])
    ]
