"""An adapter as peft's two files: `adapter_config.json` and `adapter_model.safetensors`. Bytes only, no torch.

peft wraps modules, and ours are tensors: GPT-2's queries, keys and values, adapted apart here, are one module there,
whose LoRA is theirs side by side, block by block, of the sum of their ranks. What peft can't hold is refused by name.
https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import re
from array import array
from collections.abc import Iterator, Mapping
from math import sqrt
from typing import Any

from adapter import MAGNITUDE, A, AdapterMeta, B, LoraMeta, lora_key
from relay.errors import InvalidRequest
from relay.tensor_file import ITEM_BYTES, Piece, Shaped, TensorFile

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SLICES = ("q", "k", "v")  # of GPT-2's fused matrix
FUSED = re.compile(r"(h\.\d+\.attn\.c_attn)\.([qkv])")
CONV1D = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)")  # kept transposed
NORM_OR_CONV1D = re.compile(rf"{CONV1D.pattern}|h\.\d+\.ln_[12]|ln_f")  # GPT-2's modules that have a bias


class CannotExport(InvalidRequest):
    code = "cannot_export"


def module_of(name: str) -> tuple[str, str]:
    """Our name of a tensor -> the module in our names, with GPT-2's slices together, and `weight` or `bias`."""
    stem, _, kind = name.rpartition(".")
    fused = FUSED.fullmatch(stem)
    return (fused[1] if fused else stem), kind


def in_peft(module: str, family: str) -> str:
    """Our name of a module -> that in transformers' model."""
    return f"transformer.{module}" if family == "gpt2" and module != "lm_head" else module


def exported(meta: AdapterMeta, file: TensorFile) -> tuple[dict[str, Any], dict[str, Shaped]]:
    """The config, and the tensors by their keys. Raises CannotExport."""
    if meta.family not in ("llama", "gpt2"):
        raise CannotExport(f"models of the family '{meta.family}' can't be exported yet", param="model")
    lora, full = _by_module(meta, meta.lora), _by_module(meta, meta.tensors.keys() - meta.lora.keys())
    if both := sorted(module for module in lora.keys() & full.keys() if "weight" in _kinds(full[module])):
        raise CannotExport(
            f"{both[0]} is adapted in one part and trained in full in another, and peft has one of them for a module: "
            "train all three of q, k and v alike",
            param="model",
        )
    if mixed := sorted(lora.keys() & full.keys()):
        raise CannotExport(
            f"{mixed[0]} has LoRA and a bias that was trained in full, which peft can't hold in one module: "
            "leave the biases out with match 'weight$'",
            param="model",
        )
    if len({how.dora for how in meta.lora.values()}) > 1:
        raise CannotExport("some tensors have DoRA and some LoRA, and peft has one of them for all", param="model")
    rslora = bool(meta.lora) and all(how.rslora for how in meta.lora.values())
    tensors: dict[str, Shaped] = {}
    ranks, alphas = {}, {}
    for module, names in lora.items():
        theirs = in_peft(module, meta.family)
        rank, scale, found = _lora(meta, file, module, names)
        ranks[theirs], alphas[theirs] = rank, scale * (sqrt(rank) if rslora else rank)
        tensors |= {f"{PREFIX}{theirs}.{ending}": tensor for ending, tensor in found.items()}
    saved = []
    for module, names in full.items():
        for theirs in _full_modules(meta, module):
            saved.append(theirs)
            found = _full(meta, file, module, names)
            tensors |= {f"{PREFIX}{theirs}.{kind}": tensor for kind, tensor in found.items()}
    return _config(meta, ranks, alphas, saved, rslora=rslora), tensors


def _by_module(meta: AdapterMeta, names: Any) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in (name for name in meta.tensors if name in names):
        found.setdefault(module_of(name)[0], []).append(name)
    return found


def _kinds(names: list[str]) -> set[str]:
    return {module_of(name)[1] for name in names}


def _config(
    meta: AdapterMeta, ranks: Mapping[str, int], alphas: Mapping[str, float], saved: list[str], *, rslora: bool
) -> dict[str, Any]:
    """Modules go by their whole names, and what differs from the first by patterns."""
    rank, alpha = next(iter(ranks.values()), 8), next(iter(alphas.values()), 8)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": meta.base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _whole(alpha),
        "target_modules": list(ranks),
        "rank_pattern": {re.escape(module): r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(module): _whole(a) for module, a in alphas.items() if a != alpha},
        "use_rslora": rslora,
        "use_dora": any(how.dora for how in meta.lora.values()),
        "fan_in_fan_out": meta.family == "gpt2",
        "modules_to_save": saved or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
    }


def _whole(number: float) -> float:
    """An integer where it is one, as peft writes it."""
    return int(number) if float(number).is_integer() else number


# --- LoRA ------------------------------------------------------------------------------------------------------------


