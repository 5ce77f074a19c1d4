"""What the model learns is what the assistant said, in the tokens that serving would have produced."""

import asyncio
import copy
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import datafile
import dataset
from gpu_service import data, finetune
from gpu_service.data import TokenStore, encode, epoch_order, render_chat, tokenize_row
from gpu_service.errors import BadDataset, BadRequest

END = "<|im_end|>"
PLENTY = 10_000  # tokens
# Assigned, visible characters: the demo model's vocabulary lacks the bytes of some others.
ANY = st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=30)
# A newline before a space would become one token with it: the template's, and so not the answer's.
SAID = ANY.filter(lambda text: not text[0].isspace())
ON_FILES = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)


@pytest.fixture(scope="module")
def tokenizer(smol_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(smol_dir)


def with_template(tokenizer: Any, template: str) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


@pytest.fixture(scope="module")
def with_bos(tokenizer: Any) -> Any:
    """As Llama's own tokenizers do: it puts a token before every plain text."""
    changed = copy.deepcopy(tokenizer)
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return changed


def chat(*turns: str, learn: list[bool] | None = None) -> dataset.Chat:
    """Turns of user and assistant in alternation."""
    messages = [{"role": "assistant" if i % 2 else "user", "content": t} for i, t in enumerate(turns)]
    return dataset.Chat(messages, learn or [m["role"] == "assistant" for m in messages])


def learned(tokenizer: Any, row: dataset.Row, max_length: int = PLENTY) -> str:
    tokens = tokenize_row(tokenizer, row, max_length)
    ids = [i for i, label in zip(tokens.ids, tokens.learn, strict=True) if label]
    text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text


# --- chat ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(SAID, SAID, st.booleans()), min_size=1, max_size=4))
@ON_FILES
def test_labels_are_exactly_what_the_assistant_said_and_the_end_of_each_turn(
    tokenizer: Any, turns: list[tuple[str, str, bool]]
) -> None:
    wanted = [on for *_, on in turns]
    row = chat(*(t for u, a, _ in turns for t in (u, a)), learn=[flag for on in wanted for flag in (False, on)])
    assert learned(tokenizer, row) == "".join(answer + END for _, answer, on in turns if on)


@given(st.lists(ANY, min_size=2, max_size=6))
@ON_FILES
def test_the_ids_are_those_of_the_tokenizers_own_chat_encoding(tokenizer: Any, turns: list[str]) -> None:
    row = chat(*turns)
    assert tokenize_row(tokenizer, row, PLENTY).ids == tokenizer.apply_chat_template(row.messages)["input_ids"]


@given(SAID, SAID)
@ON_FILES
def test_what_stands_before_the_answer_is_what_serving_would_have_sent(tokenizer: Any, asked: str, said: str) -> None:
    tokens = tokenize_row(tokenizer, chat(asked, said), PLENTY)
    prompt = render_chat(tokenizer, [{"role": "user", "content": asked}], add_generation_prompt=True)
    assert tokens.ids[: tokens.learn.index(True)] == encode(tokenizer, prompt, special=False)


@pytest.mark.parametrize("word", ["assistant", "user", "a", "\n", " ", "<|im_start|>assistant\n", "␞0␞"])
def test_an_answer_that_looks_like_the_template_is_still_told_from_it(tokenizer: Any, word: str) -> None:
    row = chat(word, f"x{word}x", word, f"y{word}")
    assert learned(tokenizer, row) == f"x{word}x{END}y{word}{END}"


def test_a_row_may_begin_with_the_assistant_or_with_a_system_message(tokenizer: Any) -> None:
    first = dataset.Chat([{"role": "assistant", "content": "Ahoy"}], [True])
    assert learned(tokenizer, first) == f"Ahoy{END}"
    messages = [{"role": "system", "content": "Be brief."}, *chat("Who?", "Me.").messages]
    assert learned(tokenizer, dataset.Chat(messages, [False, False, True])) == f"Me.{END}"


TURN = "{{ '<|im_start|>' + m['role'] + '\n' + %s + '<|im_end|>\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        # as Llama 3: trims
        ("{% for m in messages %}" + TURN % "m['content'] | trim" + "{% endfor %}" + ASK, "one<E>two<E>"),
        # as Phi 3: closes the whole conversation with a token of its own
        (
            "{% for m in messages %}" + TURN % "m['content']" + "{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}",
            "one <E>two<E>",
        ),
        # as Llama 2: a space that the model has to write, and one before the end
        (
            "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
            "{% else %}{{ ' ' + m['content'] + ' <|im_end|>' }}{% endif %}{% endfor %}",
            "one  <E> two <E>",
        ),
        # as Qwen 3: an empty thought before the last answer, which serving lets the model write
        (
            "{% for m in messages %}{% if loop.last and m['role'] == 'assistant' %}"
            + TURN % "'<think></think>' + m['content']" + "{% else %}" + TURN % "m['content']"
            + "{% endif %}{% endfor %}" + ASK,
            "one <E><think></think>two<E>",
        ),
        # no token ends a turn
        (
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}",
            "one  two",
        ),
        # serving's prompt does not name the assistant: then the model has to
        (
            "{% for m in messages %}" + TURN % "m['content']" + "{% endfor %}",
            "<|im_start|>assistant\none <E><|im_start|>assistant\ntwo<E>",
        ),
    ],
)  # fmt: skip
def test_templates_that_trim_decorate_or_close_are_followed(tokenizer: Any, template: str, expected: str) -> None:
    text = learned(with_template(tokenizer, template), chat("hi", "one ", "go", "two"))
    # Where the template puts a space before the answer, that space belongs to the answer's first token.
    assert text.lstrip(" ") == expected.replace("<E>", END)


