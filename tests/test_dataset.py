"""Training files as people make them: every line is a row, or an error that names the line."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import datafile
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
    return [(n, row.code if isinstance(row, datafile.RowError) else "ok") for n, row in dataset.read(path)]


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
        ({"instruction": "a", "response": "b"}, "bad_instruction"),
        ({"instruction": "a", "input": ["c"], "output": "b"}, "bad_instruction"),
        ({"question": "a"}, "unknown_format"),
        ({"conversations": "hi"}, "bad_messages"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, "bad_role"),
        ({"conversations": [{"from": "gpt", "value": ""}]}, "bad_content"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "bad_tools"),
        ({"messages": [{"role": "assistant", "content": "a"}], "tools": "all"}, "bad_tools"),
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
        assert len(error.message) <= datafile.SHOWN_CHARS
        error.message.encode()  # fit for a response


def test_whole_surrogate_pairs_are_characters(tmp_path: Path) -> None:
    path = write(tmp_path, b'{"text": "\\ud83d\\ude00"}', b'{"text": "\\\\ud800"}')
    assert [row for _, row in dataset.read(path)] == [
        dataset.Completion("", "😀"),
        dataset.Completion("", "\\ud800"),
    ]


def test_a_line_that_is_too_long_is_refused_without_losing_count(tmp_path: Path) -> None:
    limit = datafile.MAX_LINE_BYTES
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
    assert [e.line for e in report.errors] == [*range(2, 2 + datafile.SHOWN_ERRORS), 32]
    assert report.summary().startswith("31 of 32 lines can't be used (30 not_json, 1 bad_text): line 2: not JSON")
    assert "; line 5: not JSON" in report.summary()
    assert "; line 32: " in report.summary()
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


def named(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows_of(path: Path, name: str = "") -> list[Any]:
    return [row for _, row in dataset.read(path, name)]


ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
SHAREGPT = {
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello"},
        {"from": "human", "value": "Bye"},
        {"from": "gpt", "value": "See you"},
    ]
}


def test_alpaca_and_sharegpt_rows_are_conversations_of_which_each_answer_is_learned(tmp_path: Path) -> None:
    alpaca, plain, shared = rows_of(write(tmp_path, ALPACA, {**ALPACA, "input": ""}, SHAREGPT))
    assert [m["content"] for m in alpaca.messages] == ["Add.\n\n1 and 2", "3"]
    assert plain.messages[0]["content"] == "Add."
    assert [m["role"] for m in shared.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert shared.learn == [False, False, True, False, True]


def test_tools_and_their_calls_are_kept_for_the_template(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "x"},
        {"role": "assistant", "content": "Three."},
    ]
    [row] = rows_of(write(tmp_path, {"messages": turns, "tools": [{"type": "function"}]}))
    assert row.learn == [False, True, False, True]
    assert row.messages[1]["tool_calls"] == [call]
    assert row.messages[2] == {"role": "tool", "content": "3", "tool_call_id": "x"}
    assert dataset.parse(json.loads(json.dumps(dataset.as_json(row)))) == row


def test_an_array_of_rows_is_read_as_its_lines_would_be_with_their_lines(tmp_path: Path) -> None:
    content = json.dumps([CHAT, ALPACA, {"text": ""}, SHAREGPT], indent=2)
    found = list(dataset.read(named(tmp_path, "data.json", "\ufeff" + content)))
    assert [type(row).__name__ for _, row in found] == ["Chat", "Chat", "RowError", "Chat"]
    lines = content.split("\n")
    assert all(lines[line - 1].strip().startswith("{") for line, _ in found)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ('[{"text": "a"}', "not_json"),
        ('[{"text": "a"}, oops]', "not_json"),
        ("[[[[", "not_json"),
        ("[NaN]", "not_json"),
    ],
)
def test_an_array_that_breaks_off_says_so_after_the_rows_before(tmp_path: Path, content: str, code: str) -> None:
    assert codes(named(tmp_path, "a", content))[-1][1] == code


def test_csv_is_read_by_the_names_of_its_columns(tmp_path: Path) -> None:
    path = named(tmp_path, "a.csv", '\ufeffPrompt,Completion\n"One, two","three\nfour"\n\nfive,six\n')
    assert list(dataset.read(path)) == [
        (2, dataset.Completion("One, two", "three\nfour")),
        (5, dataset.Completion("five", "six")),
    ]
    german = named(tmp_path, "b", "instruction;input;output\nAdd.;;3\n")
    assert rows_of(german)[0].messages[0] == {"role": "user", "content": "Add."}
    assert rows_of(named(tmp_path, "c.csv", "text\nonly this\n")) == [dataset.Completion("", "only this")]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a,b\n1,2\n", [(1, "no_header")]),
        (b"prompt,completion\na,b\nc,d,e\nf,g\n", [(2, "ok"), (3, "bad_csv"), (4, "ok")]),
        (b'prompt,completion\na,b\n"c,d\ne,f\n', [(2, "ok"), (3, "bad_csv")]),
        (b"prompt,completion\na,\xff\nc,d\n", [(2, "not_utf8"), (3, "ok")]),
        (b"prompt,completion\na,\n", [(2, "nothing_to_learn")]),
    ],
)
def test_bad_csv_is_refused_by_line(tmp_path: Path, content: bytes, expected: list[tuple[int, str]]) -> None:
    path = named(tmp_path, "a", content)
    found = [(n, r.code if isinstance(r, datafile.RowError) else "ok") for n, r in dataset.read(path, "a.csv")]
    assert found == expected


def test_plain_text_is_passages_of_which_only_the_last_ends(tmp_path: Path) -> None:
    paragraph = "Once there was a ship. " * 20
    text = "\n\n".join(f"{i} {paragraph}" for i in range(30)) + "\n" + "x" * 7000
    path = named(tmp_path, "blob", text)
    rows = rows_of(path, "story.txt")
    assert "".join(row.completion for row in rows).split() == text.split()
    assert {len(row.completion) <= datafile.PASSAGE_CHARS for row in rows} == {True}
    assert [row.ends for row in rows] == [False] * (len(rows) - 1) + [True]
    assert sum(len(row.completion) > 1000 for row in rows) >= len(rows) - 2, "short paragraphs are gathered"


def test_text_without_a_name_that_says_so_is_no_training_file(tmp_path: Path) -> None:
    assert codes(named(tmp_path, "a", "Just some words.\n")) == [(1, "not_json")]


def test_duplicates_are_counted_with_their_lines(tmp_path: Path) -> None:
    told = dataset.check(write(tmp_path, CHAT, ALPACA, CHAT, {"text": "a"}, CHAT)).told()
    assert (told["duplicates"], told["duplicate_lines"], told["compared_rows"]) == (2, [3, 5], 5)
    assert told["kinds"] == {"chat": 4, "text": 1}


@given(st.lists(st.integers(1, 2**64 - 1), max_size=200))
def test_what_was_seen_is_what_was_added(numbers: list[int]) -> None:
    seen, known = dataset._Seen(), set[int]()
    for number in [*numbers, *(n * 4096 % 2**64 or 1 for n in numbers)]:
        assert seen.add(number) == (number in known)
        known.add(number)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, kind: str) -> None:
    def peak_bytes(rows: int) -> int:
        with (tmp_path / f"many.{kind}").open("w") as file:
            file.write({"json": "[", "csv": "prompt,completion\n"}.get(kind, ""))
            for i in range(rows):
                row = {"prompt": f"{i} is the question that is asked here", "completion": "and this is its answer"}
                text = f"{row['prompt']},{row['completion']}" if kind == "csv" else json.dumps(row)
                file.write(text + (",\n" if kind == "json" and i + 1 < rows else "\n"))
            file.write("]" if kind == "json" else "")
        path = tmp_path / f"many.{kind}"
        tracemalloc.start()
        assert sum(1 for _ in dataset.read(path)) > rows // 30
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    small, large = peak_bytes(500), peak_bytes(15_000)
    assert large < small + 500_000


@given(st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
def test_no_bytes_at_all_make_it_fail(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(raw)
    for name in ("", "a.json", "a.csv", "a.txt"):
        dataset.check(path, name).summary().encode()
    path.write_bytes(b"[" + raw)
    dataset.check(path).summary().encode()
