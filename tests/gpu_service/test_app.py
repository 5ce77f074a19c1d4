"""The gpu's HTTP API on a real port: answers, streams, refusals, and callers who leave."""

import asyncio
import json
from collections.abc import AsyncIterator
from itertools import accumulate
from typing import Any

import httpx2
import openai
import pytest

import wire
from gpu_service.gate import Identity
from tests.conftest import TINY
from tests.gpu_service.conftest import KEY, Gpu

CHAT = {"model": TINY, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6, "temperature": 0}
LONG = {"model": TINY, "prompt": "Once", "max_tokens": 500, "ignore_eos": True}  # ends only with its caller


@pytest.fixture
async def client(gpu: Gpu) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{gpu.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


async def error(response: httpx2.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]  # type: ignore[no-any-return]


async def test_the_official_client_gets_the_same_text_whole_and_streamed(client: openai.AsyncOpenAI) -> None:
    messages: Any = CHAT["messages"]
    whole = await client.chat.completions.create(model=TINY, messages=messages, max_tokens=6, temperature=0)
    stream = await client.chat.completions.create(
        model=TINY, messages=messages, max_tokens=6, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason == "length"
    assert whole.usage
    assert chunks[-1].usage
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 6
    assert chunks[-1].usage.prompt_tokens_details
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens, "the prompt was known already"


async def test_several_answers_with_log_probabilities_whole_and_streamed(client: openai.AsyncOpenAI) -> None:
    messages: Any = CHAT["messages"]
    asked: dict[str, Any] = {"n": 2, "seed": 5, "max_tokens": 4, "logprobs": True, "top_logprobs": 2}
    whole = await client.chat.completions.create(model=TINY, messages=messages, **asked)
    stream = await client.chat.completions.create(model=TINY, messages=messages, stream=True, **asked)
    texts, tokens = ["", ""], [0, 0]
    async for chunk in stream:
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        tokens[choice.index] += len(choice.logprobs.content or []) if choice.logprobs else 0
    assert texts == [choice.message.content for choice in whole.choices]
    assert texts[0] != texts[1]
    assert tokens == [4, 4]
    for choice in whole.choices:
        assert choice.logprobs
        assert choice.logprobs.content
        assert "".join(t.token for t in choice.logprobs.content) == choice.message.content
        for token in choice.logprobs.content:
            assert token.logprob <= token.top_logprobs[0].logprob <= 0
            assert len(token.top_logprobs) == 2


async def test_echo_puts_the_prompt_before_the_completion(client: openai.AsyncOpenAI) -> None:
    done = await client.completions.create(model=TINY, prompt="Once upon", echo=True, max_tokens=3)
    assert done.choices[0].text.startswith("Once upon")
    assert done.choices[0].logprobs is None


async def test_echo_with_log_probabilities_tells_those_of_the_prompt_whole_and_streamed(
    client: openai.AsyncOpenAI,
) -> None:
    asked: dict[str, Any] = {"model": TINY, "prompt": "Once upon a time", "echo": True, "logprobs": 2, "n": 2}
    whole = await client.completions.create(**asked, max_tokens=3, seed=1)
    told = whole.choices[0].logprobs
    assert told
    assert told.tokens
    assert told.token_logprobs
    assert told.top_logprobs
    assert whole.usage
    assert len(told.tokens) == whole.usage.prompt_tokens + 3
    assert "".join(told.tokens) == whole.choices[0].text
    lengths = accumulate(len(token) for token in told.tokens[:-1])
    assert told.text_offset == [0, *lengths]
    assert told.token_logprobs[0] is None
    assert told.top_logprobs[0] is None
    assert all(p <= 0 for p in told.token_logprobs[1:])
    texts, tokens, offsets = ["", ""], [0, 0], list[int]()
    async for chunk in await client.completions.create(**asked, max_tokens=3, seed=1, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        tokens[choice.index] += len(choice.logprobs.tokens or []) if choice.logprobs else 0
        offsets += (choice.logprobs.text_offset or []) if choice.logprobs and choice.index == 0 else []
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [len(told.tokens)] * 2
    assert offsets == told.text_offset

    only = await client.completions.create(**asked, max_tokens=0)
    assert only.usage
    assert only.usage.completion_tokens == 0
    for choice in only.choices:
        assert (choice.text, choice.finish_reason) == ("Once upon a time", "length")
        assert choice.logprobs
        assert choice.logprobs.token_logprobs == told.token_logprobs[: only.usage.prompt_tokens]
    alone = await client.completions.create(model=TINY, prompt="Once", echo=True, max_tokens=0)
    assert alone.choices[0].text == "Once"
    with pytest.raises(openai.BadRequestError, match="echo"):
        await client.completions.create(model=TINY, prompt="Once", max_tokens=0)


async def test_completions_whole_and_streamed(client: openai.AsyncOpenAI) -> None:
    whole = await client.completions.create(model=TINY, prompt="Once", temperature=0, max_tokens=5)
    stream = await client.completions.create(model=TINY, prompt="Once", temperature=0, max_tokens=5, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == whole.choices[0].text


async def test_many_callers_at_once_each_get_their_own_answer(gpu: Gpu) -> None:
    prompts = ["Once", "The sea", "A green apple", "Seven"]
    bodies = [{"model": TINY, "prompt": p, "max_tokens": 8, "temperature": 0} for p in prompts]

    async def ask(body: dict[str, Any]) -> str:
        return str((await gpu.http.post("/v1/completions", json=body)).json()["choices"][0]["text"])

    alone = [await ask(body) for body in bodies]
    assert await asyncio.gather(*(ask(body) for body in bodies)) == alone


async def test_dials_act_on_one_request_only(gpu: Gpu) -> None:
    async def answer(**extra: Any) -> str:
        response = await gpu.http.post("/v1/chat/completions", json={**CHAT, **extra})
        return str(response.json()["choices"][0]["message"]["content"])

    plain = await answer()
    turned, beside = await asyncio.gather(answer(dials={"attn": 0.2, "mlp": 2.0}), answer())
    assert turned != plain
    assert beside == plain == await answer(dials={"eps": 1.0, "bands": [{"layers": "0-1", "attn": 1.0}]})


async def test_a_caller_of_a_stream_who_leaves_stops_the_row_within_a_step(gpu: Gpu) -> None:
    async with gpu.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
        chunks = response.aiter_bytes()  # kept: a generator that nobody holds is closed, and the response with it
        await anext(chunks)
        assert gpu.worker.active_requests == 1
    await nobody_is_served(gpu)


async def test_a_caller_without_a_stream_who_leaves_stops_the_row_within_a_step(gpu: Gpu) -> None:
    asking = asyncio.create_task(gpu.http.post("/v1/completions", json=LONG))
    async with asyncio.timeout(30):
        while gpu.worker.active_requests == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    asking.cancel()
    await nobody_is_served(gpu)


async def nobody_is_served(gpu: Gpu) -> None:
    async with asyncio.timeout(30):
        while gpu.worker.active_requests or len(gpu.worker._text):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    # A row that had gone on to its end would have left its 500 tokens for another turn.
    assert all(len(tokens) < 400 for _, tokens in gpu.worker._text._reuse._entries)


async def test_past_the_bound_of_waiting_callers_the_answer_is_429_with_retry_after(gpu: Gpu) -> None:
    gpu.worker._max_waiting = 1
    try:
        async with gpu.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
            chunks = response.aiter_bytes()
            await anext(chunks)
            refused = await gpu.http.post("/v1/completions", json=LONG)
            assert refused.status_code == 429
            assert refused.headers["retry-after"]
            assert (await error(refused))["code"] == "gpu_busy"
    finally:
        gpu.worker._max_waiting = 256


async def test_one_caller_gets_half_of_the_bound_and_leaves_the_rest_to_others(gpu: Gpu) -> None:
    gpu.worker._max_waiting = 2
    mine, theirs = ({wire.HEADER_CALLER: name} for name in ("mine", "theirs"))
    try:
        async with gpu.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}, headers=mine) as response:
            chunks = response.aiter_bytes()
            await anext(chunks)
            refused = await gpu.http.post("/v1/completions", json=LONG, headers=mine)
            assert refused.status_code == 429
            assert "You have 1" in (await error(refused))["message"]
            assert (await gpu.http.post("/v1/completions", json={**LONG, "max_tokens": 2}, headers=theirs)).is_success
    finally:
        gpu.worker._max_waiting = 256
    await nobody_is_served(gpu)


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({**CHAT, "messages": []}, "messages", "at least 1"),
        ({**CHAT, "messages": [{"role": "tool", "content": "x"}]}, "messages", "role"),
        ({**CHAT, "messages": [{"role": "user", "content": "\ud83d"}]}, None, "surrogate"),
        ({**CHAT, "model": "\ud83d"}, None, "surrogate"),
        ({**CHAT, "logit_bias": {"9" * 5000: 1}}, "logit_bias", "49151"),
        ({**CHAT, "temperature": 3}, "temperature", "2"),
        ({**CHAT, "top_logprobs": 2}, None, "logprobs"),
        ({**CHAT, "temperature": "hot"}, "temperature", "number"),
        ({**CHAT, "top_p": 0}, "top_p", "greater"),
        ({**CHAT, "stop": ["a", "b", "c", "d", "e"]}, None, "4"),
        ({**CHAT, "n": 20}, "n", "8"),
        ({**CHAT, "tools": [{"type": "function"}]}, "tools", "not built yet"),
        ({**CHAT, "logit_bias": {"99999": 1}}, "logit_bias", "49151"),
        ({**CHAT, "top_logprobs": 21}, "top_logprobs", "20"),
        ({**CHAT, "temprature": 1}, "temprature", "temprature"),
        ({**CHAT, "dials": {"atn": 1}}, "dials", "atn"),
        ({**CHAT, "dials": {"attn": -1}}, "dials", "attn"),
        ({**CHAT, "dials": {"bands": [{"layers": "9", "attn": 2}]}}, "dials", "layers 0-3"),
        ({**CHAT, "dials": "dreamy"}, "dials", "preset"),
        ({"messages": CHAT["messages"]}, "model", "required"),
    ],
)
async def test_a_bad_field_is_400_and_named(gpu: Gpu, body: dict[str, Any], param: str | None, says: str) -> None:
    raw = json.dumps(body).encode()  # json.dumps keeps the half character as an escape
    response = await gpu.http.post("/v1/chat/completions", content=raw)
    found = await error(response)
    assert response.status_code == 400
    assert found["param"] == param
    assert says in found["message"]


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
async def test_a_body_that_is_no_json_object_is_400(gpu: Gpu, raw: bytes) -> None:
    response = await gpu.http.post("/v1/chat/completions", content=raw)
    assert response.status_code == 400
    assert (await error(response))["code"] == "not_json"


