"""Base models: find them, load their weights once, keep them. transformers gives config, tokenizer and names.

Safetensors only: no pickle is ever loaded, and no code from a model's repository runs. Knows nothing of decoders.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

import wire
from gpu_service import hub, sd
from gpu_service.costs import Estimate, Shape, estimate, held, weights_bytes
from gpu_service.device import Device
from gpu_service.errors import ModelUnreadable, NoSuchModel, OtherKind, OutOfMemory, UnsupportedModel, Withheld
from gpu_service.layers import Selection, TensorInfo, gpt2_tensors, llama_tensors
from gpu_service.quantize import Quantized
from gpu_service.sd import PictureBase, PictureSource
from gpu_service.settings import BadSetting

log = logging.getLogger(__name__)

# By transformers' model_type.
FAMILIES: Mapping[str, wire.Family] = {"llama": "llama", "qwen2": "llama", "gpt2": "gpt2"}
# For base models, which have none: plain words, so that a model that never saw a chat can follow. Ends of turns are the
# tokenizer's end of text, which a fine-tune learns; until then an answer ends where the model begins to play the user.
DEFAULT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"  # a bare one would be trimmed
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
DEFAULT_STOP = ("\nUser:",)
# Buffers that old checkpoints carry: RoPE's frequencies, GPT-2's causal masks. They follow from the config.
IGNORED_TENSORS = re.compile(r"rotary_emb\.inv_freq$|^(transformer\.)?h\.[0-9]+\.attn\.(masked_)?bias$")
# GPT-2 keeps its linear maps transposed, and queries, keys and values as one (Conv1D).
CONV1D = re.compile(r"^h\.[0-9]+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.(weight|bias)$")


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
    stop: tuple[str, ...]  # texts that end a chat's answer
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

    def weights_bytes(self, quantize: wire.Quantize, bytes_per_param: int) -> int:
        """In memory."""
        return weights_bytes(self.tensors, quantize, bytes_per_param)

    @property
    def shape(self) -> Shape:
        config, gpt2 = self.config, self.family == "gpt2"
        inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
        return Shape(
            hidden=int(config.hidden_size),
            intermediate=int(inner or 4 * config.hidden_size),
            vocab=int(config.vocab_size),
            n_heads=int(config.num_attention_heads),
            gated=not gpt2,
            attention_dropout=bool(config.attn_pdrop if gpt2 else config.attention_dropout),
            tied=self.tied,
        )

    def cost(
        self,
        selection: Selection,
        rows: int,
        tokens: int,
        bytes_per_param: int,
        *,
        checkpointing: bool = False,
        moments_bytes_per_param: int = 8,
        keeps_best: bool = False,
        streamed: bool = False,
    ) -> Estimate:
        """What training `selection` takes in memory, with micro-batches of `rows` x `tokens`."""
        in_memory = held(self.tensors, selection, tied=self.tied) if streamed else self.tensors
        return estimate(
            selection,
            self.shape,
            base_bytes_per_param=bytes_per_param,
            base_weights_bytes=weights_bytes(in_memory, selection.quantize, bytes_per_param),
            rows=rows,
            tokens=tokens,
            checkpointing=checkpointing,
            moments_bytes_per_param=moments_bytes_per_param,
            keeps_best=keeps_best,
        )


@dataclass(frozen=True)
class Base:
    """A model in memory. One copy serves and trains, unless a training asks for another quantisation."""

    source: Source
    weights: dict[str, Tensor]  # by checkpoint name, on the device, in its precision
    quantize: wire.Quantize = "none"
    quantized: Mapping[str, Quantized] = field(default_factory=dict)  # the matrices that `weights` lacks then

    @property
    def device(self) -> torch.device:
        return next(iter(self.weights.values())).device

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.weights.values())).dtype

    def whole(self, name: str) -> Tensor:
        """A tensor in the model's precision, unpacked if it is held packed."""
        return self.weights[name] if name in self.weights else self.quantized[name].whole()

    @property
    def n_bytes(self) -> int:
        return sum(w.nbytes for w in self.weights.values()) + sum(q.n_bytes for q in self.quantized.values())


