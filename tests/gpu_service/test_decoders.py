"""Our decoders against transformers' own models: logits, greedy text, loss and gradients, in fp32."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from gpu_service.cache import Pool, RowCache, Whole
from gpu_service.data import Batch
from gpu_service.decoder import Decoder, build
from gpu_service.device import Device
from gpu_service.errors import UnsupportedModel
from gpu_service.learn_text import summed_loss
from gpu_service.llama import Llama
from gpu_service.models import FAMILIES, Base, as_held
from gpu_service.rows import Rows

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS: dict[str, Any] = {
    "llama 2: every head its own keys, untied": LlamaConfig(**SMALL, num_key_value_heads=4),
    "llama 3: grouped heads, scaled rope": LlamaConfig(**SMALL, num_key_value_heads=2, rope_parameters=LLAMA3_ROPE),
    "linear rope, tied": LlamaConfig(
        **SMALL,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    ),
    "yarn rope": LlamaConfig(**SMALL, num_key_value_heads=2, rope_parameters=YARN_ROPE),
    "biases, wide heads": LlamaConfig(
        **SMALL, num_key_value_heads=2, attention_bias=True, mlp_bias=True, head_dim=32, rms_norm_eps=1e-3
    ),
    "qwen2: biases on q, k and v only": Qwen2Config(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=300, n_embd=64, n_layer=3, n_head=4, n_positions=512, initializer_range=0.2),
    "gpt2, narrow, relu": GPT2Config(
        vocab_size=300, n_embd=64, n_layer=3, n_head=2, n_inner=96, n_positions=512, activation_function="relu"
    ),
}
KINDS = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM, "gpt2": GPT2LMHeadModel}


def reference(config: Any) -> Any:
    torch.manual_seed(1)
    model = KINDS[config.model_type](config).eval()
    with torch.no_grad():  # transformers starts biases at zero and norms at one, which would hide mistakes
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name or "ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def weights_of(model: Any) -> dict[str, Tensor]:
    """As models.py holds them."""
    family = FAMILIES[model.config.model_type]
    stored = {name: tensor for name, tensor in model.state_dict().items() if "rotary" not in name}
    return {held: part for name, tensor in stored.items() for held, part in as_held(family, name, tensor)}


def decoder_of(config: Any) -> Decoder:
    return build(FAMILIES[config.model_type], config, CPU)


def whole_logits(decoder: Decoder, rows: Rows, ids: Tensor) -> Tensor:
    """ids (B, T), right-padded -> (B, T, V), without a cache."""
    attention = Whole(ids.shape[1], CPU)
    h = decoder.layers(decoder.embed(ids, rows, attention), 0, decoder.n_layers, rows, attention)
    return decoder.unembed(decoder.final_norm(h, rows), rows)


def mixed_prompts(vocab: int, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """ids (B, T) right-padded with zeros, lengths (B,)."""
    random = torch.Generator().manual_seed(2)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(3, vocab, (length,), generator=random)
    return ids, torch.tensor(lengths)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_equal_those_of_transformers_for_prompts_of_mixed_length(variant: str) -> None:
    config = VARIANTS[variant]
    model = reference(config)
    decoder, rows = decoder_of(config), Rows(weights_of(model))
    ids, lengths = mixed_prompts(300, [41, 7, 90, 1])
    ours = whole_logits(decoder, rows, ids)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(ours[row, :length], model(ids[row : row + 1, :length]).logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_cached_rows_of_mixed_length_that_come_and_go_equal_the_whole_forward(variant: str) -> None:
    """Prompts read in unequal chunks; then single tokens together, in several size classes; one row leaves midway."""
    config = VARIANTS[variant]
    model = reference(config)
    decoder, rows = decoder_of(config), Rows(weights_of(model))
    geometry = decoder.geometry(torch.float32, CPU)
    ids, _ = mixed_prompts(300, [400, 400, 400, 400])
    pool, lengths = Pool(geometry), [5, 253, 60, 255]  # two of them outgrow the smallest class on the way
    slots = {}
    for row, length in enumerate(lengths):
        cache = RowCache(geometry, 300)
        for start, end in ((0, length // 2), (length // 2, length)):
            attention = cache.reading(end - start)
            chunk = ids[row : row + 1, start:end]
            h = decoder.layers(decoder.embed(chunk, rows, attention), 0, 3, rows, attention)
        expected = model(ids[row : row + 1, :length]).logits[0, -1]
        torch.testing.assert_close(
            decoder.unembed(decoder.final_norm(h, rows), rows)[0, -1], expected, atol=1e-4, rtol=0
        )
        slots[pool.join(cache)] = row
    for step in range(6):
        if step == 3:
            leaving = next(slot for slot, row in slots.items() if row == 0)
            kept = pool.leave(leaving, keep=True)
            assert kept
            assert kept.length == 5 + 3
            del slots[leaving]
        decoding = pool.decoding()
        order = [slots[slot] for slot in pool.order()]
        now = torch.stack([ids[row, lengths[row] + step] for row in order])[:, None]
        h = decoder.layers(decoder.embed(now, rows, decoding), 0, 3, rows, decoding)
        ours = decoder.unembed(decoder.final_norm(h, rows), rows)[:, 0]
        for i, row in enumerate(order):
            theirs = model(ids[row : row + 1, : lengths[row] + step + 1]).logits[0, -1]
            torch.testing.assert_close(ours[i], theirs, atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_real_model_gives_the_logits_and_the_greedy_text_of_transformers(smol: Base) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(smol.source.folder, dtype=torch.float32).eval()
    decoder, rows = Llama(smol.source.config, CPU), Rows(smol.weights)
    for prompt in ("Gravity is", "The three largest cities of Korea, by the number of people who live there, are"):
        ids = smol.source.tokenizer(prompt, return_tensors="pt").input_ids
        torch.testing.assert_close(whole_logits(decoder, rows, ids), theirs(ids).logits, atol=1e-4, rtol=0)
        expected = theirs.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist()
        written, pending, cache = ids[0].tolist(), ids, RowCache(decoder.geometry(torch.float32, CPU), 64)
        while len(written) < len(expected):
            attention = cache.reading(pending.shape[1])
            h = decoder.layers(decoder.embed(pending, rows, attention), 0, 30, rows, attention)
            written.append(int(decoder.unembed(decoder.final_norm(h[:, -1:], rows), rows).argmax()))
            pending = torch.tensor([[written[-1]]])
        assert written == expected


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lowest", [0, 2, 3])
def test_loss_and_gradients_equal_autograd_through_transformers(variant: str, lowest: int, cpu: Device) -> None:
    config = VARIANTS[variant]
    model = reference(config)
    ids, lengths = mixed_prompts(300, [20, 33, 9])
    learn = torch.arange(33) < lengths[:, None]
    learn[:, :5] = False
    # Our own copies of the trained tensors, as held; and which of transformers' parameters each is a part of.
    parameters = {name: p for name, p in model.named_parameters() if trains(name, lowest)}
    held = {n: part for name, p in parameters.items() for n, part in as_held(FAMILIES[config.model_type], name, p)}
    full = {name: part.detach().clone().requires_grad_() for name, part in held.items()}
    rows = Rows(weights_of(model), full=full)
    ours = summed_loss(decoder_of(config), rows, Batch(ids, learn, lengths), lowest, cpu)
    ours.backward()  # type: ignore[no-untyped-call]

    theirs = torch.zeros(())
    for row, length in enumerate(lengths):
        logits = model(ids[row : row + 1, :length]).logits[0]
        labels = torch.where(learn[row, :length], ids[row, :length], -100)
        theirs = theirs + F.cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100)
    theirs.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-5)
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        for n, gradient in as_held(FAMILIES[config.model_type], name, parameter.grad):
            scale = float(gradient.abs().max())
            torch.testing.assert_close(full[n].grad, gradient, atol=1e-5 * max(1.0, scale), rtol=0)


def trains(name: str, lowest: int) -> bool:
    """The last norm, every layer from `lowest`, and with layer 0 the embedding."""
    if layer := re.search(r"\.([0-9]+)\.", name):
        return int(layer[1]) >= lowest
    return name.endswith(("model.norm.weight", "ln_f.weight", "ln_f.bias")) or (lowest == 0 and "lm_head" not in name)


def test_a_loss_in_chunks_equals_the_loss_in_one(smol: Base, cpu: Device) -> None:
    ids, lengths = mixed_prompts(49152, [40, 25])
    learn = torch.arange(40) < lengths[:, None]
    decoder = Llama(smol.source.config, CPU)
    name = "model.layers.29.mlp.down_proj.weight"
    results = []
    for chunk in (1024, 16):
        full = {name: smol.weights[name].clone().requires_grad_()}
        batch = Batch(ids, learn, lengths)
        loss = summed_loss(decoder, Rows(smol.weights, full=full), batch, 29, cpu, chunk_tokens=chunk)
        loss.backward()  # type: ignore[no-untyped-call]
        results.append((loss.detach(), full[name].grad))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (LlamaConfig(**SMALL, hidden_act="gelu"), "gelu"),
        (LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "dynamic"),
        (Qwen2Config(**SMALL, use_sliding_window=True, num_key_value_heads=4), "sliding-window"),
        (GPT2Config(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
        (GPT2Config(activation_function="silu"), "silu"),
    ],
)
def test_what_the_block_does_not_cover_is_refused_by_name(config: Any, named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        decoder_of(config)