async def test_what_clients_send_by_themselves_and_neutral_values_are_let_pass(gpu: Gpu) -> None:
    extra = {"user": "u", "n": 1, "frequency_penalty": 0, "tools": None, "logprobs": False, "metadata": {}}
    response = await gpu.http.post("/v1/chat/completions", json={**CHAT, **extra})
    assert response.status_code == 200


async def test_an_unknown_model_is_404_and_names_those_that_exist(gpu: Gpu) -> None:
    response = await gpu.http.post("/v1/chat/completions", json={**CHAT, "model": "ft:x:y:z"})
    assert response.status_code == 404
    found = await error(response)
    assert (found["code"], found["param"]) == ("model_not_found", "model")
    assert TINY in found["message"]


async def test_too_long_a_prompt_is_400_with_both_lengths(gpu: Gpu) -> None:
    response = await gpu.http.post("/v1/completions", json={"model": TINY, "prompt": "word " * 600})
    assert response.status_code == 400
    found = await error(response)
    assert found["code"] == "context_length_exceeded"
    assert "512" in found["message"]
    assert "601" in found["message"] or "600" in found["message"]


async def test_a_prompt_that_fits_is_answered_up_to_the_end_of_the_context(gpu: Gpu) -> None:
    response = await gpu.http.post("/v1/completions", json={"model": TINY, "prompt": "word " * 505, "max_tokens": 400})
    assert response.json()["usage"]["total_tokens"] == 512


