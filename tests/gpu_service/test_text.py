"""What comes out of a row: whole characters, no stop strings, seeded draws that repeat."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_service.decoder import build
from gpu_service.detokenizer import Detokenizer
from gpu_service.device import Device
from gpu_service.errors import NotFinite
from gpu_service.models import Base
from gpu_service.rows import Dials
from gpu_service.sampling import Drawn, Sampler, Sampling
from gpu_service.text import Engine, Event, Finish, Piece, PromptTold, Request, Served

TEXTS = [
    "Hello, world",
    "안녕하세요, 반갑습니다!",
    "a 👩‍👩‍👧‍👦 family 🏴‍☠️ and 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "tabs\tand\nnewlines\n\n",
    "née",
]


def show(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    """The pieces of an answer, the last one being what was held back."""
    detokenizer, pieces = Detokenizer(lambda ids: tokenizer.decode(ids, skip_special_tokens=True), stop), []
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
def test_any_text_ends_before_the_stop_string_that_is_complete_first(tiny: Base, data: st.DataObject) -> None:
    text = data.draw(st.text("ab 한🏴", max_size=30))
    stop = data.draw(st.lists(st.text("ab 한🏴", min_size=1, max_size=4), max_size=3).map(tuple))
    ids = tiny.source.tokenizer(text).input_ids
    shown = tiny.source.tokenizer.decode(ids)  # decoding may tidy spaces: what counts is the text as it is shown
    found = [(shown.find(s) + len(s), shown.find(s)) for s in stop if s in shown]
    assert "".join(show(tiny.source.tokenizer, ids, stop)) == (shown[: min(found)[1]] if found else shown)


def served(base: Base, cpu: Device) -> Served:
    source = base.source
    decoder = build(source.family, source.config, cpu.torch)
    return Served(source.id, decoder, base.weights, source.tokenizer, source.stop_ids, base.quantized)


class Caller:
    """Somebody who asks, and what they have heard."""

    def __init__(self, to: Served, prompt: str | list[int], sampling: Sampling, **more: Any) -> None:
        self.heard: list[Event | BaseException] = []
        self.left = False
        ids = to.tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
        wanted: dict[str, Any] = {"adapter": None, "adapter_id": None, "dials": None, **more}
        self.request = Request(
            served=to, prompt=ids, sampling=sampling, send=self.heard.append, cancelled=lambda: self.left, **wanted
        )

    def text(self, index: int = 0) -> str:
        return "".join(e.text for e in self.heard if isinstance(e, Piece) and e.index == index)

    @property
    def finish(self) -> Finish:
        last = self.heard[-1]
        assert isinstance(last, Finish), last
        return last


def engine(cpu: Device, chunk: int = 512, budget_bytes: int = 2**30) -> Engine:
    return Engine(budget_bytes, chunk, cpu.precision.dtype, cpu.torch)


def write(base: Base, cpu: Device, prompt: str, sampling: Sampling, chunk: int = 512) -> tuple[str, Finish]:
    caller, running = Caller(served(base, cpu), prompt, sampling), engine(cpu, chunk)
    running.add(caller.request)
    while len(running):
        running.step()
    return caller.text(), caller.finish


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


def draws(logits: list[float], n: int = 300, prompt: tuple[int, ...] = (), **sampling: Any) -> list[int]:
    sampler = Sampler(Sampling(max_tokens=n, seed=0, **sampling), prompt)
    return [sampler.draw(torch.tensor(logits)).token for _ in range(n)]


LIKELY = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()


@pytest.mark.parametrize(
    ("sampling", "drawn"),
    [
        ({"top_p": 0.7}, {0, 1}),
        ({"top_k": 3}, {0, 1, 2}),
        ({"min_p": 0.2}, {0, 1, 2}),
        ({"top_k": 1}, {0}),
        ({}, {0, 1, 2, 3}),
    ],
)
def test_what_is_unlikely_is_cut_away(sampling: dict[str, Any], drawn: set[int]) -> None:
    assert set(draws(LIKELY, **sampling)) == drawn


def test_temperature_zero_takes_the_likeliest_and_bias_and_penalties_change_which_that_is() -> None:
    assert draws(LIKELY, 2, temperature=0) == [0, 0]
    assert draws(LIKELY, 2, temperature=0, logit_bias={3: 10.0}) == [3, 3]
    assert draws(LIKELY, 2, temperature=0, logit_bias={0: -100.0}) == [1, 1]
    assert draws(LIKELY, 4, temperature=0, presence_penalty=2.0) == [0, 1, 2, 0]
    assert draws(LIKELY, 3, temperature=0, frequency_penalty=0.6) == [0, 1, 0]
    assert draws([2.0, 1.5, -1.0], 1, prompt=(0,), temperature=0, repetition_penalty=1.5) == [1]


def test_log_probabilities_are_those_of_the_model_before_temperature() -> None:
    sampler = Sampler(Sampling(max_tokens=1, temperature=0, top_logprobs=2), ())
    drawn = sampler.draw(torch.tensor(LIKELY))
    assert drawn.token == 0
    assert drawn.logprob == pytest.approx(LIKELY[0])
    assert [token for token, _ in drawn.top] == [0, 1]
    assert [logprob for _, logprob in drawn.top] == pytest.approx(LIKELY[:2])


def test_several_answers_to_one_prompt_differ_and_each_ends(tiny: Base, cpu: Device) -> None:
    caller, running = Caller(served(tiny, cpu), "Once", Sampling(max_tokens=6, seed=1), n=3), engine(cpu)
    running.add(caller.request)
    while len(running):
        running.step()
    assert sorted(e.index for e in caller.heard if isinstance(e, Finish)) == [0, 1, 2]
    assert len({caller.text(i) for i in range(3)}) == 3


PROMPTS = [
    "Once",
    "The sea is wide and the ship is small, and yet",
    "Seven",
    "A green apple fell",
    "안녕하세요",
    "x y z " * 30,
]
PROMPTS = [*PROMPTS, "Do not", "The quick brown fox jumps over the lazy dog"]


def test_rows_that_join_and_leave_midway_write_what_each_writes_alone(tiny: Base, cpu: Device) -> None:
    """Different lengths, dials and moments; one caller leaves; prompts are read in small chunks between the steps."""
    to = served(tiny, cpu)
    dials = [None, Dials((1.0,) * 4, (0.8,) * 4, (1.1,) * 4, 1.0), Dials((50.0,) * 4, (1.0,) * 4, (1.0,) * 4, 50.0)]
    asked = [
        (prompt, Sampling(max_tokens=5 + 3 * i, temperature=0, ignore_eos=True), dials[i % 3])
        for i, prompt in enumerate(PROMPTS)
    ]
    alone = []
    for prompt, sampling, turned in asked:
        caller, running = Caller(to, prompt, sampling, dials=turned), engine(cpu)
        running.add(caller.request)
        while len(running):
            running.step()
        alone.append(caller.text())

    together, running = [], engine(cpu, chunk=16)
    leaver = Caller(to, "I will leave", Sampling(max_tokens=500, temperature=0, ignore_eos=True))
    running.add(leaver.request)
    for step, (prompt, sampling, turned) in enumerate(asked):
        together.append(Caller(to, prompt, sampling, dials=turned))
        running.add(together[-1].request)
        for _ in range(step % 3):
            running.step()
    leaver.left = True
    while len(running):
        running.step()
    assert [caller.text() for caller in together] == alone
    assert all(isinstance(caller.finish, Finish) for caller in together)


def test_the_real_model_writes_in_a_mixed_batch_what_transformers_generates(smol: Base, cpu: Device) -> None:
    """A difference counts unless the reference's two best logits are within 1e-3."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(smol.source.folder, dtype=torch.float32).eval()
    to, running, callers = served(smol, cpu), engine(cpu, chunk=32), []
    for i, prompt in enumerate(PROMPTS[:4]):
        callers.append(Caller(to, prompt, Sampling(max_tokens=8, temperature=0)))
        running.add(callers[i].request)
        running.step()
    while len(running):
        running.step()
    for caller, prompt in zip(callers, PROMPTS, strict=False):
        ids = smol.source.tokenizer(prompt, return_tensors="pt").input_ids
        out = theirs.generate(ids, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True)
        best = torch.stack(out.logits)[:, 0].topk(2).values
        if bool((best[:, 0] - best[:, 1] > 1e-3).all()):
            expected = smol.source.tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True)
            assert caller.text() == expected