def _lora(meta: AdapterMeta, file: TensorFile, module: str, names: list[str]) -> tuple[int, float, dict[str, Shaped]]:
    """Rank and scale of a module, and its tensors by ending."""
    if not FUSED.fullmatch(names[0].removesuffix(".weight")):
        how = meta.lora[names[0]]
        return how.rank, how.scale, {ending: _as_is(file, lora_key(names[0], ending)) for ending in _endings(how)}
    parts = {name.split(".")[-2]: name for name in names}
    hows = {part: meta.lora[name] for part, name in parts.items()}
    if next(iter(hows.values())).dora and len(parts) < len(SLICES):
        missing = ", ".join(part for part in SLICES if part not in parts)
        raise CannotExport(
            f"{module} has DoRA on {', '.join(parts)} alone, and peft's would need the base model's lengths for "
            f"{missing} too: train q, k and v together",
            param="model",
        )
    dtype, rank = _one_type(file, [lora_key(name, A) for name in names] + [lora_key(name, B) for name in names]), 0
    for how in hows.values():
        rank += how.rank
    out, width = meta.tensors[names[0]]
    scale = max(how.scale for how in hows.values())
    if dtype != "F32" and len({how.scale for how in hows.values()}) > 1:
        raise CannotExport(f"q, k and v of {module} differ in their scale, in half precision: use fp32", param="model")

    def side_by_side() -> Piece:
        data = b"".join(file.read(lora_key(parts[part], A)).data for part in SLICES if part in parts)
        return Piece(dtype, (rank, width), data)

    def blocks() -> Piece:
        item = ITEM_BYTES[dtype]
        data, before = bytearray(), 0
        for part in SLICES:
            if part not in parts:
                data += bytes(out * rank * item)
                continue
            how, piece = hows[part], file.read(lora_key(parts[part], B))
            mine, row = scaled(piece.data, how.scale / scale), how.rank * item
            left, right = bytes(before * item), bytes((rank - before - how.rank) * item)
            for at in range(0, len(mine), row):
                data += left + mine[at : at + row] + right
            before += how.rank
        return Piece(dtype, (3 * out, rank), bytes(data))

    found = {A: Shaped(dtype, (rank, width), side_by_side), B: Shaped(dtype, (3 * out, rank), blocks)}
    if next(iter(hows.values())).dora:
        keys = [lora_key(parts[part], MAGNITUDE) for part in SLICES]
        found[MAGNITUDE] = _joined(file, keys, (3 * out,))
    return rank, scale, found


def _endings(how: LoraMeta) -> tuple[str, ...]:
    return (A, B, MAGNITUDE) if how.dora else (A, B)


def scaled(data: bytes, by: float) -> bytes:
    """Of fp32 numbers; by 1.0 of any."""
    return data if by == 1.0 else array("f", (x * by for x in array("f", data))).tobytes()


def _as_is(file: TensorFile, key: str) -> Shaped:
    place = file.places[key]
    return Shaped(place.dtype, place.shape, lambda: file.read(key))


def _one_type(file: TensorFile, keys: list[str]) -> str:
    types = {file.places[key].dtype for key in keys}
    if len(types) > 1:
        raise CannotExport(f"{keys[0]} and its neighbours differ in their precision", param="model")
    return types.pop()


def _joined(file: TensorFile, keys: list[str], shape: tuple[int, ...], *, transposed: bool = False) -> Shaped:
    """Row after row, one after another; `shape` is that of the result."""
    dtype = _one_type(file, keys)

    def read() -> Piece:
        data = b"".join(file.read(key).data for key in keys)
        return Piece(dtype, shape[::-1], data).transposed if transposed else Piece(dtype, shape, data)

    return Shaped(dtype, shape, read)


# --- trained in full -------------------------------------------------------------------------------------------------


def _full_modules(meta: AdapterMeta, module: str) -> Iterator[str]:
    """A tied head is a module of its own in peft, which would keep the old matrix: it is written twice."""
    yield in_peft(module, meta.family)
    if module in ("model.embed_tokens", "wte"):
        if meta.tied is None:
            raise CannotExport(
                "the embedding was trained by a version that did not note whether the head is tied to it: train again",
                param="model",
            )
        if meta.tied:
            yield "lm_head"


def _full(meta: AdapterMeta, file: TensorFile, module: str, names: list[str]) -> dict[str, Shaped]:
    """A module's tensors, `weight` and `bias`, as peft's `modules_to_save` has them: all of the module or none."""
    found = {}
    for kind in sorted(_kinds(names), reverse=True):
        mine = [name for name in names if module_of(name)[1] == kind]
        fused = FUSED.fullmatch(mine[0].rpartition(".")[0])
        if fused and len(mine) < len(SLICES):
            raise _incomplete(module, f"{kind} of q, k and v")
        ordered = sorted(mine, key=lambda name: SLICES.index(name.split(".")[-2])) if fused else mine
        out, *rest = meta.tensors[mine[0]]
        shape = (len(mine) * out, *rest)
        turned = kind == "weight" and CONV1D.fullmatch(module) is not None
        found[kind] = _joined(file, ordered, shape[::-1] if turned else shape, transposed=turned)
    if meta.family == "gpt2" and NORM_OR_CONV1D.fullmatch(module) and len(found) < 2:
        raise _incomplete(module, "weight and bias")
    return found


def _incomplete(module: str, what: str) -> CannotExport:
    return CannotExport(
        f"only some of {module} was trained in full, and peft keeps whole modules: train {what} together, or use lora",
        param="model",
    )
