"""The stories that trained the demo GPT-2, and the model that is shipped."""

import itertools
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from demo.gpt2 import FOLDER, card, make, text
from demo.gpt2.chats import chats
from demo.gpt2.stories import Story, stories, story
from demo.gpt2.words import HE, SHE

PRONOUNS = {"she": {"she", "her"}, "he": {"he", "him", "his"}}
NAMES = {*SHE, *HE}
SHIPPED_BYTES = 8_000_000
LOSS_BOUND = 0.28  # nats a token; the card says what it is
WORD = re.compile(r"[A-Za-z]+")


@cache
def told(count: int = 1500) -> list[Story]:
    return list(itertools.islice(stories(held_out=False), count))


@cache
def vocabulary() -> set[str]:
    written = [s.text for s in told(4000)] + [text.as_chat(turns) for turns in itertools.islice(chats(), 500)]
    return {word for one in written for word in WORD.findall(one)} - {"endoftext"}


def test_a_story_is_a_function_of_its_number_and_seed() -> None:
    assert [story(n).text for n in range(20)] == [story(n).text for n in range(20)]
    assert story(3).text != story(3, seed=8).text
    # Fixed for good: the shipped weights learned these very texts.
    assert story(0).text.startswith(
        "Once upon a time there was a young cat named Ben. Ben lived in a small town, in a barn."
    )


def test_no_story_is_told_twice_and_none_is_on_both_sides() -> None:
    seen = {s.text for s in told()}
    assert len(seen) == len(told())
    measured = text.held_out(make.HELD_OUT_STORIES)
    assert len(set(measured)) == make.HELD_OUT_STORIES
    assert not seen & set(measured)
    assert not any(part in set(measured) for turns in itertools.islice(chats(), 500) for _, part in turns)


def test_every_plot_is_told() -> None:
    assert len({s.plot for s in told()}) == 18


def test_only_those_who_are_in_a_story_are_named_in_it() -> None:
    for s in told():
        named = set(WORD.findall(s.text)) & NAMES
        assert named <= {s.hero.name, s.friend.name}, s.text
        assert s.hero.name in named


def test_a_friend_who_is_named_has_a_part() -> None:
    assert not [s.text for s in told() if s.text.count(s.friend.name) == 1]


def test_pronouns_fit_those_who_are_in_the_story() -> None:
    for s in told():
        used = set(s.text.lower().split()) & (PRONOUNS["she"] | PRONOUNS["he"])
        fitting = set().union(*(PRONOUNS[being.he] for being in (s.hero, s.friend, s.elder)))
        assert used <= fitting, s.text


def test_stories_are_whole_sentences_with_nothing_left_open() -> None:
    for s in told():
        assert not re.search(r"[{}\[\]|]|  |\.\.|[.!?][A-Z]|\b[Aa] [aeiou]", s.text), s.text
        assert s.text.count('"') % 2 == 0, s.text
        for paragraph in s.text.split("\n\n"):
            assert re.fullmatch(r'["A-Z].*[.!?]"?', paragraph), paragraph


def test_the_words_are_many_but_a_small_model_can_know_them() -> None:
    assert 600 <= len({word.lower() for word in vocabulary()} - {name.lower() for name in NAMES}) <= 1200


def test_rows_begin_with_a_text_and_every_other_one_with_its_token() -> None:
    tokens = [[n] * 200 for n in range(1, 13)]
    rows = text.pack(tokens, end=0)
    ids, owner = rows.unbind(1)
    assert rows.shape == (4, 2, text.POSITIONS)
    assert [row[:2].tolist() for row in ids] == [[1, 1], [0, 4], [7, 7], [0, 10]]
    assert ids[0, 199:202].tolist() == [1, 0, 2]
    assert owner[0, 199:202].tolist() == [0, 1, 1]  # the token that closed one text begins the next