class Models:
    """What this gpu offers. `load` belongs to the device thread; the rest may be called from anywhere."""

    def __init__(
        self,
        names: tuple[str, ...],
        device: Device,
        hf_token: str | None = None,
        folder: Path | None = None,
        tell: Callable[[hub.Download], None] = lambda _: None,
    ) -> None:
        """`folder` keeps what comes from the hub; `tell` hears how far that is, in this thread."""
        self._device = device
        self._all = {s.id: s for s in (locate(name, hf_token, folder, tell) for name in names)}
        self._painters: dict[str, PictureBase] = {}
        self._loaded: dict[str, Base] = {}
        # Held otherwise than what serves, for as long as a training holds on to them.
        self._withheld: set[str] = set()
        self._lent: WeakValueDictionary[tuple[str, str], Base] = WeakValueDictionary()

    def weights_bytes(self) -> int:
        """Of all models together, as they serve."""
        precision = self._device.precision
        return sum(s.weights_bytes(precision.quantize, precision.dtype.itemsize) for s in self._all.values())

    def ids(self) -> list[str]:
        return list(self._all)

    def source(self, model: str) -> Source:
        """Raises NoSuchModel, naming those that exist, and OtherKind."""
        found = self.either_source(model)
        if isinstance(found, PictureSource):
            raise OtherKind(f"'{model}' makes pictures: ask /v1/images/generations for one.", param="model")
        return found

    def picture_source(self, model: str) -> PictureSource:
        """Raises NoSuchModel, naming those that exist, and OtherKind."""
        found = self.either_source(model)
        if isinstance(found, Source):
            raise OtherKind(f"'{model}' writes text: ask /v1/chat/completions or /v1/completions.", param="model")
        return found

    def makes_pictures(self, model: str) -> bool:
        return isinstance(self.either_source(model), PictureSource)

    def either_source(self, model: str) -> Source | PictureSource:
        """Raises NoSuchModel, naming those that exist."""
        if model not in self._all:
            raise NoSuchModel(model, self._all)
        return self._all[model]

    def offered(self) -> list[wire.OfferedModel]:
        return [
            wire.OfferedModel(
                id=s.id,
                family=s.family,
                n_layers=s.n_layers,
                context_tokens=s.context_tokens,
                loaded=s.id in self._loaded or s.id in self._painters,
            )
            for s in self._all.values()
        ]

    def fits(self, model: str, quantize: wire.Quantize) -> bool:
        """Whether all of it is in memory, or could be."""
        if model in self._loaded and quantize == self._device.precision.quantize:
            return True
        needs = self.source(model).weights_bytes(quantize, self._device.precision.dtype.itemsize)
        return needs <= self._device.free_bytes()

    def withhold(self, model: str) -> None:
        """Leave the memory to a run that streams this model; until `restore` nobody can load it."""
        self._withheld.add(model)
        self._loaded.pop(model, None)

    def restore(self, model: str) -> None:
        self._withheld.discard(model)

    def load(self, model: str, quantize: wire.Quantize | None = None) -> Base:
        """`quantize` None: as it serves. Raises OutOfMemory, with both figures, before anything is read; Withheld."""
        if model in self._withheld:
            raise Withheld(
                f"A job trains {model} here with streamed layers, and the model is not in memory meanwhile: ask again "
                "when the job has ended, or use another gpu."
            )
        serving = self._device.precision.quantize
        if model not in self._loaded:
            self._loaded[model] = self._read(self.source(model), serving)
        if quantize is None or quantize == serving:
            return self._loaded[model]
        base = self._lent.get((model, quantize)) or self._read(self.source(model), quantize)
        self._lent[model, quantize] = base
        return base

    def load_pictures(self, model: str) -> PictureBase:
        """Raises OutOfMemory, with both figures, before anything is read."""
        if model not in self._painters:
            self._painters[model] = sd.load(self.picture_source(model), self._device)
        return self._painters[model]

    def _read(self, source: Source, quantize: wire.Quantize) -> Base:
        held = self._device.precision.name if quantize == "none" else f"{self._device.precision.name} and {quantize}"
        needs, free = source.weights_bytes(quantize, self._device.precision.dtype.itemsize), self._device.free_bytes()
        if needs > free:
            raise OutOfMemory(
                f"{source.id} takes {needs / 1e6:,.0f} MB in {held}, and {free / 1e6:,.0f} MB are free on this gpu: "
                "hold it in 8bit or 4bit (quantize), or use a smaller model."
            )
        log.info("loading %s in %s", source.id, held)
        return read_base(source, self._device, quantize)


def find(name: str) -> Source:
    """A model of text, as `locate` finds it."""
    found = locate(name)
    if isinstance(found, PictureSource):
        raise BadSetting(f"'{name}' makes pictures, and a model of text is needed here")
    return found


