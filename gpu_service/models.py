"""Base models: find them, load their weights once, keep them. transformers gives config, tokenizer and names.

Safetensors only: no pickle is ever loaded, and no code from a model's repository runs. Knows nothing of decoders.
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

import wire
from gpu_service.device import Device
from gpu_service.errors import NoSuchModel, UnsupportedModel
from gpu_service.layers import Estimate, Selection, TensorInfo, estimate, llama_tensors
from gpu_service.settings import BadSetting

log = logging.getLogger(__name__)

FAMILIES: Mapping[str, wire.Family] = {"llama": "llama", "qwen2": "llama"}  # by transformers' model_type
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt"]
IGNORED_TENSORS = "rotary_emb.inv_freq"  # a buffer that old checkpoints carry; computed from the config


@dataclass(frozen=True)
class Source:
    """Where a model's files are, and what can be told without its weights."""

    id: str
    folder: Path
    revision: str  # hub commit, or a hash of the folder's content: an adapter belongs to one revision
    family: wire.Family
    config: Any  # transformers' config object
    tokenizer: Any  # transformers' fast tokenizer
    stop_ids: frozenset[int]  # tokens that end an answer
    shapes: Mapping[str, tuple[int, ...]]
    tensors: tuple[TensorInfo, ...]

    @property
    def n_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def context_tokens(self) -> int:
        return int(self.config.max_position_embeddings)

    @property
    def tied(self) -> bool:
        """The output head is the embedding matrix."""
        return bool(self.config.tie_word_embeddings)

    def token_text(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))

    def cost(self, selection: Selection, rows: int, tokens: int, bytes_per_param: int) -> Estimate:
        """What training `selection` takes in memory, with micro-batches of `rows` x `tokens`."""
        return estimate(
            selection,
            n_layers=self.n_layers,
            hidden_size=self.config.hidden_size,
            intermediate_size=self.config.intermediate_size,
            vocab_size=self.config.vocab_size,
            n_heads=self.config.num_attention_heads,
            base_bytes_per_param=bytes_per_param,
            base_params=selection.total_params,
            rows=rows,
            tokens=tokens,
        )


@dataclass(frozen=True)
class Base:
    """A model in memory. One copy serves and trains."""

    source: Source
    weights: Mapping[str, Tensor]  # by checkpoint name, on the device, in its precision


class Models:
    """What this gpu offers. `load` belongs to the device thread; the rest may be called from anywhere."""

    def __init__(self, names: tuple[str, ...], device: Device, hf_token: str | None = None) -> None:
        self._device = device
        self._sources = {s.id: s for s in (find(name, hf_token) for name in names)}
        self._loaded: dict[str, Base] = {}

    def ids(self) -> list[str]:
        return list(self._sources)

    def source(self, model: str) -> Source:
        """Raises NoSuchModel, naming those that exist."""
        if model not in self._sources:
            raise NoSuchModel(model, self._sources)
        return self._sources[model]

    def offered(self) -> list[wire.OfferedModel]:
        return [
            wire.OfferedModel(
                id=s.id,
                family=s.family,
                n_layers=s.n_layers,
                context_tokens=s.context_tokens,
                loaded=s.id in self._loaded,
            )
            for s in self._sources.values()
        ]

    def load(self, model: str) -> Base:
        if model not in self._loaded:
            source = self.source(model)
            log.info("loading %s in %s", model, self._device.precision.name)
            self._loaded[model] = Base(source, read_weights(source, self._device))
        return self._loaded[model]


def find(name: str, hf_token: str | None = None) -> Source:
    """`name` is a hub id, a folder, or `id=folder`. Raises BadSetting, for it comes from GPU_MODELS."""
    id, _, path = name.rpartition("=")
    if id or Path(path).is_dir():
        folder, revision = Path(path), None
        if not folder.is_dir():
            raise BadSetting(f"GPU_MODELS names '{name}', and there is no folder '{path}'")
    else:
        folder, revision = _download(name, hf_token), "hub"
    try:
        return _open(id or (name if revision else folder.resolve().name), folder, revision is not None)
    except UnsupportedModel as exc:
        raise BadSetting(f"GPU_MODELS names '{name}': {exc.message}") from exc


def _download(name: str, hf_token: str | None) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, token=hf_token))
    except RepositoryNotFoundError as exc:
        raise BadSetting(
            f"GPU_MODELS names '{name}': the hub has no such model, or it needs an HF_TOKEN that may read it"
        ) from exc
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as exc:
        raise BadSetting(
            f"GPU_MODELS names '{name}': it is no folder here, and the hub did not give it ({type(exc).__name__}). "
            "Check the name and the network, or give a folder."
        ) from exc


def _open(id: str, folder: Path, from_hub: bool) -> Source:
    transformers_logging.set_verbosity_error()  # its hints are for people who call transformers themselves
    if not (folder / "config.json").is_file():
        raise UnsupportedModel(f"{folder} has no config.json")
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in FAMILIES:
        raise UnsupportedModel(
            f"its architecture is '{config.model_type}', which is not covered; covered are {', '.join(FAMILIES)}"
        )
    files = _weight_files(folder)
    shapes = _shapes(files)
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)  # some checkpoints store the tied matrix twice
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Source(
        id=id,
        folder=folder,
        revision=folder.resolve().name if from_hub else _fingerprint(folder, files),
        family=FAMILIES[config.model_type],
        config=config,
        tokenizer=tokenizer,
        stop_ids=_stop_ids(folder, config, tokenizer),
        shapes=shapes,
        tensors=tuple(llama_tensors(shapes)),
    )


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UnsupportedModel(
            f"{folder} has no *.safetensors file; pickled weights (*.bin, *.pt) are not loaded, for they can run code"
        )
    return files


def _shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if IGNORED_TENSORS not in name:
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
    return shapes


def _fingerprint(folder: Path, files: list[Path]) -> str:
    """Hash of the config, and of each weight file's size, first and last MiB: whole files would take minutes."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(2**20))
            opened.seek(max(0, size - 2**20))
            digest.update(opened.read())
    return digest.hexdigest()


def _stop_ids(folder: Path, config: Any, tokenizer: Any) -> frozenset[int]:
    """Every token by which the model may end an answer: chat models name several, in different files."""
    found: list[int | list[int] | None] = [config.eos_token_id, tokenizer.eos_token_id]
    if (folder / "generation_config.json").is_file():
        found.append(GenerationConfig.from_pretrained(folder).eos_token_id)
    flat = (i for item in found for i in (item if isinstance(item, list) else [item]))
    return frozenset(i for i in flat if i is not None)


def read_weights(source: Source, device: Device) -> dict[str, Tensor]:
    """The checkpoint's tensors by name, on the device and in its precision."""
    weights: dict[str, Tensor] = {}
    for file in _weight_files(source.folder):
        with safe_open(file, framework="pt", device=str(device.torch)) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if name in source.shapes:
                    weights[name] = tensors.get_tensor(name).to(device.precision.dtype)
    assert all(torch.is_floating_point(w) for w in weights.values())
    return weights
