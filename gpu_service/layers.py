"""From a layer spec to the tensors that are trained. No torch: a preview answers at once.

Knows the names of a checkpoint's tensors and their shapes; not their values, nor how training goes.
The language is described for its users in docs/layers.md.
"""

import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import regex  # type: ignore[import-untyped]

from adapter import LoraMeta, lora_scale
from gpu_service.errors import BadRequest, NoSuchLayer, UnsupportedModel
from wire import LayerSpec, Quantize

PARAM = "layers"
MATCH_BUDGET_S = 0.25  # that all patterns of one selection may take together

# Checkpoint name of a module -> its part, in the order in which the forward pass meets them.
LAYER_PARTS = {
    "input_layernorm": "norm.attn",
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.o",
    "post_attention_layernorm": "norm.mlp",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}
GPT2_LAYER_PARTS = {
    "ln_1": "norm.attn",
    "attn.c_attn.q": "attn.q",
    "attn.c_attn.k": "attn.k",
    "attn.c_attn.v": "attn.v",
    "attn.c_proj": "attn.o",
    "ln_2": "norm.mlp",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}
OUTER_PARTS = {"model.embed_tokens": "embed", "model.norm": "norm.final", "lm_head": "head"}
GPT2_OUTER_PARTS = {"wte": "embed", "wpe": "embed.position", "ln_f": "norm.final", "lm_head": "head"}
PARTS = ("embed", "embed.position", *LAYER_PARTS.values(), "norm.final", "head")
LINEAR_PARTS = ("attn.", "mlp.", "head", "time.")  # whose matrices are applied as y = x @ W.T
FIRST_PARTS = ("embed", "conv.in", "time.embed")  # that lie in no layer, and come before them
GROUPS = ("attn", "mlp", "norm", "conv", "time", "embed", "head")
COMPONENTS = ("unet", "text_encoder")  # of a Stable Diffusion; what a spec means that names none is first
BLOCKS = re.compile(r"(down|mid|up)|(down|up)\.([0-9]{1,3})(?:-([0-9]{1,3}))?")
IN_A_LAYER = re.compile(r"(?:model\.layers|h)\.([0-9]+)\.(.+)\.(weight|bias)")
OUTSIDE = re.compile(r"(.+)\.(weight|bias)")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint. `layer` is None for the embedding, the last norm and the head."""

    name: str
    shape: tuple[int, ...]
    part: str
    layer: int | None
    linear: bool  # applied as y = x @ W.T, so lora can adapt it; W is (out, in), or a convolution of one by one
    component: str | None = None  # of a model that is more than one network
    block: str | None = None  # the layer's name, where layers have names

    @property
    def n_params(self) -> int:
        return prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """(out, in) of one that is linear."""
        return self.shape[0], prod(self.shape[1:])

    @property
    def quantisable(self) -> bool:
        """The head stays as it is: it costs one matrix, and every token's choice hangs on it."""
        return self.linear and self.layer is not None

    def belongs_to(self, part: str) -> bool:
        return self.part == part or self.part.startswith(f"{part}.")

    @property
    def is_first(self) -> bool:
        """In no layer, and before them: whoever trains it has nothing frozen below."""
        return self.layer is None and any(self.belongs_to(part) for part in FIRST_PARTS)


@dataclass(frozen=True)
class LoraTarget:
    tensor: TensorInfo
    rank: int
    alpha: float
    rslora: bool = False
    dora: bool = False

    @property
    def scale(self) -> float:
        return lora_scale(self.rank, self.alpha, rslora=self.rslora)

    @property
    def meta(self) -> LoraMeta:
        """As an adapter says it."""
        return LoraMeta(rank=self.rank, alpha=self.alpha, rslora=self.rslora, dora=self.dora)

    @property
    def n_params(self) -> int:
        """A is (rank, in), B is (out, rank); DoRA has a length for each of `out` rows besides."""
        return self.rank * sum(self.tensor.matrix) + self.dora * self.tensor.shape[0]


@dataclass(frozen=True)
class Selection:
    """What a job trains, in the model's order."""

    full: tuple[TensorInfo, ...]
    lora: tuple[LoraTarget, ...]
    total_tensors: int
    total_params: int
    n_layers: int  # of the model
    notes: tuple[str, ...]
    quantize: Quantize = "none"  # how the frozen base is held
    blocks: tuple[str, ...] = ()  # names of the model's layers, where they have names

    @property
    def tensors(self) -> list[TensorInfo]:
        """Of the base model, that are trained or adapted."""
        return [*self.full, *(target.tensor for target in self.lora)]

    @property
    def n_tensors(self) -> int:
        """Tensors of the base model that are trained or adapted."""
        return len(self.full) + len(self.lora)

    @property
    def n_trainable(self) -> int:
        """Numbers that the optimizer changes."""
        return sum(t.n_params for t in self.full) + sum(t.n_params for t in self.lora)

    @property
    def lowest_layer(self) -> int:
        """Everything below it is frozen. `n_layers`: only the last norm or the head is trained."""
        tensors = self.tensors
        if any(t.is_first or t.component == "text_encoder" for t in tensors):  # the UNet reads what it puts out
            return 0
        return min(self.n_layers if t.layer is None else t.layer for t in tensors)


