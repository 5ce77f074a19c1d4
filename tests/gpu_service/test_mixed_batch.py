"""Real models, eight different rows in one batch: each writes what it writes alone, and what transformers generates.

In fp32 and greedy. A difference counts unless the two likeliest tokens of the row alone are within 1e-3 of each other.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import wire
from adapter import AdapterMeta
from demo import gpt2
from gpu_service.artifacts import Adapter
from gpu_service.cache import Attention
from gpu_service.device import Device
from gpu_service.errors import OutOfMemory
from gpu_service.models import Base, find, read_base
from gpu_service.rows import Dials, Rows
from gpu_service.sampling import Sampling
from gpu_service.text import Engine, Piece
from tests.gpu_service.test_rows import random_lora
from tests.gpu_service.test_text import PROMPTS, Caller, engine, served

TIE = 1e-3


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest, cpu: Device) -> Base:
    if request.param == "llama":
        smol: Base = request.getfixturevalue("smol")
        return smol
    return read_base(find(f"demo-gpt2={Path(gpt2.__file__).parent / 'model'}"), cpu)


def adapter(base: Base, seed: int) -> Adapter:
    meta = AdapterMeta(
        family=base.source.family,
        base_model=base.source.id,
        base_revision=base.source.revision,
        layers=[wire.LayerSpec()],
        lora={},
        tensors={},
        hyperparameters=wire.Hyperparameters(),
        created_at=0.0,
        trained_tokens=0,
    )
    return Adapter(meta, {}, random_lora(base, seed))


def dials(base: Base, row: int) -> Dials | None:
    """Another setting for each row; one is the model as it is."""
    n = base.source.n_layers
    attn = tuple(1.0 + 0.02 * row * (layer % 2) for layer in range(n))
    mlp = tuple(1.0 - 0.015 * row * (layer % 3 == 0) for layer in range(n))
    return Dials(tuple(1.0 + row for _ in range(n)), attn, mlp, 1.0 + row) if row else None


def rows(base: Base, cpu: Device, *, differ: bool) -> Iterator[dict[str, Any]]:
    for i, prompt in enumerate(PROMPTS):
        sampling = Sampling(max_tokens=4 + i, temperature=0, ignore_eos=True, top_logprobs=2)
        mine = adapter(base, i) if differ and i % 4 != 3 else None
        yield {
            "to": served(base, cpu),
            "prompt": prompt,
            "sampling": sampling,
            "adapter": mine,
            "adapter_id": f"adapter {i}" if mine else None,
            "dials": dials(base, i) if differ else None,
        }


def drawn(caller: Caller) -> list[tuple[int, float]]:
    """Tokens, and how far each was ahead of the next likeliest."""
    assert caller.finish.completion_tokens == caller.request.sampling.max_tokens
    pieces = [d for event in caller.heard if isinstance(event, Piece) for d in event.drawn]
    return [(d.token, d.top[0][1] - d.top[1][1]) for d in pieces]


def finish(running: Engine) -> None:
    while len(running):
        running.step()


def together(asked: list[dict[str, Any]], cpu: Device) -> list[Caller]:
    """All in one batch, though they come one after another and leave by their lengths; prompts read in chunks."""
    running, callers = engine(cpu, chunk=24), []
    for i, row in enumerate(asked):
        callers.append(Caller(**row))
        running.add(callers[-1].request)
        if i % 3 == 2:
            running.step()
    finish(running)
    assert running._admission.held_bytes == 0
    return callers


def same_until_a_tie(ours: list[int], reference: list[tuple[int, float]]) -> bool:
    """Whether the whole row was compared; behind a tie either way is right."""
    for token, (expected, ahead) in zip(ours, reference, strict=True):
        if ahead <= TIE:
            return False
        assert token == expected
    return True


def test_eight_rows_with_eight_dials_and_adapters_write_what_each_writes_alone(base: Base, cpu: Device) -> None:
    asked, alone = list(rows(base, cpu, differ=True)), []
    for row in asked:
        caller, running = Caller(**row), engine(cpu)
        running.add(caller.request)
        finish(running)
        alone.append(drawn(caller))
    mixed = [[token for token, _ in drawn(caller)] for caller in together(asked, cpu)]
    assert sum(same_until_a_tie(ours, one) for ours, one in zip(mixed, alone, strict=True)) >= 6
    plain = [[token for token, _ in drawn(caller)] for caller in together(list(rows(base, cpu, differ=False)), cpu)]
    assert sum(a != b for a, b in zip(mixed, plain, strict=True)) >= 5, "dials and adapters did something"


def test_eight_plain_rows_write_what_transformers_generates(base: Base, cpu: Device) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(base.source.folder, dtype=torch.float32).eval()
    whole = 0
    for caller in together(list(rows(base, cpu, differ=False)), cpu):
        count, prompt = caller.request.sampling.max_tokens, torch.tensor([caller.request.prompt])
        out = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=count,
            max_new_tokens=count,
            eos_token_id=None,
            pad_token_id=0,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.stack(out.logits)[:, 0].topk(2).values
        expected = list(
            zip(out.sequences[0, prompt.shape[1] :].tolist(), (best[:, 0] - best[:, 1]).tolist(), strict=True)
        )
        whole += same_until_a_tie([token for token, _ in drawn(caller)], expected)
    assert whole >= 6


def full(base: Base, seed: int) -> Adapter:
    """One matrix of each of two layers replaced; the way of a tuned model that was trained in full."""
    names = [name for name, weight in base.weights.items() if weight.dim() == 2][5:40:20]
    random = torch.Generator().manual_seed(seed)
    changed = {name: base.weights[name] * (1 + 0.3 * torch.randn(1, generator=random)) for name in names}
    return replace(adapter(base, seed), full=changed, lora={})


def test_two_models_tuned_in_full_write_beside_base_and_lora_rows_what_each_writes_alone(
    base: Base, cpu: Device
) -> None:
    asked = list(rows(base, cpu, differ=True))
    for i, seed in ((0, 1), (1, 1), (2, 2), (5, 2)):
        asked[i] |= {"adapter": full(base, seed), "adapter_id": f"full {seed}"}
    before = {name: weight.clone() for name, weight in base.weights.items()}
    alone = []
    for row in asked:
        caller, running = Caller(**row), engine(cpu)
        running.add(caller.request)
        finish(running)
        alone.append(drawn(caller))
    mixed = [[token for token, _ in drawn(caller)] for caller in together(asked, cpu)]
    assert sum(same_until_a_tie(ours, one) for ours, one in zip(mixed, alone, strict=True)) >= 6
    assert all(torch.equal(weight, before[name]) for name, weight in base.weights.items())


class Full:
    """A decoder whose device is full while `full` says how that shows."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self.full: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def layers(self, h: torch.Tensor, first: int, last: int, rows: Rows, attention: Attention) -> Any:
        if self.full == "cpu":
            torch.empty(2**50)  # the allocator's own words
        if self.full == "gpu":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if self.full == "python":
            raise MemoryError
        return self._decoder.layers(h, first, last, rows, attention)


@pytest.mark.parametrize("how", ["cpu", "gpu", "python"])
def test_out_of_memory_ends_the_rows_of_that_step_frees_what_they_held_and_others_go_on(
    tiny: Base, cpu: Device, how: str
) -> None:
    to, running = served(tiny, cpu), engine(cpu)
    decoder = Full(to.decoder)
    to = replace(to, decoder=decoder)
    greedy = Sampling(max_tokens=6, temperature=0, ignore_eos=True)
    early = Caller(to, list(range(50, 90)), greedy)
    running.add(early.request)
    finish(running)
    assert running._reuse.n_bytes > 0
    writing = [Caller(to, prompt, greedy) for prompt in PROMPTS[:2]]
    for caller in writing:
        running.add(caller.request)
    running.step()
    running.step()
    running.step()
    waiting = Caller(to, PROMPTS[3], greedy)
    decoder.full = how
    running.step()
    decoder.full = None
    running.add(waiting.request)
    finish(running)
    for caller in writing:
        assert isinstance(caller.heard[-1], OutOfMemory)
    assert waiting.finish.completion_tokens == 6
    assert running._admission.held_bytes == 0
    assert not running._groups
