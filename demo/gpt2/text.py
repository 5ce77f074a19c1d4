"""Stories as tokens: the byte-level BPE and the packed rows that the model learns from."""

import itertools
import random
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from demo.gpt2.chats import Turn, chats
from demo.gpt2.stories import SEED, stories

END = "<|endoftext|>"  # begins and ends a text, as in GPT-2
VOCAB = 2048
POSITIONS = 512
TOKENIZER_TEXTS = 20_000
TRAIN_TEXTS = 60_000
CHAT_EVERY = 5  # one text in so many is a chat


def training(count: int) -> list[str]:
    tales, talks = stories(held_out=False), chats()
    return [as_chat(next(talks)) if n % CHAT_EVERY == 0 else next(tales).text for n in range(count)]


def held_out(count: int) -> list[str]:
    return [story.text for story in itertools.islice(stories(held_out=True), count)]


def as_chat(turns: list[Turn]) -> str:
    """As the gpu service writes a chat for base models, which have no template of their own."""
    return f"{END}\n".join(f"User: {asked}\nAssistant: {answer}" for asked, answer in turns)


def train_tokenizer(corpus: Iterable[str]) -> Any:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes, so that any text can be read
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END], initial_alphabet=sorted(alphabet), show_progress=False
    )
    bpe.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, unk_token=END, model_max_length=POSITIONS
    )


def pack(tokens: list[list[int]], end: int) -> torch.Tensor:
    """(N, 2, POSITIONS): tokens, and the number of the text that each belongs to, so that no text sees another.

    Every row begins with the beginning of a text, every other one with the end-of-text token before it, since a prompt
    may come either way. Within a row that token closes one text and belongs to the next. What does not fit is cut off.
    """
    source = iter(tokens)
    rows: list[list[list[int]]] = []
    while True:
        row, owner = ([end], [0]) if len(rows) % 2 else ([], [])
        for number in itertools.count():
            if len(row) >= POSITIONS:
                break
            following = next(source, None)
            if following is None:
                return torch.tensor(rows, dtype=torch.int16)
            row += [*following, end]
            owner += [*[number] * len(following), number + 1]
        rows.append([row[:POSITIONS], owner[:POSITIONS]])


def batches(rows: torch.Tensor, size: int, start: int) -> Iterator[torch.Tensor]:
    """(B, 2, T) int64 without end; each pass has its own order. Batch `start` is the first, so that a run can go on."""
    per_pass = len(rows) // size
    for number in itertools.count(start):
        turn, place = divmod(number, per_pass)
        if place == 0 or number == start:
            order = list(range(len(rows)))
            random.Random(f"{SEED}:order:{turn}").shuffle(order)  # noqa: S311
        yield rows[order[place * size : (place + 1) * size]].long()