async def test_too_large_a_body_is_413(gpu: Gpu) -> None:
    response = await gpu.http.post("/v1/completions", content=b"x" * (8 * 2**20 + 1))
    assert response.status_code == 413
    assert (await error(response))["code"] == "request_too_large"


async def test_layers_are_described_and_a_spec_is_previewed(gpu: Gpu) -> None:
    described = (await gpu.http.get(f"/v1/models/{TINY}/layers")).json()
    assert described["n_layers"] == 4
    preview = (await gpu.http.post("/v1/layers/preview", json={"model": TINY, "layers": {"layers": "last:1"}})).json()
    assert preview["selected_tensors"] == 7
    assert preview["lowest_layer"] == 3
    assert preview["memory_bytes"]["total"] > 0
    assert "7 of 38 tensors" in preview["summary"]


async def test_a_preview_with_a_data_set_tells_the_time_and_the_pause_for_chat(gpu: Gpu) -> None:
    await gpu.http.post("/v1/completions", json={"model": TINY, "prompt": "Once", "max_tokens": 1})  # it is loaded now

    async def ask(**more: Any) -> dict[str, Any]:
        # From the lowest layer on: nothing is frozen below, whose output would be computed once for all epochs.
        asked = {"model": TINY, "layers": {"method": "full", "parts": ["attn"], "layers": "all"}, **more}
        return (await gpu.http.post("/v1/layers/preview", json=asked)).json()  # type: ignore[no-any-return]

    data = {"rows": 1000, "bytes": 200_000}
    once, thrice = [await ask(data=data, hyperparameters={"n_epochs": n, "batch_size": 4}) for n in (1, 3)]
    assert thrice["time_s"] == pytest.approx(3 * once["time_s"], rel=0.01, abs=0.2)
    assert once["batch"] == {"rows": 4, "tokens": 40}
    assert 0 < once["chat_pause_s"] < once["time_s"]
    assert "time_s" not in await ask()