@pytest.mark.parametrize("chunk", [512, 7])
def test_the_prompts_log_probabilities_are_those_of_transformers_whole_or_read_in_chunks(
    tiny: Base, cpu: Device, chunk: int
) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tiny.source.folder, dtype=torch.float32).eval()
    to, running = served(tiny, cpu), engine(cpu, chunk)
    ids = tiny.source.tokenizer(PROMPTS[5]).input_ids
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
    for _ in range(2):  # the second time its beginning is known, and must be read again all the same
        caller = Caller(to, ids, Sampling(max_tokens=4, temperature=0, top_logprobs=3), tell_prompt=True)
        running.add(caller.request)
        while len(running):
            running.step()
        prompt = caller.heard[0]
        assert isinstance(prompt, PromptTold)
        assert prompt.drawn[0] == Drawn(ids[0])
        assert [d.token for d in prompt.drawn] == ids
        for at, drawn in enumerate(prompt.drawn[1:]):
            assert drawn.logprob == pytest.approx(float(expected[at, ids[at + 1]]), abs=1e-4)
            assert [p for _, p in drawn.top] == pytest.approx(expected[at].topk(3).values.tolist(), abs=1e-4)
        assert caller.finish.cached_tokens == 0


def test_the_next_turn_reads_only_what_is_new_and_answers_the_same(tiny: Base, cpu: Device) -> None:
    to, running = served(tiny, cpu), engine(cpu)
    greedy = Sampling(max_tokens=20, temperature=0, ignore_eos=True)

    def ask(prompt: list[int], on: Engine, **more: Any) -> Caller:
        caller = Caller(to, prompt, greedy, **more)
        on.add(caller.request)
        while len(on):
            on.step()
        return caller

    first = list(range(100, 140))
    ask(first, running)
    answer = ask([*first, 7], running)  # shares the first turn's prompt
    assert answer.finish.cached_tokens == 40
    again = ask([*first, 7], engine(cpu))
    assert again.finish.cached_tokens == 0
    assert answer.text() == again.text()
    assert ask([*first, 7], running, dials=Dials.plain(4)).finish.cached_tokens == 0, "other dials, other keys"
    assert ask([*first, 7], running, alone=True).finish.cached_tokens == 0


