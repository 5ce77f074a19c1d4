"""LoRA of a Stable Diffusion as one safetensors file, out and in: diffusers' own, and kohya's, which other tools read.

Ours names tensors by component and by the checkpoint's name; diffusers by the module; kohya by the module with its dots
as underscores, so that names are looked up and never taken apart. What can't be held exactly is refused by name. Bytes
only, no torch. https://huggingface.co/docs/diffusers/using-diffusers/other-formats
"""

import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any, Literal

from adapter import A, AdapterMeta, B, LoraMeta, lora_key
from relay.peft import CONFIG, CannotExport, scaled
from relay.peft_import import BaseTensors, CannotImport, Config, Imported, Matcher, read_config
from relay.tensor_file import ITEM_BYTES, Piece, Shaped, TensorFile

Format = Literal["diffusers", "kohya"]
COMPONENTS = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}  # as kohya's names begin
STARTS: Mapping[str, tuple[str, ...]] = {  # that are read: diffusers' converter writes te1, and no text_model
    "unet": ("lora_unet_",),
    "text_encoder": ("lora_te_text_model_", "lora_te1_text_model_", "lora_te1_"),
}
AROUND = "text_model."  # the module around all others of the text encoder, in transformers before 5.6
METADATA = "lora_adapter_metadata"  # diffusers' key for what peft's config would say
# Endings of a pair, down and up, of diffusers' versions and of kohya's; the first is what is written.
DIFFUSERS = (
    (A, B),
    ("lora.down.weight", "lora.up.weight"),
    ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
)
KOHYA = ("lora_down.weight", "lora_up.weight")
ALPHA = "alpha"
TINY_ALPHA, MOST_ALPHA = 2.0**-126, 65_536
OLD_PROCESSOR = re.compile(r"\.processor\.to_(q|k|v|out)_lora\.(down|up)\.weight$")
OTHERS = {  # what stands in the keys of other kinds of adapters
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "a LoCon with a core (Tucker)",
    "lora_te2_": "an adapter of SDXL",
    "text_encoder_2": "an adapter of SDXL",
    "_input_blocks_": "an adapter with SDXL's names of blocks",
    "oft_": "OFT",
    "on_input": "IA3",
}


# --- out -------------------------------------------------------------------------------------------------------------


def exported(meta: AdapterMeta, file: TensorFile, form: Format) -> tuple[dict[str, Shaped], dict[str, str]]:
    """Tensors by their keys, and the file's metadata. Raises CannotExport."""
    if full := sorted(meta.tensors.keys() - meta.lora.keys()):
        raise CannotExport(
            f"{full[0]} was trained in full, and a LoRA file has no place for that ({len(full)} in all): train with "
            "lora alone to take the model elsewhere",
            param="model",
        )
    if dora := sorted(name for name, how in meta.lora.items() if how.dora):
        raise CannotExport(f"{dora[0]} has DoRA, and is written by peft alone: train with lora", param="model")
    return _kohya(meta, file) if form == "kohya" else _diffusers(meta, file)


def _diffusers(meta: AdapterMeta, file: TensorFile) -> tuple[dict[str, Shaped], dict[str, str]]:
    """The encoder's keys name the module that transformers had around it before 5.6: with any version, diffusers takes
    them so, and not without. The configs' names are without, and match the ends of either.
    """
    tensors: dict[str, Shaped] = {}
    for name in meta.lora:
        component, module = _module(name)
        within = AROUND if component == "text_encoder" else ""
        for ending in (A, B):
            tensors[f"{component}.{within}{module}.{ending}"] = _out(meta, file, name, ending)
    return tensors, {"format": "pt", METADATA: json.dumps(_configs(meta), sort_keys=True)}


def _kohya(meta: AdapterMeta, file: TensorFile) -> tuple[dict[str, Shaped], dict[str, str]]:
    """One alpha for each component, where it can be: diffusers overlooks those of attention where they differ, so what
    differs is multiplied into B.
    """
    rank, first = next((how.rank, how.scale * how.rank) for how in meta.lora.values())
    alphas: dict[str, float] = {}
    tensors: dict[str, Shaped] = {}
    for name, how in meta.lora.items():
        component, module = _module(name)
        theirs, own = COMPONENTS[component] + module.replace(".", "_"), how.scale * how.rank
        if not TINY_ALPHA <= own <= MOST_ALPHA:
            raise CannotExport(f"{name} has an alpha of {own:g}, which kohya's files can't hold", param="model")
        alpha = alphas.setdefault(component, own)
        if own != alpha and file.places[lora_key(name, B)].dtype != "F32":
            raise CannotExport(
                "alphas differ between the modules, which in half precision can't be made one: use format=diffusers",
                param="format",
            )
        tensors[f"{theirs}.{KOHYA[0]}"] = _out(meta, file, name, A)
        tensors[f"{theirs}.{KOHYA[1]}"] = _out(meta, file, name, B, own / alpha)
        tensors[f"{theirs}.{ALPHA}"] = _scalar(alpha)
    told = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": f"{first:g}"}
    return tensors, {"format": "pt", **told}