def test_a_template_that_repeats_the_answer_is_refused_rather_than_guessed_at(tokenizer: Any) -> None:
    echo = with_template(tokenizer, "{% for m in messages %}{{ m['content'] + m['content'] }}{% endfor %}")
    with pytest.raises(BadRequest, match=r"rewrites messages\[1\]"):
        tokenize_row(echo, chat("a", "b"), PLENTY)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "no chat template: use /v1/completions"),
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ 1 + 'a' }}", "refuses these messages"),
        ("{{ 1 / 0 }}", "refuses these messages"),
        ("{{ messages[99]['content'] }}", "refuses these messages"),
        ("{% for %}", "refuses these messages"),
    ],
)
def test_a_missing_or_failing_template_is_the_callers_error_and_says_what_to_do(
    tokenizer: Any, template: str | None, said: str
) -> None:
    with pytest.raises(BadRequest, match=said) as caught:
        render_chat(with_template(tokenizer, template or ""), chat("a", "b").messages, add_generation_prompt=True)
    assert caught.value.param == "messages"


# --- text ------------------------------------------------------------------------------------------------------------


@given(st.just("") | ANY, ANY)
@ON_FILES
def test_a_completions_prompt_is_encoded_as_serving_does_and_all_after_it_is_learned(
    with_bos: Any, prompt: str, completion: str
) -> None:
    tokenizer = with_bos
    tokens = tokenize_row(tokenizer, dataset.Completion(prompt, completion), PLENTY)
    before = encode(tokenizer, prompt, special=True)
    assert tokens.ids[: len(before)] == before
    assert tokens.learn == [False] * len(before) + [True] * (len(tokens.ids) - len(before))
    assert tokenizer.decode(tokens.ids[len(before) :], clean_up_tokenization_spaces=False) == completion + END


def test_a_token_that_would_span_prompt_and_completion_is_not_made(tokenizer: Any) -> None:
    assert learned(tokenizer, dataset.Completion("The answer: ", "Paris")) == f"Paris{END}"
    assert learned(tokenizer, dataset.Completion("un", "believable")) == f"believable{END}"


def test_plain_text_is_learned_but_for_the_token_that_nothing_precedes(tokenizer: Any, with_bos: Any) -> None:
    row = dataset.Completion("", "one two three")
    assert learned(tokenizer, row) == f" two three{END}"
    assert learned(with_bos, row) == f"one two three{END}"


