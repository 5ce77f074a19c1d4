"""The Llama decoder, written out: hidden states at layer a -> hidden states at layer b.

Covers Llama 1/2/3, SmolLM, TinyLlama and Qwen2: RoPE in its scaled forms, grouped heads, tied and untied heads,
optional biases. It holds no weights of its own and no state; `Rows` answers for what differs by row. Serving, training
and whatever needs only some of the layers call the same functions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gpu_service.errors import UnsupportedModel
from gpu_service.rows import Rows

ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # the others change their frequencies with the length
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu}


@dataclass(frozen=True)
class Shape:
    n_layers: int
    hidden: int  # D
    heads: int  # H
    kv_heads: int
    head_dim: int
    vocab: int  # V
    eps: float


class KVCache:
    """Keys and values of B rows, dense: (B, kv_heads, capacity, head_dim) for each layer. Grows by doubling."""

    def __init__(self, shape: Shape, rows: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        size = (rows, shape.kv_heads, capacity, shape.head_dim)
        # Zeros, not empty: a masked key still meets a weight of 0, and 0 times the NaN of stale memory is NaN.
        self.keys = [torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.n_layers)]
        self.values = [torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.n_layers)]
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)  # (B,) tokens that each row holds

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    def reserve(self, tokens: int) -> None:
        if tokens > self.capacity:
            extra = max(tokens, 2 * self.capacity) - self.capacity
            self.keys = [F.pad(k, (0, 0, 0, extra)) for k in self.keys]
            self.values = [F.pad(v, (0, 0, 0, extra)) for v in self.values]


@dataclass(frozen=True)
class Positions:
    """Where the tokens of one forward pass stand; the same for every layer."""

    index: Tensor  # (B or 1, T)
    keys: int  # K: how many keys a query may look at
    cos: Tensor  # (B or 1, 1, T, head_dim)
    sin: Tensor
    mask: Tensor | None  # (B, 1, T, K), True where a query may look


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
        self.shape = Shape(
            n_layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            vocab=config.vocab_size,
            eps=config.rms_norm_eps,
        )
        self._activation = ACTIVATIONS[config.hidden_act]
        self._head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
        if rope == "default":
            theta = config.rope_parameters["rope_theta"]
            frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim)
            self._rope_scale = 1.0
        else:
            frequencies, self._rope_scale = ROPE_INIT_FUNCTIONS[rope](config, torch.device("cpu"))
        self._frequencies = frequencies.to(device)  # (head_dim / 2,)

    def embed(self, ids: Tensor, rows: Rows) -> Tensor:
        """ids (B, T) -> hidden states (B, T, D)."""
        return F.embedding(ids, rows.weight("model.embed_tokens.weight"))

    def layers(
        self,
        h: Tensor,
        first: int,
        last: int,
        rows: Rows,
        *,
        cache: KVCache | None = None,
        checkpoint: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Hidden states (B, T, D) entering layer `first` -> hidden states leaving layer `last - 1`.

        Rows are right-padded. Without a cache positions count from 0. With one they go on from `cache.lengths`, and
        keys and values are stored; the caller reserves the room and adds to `cache.lengths` after the last layer.
        """
        where = self._positions(h, cache)
        for layer in range(first, last):
            if checkpoint:
                h = checkpoint(self._layer, h, layer, where, rows, cache)
            else:
                h = self._layer(h, layer, where, rows, cache)
        return h

    def head(self, h: Tensor, rows: Rows) -> Tensor:
        """Hidden states (..., T, D) leaving the last layer -> logits (..., T, V)."""
        return rows.linear(self.final_norm(h, rows), self._head)

    def final_norm(self, h: Tensor, rows: Rows) -> Tensor:
        return rows.norm(h, "model.norm", self.shape.eps, -1)

    def unembed(self, h: Tensor, rows: Rows) -> Tensor:
        """Normed hidden states (N, D) -> logits (N, V)."""
        return rows.linear(h, self._head)

    def _positions(self, h: Tensor, cache: KVCache | None) -> Positions:
        T = h.shape[1]
        start = cache.lengths if cache else torch.zeros(1, dtype=torch.long, device=h.device)
        index = start[:, None] + torch.arange(T, device=h.device)
        angles = index[..., None].float() * self._frequencies
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        cos, sin = angles.cos() * self._rope_scale, angles.sin() * self._rope_scale
        keys = int(index.max()) + 1 if cache else T
        # Without a cache plain causal attention says the same as a mask; one token of one row sees all that there is.
        alone = cache is None or index.shape == (1, 1)
        mask = None if alone else torch.arange(keys, device=h.device) <= index[:, None, :, None]
        return Positions(index, keys, cos.to(h.dtype), sin.to(h.dtype), mask)

    def _layer(self, h: Tensor, layer: int, where: Positions, rows: Rows, cache: KVCache | None) -> Tensor:
        at, eps = f"model.layers.{layer}", self.shape.eps
        x = rows.norm(h, f"{at}.input_layernorm", eps, layer)
        x = self._attention(x, layer, where, rows, cache)
        h = h + rows.gain(x, "attn", layer)
        x = rows.norm(h, f"{at}.post_attention_layernorm", eps, layer)
        x = self._activation(rows.linear(x, f"{at}.mlp.gate_proj")) * rows.linear(x, f"{at}.mlp.up_proj")
        x = rows.linear(x, f"{at}.mlp.down_proj")
        return h + rows.gain(x, "mlp", layer)

    def _attention(self, x: Tensor, layer: int, where: Positions, rows: Rows, cache: KVCache | None) -> Tensor:
        at = f"model.layers.{layer}.self_attn"
        B, T, _ = x.shape
        H, G, Dh = self.shape.heads, self.shape.kv_heads, self.shape.head_dim
        q = _rotate(rows.linear(x, f"{at}.q_proj").view(B, T, H, Dh).transpose(1, 2), where)  # (B, H, T, Dh)
        k = _rotate(rows.linear(x, f"{at}.k_proj").view(B, T, G, Dh).transpose(1, 2), where)  # (B, G, T, Dh)
        v = rows.linear(x, f"{at}.v_proj").view(B, T, G, Dh).transpose(1, 2)
        if cache:
            batch = torch.arange(B, device=x.device)[:, None]
            cache.keys[layer][batch, :, where.index] = k.transpose(1, 2)
            cache.values[layer][batch, :, where.index] = v.transpose(1, 2)
            k, v = cache.keys[layer][:, :, : where.keys], cache.values[layer][:, :, : where.keys]
        if T == 1 and cache:
            # One query a head: the heads of a group read the same keys, so view them as that group's query rows.
            # SDPA's own grouped path is several times slower here.
            y = F.scaled_dot_product_attention(q.view(B, G, H // G, Dh), k, v, attn_mask=where.mask).view(B, H, 1, Dh)
        else:
            k, v = _expand(k, H // G), _expand(v, H // G)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=where.mask, is_causal=where.mask is None)
        return rows.linear(y.transpose(1, 2).reshape(B, T, H * Dh), f"{at}.o_proj")


def _expand(x: Tensor, times: int) -> Tensor:
    """(B, G, T, Dh) -> (B, G * times, T, Dh): each key head repeated for the query heads of its group."""
    B, G, T, Dh = x.shape
    return x[:, :, None].expand(B, G, times, T, Dh).reshape(B, G * times, T, Dh) if times > 1 else x


def _rotate(x: Tensor, where: Positions) -> Tensor:
    """Rotary position embedding (https://arxiv.org/abs/2104.09864), halves paired as in the published weights."""
    half = x.shape[-1] // 2
    return x * where.cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * where.sin
