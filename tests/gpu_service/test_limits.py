"""Limits that callers meet, on a real server with the official client."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai.types.chat import ChatCompletionMessageParam

import wire
from adapter import AdapterMeta, LoraMeta
from gpu_service import device as devices
from gpu_service.artifacts import Adapter, save
from gpu_service.device import Device
from gpu_service.models import Models
from gpu_service.resident import AdapterFiles, Resident
from gpu_service.settings import Settings
from tests.conftest import TINY
from tests.gpu_service.conftest import KEY, Gpu, run_gpu
from tests.gpu_service.test_rows import random_lora

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]


def client_of(gpu: Gpu) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{gpu.url}/v1", api_key=KEY, max_retries=0)


@pytest.fixture
async def narrow(tiny_dir: Path, cpu: Device) -> AsyncIterator[Gpu]:
    """A gpu with room for one row of 256 tokens and little more."""
    async with run_gpu(tiny_dir, cpu, Settings()) as gpu:
        gpu.worker._text._admission.budget_bytes = 300 * 1024
        yield gpu


async def test_what_can_never_fit_is_refused_at_once_and_an_answer_without_a_limit_is_cut_to_what_fits(
    narrow: Gpu,
) -> None:
    async with client_of(narrow) as client:
        with pytest.raises(openai.BadRequestError, match="would take 1 MB, and this gpu has 0 MB") as refused:
            await client.chat.completions.create(model=TINY, messages=HELLO, max_tokens=400)
        assert refused.value.code == "does_not_fit"
        assert refused.value.param == "max_tokens"
        answer = await client.chat.completions.create(model=TINY, messages=HELLO, temperature=0, logit_bias={"2": -100})
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage
        assert 100 < answer.usage.total_tokens <= 256
        with pytest.raises(openai.BadRequestError, match="would take 4 MB"):
            await client.chat.completions.create(model=TINY, messages=HELLO, n=8)


async def test_a_template_that_refuses_the_messages_is_400_in_its_own_words(
    tiny_dir: Path, cpu: Device, tmp_path: Path
) -> None:
    folder = tmp_path / "strict"
    shutil.copytree(tiny_dir, folder)
    (folder / "chat_template.jinja").write_text(
        "{% if messages[0].role != 'system' %}{{ raise_exception('begin with a system message') }}{% endif %}hello"
    )
    async with run_gpu(folder, cpu, Settings()) as gpu, client_of(gpu) as client:
        with pytest.raises(openai.BadRequestError, match="begin with a system message") as refused:
            await client.chat.completions.create(model=TINY, messages=HELLO, max_tokens=4)
        assert refused.value.param == "messages"


@pytest.fixture(scope="module")
async def flat(flat_dir: Path, cpu: Device) -> AsyncIterator[Gpu]:
    async with run_gpu(flat_dir, cpu, Settings()) as gpu:
        yield gpu


@pytest.mark.parametrize(
    ("asked", "written"),
    [
        ({"temperature": 0}, "aaaaaa"),
        ({"temperature": 0, "frequency_penalty": 2}, "ababab"),
        ({"temperature": 0, "presence_penalty": 2}, "abaaaa"),
        ({"temperature": 2, "top_k": 1}, "aaaaaa"),
        ({"temperature": 1, "top_p": 0.5}, "aaaaaa"),
        ({"temperature": 1, "min_p": 0.9}, "aaaaaa"),
        ({"temperature": 0, "stop": ["never", "baa"], "presence_penalty": 2}, "a"),
        ({"temperature": 0, "stop": "bab", "frequency_penalty": 2, "stream": True}, "a"),
    ],
)
async def test_each_way_of_sampling_reaches_the_model(flat: Gpu, asked: dict[str, Any], written: str) -> None:
    """Two tokens stand far above the others, one a little above the other."""
    tokenizer = flat.worker._models.source(TINY).tokenizer
    a, b = (tokenizer(letter).input_ids[0] for letter in "ab")
    known = {"temperature", "frequency_penalty", "presence_penalty", "top_p", "stop", "stream"}
    extra = {"ignore_eos": True, **{name: value for name, value in asked.items() if name not in known}}
    async with client_of(flat) as client:
        answer: Any = await client.completions.create(
            model=TINY,
            prompt="Once",
            max_tokens=6,
            seed=1,
            logit_bias={str(a): 100, str(b): 99},
            extra_body=extra,
            **{name: value for name, value in asked.items() if name in known},
        )
        choices = [chunk.choices[0] async for chunk in answer] if "stream" in asked else answer.choices
    assert "".join(choice.text for choice in choices) == written
    assert choices[-1].finish_reason == ("stop" if "stop" in asked else "length")


async def test_a_repetition_penalty_counts_prompt_and_answer_as_transformers_does(gpu: Gpu, tiny_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer, theirs = gpu.worker._models.source(TINY).tokenizer, AutoModelForCausalLM.from_pretrained(tiny_dir)
    prompt = tokenizer("Once upon a time", return_tensors="pt").input_ids
    asked = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), repetition_penalty=0.5, **asked)
    async with client_of(gpu) as client:
        answer = await client.completions.create(
            model=TINY,
            prompt="Once upon a time",
            max_tokens=12,
            temperature=0,
            extra_body={"repetition_penalty": 0.5, "ignore_eos": True},
        )
    assert answer.choices[0].text == tokenizer.decode(expected[0, prompt.shape[1] :])
    plain = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **asked)
    assert not torch.equal(plain, expected)


async def test_a_model_without_a_template_chats_in_lines_and_stops_before_the_next_speaker(
    flat_dir: Path, cpu: Device, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(flat_dir, folder, ignore=shutil.ignore_patterns("chat_template*"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    async with run_gpu(folder, cpu, Settings()) as gpu, client_of(gpu) as client:
        tokenizer = gpu.worker._models.source(TINY).tokenizer
        line = tokenizer("fine\nUser: and").input_ids
        # One token after the other, each the likeliest while the ones before it have been written.
        bias = {str(token): 100 - place for place, token in enumerate(dict.fromkeys(line))}
        answer = await client.chat.completions.create(
            model=TINY,
            messages=HELLO,
            max_tokens=len(line),
            temperature=0,
            logit_bias=bias,
            presence_penalty=2,
            frequency_penalty=2,
            extra_body={"ignore_eos": True},
        )
        asked = tokenizer("User: hello\nAssistant:").input_ids
        assert answer.usage
        assert answer.usage.prompt_tokens == len(asked)
        assert answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].message.content == "fine"


async def test_a_deterministic_request_repeats_in_half_precision_whatever_else_is_asked(
    tiny_dir: Path, tmp_path: Path
) -> None:
    half = devices.choose(Settings(device="cpu", precision="bf16"))
    async with run_gpu(tiny_dir, half, Settings(data_dir=tmp_path)) as gpu, client_of(gpu) as client:

        async def ask(seed: int, deterministic: bool) -> str | None:
            answer = await client.chat.completions.create(
                model=TINY,
                messages=HELLO,
                max_tokens=24,
                seed=seed,
                extra_body={"deterministic": deterministic, "ignore_eos": True},
            )
            return answer.choices[0].message.content

        alone = await ask(7, True)
        asked = [ask(seed, seed == 7) for seed in range(4, 10)]
        answers = await asyncio.gather(*asked)
        assert answers[3] == alone
        assert len(set(answers)) == len(answers)


def test_adapters_stay_within_their_budget_and_the_least_recently_used_leave(
    tiny_dir: Path, cpu: Device, tmp_path: Path
) -> None:
    models = Models((f"{TINY}={tiny_dir}",), cpu)
    base = models.load(TINY)
    wanted = []
    for seed in range(3):
        lora = random_lora(base, seed)
        meta = AdapterMeta(
            family="llama",
            base_model=TINY,
            base_revision=base.source.revision,
            layers=[wire.LayerSpec()],
            lora={
                name: LoraMeta(rank=pair.a.shape[0], alpha=pair.scale * pair.a.shape[0]) for name, pair in lora.items()
            },
            tensors={name: tuple(base.weights[name].shape) for name in lora},
            hyperparameters=wire.Hyperparameters(),
            created_at=1.8e9,
            trained_tokens=1,
        )
        save(tmp_path / str(seed), Adapter(meta, {}, lora))
        files = {path.name: path for path in (tmp_path / str(seed)).iterdir()}
        wanted.append(AdapterFiles(str(seed), files))
    resident = Resident(cpu, models, tmp_path / "compiled", 2**30)
    first = resident.adapter(wanted[0], base)
    resident.adapter_bytes = int(2.9 * first.n_bytes)
    resident.adapter(wanted[1], base)
    assert resident.adapter(wanted[0], base) is first, "held, and now the one that was used last"
    resident.adapter_bytes = first.n_bytes + resident._adapters["1"].n_bytes
    resident.adapter(wanted[2], base)
    assert "1" not in resident._adapters
    assert "2" in resident._adapters
    resident.adapter_bytes = 1
    resident.adapter(wanted[1], base)
    assert list(resident._adapters) == ["1"], "one may be larger than the budget, and is used all the same"