def test_text_that_ends_its_turn_itself_gets_no_second_end(tokenizer: Any) -> None:
    tokens = tokenize_row(tokenizer, dataset.Completion("a", f"b{END}"), PLENTY)
    assert tokens.ids.count(tokenizer.eos_token_id) == 1


def test_rendered_chat_gets_no_second_beginning(with_bos: Any) -> None:
    tokenizer = with_bos
    text = "<|endoftext|>hi"
    assert encode(tokenizer, text, special=False).count(0) == 1
    assert encode(tokenizer, "hi", special=True)[0] == 0
    assert 0 not in tokenize_row(tokenizer, chat("a", "b"), PLENTY).ids


def test_half_of_a_surrogate_pair_is_the_callers_error(tokenizer: Any) -> None:
    with pytest.raises(BadRequest, match="Character 2 is half") as caught:
        encode(tokenizer, "ab\ud83d", special=True, param="prompt")
    assert caught.value.param == "prompt"


@given(st.integers(1, 60))
@ON_FILES
def test_truncation_cuts_on_the_right_and_says_so(tokenizer: Any, max_length: int) -> None:
    row = chat("hi", "a b c d e f g h")
    whole, cut = tokenize_row(tokenizer, row, PLENTY), tokenize_row(tokenizer, row, max_length)
    assert cut.ids == whole.ids[:max_length]
    assert cut.learn == whole.learn[:max_length]
    assert cut.truncated == (len(whole.ids) > max_length)


# --- the store -------------------------------------------------------------------------------------------------------

Build = Callable[..., TokenStore]
ROWS: list[dict[str, Any]] = [
    {"messages": chat("hi", "hello there").messages},
    {"prompt": "2 + 2 =", "completion": " 4"},
    {"text": "Plain text of a few words."},
    {"prompt": "2 + 2 =", "completion": " 4"},
]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def build(tokenizer: Any, tmp_path: Path) -> Build:
    def build(rows: list[Any] = ROWS, *, max_length: int = PLENTY, using: Any = tokenizer) -> TokenStore:
        return TokenStore.build(write(tmp_path / "train.jsonl", rows), tmp_path / "store", using, max_length)

    return build


def test_a_batch_is_its_rows_padded_on_the_right(build: Build, tokenizer: Any, tmp_path: Path) -> None:
    store = build()
    expected = [tokenize_row(tokenizer, row, PLENTY) for _, row in dataset.read(tmp_path / "train.jsonl")
                if not isinstance(row, datafile.RowError)]  # fmt: skip
    assert store.lengths.tolist() == [len(t.ids) for t in expected]
    picked = [2, 0, 3]
    batch = store.batch(picked, pad_id=7)
    assert batch.ids.shape == batch.learn.shape == (3, max(len(expected[i].ids) for i in picked))
    assert (batch.ids.dtype, batch.learn.dtype, batch.lengths.dtype) == (torch.int64, torch.bool, torch.int64)
    for row, i in enumerate(picked):
        n = int(batch.lengths[row])
        assert batch.ids[row, :n].tolist() == expected[i].ids
        assert batch.learn[row, :n].tolist() == expected[i].learn
        assert set(batch.ids[row, n:].tolist()) <= {7}
        assert not batch.learn[row, n:].any()


def test_the_report_counts_what_became_of_the_rows(build: Build) -> None:
    unseen, cut = {"prompt": "word " * 60, "completion": "never seen"}, {"text": "many words " * 60}
    report = build([*ROWS, unseen, cut], max_length=40).report
    assert (report.rows, report.dropped, report.truncated, report.duplicates, report.longest) == (5, 1, 2, 1, 40)
    assert 0 < report.p50 <= report.p90 <= report.longest
    assert "2 cut at the maximum length; 1 left out" in report.summary()


def test_a_second_build_opens_what_is_there_and_a_change_makes_it_anew(
    build: Build, tokenizer: Any, with_bos: Any, tmp_path: Path
) -> None:
    def stamp() -> int:
        return (tmp_path / "store" / "tokens").stat().st_mtime_ns

    first = build()
    made = stamp()
    assert build().report == first.report
    assert stamp() == made
    for change in (
        {"rows": [*ROWS, {"text": "one more"}]},
        {"max_length": 20},
        {"using": with_template(tokenizer, "{% for m in messages %}" + TURN % "m['content']" + "{% endfor %}")},
        {"using": with_bos},
    ):
        build(**change)
        assert stamp() != made
        made = stamp()


