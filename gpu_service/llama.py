"""The Llama decoder, written out: hidden states at layer a -> hidden states at layer b.

Covers Llama 1/2/3, SmolLM, TinyLlama and Qwen2: RoPE in its scaled forms, grouped heads, tied and untied heads,
optional biases. It holds no weights of its own and no state; `Rows` answers for what differs by row. Serving, training
and whatever needs only some of the layers call the same functions.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gpu_service.cache import Attention, Geometry
from gpu_service.errors import UnsupportedModel
from gpu_service.rows import Rows

ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # the others change their frequencies with the length
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of the tokens of one pass; the same for every layer. (B or 1, 1, T, head_dim)"""

    cos: Tensor
    sin: Tensor  # its first half negative

    def rotate(self, x: Tensor) -> Tensor:
        """(B, heads, T, head_dim), halves paired as in the published weights. https://arxiv.org/abs/2104.09864"""
        return torch.addcmul(x * self.cos, x.roll(x.shape[-1] // 2, -1), self.sin)


class Llama:
    """The decoder of one config. Raises UnsupportedModel for what the block does not cover."""

    def __init__(self, config: Any, device: torch.device) -> None:
        if config.hidden_act not in ACTIVATIONS:
            raise UnsupportedModel(f"its activation is '{config.hidden_act}'; covered is {', '.join(ACTIVATIONS)}")
        if getattr(config, "use_sliding_window", False):
            raise UnsupportedModel("it uses sliding-window attention, which is not covered")
        rope = config.rope_parameters["rope_type"]
        if rope not in ROPE_TYPES:
            raise UnsupportedModel(f"its RoPE type is '{rope}'; covered are {', '.join(ROPE_TYPES)}")
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.n_layers = int(config.num_hidden_layers)
        self.attention_dropout = float(config.attention_dropout)
        self._heads, self._kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self._head_dim = int(head_dim)
        self._eps = float(config.rms_norm_eps)
        self._activation = ACTIVATIONS[config.hidden_act]
        self.head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
        if rope == "default":
            theta = config.rope_parameters["rope_theta"]
            frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim)
            self._rope_scale = 1.0
        else:
            frequencies, self._rope_scale = ROPE_INIT_FUNCTIONS[rope](config, torch.device("cpu"))
        self._frequencies = frequencies.to(device)  # (head_dim / 2,)

    def geometry(self, dtype: torch.dtype, device: torch.device) -> Geometry:
        """Of the keys and values that it keeps."""
        return Geometry(self.n_layers, self._kv_heads, self._head_dim, dtype, device)

    def embed(self, ids: Tensor, rows: Rows, attention: Attention) -> Tensor:
        """ids (B, T) -> hidden states (B, T, D). Positions come with the layers."""
        return F.embedding(ids, rows.weight("model.embed_tokens.weight"))

    def layers(self, h: Tensor, first: int, last: int, rows: Rows, attention: Attention) -> Tensor:
        """Hidden states (B, T, D) entering layer `first` -> hidden states leaving layer `last - 1`."""
        angles = attention.positions[..., None].float() * self._frequencies  # (B or 1, T, head_dim / 2)
        cos, sin = angles.cos()[:, None] * self._rope_scale, angles.sin()[:, None] * self._rope_scale
        rope = Rope(torch.cat((cos, cos), dim=-1).to(h.dtype), torch.cat((-sin, sin), dim=-1).to(h.dtype))
        for layer in range(first, last):
            h = self._layer(h, layer, rope, rows, attention)
        return h

    def final_norm(self, h: Tensor, rows: Rows) -> Tensor:
        return rows.rms_norm(h, "model.norm", self._eps, -1)

    def unembed(self, h: Tensor, rows: Rows) -> Tensor:
        """Hidden states (..., D) behind the last norm -> logits (..., V)."""
        return rows.linear(h, self.head)

    def same_input(self) -> Iterator[tuple[str, ...]]:
        return (names for layer in range(self.n_layers) for names in (self._qkv(layer), self._gate_up(layer)))

    def _qkv(self, layer: int) -> tuple[str, ...]:
        return tuple(f"model.layers.{layer}.self_attn.{part}_proj" for part in "qkv")

    def _gate_up(self, layer: int) -> tuple[str, ...]:
        return tuple(f"model.layers.{layer}.mlp.{part}_proj" for part in ("gate", "up"))

    def _layer(self, h: Tensor, layer: int, rope: Rope, rows: Rows, attention: Attention) -> Tensor:
        at, eps = f"model.layers.{layer}", self._eps
        x = rows.rms_norm(h, f"{at}.input_layernorm", eps, layer)
        x = self._attention(x, layer, rope, rows, attention)
        h = h + rows.gain(x, "attn", layer)
        x = rows.rms_norm(h, f"{at}.post_attention_layernorm", eps, layer)
        gate, up = rows.linears(x, *self._gate_up(layer))
        x = self._activation(gate) * up
        x = rows.linear(x, f"{at}.mlp.down_proj")
        return h + rows.gain(x, "mlp", layer)

    def _attention(self, x: Tensor, layer: int, rope: Rope, rows: Rows, attention: Attention) -> Tensor:
        at = f"model.layers.{layer}.self_attn"
        B, T, _ = x.shape
        H, G, Dh = self._heads, self._kv_heads, self._head_dim
        q, k, v = rows.linears(x, *self._qkv(layer))
        q = rope.rotate(q.view(B, T, H, Dh).transpose(1, 2))  # (B, H, T, Dh)
        k = rope.rotate(k.view(B, T, G, Dh).transpose(1, 2))  # (B, G, T, Dh)
        v = v.view(B, T, G, Dh).transpose(1, 2)
        y = attention.attend(layer, q, k, v)
        return rows.linear(y.transpose(1, 2).reshape(B, T, H * Dh), f"{at}.o_proj")
