"""What an adapter says of itself, and the names of its tensors; pydantic and the standard library only.

The gpu writes adapters and serves them; the relay turns them into peft's files and back. Neither torch nor a tensor's
values are known here.
"""

from math import sqrt
from typing import Literal

from pydantic import Field

import wire

WEIGHTS, DESCRIPTION = "adapter.safetensors", "adapter.json"
FORMAT: Literal[2] = 2  # of the description; 1 knew neither DoRA nor rsLoRA, nor whether the head is tied
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"  # endings in the file, which are peft's


def lora_scale(rank: int, alpha: float, *, rslora: bool) -> float:
    """rsLoRA (arXiv:2312.03732) divides by the root, so that a high rank still learns as far as a low one."""
    return alpha / (sqrt(rank) if rslora else rank)


def lora_key(name: str, ending: str) -> str:
    """The key in the file of what belongs to the weight of this name."""
    return f"{name.removesuffix('.weight')}.{ending}"


class LoraMeta(wire.Message):
    rank: int = Field(ge=1)
    alpha: float = Field(gt=0, allow_inf_nan=False)
    rslora: bool = False
    dora: bool = False

    @property
    def scale(self) -> float:
        return lora_scale(self.rank, self.alpha, rslora=self.rslora)

    def shapes(self, out_size: int, in_size: int) -> dict[str, tuple[int, ...]]:
        """By ending, for a weight (out, in)."""
        pair: dict[str, tuple[int, ...]] = {A: (self.rank, in_size), B: (out_size, self.rank)}
        return pair | {MAGNITUDE: (out_size,)} if self.dora else pair


class AdapterMeta(wire.Message):
    """What an adapter is, and how it came to be. Tensors go by their names in the base model."""

    format: Literal[1, 2] = FORMAT
    family: wire.Family
    base_model: str
    base_revision: str  # empty where nobody said
    tied: bool | None = None  # the base model's head is its embedding
    layers: list[wire.LayerSpec]
    lora: dict[str, LoraMeta]
    tensors: dict[str, tuple[int, ...]]  # shape in the base model, of all that is trained: in full or by lora
    hyperparameters: wire.Hyperparameters  # as resolved
    created_at: float  # unix time
    trained_tokens: int = Field(ge=0)
    training_loss: float | None = Field(default=None, allow_inf_nan=False)  # at the end
    validation_loss: float | None = Field(default=None, allow_inf_nan=False)


class Description(wire.Message):
    """adapter.json. It carries the weights' hash, so that the two files can't be mixed up or damaged unseen."""

    meta: AdapterMeta
    weights: wire.FileRef
