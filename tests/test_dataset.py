"""Training files as people make them: every line is a row, or an error that names the line."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dataset

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def write(tmp_path: Path, *lines: object) -> Path:
    path = tmp_path / "train.jsonl"
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(raw))
    return path


def codes(path: Path) -> list[tuple[int, str]]:
    """(line, error code or "ok") of every line."""
    return [(n, row.code if isinstance(row, dataset.RowError) else "ok") for n, row in dataset.read(path)]


def test_the_three_formats_are_read_as_what_they_mean(tmp_path: Path) -> None:
    path = write(tmp_path, CHAT, {"prompt": "a", "completion": "b"}, {"text": "c"})
    assert [row for _, row in dataset.read(path)] == [
        dataset.Chat(CHAT["messages"], [False, True]),
        dataset.Completion("a", "b"),
        dataset.Completion("", "c"),
    ]


def test_byte_order_mark_windows_line_ends_and_blank_lines_are_no_errors_and_lines_keep_their_numbers(
    tmp_path: Path,
) -> None:
    line = json.dumps(CHAT).encode()
    path = write(tmp_path, b"\xef\xbb\xbf" + line + b"\r", b"\r", b"", b"  \t", line + b"\r", b"")
    assert codes(path) == [(1, "ok"), (5, "ok")]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b'{"text": "\\ud800"}', "bad_escape"),
        (b'{"text": "ok", "\\uDC00": 1}', "bad_escape"),
        (b'{"text": "a", "x": NaN}', "not_json"),
        (b'{"text": -Infinity}', "not_json"),
        (b'{"text": "a", "text": "b"}', "not_json"),
        (b'{"\\ud800": 1, "\\ud800": 2}', "not_json"),
        (b'{"text": "cut', "not_json"),
        (b"[" * 100_000, "not_json"),
        (b"1" * 10_000, "not_json"),
        (b'{"text": "\xff"}', "not_utf8"),
        ('{"text": "a"}'.encode("utf-16"), "not_utf8"),
        (b"null", "not_an_object"),
        ([CHAT], "not_an_object"),
        ({}, "unknown_format"),
        ({"instruction": "a", "output": "b"}, "unknown_format"),
        ({"text": ""}, "bad_text"),
        ({"text": None}, "bad_text"),
        ({"completion": "a"}, "bad_completion"),
        ({"prompt": 1, "completion": "a"}, "bad_completion"),
        ({"prompt": "a", "completion": ""}, "nothing_to_learn"),
        ({"messages": []}, "bad_messages"),
        ({"messages": {"role": "user"}}, "bad_messages"),
        ({"messages": ["hi"]}, "bad_message"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "bad_role"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "bad_role"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "bad_content"),
        ({"messages": [{"role": "user", "content": ""}]}, "bad_content"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": True}]}, "bad_weight"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, "bad_weight"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": []}]}, "bad_weight"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0}]}, "nothing_to_learn"),
        ({"messages": [{"role": "user", "content": "a"}]}, "nothing_to_learn"),
    ],
)
def test_a_line_that_cannot_be_used_is_refused_by_number_and_the_lines_around_it_are_read(
    tmp_path: Path, line: object, code: str
) -> None:
    path = write(tmp_path, CHAT, line, CHAT)
    if line == '{"text": "a"}'.encode("utf-16"):
        path = write(tmp_path, CHAT, b"\xff\xfe{\x00", CHAT)
    assert codes(path) == [(1, "ok"), (2, code), (3, "ok")]
    for error in dataset.check(path).errors:
        assert len(error.message) <= dataset.SHOWN_CHARS
        error.message.encode()  # fit for a response


def test_whole_surrogate_pairs_are_characters(tmp_path: Path) -> None:
    path = write(tmp_path, b'{"text": "\\ud83d\\ude00"}', b'{"text": "\\\\ud800"}')
    assert [row for _, row in dataset.read(path)] == [
        dataset.Completion("", "😀"),
        dataset.Completion("", "\\ud800"),
    ]


def test_a_line_that_is_too_long_is_refused_without_losing_count(tmp_path: Path) -> None:
    limit = dataset.MAX_LINE_BYTES
    exact = b'{"text": "' + b"a" * (limit - 13) + b'"}'
    path = write(tmp_path, b"x" * (3 * limit + 7), exact, b"x" * limit, CHAT)
    assert len(exact) + 1 == limit
    assert codes(path) == [(1, "line_too_long"), (2, "ok"), (3, "line_too_long"), (4, "ok")]


def test_weight_zero_leaves_a_turn_out(tmp_path: Path) -> None:
    turns: list[dict[str, Any]] = [
        {"role": "assistant", "content": "a", "weight": 0},
        {"role": "assistant", "content": "b", "weight": 1},
        {"role": "user", "content": "c", "weight": 1},
    ]
    [(_, row)] = dataset.read(write(tmp_path, {"messages": turns}))
    assert isinstance(row, dataset.Chat)
    assert row.learn == [False, True, False]
    assert row.messages[0] == {"role": "assistant", "content": "a"}


def test_the_report_counts_every_error_and_shows_the_first_by_line(tmp_path: Path) -> None:
    report = dataset.check(write(tmp_path, CHAT, *[b"?"] * 30, {"text": ""}))
    assert (report.rows, dict(report.counts), report.ok) == (1, {"not_json": 30, "bad_text": 1}, False)
    assert [e.line for e in report.errors] == list(range(2, 2 + dataset.SHOWN_ERRORS))
    assert report.summary().startswith("31 of 32 lines can't be used: line 2: not JSON")
    assert report.summary().endswith("and 26 more")


def test_an_empty_file_is_not_ok_and_says_what_a_line_looks_like(tmp_path: Path) -> None:
    report = dataset.check(write(tmp_path, b"\n\n"))
    assert not report.ok
    assert '"messages"' in report.summary()


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5), st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_what_was_written_is_what_is_read(tmp_path: Path, pairs: list[tuple[str, str]], ascii_only: bool) -> None:
    lines = [json.dumps({"prompt": p, "completion": c}, ensure_ascii=ascii_only).encode() for p, c in pairs]
    rows = [row for _, row in dataset.read(write(tmp_path, *lines))]
    assert rows == [dataset.Completion(p, c) for p, c in pairs]


@given(st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
def test_no_bytes_at_all_make_it_fail(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(raw)
    dataset.check(path).summary().encode()