@pytest.mark.parametrize(
    ("spec", "code", "says"),
    [
        ({"layers": "9"}, "no_such_layer", "layers 0-3"),
        ({"parts": ["brain"]}, "no_such_layer", "attn"),
        ({"component": "unet"}, "no_such_layer", "unet"),
        ({"quantize": "4bit", "method": "full"}, "invalid_value", "held in 4bit"),
        ({"method": "magic"}, "invalid_value", "method"),
        ([], "invalid_value", "layers"),
    ],
)
async def test_a_bad_layer_spec_is_400_and_says_what_exists(gpu: Gpu, spec: Any, code: str, says: str) -> None:
    response = await gpu.http.post("/v1/layers/preview", json={"model": TINY, "layers": spec})
    assert response.status_code == 400
    found = await error(response)
    assert (found["code"], found["param"]) == (code, "layers")
    assert says in found["message"]


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {KEY}"}])
@pytest.mark.parametrize("path", ["/v1/models", f"/v1/models/{TINY}/layers"])
async def test_without_the_key_every_route_is_401(gpu: Gpu, headers: dict[str, str], path: str) -> None:
    async with httpx2.AsyncClient(base_url=gpu.url) as stranger:
        response = await stranger.get(path, headers=headers)
        assert response.status_code == 401
        assert (await error(response))["code"] == "invalid_api_key"
        assert (await stranger.post("/v1/completions", json=LONG, headers=headers)).status_code == 401
        assert (await stranger.get("/healthz")).json() == {"status": "ok"}


async def test_an_unknown_path_is_404_in_the_same_shape(gpu: Gpu) -> None:
    response = await gpu.http.get("/v1/nothing")
    assert response.status_code == 404
    assert (await error(response))["code"] == "not_found"


async def test_metrics_count_tokens_rows_and_requests_and_open_with_the_key_alone(gpu: Gpu) -> None:
    async with httpx2.AsyncClient(base_url=gpu.url) as stranger:
        assert (await stranger.get("/metrics")).status_code == 401

    async def numbers() -> dict[str, float]:
        text = (await gpu.http.get("/metrics")).raise_for_status().text
        lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in lines}

    before = await numbers()
    usage = (await gpu.http.post("/v1/chat/completions", json=CHAT)).json()["usage"]
    refused = await gpu.http.post("/v1/chat/completions", json={**CHAT, "model": "a-name-of-the-callers"})
    assert refused.status_code == 404
    found = await numbers()
    more = {name: value - before.get(name, 0) for name, value in found.items()}
    assert more['gpu_tokens_total{what="written"}'] == usage["completion_tokens"]
    assert (
        more['gpu_tokens_total{what="read"}']
        == usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
    )
    assert more['gpu_device_seconds_count{kind="text"}'] >= usage["completion_tokens"] - 1
    assert more['gpu_requests_total{method="POST",route="/v1/chat/completions",status="2xx"}'] == 1
    assert more['gpu_errors_total{code="model_not_found"}'] == 1
    assert found["gpu_kv_budget_bytes"] > 0
    assert found["gpu_device_memory_bytes"] >= found["gpu_device_free_bytes"] > 0
    assert (found["gpu_rows"], found["gpu_active_requests"], found["gpu_kv_held_bytes"]) == (0, 0, 0)
    assert not [name for name in found if TINY in name or "callers" in name]