def llama_tensors(shapes: Mapping[str, tuple[int, ...]]) -> list[TensorInfo]:
    """The tensors of a Llama checkpoint in the order of the forward pass. Raises UnsupportedModel for a foreign one."""
    return _tensors(shapes, LAYER_PARTS, OUTER_PARTS)


def gpt2_tensors(shapes: Mapping[str, tuple[int, ...]]) -> list[TensorInfo]:
    """The same of a GPT-2, by the names under which its weights are held: linear maps, with q, k and v apart."""
    return _tensors(shapes, GPT2_LAYER_PARTS, GPT2_OUTER_PARTS)


def _tensors(
    shapes: Mapping[str, tuple[int, ...]], layer_parts: Mapping[str, str], outer_parts: Mapping[str, str]
) -> list[TensorInfo]:
    found = []
    for name, shape in shapes.items():
        layer: int | None = None
        if inside := IN_A_LAYER.fullmatch(name):
            layer, part = int(inside[1]), layer_parts.get(inside[2])
        else:
            outside = OUTSIDE.fullmatch(name)
            part = outer_parts.get(outside[1]) if outside else None
        if part is None:
            if name.endswith("rotary_emb.inv_freq"):
                continue  # a constant that old checkpoints carry
            raise UnsupportedModel(
                f"The checkpoint has a tensor '{name}', which no model of its family has.", param="model"
            )
        linear = len(shape) == 2 and part.startswith(LINEAR_PARTS)
        found.append(TensorInfo(name, tuple(shape), part, layer, linear))
    return sorted(found, key=_place)


def _place(tensor: TensorInfo) -> tuple[float, int, bool]:
    outside = -1.0 if tensor.is_first else float("inf")
    return (outside if tensor.layer is None else tensor.layer, PARTS.index(tensor.part), tensor.name.endswith(".bias"))


def select(tensors: Sequence[TensorInfo], specs: Sequence[LayerSpec], *, tied: bool) -> Selection:
    """The tensors to train. `tied`: the head is the embedding.

    Raises NoSuchLayer, which says what exists, rather than train nothing; BadRequest for a spec that contradicts
    itself or another one.
    """
    tensors = [t for t in tensors if not (tied and t.part == "head")]  # some checkpoints store a tied head twice
    deadline = time.monotonic() + MATCH_BUDGET_S
    full: dict[str, TensorInfo] = {}
    lora: dict[str, LoraTarget] = {}
    notes: list[str] = []
    quantized = quantize(specs)
    for spec in specs:
        _check(spec)
        for tensor in _chosen(component(tensors, spec.component), spec, tied, deadline, notes):
            if tensor.name in full or tensor.name in lora:
                raise BadRequest(f"'{tensor.name}' is selected by two specs: let each select its own.", param=PARAM)
            if spec.method != "full":
                # No alpha: twice the rank, so that the rank does not change how far a step goes.
                alpha = spec.alpha or 2.0 * spec.rank
                lora[tensor.name] = LoraTarget(tensor, spec.rank, alpha, spec.rslora, spec.method == "dora")
            else:
                _refuse_packed(tensor, quantized)
                full[tensor.name] = tensor
    return Selection(
        full=tuple(full[t.name] for t in tensors if t.name in full),
        lora=tuple(lora[t.name] for t in tensors if t.name in lora),
        total_tensors=len(tensors),
        total_params=sum(t.n_params for t in tensors),
        n_layers=_n_layers(component(tensors, None)),
        blocks=_blocks(component(tensors, None)),
        notes=tuple(dict.fromkeys(notes)),
        quantize=quantized,
    )


def quantize(specs: Sequence[LayerSpec]) -> Quantize:
    """How they have the base held: there is one, so one answer; specs that say nothing agree. Raises BadRequest."""
    asked = {spec.quantize for spec in specs} - {"none"}
    if len(asked) > 1:
        raise BadRequest("Specs ask for 8bit and for 4bit: a job has one frozen base, choose one.", param=PARAM)
    return asked.pop() if asked else "none"


