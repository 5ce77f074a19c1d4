"""What diffusers' modules do anew at every step and need not, left out where there are no gradients: the same bits.

Texts are read once: their keys and values are the same at every step. An attention is asked at once, without a look at
its processor's signature, which takes as long as a small product. And on CPUs a convolution's weights lie as oneDNN
wants them, where torch would reorder them each time: a third to a half of it where pictures are small. The operators
are those that torch's own compiler calls. What a fine-tune lays over a weight is seen, and goes the usual way. Knows
no request.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

MOST_BYTES = 2**26  # of convolutions' weights, for they are kept twice
SMALL = 20480  # numbers in one picture's map: up to here torch takes a kernel of its own


class Texts:
    """What the next passes read, told by who makes them, and what became of it on the way into each attention."""

    def __init__(self) -> None:
        self._given: Tensor | None = None
        self._made: dict[Any, tuple[Tensor, Tensor]] = {}  # by module: with which weight, and what

    def give(self, texts: Tensor | None) -> None:
        """The same tensor again keeps what was made of it; None forgets it."""
        if texts is not self._given:
            self._given = texts
            self._made.clear()

    def once(self, linear: Any) -> Callable[[Tensor], Tensor]:
        plain = linear.forward

        def forward(x: Tensor) -> Tensor:
            if x is not self._given or torch.is_grad_enabled():
                return plain(x)  # type: ignore[no-any-return]
            weight, made = self._made.get(linear, (None, x))
            if weight is not linear.weight:
                made = plain(x)
                self._made[linear] = linear.weight, made
            return made

        return forward


def read_texts_once(unet: nn.Module) -> Texts:
    from diffusers.models.attention_processor import Attention

    texts = Texts()
    for module in unet.modules():
        if isinstance(module, Attention):
            module.forward = partial(_attend, module)
            if module.is_cross_attention and module.norm_cross is None:
                for linear in (module.to_k, module.to_v):
                    linear.forward = texts.once(linear)
    return texts


def _attend(
    attention: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """As `Attention.forward`, which would drop arguments that its processor does not know. Here are none."""
    found: Tensor = attention.processor(
        attention, hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask
    )
    return found


def pack(module: nn.Module) -> None:
    """Its convolutions, for a CPU; unless they are large, or this torch lacks the operators."""
    found: list[Any] = [
        m for m in module.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1 and m.groups == 1
    ]
    if sum(conv.weight.nbytes for conv in found) > MOST_BYTES or not _works():
        return
    for conv in found:
        conv.forward = _packed(conv)


def _packed(conv: Any) -> Callable[[Tensor], Tensor]:
    plain, loaded = conv.forward, conv.weight
    shape = conv.padding, conv.stride, conv.dilation, conv.groups
    packed: Tensor | None = None

    def forward(x: Tensor) -> Tensor:
        nonlocal packed
        if torch.is_grad_enabled() or conv.weight is not loaded or (len(x) == 1 and x.numel() <= SMALL):
            return plain(x)  # type: ignore[no-any-return]
        if packed is None:
            packed = torch.ops.mkldnn._reorder_convolution_weight(loaded.detach(), *shape, x.shape)
        out: Tensor = torch.ops.mkldnn._convolution_pointwise(x, packed, conv.bias, *shape, "none", [], "")
        return out

    return forward


def _works() -> bool:
    conv, x = nn.Conv2d(2, 2, 3, padding=1).requires_grad_(False), torch.ones(2, 2, 4, 4)
    try:
        with torch.no_grad():
            return torch.equal(_packed(conv)(x), conv(x))
    except (AttributeError, RuntimeError) as exc:  # names and arguments of torch's own, which may change
        log.info("convolutions are reordered at each call: %s", exc)
        return False