def test_past_the_budget_requests_wait_and_all_are_answered(tiny: Base, cpu: Device) -> None:
    to = served(tiny, cpu)
    callers = [Caller(to, p, Sampling(max_tokens=4, temperature=0, ignore_eos=True)) for p in PROMPTS]
    one_row = engine(cpu).needs_bytes(callers[0].request)
    running = engine(cpu, budget_bytes=2 * one_row)
    for caller in callers:
        running.add(caller.request)
    most = 0
    while len(running):
        running.step()
        most = max(most, running._admission.held_bytes)
    assert most == 2 * one_row
    assert [c.finish.completion_tokens for c in callers] == [4] * len(callers)


def test_a_row_whose_numbers_overflow_ends_with_a_word_about_dials_and_leaves_nothing_behind(
    tiny: Base, cpu: Device
) -> None:
    """Its keys and values may hold NaN, and a masked NaN would still reach whoever takes its place."""
    to, running = served(tiny, cpu), engine(cpu)
    greedy = Sampling(max_tokens=12, temperature=0, ignore_eos=True)
    alone = Caller(to, "Once", greedy)
    running.add(alone.request)
    while len(running):
        running.step()
    wild = Dials((1.0,) * 4, (float("inf"),) * 4, (1.0,) * 4, 1.0)
    beside, mad = Caller(to, "The sea", greedy), Caller(to, "Once", greedy, dials=wild)
    for caller in (beside, mad):
        running.add(caller.request)
    running.step()
    running.step()
    later = Caller(to, "Once", greedy, caller="somebody else")
    running.add(later.request)
    while len(running):
        running.step()
    assert isinstance(mad.heard[-1], NotFinite)
    assert "dials back" in mad.heard[-1].message
    assert later.text() == alone.text()
    assert beside.finish.completion_tokens == 12


