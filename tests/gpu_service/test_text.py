"""What comes out of a row: whole characters, no stop strings, seeded draws that repeat."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_service.device import Device
from gpu_service.llama import Llama
from gpu_service.models import Base
from gpu_service.rows import Rows
from gpu_service.text import Detokenizer, Engine, Finish, Piece, Row, Sampling, sample

TEXTS = [
    "Hello, world",
    "안녕하세요, 반갑습니다!",
    "a 👩‍👩‍👧‍👦 family 🏴‍☠️ and 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "tabs\tand\nnewlines\n\n",
    "née",
]


def show(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    """The pieces of an answer, the last one being what was held back."""
    detokenizer, pieces = Detokenizer(tokenizer, stop), []
    for token in ids:
        text, stopped = detokenizer.add(token)
        pieces.append(text)
        if stopped:
            return pieces
    return [*pieces, detokenizer.rest()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_never_cut_a_character(tiny: Base, text: str) -> None:
    tokenizer = tiny.source.tokenizer
    pieces = show(tokenizer, tokenizer(text).input_ids)
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.parametrize("text", TEXTS)
def test_a_stop_string_is_found_across_tokens_and_never_shown(tiny: Base, text: str) -> None:
    tokenizer = tiny.source.tokenizer
    ids = tokenizer(text + " the end, and more").input_ids
    pieces = show(tokenizer, ids, ("end, a", "never"))
    assert "".join(pieces) == text + " the "


def test_the_beginning_of_a_stop_string_that_does_not_come_is_shown_in_the_end(tiny: Base) -> None:
    tokenizer = tiny.source.tokenizer
    assert "".join(show(tokenizer, tokenizer("one two thr").input_ids, ("three",))) == "one two thr"


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_text_with_any_stop_string_ends_where_the_first_one_begins(tiny: Base, data: st.DataObject) -> None:
    text = data.draw(st.text("ab 한🏴", max_size=30))
    stop = data.draw(st.lists(st.text("ab 한🏴", min_size=1, max_size=4), max_size=3).map(tuple))
    ids = tiny.source.tokenizer(text).input_ids
    shown = tiny.source.tokenizer.decode(ids)  # decoding may tidy spaces: what counts is the text as it is shown
    places = [shown.find(s) for s in stop if s in shown]
    assert "".join(show(tiny.source.tokenizer, ids, stop)) == (shown[: min(places)] if places else shown)


def write(base: Base, cpu: Device, prompt: str, sampling: Sampling, chunk: int = 512) -> tuple[str, Finish]:
    out: list[Piece | Finish | BaseException] = []
    engine = Engine(chunk)
    engine.add(
        Row(
            Llama(base.source.config, cpu.torch),
            Rows(base.weights),
            base.source.tokenizer(prompt).input_ids,
            sampling,
            base.source.stop_ids,
            base.source.tokenizer,
            send=out.append,
            cancelled=lambda: False,
            dtype=cpu.precision.dtype,
            device=cpu.torch,
        )
    )
    while len(engine):
        engine.step()
    finish = out[-1]
    assert isinstance(finish, Finish)
    return "".join(p.text for p in out if isinstance(p, Piece)), finish


def test_a_seed_repeats_and_another_differs(tiny: Base, cpu: Device) -> None:
    one = Sampling(max_tokens=12, temperature=1.0, seed=7)
    assert write(tiny, cpu, "Once", one) == write(tiny, cpu, "Once", one)
    assert write(tiny, cpu, "Once", one) != write(tiny, cpu, "Once", Sampling(max_tokens=12, seed=8))


def test_no_seed_differs_each_time(tiny: Base, cpu: Device) -> None:
    assert len({write(tiny, cpu, "Once", Sampling(max_tokens=8))[0] for _ in range(4)}) > 1


def test_a_prompt_read_in_chunks_gives_the_same_answer(tiny: Base, cpu: Device) -> None:
    greedy = Sampling(max_tokens=8, temperature=0)
    prompt = "The quick brown fox jumps over the lazy dog and then it goes on"
    assert write(tiny, cpu, prompt, greedy, chunk=5) == write(tiny, cpu, prompt, greedy)


def test_the_end_is_by_length_or_by_stop_string(tiny: Base, cpu: Device) -> None:
    text, finish = write(tiny, cpu, "Once", Sampling(max_tokens=6, temperature=0))
    assert (finish.reason, finish.completion_tokens, finish.prompt_tokens) == ("length", 6, 1)
    stop = text[3:6]
    shorter, finish = write(tiny, cpu, "Once", Sampling(max_tokens=6, temperature=0, stop=(stop,)))
    assert finish.reason == "stop"
    assert shorter == text[: text.index(stop)]


def test_generating_leaves_the_global_random_state_alone(tiny: Base, cpu: Device) -> None:
    before = torch.get_rng_state()
    write(tiny, cpu, "Once", Sampling(max_tokens=4, temperature=1.0))
    assert torch.equal(before, torch.get_rng_state())


def test_top_p_keeps_only_the_likeliest_tokens() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    random = torch.Generator().manual_seed(0)
    drawn = {sample(logits, Sampling(max_tokens=1, top_p=0.7), random) for _ in range(200)}
    assert drawn == {0, 1}


def test_temperature_zero_takes_the_likeliest() -> None:
    random = torch.Generator()
    assert sample(torch.tensor([0.1, 0.9, 0.3]), Sampling(max_tokens=1, temperature=0), random) == 1
