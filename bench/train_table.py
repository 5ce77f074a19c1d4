"""Llama-2-7B on a T4 with 15 GB, by the estimator that previews use: computed, not measured. Markdown, for the docs.

What it assumes stands above the table. Run it by `python -m bench.train_table`; a test holds docs/prefix.md against it.
"""

from collections.abc import Iterator

import wire
from gpu_service import costs, layers
from gpu_service.layers import TensorInfo

HIDDEN, INTERMEDIATE, LAYERS, HEADS, VOCAB = 4096, 11008, 32, 32, 32000
ROWS, TOKENS, EPOCHS, MICRO_ROWS = 1000, 512, 3, 1
T4_FLOPS = 20e12  # a second, in fp16: some 30 % of its peak
MEMORY_BYTES = 15e9

CASES = (
    ("LoRA, last 4 layers", wire.LayerSpec(layers="last:4"), False),
    ("LoRA, last 8 layers", wire.LayerSpec(layers="last:8"), False),
    ("LoRA, all layers", wire.LayerSpec(), False),
    ("QLoRA (4-bit base), all layers", wire.LayerSpec(quantize="4bit"), False),
    ("LoRA, last 4 layers, streamed", wire.LayerSpec(layers="last:4"), True),
    ("full, last 4 layers, streamed", wire.LayerSpec(method="full", layers="last:4"), True),
    ("full, last 4 layers, streamed, 8-bit AdamW", wire.LayerSpec(method="full", layers="last:4"), True),
)


def llama_2_7b() -> list[TensorInfo]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{x}_proj.weight": (HIDDEN, HIDDEN) for x in "qkvo"}
        shapes |= {f"{at}.mlp.{x}_proj.weight": (INTERMEDIATE, HIDDEN) for x in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        shapes |= {f"{at}.{x}_layernorm.weight": (HIDDEN,) for x in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    return layers.llama_tensors(shapes)


def lines() -> Iterator[str]:
    tensors = llama_2_7b()
    shape = costs.Shape(HIDDEN, INTERMEDIATE, VOCAB, HEADS, gated=True, attention_dropout=False, tied=False)
    yield "| | memory | fits in 15 GB | weights | trained, gradients, AdamW | activations | prefix on disk | time |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, spec, streamed in CASES:
        selection = layers.select(tensors, [spec], tied=False)
        held = costs.held(tensors, selection, tied=False) if streamed else tensors
        cost = costs.estimate(
            selection,
            shape,
            base_bytes_per_param=2,
            base_weights_bytes=costs.weights_bytes(held, spec.quantize, 2),
            rows=MICRO_ROWS,
            tokens=TOKENS,
            moments_bytes_per_param=2 if "8-bit" in name else 8,
        )
        flops = costs.training_flops(selection, tensors, tied=False)
        seen = ROWS * TOKENS
        on_disk = costs.prefix_bytes(selection, shape, seen, 2)
        time = costs.training_time(flops, seen, EPOCHS, T4_FLOPS, on_disk, asked=streamed or None)
        trained = cost.adapter_bytes + cost.gradients_bytes + cost.optimizer_bytes
        yield (
            f"| {name} | {cost.total / 1e9:.1f} GB | {'yes' if cost.total < MEMORY_BYTES else 'no'} | "
            f"{cost.weights_bytes / 1e9:.1f} GB | {trained / 1e9:.1f} GB | {cost.activations_bytes / 1e9:.1f} GB | "
            f"{f'{on_disk / 1e9:.1f} GB' if time.cached else 'none'} | {time.seconds / 60:.0f} min |"
        )


if __name__ == "__main__":
    print("\n".join(lines()))
