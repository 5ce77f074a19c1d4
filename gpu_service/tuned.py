"""Trained tensors laid over diffusers' and transformers' modules for the length of a pass, which stay as they are.

What is trained in full takes a weight's place by pointer; a LoRA adds what it adds behind its matrix. Knows no request
and no training: both bring their tensors.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from gpu_service.lora import Lora


class Tuned:
    """Names are the base model's: the component, and what the module calls it."""

    def __init__(self, full: Mapping[str, Tensor], lora: Mapping[str, Lora]) -> None:
        self._full = dict(full)
        self._lora = {name.removesuffix(".weight"): pair for name, pair in lora.items()}

    def __call__(self, component: str, module: nn.Module, *given: Any, within: str = "", **named: Any) -> Any:
        """What the module makes of it. `component`: under which name the tensors know it, or, where it holds that one
        as an attribute, the attribute `within`.
        """
        prefix, own = f"{component}.", f"{within}." if within else ""
        full = {own + name.removeprefix(prefix): x for name, x in self._full.items() if name.startswith(prefix)}
        lora = {own + name.removeprefix(prefix): x for name, x in self._lora.items() if name.startswith(prefix)}
        with _adapted(module, lora):
            if not full:
                return module(*given, **named)
            dtype = next(module.parameters()).dtype
            return functional_call(module, {name: x.to(dtype) for name, x in full.items()}, given, named)


PLAIN = Tuned({}, {})


@contextmanager
def _adapted(module: nn.Module, lora: Mapping[str, Lora]) -> Iterator[None]:
    with ExitStack() as hooks:
        for name, pair in lora.items():
            handle = module.get_submodule(name).register_forward_hook(_adding(pair))
            hooks.callback(handle.remove)
        yield


def _adding(pair: Lora) -> Any:
    def hook(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x, a, b = given[0], pair.a.to(out.dtype), pair.b.to(out.dtype)
        if isinstance(module, nn.Conv2d):  # of one by one: a matrix by place
            return out + pair.scale * F.conv2d(F.conv2d(x, a[..., None, None]), b[..., None, None])
        low = F.linear(x, a).flatten(0, -2)
        return torch.addmm(out.flatten(0, -2), low, b.T, alpha=pair.scale).view_as(out)

    return hook
