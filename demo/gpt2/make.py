"""`python -m demo.gpt2.make`: trains the demo GPT-2 from nothing on stories of our own, and writes its folder.

Goes on where it was stopped. One thread and the same versions give the same weights; other hardware rounds differently.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from demo import run
from demo.gpt2 import FOLDER, card, text
from demo.gpt2.stories import SEED

STEPS = 2900  # of the shipped weights; their run was planned for 2,200 and then lengthened
WIDTH = 192
ROWS = 2  # of 512 tokens a step
WARM_UP = 100
PEAK, LAST = 1.2e-3, 5e-5  # learning rates
HELD_OUT_STORIES = 50
LOOK_EVERY = 200  # steps
SAVE_EVERY_S = 180.0


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo GPT-2.")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--work", type=Path, default=Path("data/demo-gpt2"), help="where the checkpoint lies")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)

    corpus = text.training(text.TRAIN_TEXTS)
    tokenizer = text.train_tokenizer(corpus[: text.TOKENIZER_TEXTS])
    held_out = tokenizer(text.held_out(HELD_OUT_STORIES))["input_ids"]
    rows = text.pack(tokenizer(corpus)["input_ids"], tokenizer.eos_token_id)
    print(f"{len(tokenizer):,} tokens known, {rows[:, 0].numel():,} to learn from", flush=True)

    model = new_model(tokenizer)
    stop = run.Stop()

    def look() -> None:
        told = "\n\n".join(card.samples(model, tokenizer, card.PROMPTS[:2]))
        print(f"held out {held_out_loss(model, held_out):.4f}\n{told}\n", flush=True)

    if train(model, rows, options.steps, options.work / "checkpoint.pt", stop=lambda: stop.asked, look=look):
        write(model, tokenizer, held_out, options.steps, options.out)


def new_model(tokenizer: Any) -> Any:
    """3.2 million parameters. GPT-2's dropout is for fine-tuning; this training reads no text twice, without it."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=text.POSITIONS,
            n_embd=WIDTH,
            n_layer=6,
            n_head=6,
            initializer_range=WIDTH**-0.5,  # GPT-2's 0.02 suits 768; here attention would stay flat for long
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def train(
    model: Any, rows: torch.Tensor, steps: int, file: Path, *, stop: Callable[[], bool], look: Callable[[], None]
) -> bool:
    """True when all steps are done, False when it was asked to stop; in both cases the file holds the state."""
    optimizer = torch.optim.AdamW(_groups(model), lr=PEAK, betas=(0.9, 0.95), fused=True)
    first = step = 0
    if state := run.load(file):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = step = int(state["step"])

    def save() -> None:
        run.save(file, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step})

    saved = started = time.monotonic()
    _drop_dropout(model)
    for batch in text.batches(rows, ROWS, start=step):
        if step >= steps or stop():
            break
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        loss = _loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 25 == 0:
            speed = (step - first) * ROWS * text.POSITIONS / (time.monotonic() - started)
            print(f"step {step}/{steps}  loss {loss.item():.3f}  {speed:,.0f} tokens/s", flush=True)
        if step % LOOK_EVERY == 0:
            look()
        if time.monotonic() - saved > SAVE_EVERY_S:
            save()
            saved = time.monotonic()
    save()
    return step >= steps


def rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to the last rate."""
    if step < WARM_UP:
        return PEAK * (step + 1) / WARM_UP
    done = min(1.0, (step - WARM_UP) / max(1, steps - WARM_UP))
    return LAST + (PEAK - LAST) * (1 + math.cos(math.pi * done)) / 2


def _loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """Nats a token; batch (B, 2, T) as packed. bf16 products are three times as fast here as fp32, and the weights stay
    fp32.
    """
    ids, owner = batch.unbind(1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids, attention_mask=seen(owner), use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def seen(owner: torch.Tensor) -> torch.Tensor:
    """(B, T) numbers of texts -> (B, 1, T, T): a token sees those before it in its own text."""
    same = owner[:, :, None] == owner[:, None, :]
    return (same & torch.ones_like(same).tril())[:, None]


def held_out_loss(model: Any, stories: list[list[int]]) -> float:
    """Mean nats a token, each story alone after its end-of-text token, its own end included."""
    end, training = model.config.eos_token_id, model.training
    model.eval()
    total = count = 0.0
    with torch.no_grad():
        for story in stories:
            ids = torch.tensor([[end, *story, end]])
            logits = model(ids, use_cache=False).logits[0, :-1].float()
            total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += len(story) + 1
    model.train(training)
    return total / count


def write(model: Any, tokenizer: Any, held_out: list[list[int]], steps: int, folder: Path) -> None:
    """In fp16: these weights lie far inside its range, and it keeps three more bits of each than bf16 would."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _name_tokenizer(folder / "tokenizer_config.json")
    shipped = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)  # what is measured is what is shipped
    loss = held_out_loss(shipped, held_out)
    size = (folder / "model.safetensors").stat().st_size
    told = card.card(
        shipped,
        tokenizer,
        loss=loss,
        held_out=len(held_out),
        steps=steps,
        step_tokens=ROWS * text.POSITIONS,
        size=size,
    )
    (folder / "README.md").write_text(told)
    print(f"written: {size:,} bytes, held out {loss:.4f}", flush=True)


def _name_tokenizer(file: Path) -> None:
    """The class that GPT-2 names; what `save_pretrained` names is known to this major version only."""
    told = json.loads(file.read_text())
    told.pop("backend", None)
    file.write_text(json.dumps(told | {"tokenizer_class": "GPT2Tokenizer"}, indent=2) + "\n")


def _groups(model: Any) -> list[dict[str, Any]]:
    """Matrices decay, biases and norms do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]


def _drop_dropout(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attn_dropout", None), float):
            module.attn_dropout = 0.0
    model.train()


if __name__ == "__main__":
    main()