def _module(name: str) -> tuple[str, str]:
    component, _, rest = name.removesuffix(".weight").partition(".")
    return component, rest


def _out(meta: AdapterMeta, file: TensorFile, name: str, ending: str, times: float = 1.0) -> Shaped:
    """Half of a pair, as a convolution of one by one where the weight is one."""
    key = lora_key(name, ending)
    place = file.places[key]
    shape = (*place.shape, 1, 1) if len(meta.tensors[name]) == 4 else place.shape
    return Shaped(place.dtype, shape, lambda: Piece(place.dtype, shape, scaled(file.read(key).data, times)))


def _scalar(value: float) -> Shaped:
    return Shaped("F32", (), lambda: Piece("F32", (), struct.pack("<f", value)))


def _configs(meta: AdapterMeta) -> dict[str, Any]:
    """As peft's config of each component would say it; whoever does not read it takes alpha for the rank."""
    found: dict[str, Any] = {}
    for component in COMPONENTS:
        mine = {_module(n)[1]: how for n, how in meta.lora.items() if _module(n)[0] == component}
        if not mine:
            continue
        first = next(iter(mine.values()))
        rank, alpha = first.rank, first.scale * first.rank
        told = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": sorted(mine),
            "rank_pattern": {re.escape(m): how.rank for m, how in mine.items() if how.rank != rank},
            "alpha_pattern": {
                re.escape(m): how.scale * how.rank for m, how in mine.items() if how.scale * how.rank != alpha
            },
            "lora_dropout": 0.0,
            "bias": "none",
            "use_dora": False,
            "use_rslora": False,
            "inference_mode": False,
        }
        found |= {f"{component}.{key}": value for key, value in told.items()}
    return found


# --- in --------------------------------------------------------------------------------------------------------------


@dataclass
class _Pair:
    """The keys of one module's tensors."""

    down: str | None = None
    up: str | None = None
    alpha: str | None = None


def imported(file: TensorFile, base: BaseTensors) -> Imported:
    """Raises CannotImport for what the base model lacks, and for what is no plain LoRA."""
    pairs = _pairs(file, base)
    configs = _read_configs(file)
    found = Imported()
    for name, pair in pairs.items():
        component, module = _module(name)
        if pair.down is None or pair.up is None:
            raise CannotImport(f"{module[:200]} has only one half of its pair: the file is not whole")
        down, up = file.places[pair.down], file.places[pair.up]
        if _beyond(down.shape) or _beyond(up.shape) or not 0 < down.shape[0] == up.shape[1]:
            raise CannotImport(f"{module[:200]}: {list(down.shape)} and {list(up.shape)} are no pair of LoRA")
        rank, theirs = down.shape[0], (up.shape[0], down.shape[1])
        shape = base.shapes[name]
        if (shape[0], prod(shape[1:])) != theirs:
            raise CannotImport(
                f"{module[:200]} is adapted as {list(theirs)}, and in this model it is {[shape[0], prod(shape[1:])]}: "
                "choose the model it was made for"
            )
        how = _how(file, pair, configs.get(component), module, rank)
        found.lora[name], found.tensors[name] = how, shape
        for ending, key in ((A, pair.down), (B, pair.up)):
            found.pieces[lora_key(name, ending)] = _in(file, key, how.shapes(*theirs)[ending])
    if not found.tensors:
        raise CannotImport("the file adapts nothing")
    return found


def _beyond(shape: tuple[int, ...]) -> bool:
    """It has a kernel of more than one by one."""
    return len(shape) not in (2, 4) or shape[2:] not in ((), (1, 1))


def _pairs(file: TensorFile, base: BaseTensors) -> dict[str, _Pair]:
    """By our name of the weight."""
    by_kohya = {
        start + module.replace(".", "_"): name
        for name in base.shapes
        if name.endswith(".weight")
        for component, module in [_module(name)]
        for start in STARTS.get(component, ())
    }
    pairs: dict[str, _Pair] = {}
    for key in file.places:
        name, side = _place(key, by_kohya)
        if name is None:
            kind = next((kind for piece, kind in OTHERS.items() if piece in key), None)
            raise CannotImport(
                f"{key[:200]}: this is {kind}, and only plain LoRA of Stable Diffusion 1 and 2 can be held here"
                if kind
                else f"{key[:200]} is not in this model, or no tensor of a LoRA: choose the model it was made for"
            )
        if name not in base.shapes:
            raise CannotImport(f"{key[:200]} is not in this model: choose the model it was made for")
        if name not in base.linear:
            raise CannotImport(
                f"{key[:200]} adapts what is no matrix (LoCon adapts convolutions), which can't be held here: train it "
                "without convolutions"
            )
        pair = pairs.setdefault(name, _Pair())
        if getattr(pair, side) is not None:
            raise CannotImport(f"{key[:200]} stands twice, in two ways of writing it")
        setattr(pair, side, key)
    return pairs


