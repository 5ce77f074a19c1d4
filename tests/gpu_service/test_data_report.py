"""What a model will see of some rows, said by a running gpu service."""

from typing import Any

from tests.conftest import TINY
from tests.gpu_service.conftest import Gpu

CHAT = {"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "The captain."}]}


async def ask(gpu: Gpu, *rows: Any, **asked: Any) -> Any:
    lined = [{"line": 3 * i + 1, "row": row} for i, row in enumerate(rows)]
    return await gpu.http.post("/v1/data/report", json={"model": TINY, "rows": lined, **asked})


async def test_the_report_shows_lengths_what_is_cut_and_an_example_with_its_learned_part(gpu: Gpu) -> None:
    long = {"text": "word " * 200}
    told = (await ask(gpu, CHAT, long, {"prompt": "x " * 100, "completion": "y"}, max_length_tokens=64)).json()
    assert (told["rows"], told["truncated"], told["truncated_lines"]) == (3, 2, [4, 7])
    assert (told["nothing_to_learn"], told["nothing_to_learn_lines"]) == (1, [7]), "the cut took the completion"
    tokens = told["tokens"]
    assert tokens["shortest"] <= tokens["p50"] <= tokens["p90"] <= tokens["longest"]
    assert tokens["longest"] > 64, "lengths are those before the cut"
    text = "".join(part["text"] for part in told["example"]["parts"])
    learned = "".join(part["text"] for part in told["example"]["parts"] if part["learned"])
    assert told["example"]["line"] == 1
    assert "Who are you?" in text
    assert learned.strip() == "The captain.<|im_end|>"


async def test_train_on_all_learns_everything_but_the_first_token(gpu: Gpu) -> None:
    some, everything = [(await ask(gpu, CHAT, train_on=on)).json() for on in ("completions", "all")]
    assert everything["learned_tokens"] == everything["tokens"]["total"] - 1 > some["learned_tokens"]


async def test_a_row_that_is_none_is_refused_by_its_line(gpu: Gpu) -> None:
    answer = await ask(gpu, CHAT, {"text": ""})
    assert answer.status_code == 400
    assert "line 4" in answer.json()["error"]["message"]
    assert (await ask(gpu, max_length_tokens=64)).status_code == 400
    assert (await ask(gpu, CHAT, max_length_tokens=9999)).status_code == 400


async def test_calls_of_tools_that_the_template_does_not_know_are_refused_and_counted(gpu: Gpu) -> None:
    call = {"type": "function", "function": {"name": "add_numbers", "arguments": "{}"}}
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    told = (await ask(gpu, CHAT, {"messages": turns})).json()
    assert (told["refused"], told["first_refused"][0]["line"]) == (1, 4)
    assert "knows no tools" in told["first_refused"][0]["message"]