def test_batches_go_on_where_they_were_left() -> None:
    rows = torch.arange(10)[:, None].repeat(1, 4)
    whole = list(itertools.islice(text.batches(rows, 2, start=0), 12))
    again = list(itertools.islice(text.batches(rows, 2, start=7), 5))
    assert all(torch.equal(one, other) for one, other in zip(whole[7:], again, strict=True))
    assert sorted(torch.cat(whole[:5])[:, 0].tolist()) == list(range(10))


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [make.rate(step, 1000) for step in range(1000)]
    assert rates.index(max(rates)) == make.WARM_UP - 1
    assert rates[-1] == pytest.approx(make.LAST, rel=0.01)


def tiny() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    )


def test_a_run_that_was_stopped_ends_with_the_same_weights(tmp_path: Path) -> None:
    rows = torch.randint(0, 50, (32, 2, 16), generator=torch.Generator().manual_seed(0))

    def run(file: Path, stops_after: int) -> tuple[Any, bool]:
        model, asked = tiny(), itertools.count()
        return model, make.train(model, rows, 6, file, stop=lambda: next(asked) >= stops_after, look=lambda: None)

    whole, done = run(tmp_path / "whole.pt", 99)
    assert done
    assert not run(tmp_path / "parts.pt", 4)[1]
    parts, done = run(tmp_path / "parts.pt", 99)
    assert done
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, parts.state_dict()[name]), name


def test_in_a_row_no_text_sees_another() -> None:
    model = tiny().eval()
    row = torch.tensor([[[5, 6, 7, 0, 8, 9], [0, 0, 0, 1, 1, 1]]])
    seen = make.seen(row[:, 1])
    assert seen[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1, 1],
    ]
    other = row.clone()
    other[0, 0, 1] = 9
    one, two = (model(r[:, 0], attention_mask=seen, use_cache=False).logits for r in (row, other))
    assert not torch.equal(one[0, 1:3], two[0, 1:3])
    assert torch.equal(one[0, 3:], two[0, 3:])


@pytest.fixture(scope="module")
def shipped() -> Iterator[tuple[Any, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # rows are small: a second thread would only wait
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, local_files_only=True)
    yield model.eval(), AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)
    torch.set_num_threads(threads)


def test_the_folder_is_a_gpt2_of_at_most_8_mb_without_a_chat_template(shipped: tuple[Any, Any]) -> None:
    model, tokenizer = shipped
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= SHIPPED_BYTES
    assert model.config.attn_pdrop == model.config.resid_pdrop == model.config.embd_pdrop == 0.1
    assert model.lm_head.weight is model.transformer.wte.weight
    assert tokenizer.chat_template is None
    assert tokenizer.eos_token == tokenizer.bos_token == text.END
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_any_text_survives_the_tokenizer(shipped: tuple[Any, Any]) -> None:
    written = 'Once upon a time, "안녕" said Zoë.\n\n  🙂 x=1'
    assert shipped[1].decode(shipped[1](written)["input_ids"]) == written


def test_held_out_stories_are_well_foreseen(shipped: tuple[Any, Any]) -> None:
    model, tokenizer = shipped
    assert make.held_out_loss(model, tokenizer(text.held_out(make.HELD_OUT_STORIES))["input_ids"]) < LOSS_BOUND


PROMPTS = [
    "Once upon a time",
    "One winter night",
    "One day",
    "There was once a little fox named Ruby.",
    "Tom wanted to",
    "Long ago there lived a grey rabbit",
    "User: Tell me a story about the moon.\nAssistant:",
    "User: Hello!\nAssistant:",
]


@pytest.mark.parametrize(("temperature", "steady"), [(0.0, 7), (0.7, 4)])
def test_continuations_are_whole_sentences_of_known_words_mostly_about_the_same_one_or_two(
    shipped: tuple[Any, Any], temperature: float, steady: int
) -> None:
    written = card.samples(*shipped, PROMPTS, temperature=temperature)
    words = [set(WORD.findall(one)) for one in written]
    assert sum(bool(re.search(r'[.!?]"?$', one)) for one in written) >= 7
    assert sum(found <= vocabulary() for found in words) >= 7
    assert sum(len(found & NAMES) <= 2 for found in words) >= steady
