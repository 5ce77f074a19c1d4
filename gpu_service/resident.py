"""What lies on the device for the steps to use: base models laid out, how fast they are, and adapters.

Used by the device thread alone; the two measurements may be looked up from any. Knows nothing of requests.
"""

import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gpu_service import artifacts, costs, decoder, kernels
from gpu_service.artifacts import Adapter
from gpu_service.device import Device
from gpu_service.models import Base, Models
from gpu_service.rows import Rows, join
from gpu_service.sd import PictureBase
from gpu_service.speed import pass_s, token_s
from gpu_service.text import Served
from gpu_service.tuned import Tuned

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterFiles:
    """A tuned model's files on disk, by name; `id` changes with their content."""

    id: str
    files: Mapping[str, Path]


class Resident:
    def __init__(self, device: Device, models: Models, compiled: Path, adapter_bytes: int) -> None:
        """`compiled` is the folder of the kernels; adapters share `adapter_bytes`, of which one may be larger."""
        self._device, self._models, self._compiled = device, models, compiled
        self.adapter_bytes = adapter_bytes
        self.flops_per_s: dict[str, float] = {}  # by model, measured when it was loaded
        self.picture_s: dict[str, float] = {}  # of one pass for one picture, by model
        self._served: dict[str, Served] = {}
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()  # least recently used first
        self._laid: dict[str, tuple[Adapter, Tuned]] = {}  # of those, the ones of models that make pictures

    def text(self, model: str) -> Served:
        """Loaded where it is not yet. Raises what Models.load does."""
        base = self._models.load(model)
        if model not in self._served:
            served = self._served[model] = self._lay_out(base)
            self.flops_per_s[model] = costs.forward_flops(base.source.tensors, tied=base.source.tied) / token_s(
                served.decoder, Rows(served.weights, quantized=served.quantized), self._device.torch
            )
        return self._served[model]

    def _lay_out(self, base: Base) -> Served:
        source = base.source
        laid = decoder.build(source.family, source.config, self._device.torch)
        # Elsewhere memory that is given back piece by piece may be of no use to what is larger.
        joined = join(base.weights, laid.same_input()) if self._device.torch.type == "cpu" else {}
        return Served(
            source.id,
            laid,
            base.weights,
            source.tokenizer,
            source.stop_ids,
            base.quantized,
            kernels.choose([w for w in base.weights.values() if w.dim() == 2], self._compiled),
            joined,
        )

    def forget(self, model: str) -> None:
        """Its weights are laid out anew when it is next asked for."""
        self._served.pop(model, None)

    def painter(self, model: str) -> PictureBase:
        """Loaded where it is not yet. Raises what Models.load_pictures does."""
        base = self._models.load_pictures(model)
        if model not in self.picture_s:
            self.picture_s[model] = pass_s(base)
        return base

    def tuned(self, wanted: AdapterFiles, base: PictureBase) -> Tuned:
        """One for as long as its tensors are held: who shares a batch is told by it. Raises BadAdapter."""
        adapter = self.adapter(wanted, base)
        if (found := self._laid.get(wanted.id)) is None or found[0] is not adapter:
            found = self._laid[wanted.id] = adapter, Tuned(adapter.full, adapter.lora)
        return found[1]

    def adapter(self, wanted: AdapterFiles, base: Base | PictureBase) -> Adapter:
        """In the base's precision. The least recently used leave when the budget is spent. Raises BadAdapter."""
        if wanted.id in self._adapters:
            self._adapters.move_to_end(wanted.id)
            return self._adapters[wanted.id]
        adapter = artifacts.load(wanted.files, base.source.tensors)
        if adapter.meta.base_revision not in ("", base.source.revision):
            # The same weights have one revision as a folder and another from the hub: no reason to refuse.
            log.warning("%s has another revision here than the one that this adapter was trained on", base.source.id)
        adapter = adapter.served(self._device.torch, self._device.precision.dtype, base.whole)
        self._adapters[wanted.id] = adapter
        while len(self._adapters) > 1 and sum(a.n_bytes for a in self._adapters.values()) > self.adapter_bytes:
            gone, _ = self._adapters.popitem(last=False)
            self._laid.pop(gone, None)
        return adapter