def _refuse_packed(tensor: TensorInfo, quantize: Quantize) -> None:
    if quantize != "none" and tensor.quantisable:
        raise BadRequest(
            f"'{tensor.name}' is held in {quantize} and can't be trained itself: use lora for it, or quantize none.",
            param=PARAM,
        )


def _check(spec: LayerSpec) -> None:
    if spec.method == "full" and spec.rslora:
        raise BadRequest("rslora scales lora and dora: leave it out with method full.", param=PARAM)


def component(tensors: Sequence[TensorInfo], name: str | None) -> list[TensorInfo]:
    """One network of the model; None: its first, or all there is. Raises NoSuchLayer, naming those that exist."""
    known = [c for c in COMPONENTS if any(t.component == c for t in tensors)]
    if name is not None and name not in known:
        such = f"use {' or '.join(known)}" if known else "a text model is one network, leave the field out"
        raise NoSuchLayer(f"This model has no component '{name}': {such}.", param=PARAM)
    return [t for t in tensors if t.component == (name or (known[0] if known else None))]


def _chosen(
    tensors: Sequence[TensorInfo], spec: LayerSpec, tied: bool, deadline: float, notes: list[str]
) -> list[TensorInfo]:
    """One spec's tensors, before it is known what others select."""
    for part in spec.parts:
        _check_part(tensors, part, spec.method, tied)
    layers = parse_layers(tensors, spec.layers)
    everywhere = len(layers) == _n_layers(tensors)

    def wanted(tensor: TensorInfo) -> bool:
        if tensor.layer is not None:
            return tensor.layer in layers and any(tensor.belongs_to(p) for p in spec.parts)
        # What lies in no layer is meant when it is named itself, or when its group is wanted everywhere.
        return tensor.part in spec.parts or (everywhere and any(tensor.belongs_to(p) for p in spec.parts))

    chosen = [t for t in tensors if wanted(t)]
    if spec.match is not None:
        chosen = _matching(chosen, spec.match, deadline)
    if spec.method != "full" and chosen:
        chosen = [t for t in chosen if t.linear]
        if not chosen:
            raise BadRequest(
                f"{_echo(spec)} selects no matrices, and {spec.method} adapts only these: use full.", param=PARAM
            )
        if large := [t for t in chosen if spec.rank > min(t.matrix)]:
            notes.append(f"rank {spec.rank} is more than {large[0].name} {list(large[0].shape)} can have.")
    if not chosen:
        raise NoSuchLayer(f"{_echo(spec)} selects nothing: {_what_exists(tensors)}", param=PARAM)
    if not everywhere and (outside := sorted({t.part for t in chosen if t.layer is None})):
        notes.append(f'{", ".join(outside)}: outside the layers, so "layers": "{spec.layers}" does not apply.')
    if tied and any(t.part == "embed" for t in chosen):
        notes.append("The head is tied to the embedding: training embed trains both.")
    return chosen


def _check_part(tensors: Sequence[TensorInfo], part: str, method: str, tied: bool) -> None:
    members = [t for t in tensors if t.belongs_to(part)]
    if tied and part == "head":
        raise NoSuchLayer(
            "This model's head is tied to its embedding: select embed, with method full, which trains both.",
            param=PARAM,
        )
    if not members:
        raise NoSuchLayer(f"This model has no part '{part}': {_what_exists(tensors)}", param=PARAM)
    if method != "full" and not any(t.linear for t in members):
        raise BadRequest(
            f"{method} adapts the matrices of attention, MLP and head, and '{part}' has none: use method full for it, "
            f"in a spec of its own if other parts shall have {method}.",
            param=PARAM,
        )


def parse_layers(tensors: Sequence[TensorInfo], text: str) -> frozenset[int]:
    """`all`, `first:4`, `last:8`, `3`, `8-15,31`, or `mid,up.1-3`: the layers, from 0, both ends included.

    Layers that have names go by these. Raises NoSuchLayer.
    """
    n_layers, blocks = _n_layers(tensors), _blocks(tensors)
    layers: set[int] = set()
    for item in (piece.strip() for piece in text.split(",")):
        if item == "all":
            layers.update(range(n_layers))
        elif match := re.fullmatch(r"(first|last):(\d+)", item):
            count = int(match[2])
            layers.update(_range(tensors, item, *((0, count - 1) if match[1] == "first" else (n_layers - count, None))))
        elif not blocks and (match := re.fullmatch(r"(\d+)(?:-(\d+))?", item)):
            layers.update(_range(tensors, item, int(match[1]), int(match[2] or match[1])))
        elif named := named_blocks(blocks, item):
            layers.update(blocks.index(name) for name in named)
        else:
            kind = "block of this model" if blocks else "number of a layer"
            raise NoSuchLayer(f"'{item}' is no {kind}: {_what_exists(tensors)}", param=PARAM)
    return frozenset(layers)