def locate(
    name: str,
    hf_token: str | None = None,
    kept: Path | None = None,
    tell: Callable[[hub.Download], None] = lambda _: None,
) -> Source | PictureSource:
    """`name` is a hub id, a folder, or `id=folder`. Raises BadSetting, for it comes from GPU_MODELS."""
    id, _, path = name.rpartition("=")
    if id or Path(path).is_dir():
        folder, revision = Path(path), None
        if not folder.is_dir():
            raise BadSetting(f"GPU_MODELS names '{name}', and there is no folder '{path}'")
    else:
        folder, revision = hub.fetch(name, hf_token, kept, tell), "hub"
    try:
        id = id or (name if revision else folder.resolve().name)
        if sd.is_pipeline(folder):
            return sd.open_folder(id, folder, folder.resolve().name if revision else None)
        return _open(id, folder, revision is not None)
    except UnsupportedModel as exc:
        raise BadSetting(f"GPU_MODELS names '{name}': {exc.message}") from exc


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
    family = FAMILIES[config.model_type]
    shapes = _shapes(files, family)
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)  # some checkpoints store the tied matrix twice
    tokenizer = AutoTokenizer.from_pretrained(folder)
    has_template = tokenizer.chat_template is not None
    if not has_template:
        tokenizer.chat_template = DEFAULT_TEMPLATE
    return Source(
        id=id,
        folder=folder,
        revision=folder.resolve().name if from_hub else _fingerprint(folder, files),
        family=family,
        config=config,
        tokenizer=tokenizer,
        stop_ids=_stop_ids(folder, config, tokenizer),
        stop=() if has_template else DEFAULT_STOP,
        shapes=shapes,
        tensors=tuple(gpt2_tensors(shapes) if family == "gpt2" else llama_tensors(shapes)),
    )


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UnsupportedModel(
            f"{folder} has no *.safetensors file; pickled weights (*.bin, *.pt) are not loaded, for they can run code"
        )
    return files


def _shapes(files: list[Path], family: wire.Family) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if not IGNORED_TENSORS.search(name):
                    empty = torch.empty(tensors.get_slice(name).get_shape(), device="meta")
                    shapes |= {held: tuple(part.shape) for held, part in as_held(family, name, empty)}
    return shapes


def as_held(family: wire.Family, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's tensor under the names and in the shapes in which all code here knows it.

    Only GPT-2 differs: no prefix, every linear map (out, in), and `c_attn` as `c_attn.q`, `.k` and `.v`.
    """
    if family != "gpt2":
        yield name, tensor
        return
    name = name.removeprefix("transformer.")
    found = CONV1D.match(name)
    if found and found[2] == "weight":
        tensor = tensor.T.contiguous()
    if found and found[1] == "attn.c_attn":
        stem = name.removesuffix(f".{found[2]}")
        for part, piece in zip("qkv", tensor.chunk(3), strict=True):
            yield f"{stem}.{part}.{found[2]}", piece.clone()
    else:
        yield name, tensor


def held_names(family: wire.Family, name: str) -> set[str]:
    """The names of `as_held`, without the tensor."""
    if family != "gpt2":
        return {name}
    name = name.removeprefix("transformer.")
    found = CONV1D.match(name)
    if found and found[1] == "attn.c_attn":
        return {f"{name.removesuffix(f'.{found[2]}')}.{part}.{found[2]}" for part in "qkv"}
    return {name}


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


def read_base(
    source: Source,
    device: Device,
    quantize: wire.Quantize = "none",
    only: Callable[[TensorInfo], bool] = lambda _: True,
) -> Base:
    """The checkpoint's tensors by name, on the device and in its precision; each is packed as soon as it is read.

    `only`: those that are wanted; no other is read. Raises ModelUnreadable.
    """
    weights: dict[str, Tensor] = {}
    quantized: dict[str, Quantized] = {}
    packed = {t.name for t in source.tensors if t.quantisable}
    wanted = {t.name for t in source.tensors if only(t)}
    for name, tensor in _tensors(source, device, wanted):
        if quantize != "none" and name in packed:
            quantized[name] = Quantized(tensor, quantize)
        else:
            weights[name] = tensor
    assert all(torch.is_floating_point(w) for w in weights.values())
    return Base(source, weights, quantize, quantized)


def _tensors(source: Source, device: Device, wanted: set[str]) -> Iterator[tuple[str, Tensor]]:
    try:
        for file in _weight_files(source.folder):
            with safe_open(file, framework="pt", device=str(device.torch)) as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    if IGNORED_TENSORS.search(name) or wanted.isdisjoint(held_names(source.family, name)):
                        continue
                    tensor = tensors.get_tensor(name).to(device.precision.dtype)
                    yield from ((held, part) for held, part in as_held(source.family, name, tensor) if held in wanted)
    except (OSError, SafetensorError, UnsupportedModel) as exc:
        raise ModelUnreadable(
            f"The weights of {source.id} can't be read from {source.folder} ({exc}): see that the drive is mounted and "
            "the files are whole, then start again."
        ) from exc
