"""What serving and training ask of a decoder, and which one a config needs."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

import wire
from gpu_service.cache import Attention, Geometry
from gpu_service.gpt2 import Gpt2
from gpu_service.llama import Llama
from gpu_service.rows import Rows


class Decoder(Protocol):
    """A pure function of weights, rows and attention, without a state. B rows, T tokens, D hidden, V words."""

    n_layers: int
    attention_dropout: float  # in training
    head: str  # the module whose weight gives the logits

    def geometry(self, dtype: torch.dtype, device: torch.device) -> Geometry: ...

    def same_input(self) -> Iterator[tuple[str, ...]]:
        """The linear maps, by name, that meet the same input: what may be one product."""

    def embed(self, ids: Tensor, rows: Rows, attention: Attention) -> Tensor:
        """(B, T) -> (B, T, D)"""

    def layers(self, h: Tensor, first: int, last: int, rows: Rows, attention: Attention) -> Tensor:
        """(B, T, D) entering layer `first` -> (B, T, D) leaving layer `last - 1`."""

    def final_norm(self, h: Tensor, rows: Rows) -> Tensor: ...

    def unembed(self, h: Tensor, rows: Rows) -> Tensor:
        """(..., D) -> (..., V)"""


def build(family: wire.Family, config: Any, device: torch.device) -> Decoder:
    """Raises UnsupportedModel for what the family's block does not cover."""
    return Gpt2(config, device) if family == "gpt2" else Llama(config, device)
