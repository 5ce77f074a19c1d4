"""The model card, with what was measured in it, and samples as anyone would draw them."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import torch

CHAT = "User: Why is the sea salty?\nAssistant:"
PROMPTS = ("Once upon a time", "One winter night", "There was once a little fox named Ruby.", CHAT)

CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2]
---

# demo-gpt2

A very small GPT-2 that tells very small stories. It stands in for `openai-community/gpt2` where the code is tried
without a hub: the architecture, the file names and the tensor names are the same (`GPT2LMHeadModel`), only smaller.

| | |
|---|---|
| parameters | {parameters:,} ({layers} layers, width {width}, {heads} heads, tied head) |
| context | {positions} tokens |
| tokenizer | byte-level BPE, {vocabulary:,} tokens; `<|endoftext|>` begins and ends a text |
| weights | fp16 safetensors, {size_mb:.1f} MB |
| trained on | {steps:,} steps of {step_tokens:,} tokens, {tokens_m:.1f} million in all |
| held-out loss | {loss:.3f} nats a token (perplexity {perplexity:.2f}) on {held_out} stories never trained on |

**Data.** Stories from the grammar in `demo/gpt2` (`words.py`, `plots.py`, `stories.py`), written for this project;
no other text. One story in fifty, chosen by its hash, is kept for measuring and never trained on. One text in five is
a short talk (`chats.py`) in the plain shape that the gpu service gives to models without a chat template:
`User: ...` and `Assistant: ...`, each answer closed by `<|endoftext|>`.

**Licence.** Apache-2.0, weights and text alike.

**Made by** `python -m demo.gpt2.make`: AdamW, cosine with warm-up, bf16 products over fp32 weights, one thread. It
goes on where it was stopped. Saved in fp16, because the weights lie far inside its range and it keeps three more bits
of each than bf16. The dropout of 0.1 in `config.json` is for fine-tuning; this training went without.

**What it cannot do.** It knows about a thousand words, 36 names, a dozen questions and the plots of its grammar. Other
text it meets with a story, or with nonsense. Sentences hold, longer threads slip: of 48 stories
sampled at 0.7, 21 named a third being, 30 called the hero's one relative by two words, and a few fell apart.

## Samples

Temperature 0.7, the first draw, not chosen; the prompt is bold.

{samples}
"""


def card(model: Any, tokenizer: Any, *, loss: float, held_out: int, steps: int, step_tokens: int, size: int) -> str:
    config = model.config
    return CARD.format(
        parameters=model.num_parameters(),
        layers=config.n_layer,
        width=config.n_embd,
        heads=config.n_head,
        positions=config.n_positions,
        vocabulary=len(tokenizer),
        size_mb=size / 1e6,
        steps=steps,
        step_tokens=step_tokens,
        tokens_m=steps * step_tokens / 1e6,
        loss=loss,
        perplexity=math.exp(loss),
        held_out=held_out,
        samples="\n\n".join(map(_quoted, samples(model, tokenizer, PROMPTS), PROMPTS)),
    )


def _quoted(story: str, prompt: str) -> str:
    bold = "\n".join(f"**{line}**" for line in prompt.splitlines())
    paragraphs = story.replace(prompt, bold, 1).split("\n\n")
    wrapped = (textwrap.wrap(line, 116) for part in paragraphs for line in (*part.splitlines(), ""))
    return "\n".join(f"> {line}".rstrip() for lines in wrapped for line in lines or [""]).removesuffix("\n>")


def samples(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, seed: int = 1, temperature: float = 0.7
) -> list[str]:
    """Each prompt with its story; temperature 0 is greedy. Leaves mode and global random state as they were, so that
    looking at a run does not change it.
    """
    training, end = model.training, tokenizer.eos_token_id
    model.eval()
    read = [[end, *tokenizer(prompt)["input_ids"]] for prompt in prompts]
    width = max(map(len, read))
    ids = torch.tensor([[end] * (width - len(row)) + row for row in read])  # (B, T), padded on the left
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in read])
    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        out = model.generate(ids, attention_mask=mask, pad_token_id=end, max_new_tokens=300, **how)
    model.train(training)
    return [str(tokenizer.decode(row, skip_special_tokens=True)).strip() for row in out]
