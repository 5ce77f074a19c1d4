import io

from demo.screen import Screen, cells, progress_line

LEFT = ("Base model", "Drink a glass of water slowly, and hold your breath as long as is comfortable.\n\nThen rest.")
RIGHT = ("Tuned", "Arr, matey, hold yer breath and drink a mug of water as slow as the tide.")


def screen(*, width: int = 100, is_terminal: bool = True, korean: bool = False) -> tuple[Screen, io.StringIO]:
    out = io.StringIO()
    return Screen(out, width=width, is_terminal=is_terminal, korean=korean), out


def test_two_answers_stand_side_by_side_within_the_terminal_s_width() -> None:
    for width in (70, 100, 140):
        wide, out = screen(width=width)
        wide.side_by_side(LEFT, RIGHT)
        lines = out.getvalue().splitlines()
        assert all(cells(line) <= width for line in lines)
        column = lines[0].index("Tuned")
        assert lines[0][:column].strip() == "Base model"
        left, right = (
            " ".join(part).split() for part in ([x[:column] for x in lines[2:]], [x[column:] for x in lines[2:]])
        )
        assert (left, right) == (LEFT[1].split(), RIGHT[1].split())


def test_titles_in_korean_keep_the_columns_straight() -> None:
    wide, out = screen()
    wide.side_by_side(("기본 모델", "one"), ("튜닝", "two"))
    title, _, text = out.getvalue().splitlines()
    assert cells(title[: title.index("튜닝")]) == cells(text[: text.index("two")])


def test_a_narrow_terminal_or_a_file_gets_one_answer_after_the_other() -> None:
    for plain, out in (screen(width=50), screen(is_terminal=False)):
        plain.side_by_side(LEFT, RIGHT)
        text = out.getvalue()
        assert text.index("Base model:") < text.index("Then rest.") < text.index("Tuned:") < text.index("the tide.")
        assert "\033" not in text


def test_progress_is_one_line_on_a_terminal_and_a_line_each_tenth_elsewhere() -> None:
    live, drawn = screen()
    plain, logged = screen(is_terminal=False)
    for step in range(1, 101):
        live.progress(step, 100, 2.0, 100.0 - step)
        plain.progress(step, 100, 2.0, 100.0 - step)
    assert "\n" not in drawn.getvalue()
    assert drawn.getvalue().count("\r") == 100
    assert len(logged.getvalue().splitlines()) == 11


def test_a_progress_line_shows_loss_and_time_left() -> None:
    assert progress_line(14, 56, 1.93456, 61.2) == f"  [{'█' * 6}{'·' * 18}] 14/56  loss 1.935  ETA 1:01"
    assert progress_line(0, 0, None, None) == f"  [{'·' * 24}] 0/0"


def test_lines_follow_the_user_s_language() -> None:
    for korean, expected in ((False, "Stopping\n"), (True, "멈추는 중\n")):
        chosen, out = screen(korean=korean)
        chosen.say("Stopping", "멈추는 중")
        assert out.getvalue() == expected
