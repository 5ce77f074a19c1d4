"""AdamW over named tensors, in 32 or in 8 bits, whose whole state is named tensors too: it can be stored and set again.

The 8-bit one is bitsandbytes' (arXiv:2110.02861): moments in blocks of 256 that share a scale. Tensors of fewer than
4,096 numbers keep theirs in fp32. Both ways a tensor that no step has moved yet has moments of zero.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gpu_service.costs import SMALLEST_8BIT
from gpu_service.plan import Plan
from gpu_service.quantize import bitsandbytes

FIRST, SECOND, COUNT = "first_moment", "second_moment", "steps"
FIRST_SCALE, SECOND_SCALE = "first_scale", "second_scale"
BETAS, EPS = (0.9, 0.999), 1e-8
BLOCK = 256  # numbers that share a scale in 8 bits

Spec = tuple[tuple[int, ...], torch.dtype]


def specs(plan: Plan, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Spec]:
    """Key -> shape and type, of an optimizer's state over tensors of these shapes."""
    found: dict[str, Spec] = {}
    for name, shape in shapes.items():
        n = torch.Size(shape).numel()
        packed = plan.optimizer == "adamw_8bit" and n >= SMALLEST_8BIT
        for kind, scale in ((FIRST, FIRST_SCALE), (SECOND, SECOND_SCALE)):
            found[f"{kind}.{name}"] = (shape, torch.uint8 if packed else torch.float32)
            if packed:
                found[f"{scale}.{name}"] = ((-(-n // BLOCK),), torch.float32)
        found[f"{COUNT}.{name}"] = ((), torch.float32)
    return found


class Optimizer:
    def __init__(self, plan: Plan, named: Mapping[str, Tensor]) -> None:
        self._named = named
        self._packed = plan.optimizer == "adamw_8bit"
        # Norms, biases and magnitudes are scales and offsets: what decays them pulls towards nothing in particular.
        groups = [
            {"params": [t for t in named.values() if t.ndim >= 2], "weight_decay": plan.weight_decay},
            {"params": [t for t in named.values() if t.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self.torch: torch.optim.Optimizer
        if self._packed:
            self.torch = bitsandbytes().optim.AdamW8bit(
                groups, lr=plan.learning_rate, betas=BETAS, eps=EPS, min_8bit_size=SMALLEST_8BIT
            )
        else:
            self.torch = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=BETAS, eps=EPS, fused=True)

    def set_rate(self, rate: float) -> None:
        for group in self.torch.param_groups:
            group["lr"] = rate

    def captured(self) -> dict[str, Tensor]:
        """Copies on the CPU."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._named.items():
            state = self.torch.state.get(parameter) or self._fresh(parameter)
            for kind, key in self._keys(parameter).items():
                value = state[key]
                value = value if isinstance(value, Tensor) else torch.tensor(float(value))
                tensors[f"{kind}.{name}"] = value.detach().to("cpu", copy=True).contiguous()
        return tensors

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Into memory laid out as a new run's: the layout of a tensor may decide how it is rounded."""
        for name, parameter in self._named.items():
            state = self._fresh(parameter)
            for kind, key in self._keys(parameter).items():
                value = tensors[f"{kind}.{name}"]
                if isinstance(state[key], Tensor):
                    state[key].copy_(value)
                else:
                    state[key] = int(value)
            self.torch.state[parameter] = state

    def _keys(self, parameter: Tensor) -> dict[str, str]:
        if not self._packed:
            return {FIRST: "exp_avg", SECOND: "exp_avg_sq", COUNT: "step"}
        keys = {FIRST: "state1", SECOND: "state2", COUNT: "step"}
        scales = {FIRST_SCALE: "absmax1", SECOND_SCALE: "absmax2"}
        return keys | scales if parameter.numel() >= SMALLEST_8BIT else keys

    def _fresh(self, parameter: Tensor) -> dict[str, Any]:
        """The state of a parameter that no step has moved."""
        if not self._packed:
            first, second = (torch.zeros_like(parameter, memory_format=torch.preserve_format) for _ in range(2))
            return {"step": torch.zeros((), device=parameter.device), "exp_avg": first, "exp_avg_sq": second}
        self.torch.init_state(self._group(parameter), parameter, *self._place(parameter))  # type: ignore[attr-defined]
        state: dict[str, Any] = self.torch.state.pop(parameter)
        return state

    def _place(self, parameter: Tensor) -> tuple[int, int]:
        for g, group in enumerate(self.torch.param_groups):
            for i, mine in enumerate(group["params"]):
                if mine is parameter:
                    return g, i
        raise AssertionError("it has a group")

    def _group(self, parameter: Tensor) -> dict[str, Any]:
        group: dict[str, Any] = self.torch.param_groups[self._place(parameter)[0]]
        return group
