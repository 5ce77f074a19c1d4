"""Answers of a model in training to a few prompts: the likeliest token each time, so nothing random is drawn.

All prompts are answered together, a token each in one step, between which others' work runs. Knows no job.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import datafile
import dataset
from gpu_service.cache import Geometry, Pool, RowCache, Slot
from gpu_service.data import encode, render_chat
from gpu_service.decoder import Decoder
from gpu_service.errors import BadRequest
from gpu_service.models import Source
from gpu_service.rows import Rows

MAX_ANSWER_TOKENS = 64
HELD_OUT = 3  # rows of the validation file whose prompts stand in where the user gave none
LOOKED_AT = 100  # rows of it


@dataclass(frozen=True)
class Prompt:
    text: str
    ids: tuple[int, ...]
    reference: str | None = None  # what the data set answers


@dataclass(frozen=True)
class File:
    path: Path
    name: str  # as its owner calls it: the ending may say the format


def prompts(source: Source, texts: Sequence[str], training: File, validation: File | None) -> list[Prompt]:
    """The user's own, put as the training rows are put, a chat's question or a plain beginning; else held-out ones."""
    if texts:
        first = next(
            (row for _, row in dataset.read(training.path, training.name) if not isinstance(row, datafile.RowError)),
            None,
        )
        chat = isinstance(first, dataset.Chat)
        return [_prompt(source, [{"role": "user", "content": t}] if chat else t, t) for t in texts]
    found: list[Prompt] = []
    held_out = dataset.read(validation.path, validation.name) if validation else iter(())
    for _, row in islice(held_out, LOOKED_AT):
        if len(found) == HELD_OUT:
            break
        if isinstance(row, dataset.Completion):
            asked, answer = (row.prompt, row.completion) if row.prompt else _halves(row.completion)
            found.append(_prompt(source, asked, asked, answer))
        elif isinstance(row, dataset.Chat) and row.messages[-1]["role"] == "assistant" and len(row.messages) > 1:
            turns = list(row.messages[:-1])
            try:
                found.append(_prompt(source, turns, turns[-1]["content"], row.messages[-1]["content"], row.tools))
            except BadRequest:  # a template that refuses the beginning of a chat
                continue
    return found


def _halves(passage: str) -> tuple[str, str]:
    """Plain text asks nothing: its second half is what it goes on with after its first, cut between words."""
    middle = len(passage) // 2
    cut = passage.find(" ", middle) if " " in passage[middle:] else middle
    return passage[:cut], passage[cut:]


def _prompt(
    source: Source,
    asked: str | list[dict[str, str]],
    text: str,
    reference: str | None = None,
    tools: list[Any] | None = None,
) -> Prompt:
    if isinstance(asked, str):
        ids = encode(source.tokenizer, asked, special=True, param="sample_prompts")
    else:
        rendered = render_chat(source.tokenizer, asked, add_generation_prompt=True, tools=tools)
        ids = encode(source.tokenizer, rendered, special=False, param="sample_prompts")
    most = source.context_tokens - _answer_tokens(source)
    return Prompt(text, tuple(ids[-most:]), reference)


def _answer_tokens(source: Source) -> int:
    return min(MAX_ANSWER_TOKENS, source.context_tokens // 2)


def answers(
    decoder: Decoder, rows: Rows, wanted: Sequence[Prompt], source: Source, geometry: Geometry
) -> Generator[None, None, list[str]]:
    """Yields after each step; the text of each answer comes back at the end."""
    pool = Pool(geometry)
    found: list[list[int]] = [[] for _ in wanted]
    going: dict[int, Slot] = {}
    for i, prompt in enumerate(wanted):
        if not prompt.ids:
            continue
        cache, token = _read(decoder, rows, prompt.ids, geometry)
        if token not in source.stop_ids:
            found[i].append(token)
            going[i] = pool.join(cache)
        yield
    for _ in range(_answer_tokens(source) - 1):
        if not going:
            break
        tokens = _step(decoder, rows, pool, {id(slot): found[i][-1] for i, slot in going.items()}, geometry)
        for i, slot in list(going.items()):
            found[i].append(tokens[id(slot)])
            text = str(source.tokenizer.decode(found[i], skip_special_tokens=True))
            if found[i][-1] in source.stop_ids or any(stop in text for stop in source.stop):
                pool.leave(slot, keep=False)
                del going[i]
        yield
    return [_text(source, ids) for ids in found]


def _text(source: Source, ids: list[int]) -> str:
    text = str(source.tokenizer.decode(ids, skip_special_tokens=True))
    for stop in source.stop:
        text = text.partition(stop)[0]
    return text.strip()


@torch.no_grad()
def _read(decoder: Decoder, rows: Rows, ids: Sequence[int], geometry: Geometry) -> tuple[RowCache, int]:
    cache = RowCache(geometry, len(ids))
    attention = cache.reading(len(ids))
    h = decoder.embed(torch.tensor([ids], device=geometry.device), rows, attention)
    h = decoder.layers(h, 0, decoder.n_layers, rows, attention)[:, -1:]
    return cache, int(decoder.unembed(decoder.final_norm(h, rows), rows)[0, -1].argmax())


@torch.no_grad()
def _step(decoder: Decoder, rows: Rows, pool: Pool, last: dict[int, int], geometry: Geometry) -> dict[int, int]:
    """One more token of every row; both maps go by the slot's identity."""
    attention = pool.decoding()  # first: it may move rows
    slots = pool.order()
    ids = torch.tensor([[last[id(slot)]] for slot in slots], device=geometry.device)
    h = decoder.embed(ids, rows, attention)
    h = decoder.layers(h, 0, decoder.n_layers, rows, attention)
    chosen = decoder.unembed(decoder.final_norm(h, rows), rows)[:, -1].argmax(-1)
    return {id(slot): int(token) for slot, token in zip(slots, chosen.tolist(), strict=True)}