def _place(key: str, by_kohya: Mapping[str, str]) -> tuple[str | None, str]:
    """Our name of the weight that a key belongs to, and `down`, `up` or `alpha`. None: it is no such key."""
    if key.startswith("lora_"):
        module, _, ending = key.partition(".")
        side = {KOHYA[0]: "down", KOHYA[1]: "up", ALPHA: "alpha"}.get(ending)
        return (by_kohya.get(module), side) if side else (None, "")
    component, _, rest = key.partition(".")
    if component not in COMPONENTS:
        return None, ""
    if old := OLD_PROCESSOR.search(rest):
        module = f"{rest[: old.start()]}.to_{old[1]}" + (".0" if old[1] == "out" else "")
        return f"{component}.{module}.weight", old[2]
    rest = rest.removeprefix(AROUND)
    for down, up in DIFFUSERS:
        for ending, side in ((down, "down"), (up, "up")):
            if rest.endswith(f".{ending}"):
                return f"{component}.{_modern(rest.removesuffix(f'.{ending}'))}.weight", side
    if rest.endswith(f".{ALPHA}"):
        return f"{component}.{_modern(rest.removesuffix(f'.{ALPHA}'))}.weight", ALPHA
    return None, ""


def _modern(module: str) -> str:
    """`to_out` was a module of its own once."""
    return f"{module}.0" if module.endswith(".to_out") else module


def _how(file: TensorFile, pair: _Pair, matcher: Matcher | None, module: str, rank: int) -> LoraMeta:
    """A file that does not say alpha means the rank."""
    if pair.alpha:
        alpha = _number(file.read(pair.alpha), pair.alpha)
        return LoraMeta(rank=rank, alpha=alpha)
    if matcher:
        if pair.down and pair.down.startswith(f"text_encoder.{AROUND}"):
            module = AROUND + module  # patterns are of the names that their writer had
        if (said := matcher.rank(module)) != rank:
            raise CannotImport(f"{module[:200]} has rank {rank} in its tensors and {said} in the file's metadata")
        return LoraMeta(rank=rank, alpha=matcher.alpha(module), rslora=matcher.config.use_rslora)
    return LoraMeta(rank=rank, alpha=float(rank))


def _number(piece: Piece, key: str) -> float:
    if prod(piece.shape) != 1:
        raise CannotImport(f"{key[:200]} is {list(piece.shape)}, and an alpha is one number")
    value = piece.number
    if not (isfinite(value) and 0 < value <= MOST_ALPHA):
        raise CannotImport(f"{key[:200]} is {value:g}: an alpha is above 0, and at most {MOST_ALPHA:,}")
    return value


def _in(file: TensorFile, key: str, shape: tuple[int, ...]) -> Shaped:
    """A convolution of one by one is a matrix."""
    dtype = file.places[key].dtype
    assert dtype in ITEM_BYTES
    return Shaped(dtype, shape, lambda: Piece(dtype, shape, file.read(key).data))


def _read_configs(file: TensorFile) -> dict[str, Matcher]:
    """By component, what diffusers' metadata says; empty where there is none."""
    said = file.metadata.get(METADATA)
    if said is None:
        return {}
    try:
        told = json.loads(said)
        pieces = [(key.partition("."), value) for key, value in told.items()]
    except (ValueError, RecursionError, AttributeError, TypeError) as exc:
        raise CannotImport(f"the file's {METADATA} is no JSON object") from exc
    return dict(_matchers([(component, key, value) for (component, _, key), value in pieces]))


def _matchers(told: list[tuple[str, str, Any]]) -> Iterator[tuple[str, Matcher]]:
    for component in COMPONENTS:
        mine = {key: value for where, key, value in told if where == component}
        if mine:
            try:
                config: Config = read_config(json.dumps({"peft_type": "LORA", **mine}).encode())
            except CannotImport as exc:
                raise CannotImport(exc.message.replace(CONFIG, f"the file's {METADATA}")) from exc
            if config.use_dora:
                raise CannotImport("the file says use_dora, and DoRA on models that make pictures can't be held here")
            yield component, Matcher(config)