async def test_a_relay_is_told_what_its_user_used_and_nobody_else(gpu: Gpu) -> None:
    relay = {wire.HEADER_CALLER: "user-1"}
    whole = await gpu.http.post("/v1/chat/completions", json=CHAT, headers=relay)
    prompt, written = (whole.json()["usage"][what] for what in ("prompt_tokens", "completion_tokens"))
    assert whole.headers[wire.HEADER_USAGE] == f"{prompt},{written}"
    told = await gpu.http.post("/v1/chat/completions", json={**CHAT, "stream": True}, headers=relay)
    comment = wire.USAGE_COMMENT.decode()
    frames = told.text.split("\n\n")
    assert [frame for frame in frames if frame.startswith(":")] == [
        f"{comment}{prompt},0",
        f"{comment}{prompt},{written}",
    ]
    assert frames[-2] == "data: [DONE]"
    plain = await gpu.http.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert comment not in plain.text
    assert wire.HEADER_USAGE not in (await gpu.http.post("/v1/chat/completions", json=CHAT)).headers


async def test_an_answer_has_the_callers_request_id_where_that_is_well_formed(gpu: Gpu) -> None:
    for given, kept in [("req-of-the-relay-1", True), ("two words", False), ("x" * 65, False), ("sk-gpu-a-key", False)]:
        answer = await gpu.http.get("/healthz", headers={"x-request-id": given})
        assert (answer.headers["x-request-id"] == given) is kept, given


class TestSignedRequests:
    """As the relay sends them."""

    BY = wire.SignedBy(gpu_id="gpu-1", epoch=2)

    @pytest.fixture
    async def stranger(self, gpu: Gpu) -> AsyncIterator[httpx2.AsyncClient]:
        gpu.identity = Identity(self.BY, "the signing key", lambda: 1000.0)
        async with httpx2.AsyncClient(base_url=gpu.url) as stranger:
            yield stranger
        gpu.identity = None

    def headers(self, body: bytes, target: str = "/v1/completions", by: wire.SignedBy = BY) -> dict[str, str]:
        return wire.sign("the signing key", by, "POST", target, wire.body_sha256(body), 1000.0)

    BODY = json.dumps({"model": TINY, "prompt": "Once", "max_tokens": 2}).encode()

    async def test_a_signed_request_is_answered_once(self, stranger: httpx2.AsyncClient) -> None:
        headers = self.headers(self.BODY)
        assert (await stranger.post("/v1/completions", content=self.BODY, headers=headers)).status_code == 200
        replayed = await stranger.post("/v1/completions", content=self.BODY, headers=headers)
        assert (replayed.status_code, (await error(replayed))["code"]) == (401, "bad_signature")

    async def test_another_body_path_or_epoch_is_refused(self, stranger: httpx2.AsyncClient) -> None:
        other = self.BODY.replace(b"Once", b"Twice")
        earlier = wire.SignedBy(gpu_id="gpu-1", epoch=1)
        for body, headers in [
            (other, self.headers(self.BODY)),
            (self.BODY, self.headers(self.BODY, "/v1/chat/completions")),
            (self.BODY, self.headers(self.BODY, "/v1/completions?x=1")),
            (self.BODY, self.headers(self.BODY, by=earlier)),
        ]:
            response = await stranger.post("/v1/completions", content=body, headers=headers)
            assert (response.status_code, (await error(response))["code"]) == (401, "bad_signature")

    async def test_the_challenge_is_answered_with_the_proof(self, stranger: httpx2.AsyncClient) -> None:
        body = wire.Challenge(nonce="n" * 32).model_dump_json().encode()
        response = await stranger.post("/challenge", content=body, headers=self.headers(body, "/challenge"))
        proof = wire.ChallengeReply.model_validate_json(response.content).proof
        assert proof == wire.challenge_proof("the signing key", "n" * 32, self.BY)
