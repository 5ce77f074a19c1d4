"""The GPT-2 decoder, written out: hidden states at layer a -> hidden states at layer b.

Learned positions, LayerNorm with biases, one MLP matrix up and one down, tied head; dropout where gradients are kept.
Weights come with names and shapes of linear maps, (out, in), queries, keys and values apart (see models.py), so a spec
selects and LoRA adapts them as it does in Llama.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_service.cache import Attention, Geometry
from gpu_service.errors import UnsupportedModel
from gpu_service.rows import Rows

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


class Gpt2:
    """The decoder of one config. Raises UnsupportedModel for what the block does not cover."""

    def __init__(self, config: Any, device: torch.device) -> None:
        if config.activation_function not in ACTIVATIONS:
            raise UnsupportedModel(
                f"its activation is '{config.activation_function}'; covered are {', '.join(ACTIVATIONS)}"
            )
        for name, wanted in (
            ("scale_attn_weights", True),
            ("scale_attn_by_inverse_layer_idx", False),
            ("reorder_and_upcast_attn", False),
            ("add_cross_attention", False),
        ):
            if bool(getattr(config, name, wanted)) is not wanted:
                raise UnsupportedModel(f"its config sets {name} to {not wanted}, which is not covered")
        self.n_layers = int(config.n_layer)
        self._heads, self._head_dim = int(config.n_head), int(config.n_embd // config.n_head)
        self._eps = float(config.layer_norm_epsilon)
        self._embed_drop, self._residual_drop = float(config.embd_pdrop), float(config.resid_pdrop)
        self.attention_dropout = float(config.attn_pdrop)
        self._activation = ACTIVATIONS[config.activation_function]
        self.head = "wte" if config.tie_word_embeddings else "lm_head"

    def geometry(self, dtype: torch.dtype, device: torch.device) -> Geometry:
        """Of the keys and values that it keeps."""
        return Geometry(self.n_layers, self._heads, self._head_dim, dtype, device)

    def embed(self, ids: Tensor, rows: Rows, attention: Attention) -> Tensor:
        """ids (B, T) -> hidden states (B, T, D), positions added."""
        h = F.embedding(ids, rows.weight("wte.weight"))
        return rows.drop(h + F.embedding(attention.positions, rows.weight("wpe.weight")), self._embed_drop)

    def layers(self, h: Tensor, first: int, last: int, rows: Rows, attention: Attention) -> Tensor:
        """Hidden states (B, T, D) entering layer `first` -> hidden states leaving layer `last - 1`."""
        for layer in range(first, last):
            h = self._layer(h, layer, rows, attention)
        return h

    def final_norm(self, h: Tensor, rows: Rows) -> Tensor:
        return rows.layer_norm(h, "ln_f", self._eps, -1)

    def unembed(self, h: Tensor, rows: Rows) -> Tensor:
        """Hidden states (..., D) behind the last norm -> logits (..., V)."""
        return rows.linear(h, self.head)

    def same_input(self) -> Iterator[tuple[str, ...]]:
        return (self._qkv(layer) for layer in range(self.n_layers))

    def _qkv(self, layer: int) -> tuple[str, ...]:
        return tuple(f"h.{layer}.attn.c_attn.{part}" for part in "qkv")

    def _layer(self, h: Tensor, layer: int, rows: Rows, attention: Attention) -> Tensor:
        at = f"h.{layer}"
        x = self._attention(rows.layer_norm(h, f"{at}.ln_1", self._eps, layer), layer, rows, attention)
        h = h + rows.gain(rows.drop(x, self._residual_drop), "attn", layer)
        x = self._activation(rows.linear(rows.layer_norm(h, f"{at}.ln_2", self._eps, layer), f"{at}.mlp.c_fc"))
        x = rows.drop(rows.linear(x, f"{at}.mlp.c_proj"), self._residual_drop)
        return h + rows.gain(x, "mlp", layer)

    def _attention(self, x: Tensor, layer: int, rows: Rows, attention: Attention) -> Tensor:
        at = f"h.{layer}.attn"
        B, T, D = x.shape
        q, k, v = (
            part.view(B, T, self._heads, self._head_dim).transpose(1, 2) for part in rows.linears(x, *self._qkv(layer))
        )  # (B, H, T, Dh) each
        y = attention.attend(layer, q, k, v)
        return rows.linear(y.transpose(1, 2).reshape(B, T, D), f"{at}.c_proj")