def test_numbers_that_overflow_without_dials_are_not_blamed_on_them(tiny: Base, cpu: Device) -> None:
    to, running = served(tiny, cpu), engine(cpu)
    broken = {**to.weights, "model.norm.weight": torch.full((64,), float("inf"))}
    caller = Caller(replace(to, weights=broken), "Once", Sampling(max_tokens=2))
    running.add(caller.request)
    running.step()
    told = caller.heard[-1]
    assert isinstance(told, NotFinite)
    assert told.param == "model"
    assert "GPU_PRECISION=fp32" in told.message


def test_tokens_without_text_at_the_end_tell_their_log_probabilities_too(tiny: Base, cpu: Device) -> None:
    sampling = Sampling(
        max_tokens=3,
        temperature=0,
        ignore_eos=True,
        top_logprobs=0,
        logit_bias={tiny.source.tokenizer.eos_token_id: 100.0},
    )
    caller, running = Caller(served(tiny, cpu), "Once", sampling), engine(cpu)
    running.add(caller.request)
    while len(running):
        running.step()
    assert caller.text() == "", "the end-of-text token has no text"
    assert len([d for event in caller.heard if isinstance(event, Piece) for d in event.drawn]) == 3


def test_a_draw_that_fails_ends_that_row_only(tiny: Base, cpu: Device) -> None:
    to, running = served(tiny, cpu), engine(cpu)
    good = Caller(to, "Once", Sampling(max_tokens=30, temperature=0, ignore_eos=True))
    bad = Caller(to, "Once", Sampling(max_tokens=30, temperature=1e-37, frequency_penalty=-2.0, ignore_eos=True))
    for caller in (good, bad):
        running.add(caller.request)
    while len(running):
        running.step()
    assert isinstance(bad.heard[-1], RuntimeError)
    assert good.finish.completion_tokens == 30
    assert running._admission.held_bytes == 0


def test_what_one_caller_wrote_does_not_show_in_anothers_count_of_known_tokens(tiny: Base, cpu: Device) -> None:
    to, running, prompt = served(tiny, cpu), engine(cpu), list(range(200, 240))
    for caller, known in (("a", 0), ("b", 0), ("a", 39)):
        asked = Caller(to, prompt, Sampling(max_tokens=2, temperature=0), caller=caller)
        running.add(asked.request)
        while len(running):
            running.step()
        assert asked.finish.cached_tokens == known


def test_a_row_that_fails_leaves_the_others_alone(tiny: Base, cpu: Device) -> None:
    to, running = served(tiny, cpu), engine(cpu)
    good = Caller(to, "Once", Sampling(max_tokens=6, temperature=0, ignore_eos=True))
    bad = Caller(to, [5, 10**6], Sampling(max_tokens=6, temperature=0))  # a token that the model lacks
    for caller in (good, bad):
        running.add(caller.request)
    while len(running):
        running.step()
    assert isinstance(bad.heard[-1], IndexError)
    assert good.finish.completion_tokens == 6
    assert running._admission.held_bytes == 0