def _range(tensors: Sequence[TensorInfo], item: str, low: int, high: int | None) -> range:
    n_layers = _n_layers(tensors)
    high = n_layers - 1 if high is None else high
    if low > high:
        raise NoSuchLayer(f"'{item}' names no layer: ranges go upwards.", param=PARAM)
    if low < 0 or high >= n_layers:
        raise NoSuchLayer(f"'{item}' goes beyond the model: {_what_exists(tensors)}", param=PARAM)
    return range(low, high + 1)


def named_blocks(known: Sequence[str], item: str) -> list[str]:
    """`down`, `mid`, `up.1`, `up.1-3`: blocks of a UNet, in their order; empty where one of them is not known."""
    named = BLOCKS.fullmatch(item)
    if named is None:
        return []
    if named[1]:
        return [b for b in known if b.partition(".")[0] == named[1]]
    chosen = [f"{named[2]}.{n}" for n in range(int(named[3]), int(named[4] or named[3]) + 1)]
    return chosen if set(chosen) <= set(known) else []


def _blocks(tensors: Iterable[TensorInfo]) -> tuple[str, ...]:
    """Names of the layers in their order; empty where they are numbered."""
    return tuple(dict(sorted((t.layer, t.block) for t in tensors if t.layer is not None and t.block)).values())


def _matching(tensors: Iterable[TensorInfo], pattern: str, deadline: float) -> list[TensorInfo]:
    """Strangers write the patterns, and some take exponential time: all of a selection share one deadline.

    The standard library's matcher can't be interrupted; that of the `regex` package watches the clock.
    """

    def left_s() -> float:
        return max(deadline - time.monotonic(), 1e-3)

    try:
        compiled = regex.compile(pattern)
        return [t for t in tensors if compiled.search(t.name, timeout=left_s())]
    except (regex.error, OverflowError, RecursionError) as exc:
        raise BadRequest(f"match '{pattern}' is no regular expression: {exc}", param=PARAM) from exc
    except TimeoutError as exc:
        raise BadRequest(f"match '{pattern}' takes too long: use a simpler one.", param=PARAM) from exc


def _n_layers(tensors: Iterable[TensorInfo]) -> int:
    return 1 + max((t.layer for t in tensors if t.layer is not None), default=-1)


def _what_exists(tensors: Sequence[TensorInfo]) -> str:
    parts = []
    for group in GROUPS:
        members = dict.fromkeys(t.part for t in tensors if t.belongs_to(group))
        finer = [p for p in sorted(members, key=_part_place) if p != group]
        if members:
            parts.append(f"{group} ({', '.join(finer)})" if finer else group)
    blocks = _blocks(tensors)
    layers = f"blocks {', '.join(blocks)}" if blocks else f"layers 0-{_n_layers(tensors) - 1}"
    return f"this model has {layers}; parts: {', '.join(parts)}."


def _part_place(part: str) -> tuple[int, str]:
    return (PARTS.index(part) if part in PARTS else len(PARTS), part)


def _echo(spec: LayerSpec) -> str:
    match = f", match '{spec.match}'" if spec.match is not None else ""
    return f"{spec.method} of {', '.join(spec.parts)} in layers {spec.layers}{match}"


def describe(tensors: Sequence[TensorInfo], name: str | None = None) -> dict[str, Any]:
    """What GET /v1/models/{id}/layers answers: every tensor by layer, and those that lie in none.

    Of a model that is more than one network: of the component that is named. Raises NoSuchLayer.
    """
    components = [c for c in COMPONENTS if any(t.component == c for t in tensors)]
    tensors = component(tensors, name)
    blocks = _blocks(tensors)

    def rows(layer: int | None) -> list[dict[str, Any]]:
        return [
            {"name": t.name, "shape": list(t.shape), "part": t.part, "parameters": t.n_params, "linear": t.linear}
            for t in tensors
            if t.layer == layer
        ]

    n_layers = _n_layers(tensors)
    return {
        "object": "model.layers",
        **({"component": name or components[0], "components": components} if components else {}),
        "n_layers": n_layers,
        "parts": dict(Counter(t.part for t in tensors)),
        "layers": [
            {"layer": layer, **({"block": blocks[layer]} if blocks else {}), "tensors": rows(layer)}
            for layer in range(n_layers)
        ],
        "outside": rows(None),
    }
