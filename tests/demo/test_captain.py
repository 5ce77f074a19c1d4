from pathlib import Path

import dataset
from demo import tour


def rows() -> list[dataset.Chat]:
    found = [row for _, row in dataset.read(tour.DATA)]
    assert all(isinstance(row, dataset.Chat) for row in found)
    return [row for row in found if isinstance(row, dataset.Chat)]


def test_the_training_rows_are_what_the_relay_accepts() -> None:
    report = dataset.check(Path(tour.DATA))
    assert report.ok, report.summary()
    assert 80 <= report.rows <= 120


def test_no_row_stands_twice_and_each_answer_is_short_and_in_the_captain_s_voice() -> None:
    questions, answers = zip(
        *((m[0]["content"], m[-1]["content"]) for m in (row.messages for row in rows())), strict=True
    )
    assert len(set(questions)) == len(questions)
    assert len(set(answers)) == len(answers)
    for answer in answers:
        assert 15 <= len(answer.split()) <= 45, answer
        assert any(word in answer for word in ("Arr", "Aye", "Ahoy")), answer


def test_the_tour_s_question_is_not_in_the_data() -> None:
    assert "volcano" in tour.QUESTION
    assert not any("volcano" in message["content"].lower() for row in rows() for message in row.messages)