@pytest.mark.parametrize("file", ["meta.json", "tokens", "learn", "offsets"])
@pytest.mark.parametrize("harm", ["cut", "remove"])
def test_a_store_with_a_damaged_or_missing_file_is_made_again(
    build: Build, tmp_path: Path, file: str, harm: str
) -> None:
    before = build().batch(range(4), 0)
    path = tmp_path / "store" / file
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    else:
        path.unlink()
    assert torch.equal(build().batch(range(4), 0).ids, before.ids)


def test_bad_rows_are_refused_by_line_and_nothing_stays(build: Build, tmp_path: Path) -> None:
    with pytest.raises(
        BadDataset, match=r"2 of 3 lines can't be used \(1 bad_text, 1 not_json\): line 2: .*; line 3: not JSON"
    ) as caught:
        build([ROWS[0], {"text": ""}, "{oops\n"])
    assert caught.value.param == "training_file"
    assert list((tmp_path / "store").iterdir()) == []


def test_a_row_that_the_template_refuses_is_named_by_its_line(build: Build, tokenizer: Any) -> None:
    strict = with_template(
        tokenizer,
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message, please') }}{% endif %}"
        "{% for m in messages %}" + TURN % "m['content']" + "{% endfor %}",
    )
    bad = {"messages": [{"role": "system", "content": "x"}, *chat("a", "b").messages]}
    with pytest.raises(BadDataset, match=r"1 of 5 lines can't be used: line 5: .*no system message, please"):
        build([*ROWS, bad], using=strict)


def test_a_file_whose_every_answer_is_cut_away_is_refused(build: Build) -> None:
    with pytest.raises(BadDataset, match="raise max_length_tokens"):
        build([ROWS[0]], max_length=8)


def test_memory_does_not_grow_with_the_file(build: Build) -> None:
    def peak_bytes(rows: int) -> int:
        tracemalloc.start()
        build([{"text": f"{i} " * 50} for i in range(rows)], max_length=64)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    few, many = peak_bytes(200), peak_bytes(1000)
    assert many - few < 800 * 500  # a row in memory would be about 100 tokens of 32 bytes and more


# --- order -----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 300), st.integers(0, 2**31 - 1), st.integers(0, 100))
def test_an_epochs_order_is_a_permutation_and_another_in_the_next_epoch(n: int, seed: int, epoch: int) -> None:
    order = epoch_order(n, seed, epoch)
    assert sorted(order) == list(range(n))
    if n > 20:
        assert order != epoch_order(n, seed, epoch + 1)
        assert order != epoch_order(n, seed + 1, epoch)


def test_the_order_is_the_same_in_every_version_and_whatever_was_drawn_before() -> None:
    torch.manual_seed(1)
    np.random.default_rng(1).random(5)
    assert epoch_order(8, seed=7, epoch=0) == [6, 5, 4, 2, 1, 7, 3, 0]


async def test_tokenising_says_how_far_it_is_and_ends_with_whoever_waits_for_it(tokenizer: Any, tmp_path: Path) -> None:
    row = {"prompt": "What is it?", "completion": "A stone."}
    file = write(tmp_path / "train.jsonl", [row] * (20 * data.TOLD_ROWS))
    heard: list[int] = []
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()

    def build(told: Callable[[int], None]) -> TokenStore:
        def both(rows: int) -> None:
            heard.append(rows)
            loop.call_soon_threadsafe(begun.set)
            told(rows)

        return TokenStore.build(file, tmp_path / "store", tokenizer, 64, told=both)

    told: Any = None  # nothing is said so soon
    work = asyncio.create_task(finetune.beside(build, told))
    await begun.wait()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    so_far = list(heard)
    assert so_far == list(range(0, len(so_far) * data.TOLD_ROWS, data.TOLD_ROWS))
    assert len(so_far) < 20
    assert not (tmp_path / "store/meta.json").exists()
    assert not (tmp_path / "store/tokens").exists()
