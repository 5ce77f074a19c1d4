"""The UNet's blocks by name, the dials on them, and a pass that takes most of its work from an earlier step.

A block is `down.0`, `mid` or `up.2`, as diffusers orders them. Dials act by picture, through hooks that are there for
the length of one pass: attention and feed-forward outputs are multiplied, and norms are computed again with their
epsilon multiplied. Without dials there is no hook, and the pass is diffusers' own, bit for bit. Knows no request.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gpu_service.errors import NoSuchLayer
from gpu_service.layers import named_blocks

Part = Literal["attn.self", "attn.cross", "mlp", "eps"]
OUTER = ""  # what belongs to no block: the first and last convolution and the last norm


@dataclass(frozen=True)
class UnetDials:
    """Multipliers by block and part, for one picture; what is not named is 1.0. Never empty."""

    gains: Mapping[tuple[str, Part], float]

    def gain(self, block: str, part: Part) -> float:
        return self.gains.get((block, part), 1.0)


def blocks(config: Mapping[str, Any]) -> tuple[str, ...]:
    """In the order of a pass."""
    down = tuple(f"down.{n}" for n in range(len(config["down_block_types"])))
    up = tuple(f"up.{n}" for n in range(len(config["up_block_types"])))
    return (*down, "mid", *up)


def parse_blocks(known: Sequence[str], text: str) -> list[str]:
    """`all`, `down`, `up.1-3`, `down.0,mid`. Raises NoSuchLayer, naming what exists."""
    found: list[str] = []
    for item in (item.strip() for item in text.split(",")):
        chosen = list(known) if item == "all" else named_blocks(known, item)
        if not chosen:
            raise NoSuchLayer(f"'{item[:50]}' is no block of this model: use all, {', '.join(known)}.", param="dials")
        found += [b for b in chosen if b not in found]
    return found


@contextlib.contextmanager
def dialled(unet: nn.Module, rows: Sequence[UnetDials | None]) -> Iterator[None]:
    """Passes within have `rows` in their batch, in this order."""
    if not any(rows):
        yield
        return
    with contextlib.ExitStack() as hooks:
        for name, module in unet.named_modules():
            part = _part(name, module)
            if part is None:
                continue
            gains = [row.gain(_block(name), part) if row else 1.0 for row in rows]
            if any(gain != 1.0 for gain in gains):
                hook = _norm_again if part == "eps" else _multiplied
                handle = module.register_forward_hook(hook(torch.tensor(gains)))
                hooks.callback(handle.remove)
        yield


def _part(name: str, module: nn.Module) -> Part | None:
    if isinstance(module, nn.GroupNorm | nn.LayerNorm):
        return "eps"
    last = name.rpartition(".")[2]
    ending: dict[str, Part] = {"attn1": "attn.self", "attn2": "attn.cross", "ff": "mlp"}
    return ending.get(last)


def _block(name: str) -> str:
    kind, _, rest = name.partition("_block")
    if kind == "mid":
        return "mid"
    return f"{kind}.{rest.split('.')[1]}" if kind in ("down", "up") else OUTER


def _multiplied(gains: Tensor) -> Any:
    def hook(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out * gains.to(out).view(-1, *[1] * (out.dim() - 1))

    return hook


def _norm_again(gains: Tensor) -> Any:
    def hook(module: Any, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """Rows whose gain is 1 keep what the module made, to the last bit."""
        x = given[0].float()
        shape = [-1, *[1] * (x.dim() - 1)]
        eps = (gains.to(x.device) * module.eps).view(shape)
        if isinstance(module, nn.GroupNorm):
            parts = x.reshape(len(x), module.num_groups, -1)
            mean, var = parts.mean(-1, keepdim=True), parts.var(-1, keepdim=True, unbiased=False)
            normed = ((parts - mean) * (var + eps.view(-1, 1, 1)).rsqrt()).reshape(x.shape)
            across = (1, -1, *[1] * (x.dim() - 2))
        else:
            mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
            normed = (x - mean) * (var + eps).rsqrt()
            across = (*[1] * (x.dim() - 1), -1)
        if module.weight is not None:
            normed = normed * module.weight.float().view(across) + module.bias.float().view(across)
        return torch.where((gains != 1.0).to(x.device).view(shape), normed.to(out), out)

    return hook


# --- reuse between steps ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def keeping(unet: Any, *, wanted: bool = True) -> Iterator[list[Tensor]]:
    """Of the pass within: what enters the last block on the way up, that is, all that lies deeper."""
    found: list[Tensor] = []
    if not wanted:
        yield found
        return

    def hook(module: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        found.append(named["hidden_states"])

    handle = unet.up_blocks[-1].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


class Shallow(nn.Module):
    """A pass through the outermost blocks alone; what lies deeper is as an earlier step left it, for it changes little
    from one to the next. https://arxiv.org/abs/2312.00858
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, times: Tensor, texts: Tensor, deep: Tensor) -> Tensor:
        """`deep`: of `keeping`, for the same pictures. What the UNet makes of them."""
        unet: Any = self.unet
        told = unet.time_embedding(unet.time_proj(times).to(sample.dtype))
        h = unet.conv_in(sample)
        first, last = unet.down_blocks[0], unet.up_blocks[-1]
        _, across = first(h, told, **_texts(first, texts))
        across = (h, *across)[: len(last.resnets)]  # without the halved one, which only deeper blocks see
        h = last(deep, across, told, **_texts(last, texts))
        out: Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))
        return out


def _texts(block: Any, texts: Tensor) -> dict[str, Tensor]:
    return {"encoder_hidden_states": texts} if getattr(block, "has_cross_attention", False) else {}
