"""peft's two files as an adapter of ours. What we can't hold exactly is refused by name, and nothing is unpickled.

The config comes from a stranger, regular expressions included: those run against a clock. Bytes only, no torch.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import regex  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict, Field

from adapter import MAGNITUDE, A, B, LoraMeta, lora_key
from relay.bodies import parse
from relay.errors import InvalidRequest
from relay.peft import CONFIG, CONV1D, PREFIX, SLICES, WEIGHTS
from relay.tensor_file import Piece, Shaped, TensorFile

PATTERNS_S = 1.0  # that all patterns of one config may take together
MAX_CONFIG_BYTES = 2**20
# Initialisations that leave the base model as it is; the others change it, and would have to change ours.
HARMLESS_INIT = (True, False, None, "gaussian", "eva", "orthogonal")
# Fields of peft 0.21 that say nothing about what a loaded adapter computes.
IGNORED = (
    *("task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"),
    *("lora_dropout", "fan_in_fan_out", "megatron_core", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
)


class CannotImport(InvalidRequest):
    code = "cannot_import"

    def __init__(self, message: str) -> None:
        super().__init__(message, param="file")


class Config(BaseModel):
    """adapter_config.json: the fields that are used. Others must be IGNORED or say nothing."""

    model_config = ConfigDict(extra="allow", frozen=True)

    peft_type: Literal["LORA"]
    r: int = Field(default=8, ge=1)
    lora_alpha: float = Field(default=8, gt=0, allow_inf_nan=False)
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    init_lora_weights: bool | str | None = True


@dataclass(frozen=True)
class BaseTensors:
    """What a gpu says of the base model."""

    family: str
    tied: bool
    shapes: Mapping[str, tuple[int, ...]]
    linear: frozenset[str]  # those that LoRA can adapt


@dataclass
class Imported:
    """What the description says, and the tensors by their keys, to be read one after another."""

    lora: dict[str, LoraMeta] = field(default_factory=dict)
    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    pieces: dict[str, Shaped] = field(default_factory=dict)


def read_config(content: bytes) -> Config:
    """Raises CannotImport, or InvalidRequest naming the field."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as exc:
        raise CannotImport(f"{CONFIG} is not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise CannotImport(f"{CONFIG} is no JSON object")
    if (kind := value.get("peft_type")) != "LORA":
        raise CannotImport(f"{CONFIG}: peft_type is {str(kind)[:50]!r}, and only LORA can be held here")
    config = parse(Config, value)
    if config.bias != "none":
        raise CannotImport(f"{CONFIG}: bias is '{config.bias[:50]}', and only 'none' can be held here")
    if config.init_lora_weights not in HARMLESS_INIT:
        raise CannotImport(
            f"{CONFIG}: init_lora_weights is '{str(config.init_lora_weights)[:50]}', which changes the base model too: "
            "save it with path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    for name, given in (config.model_extra or {}).items():
        if name not in IGNORED and given:
            raise CannotImport(f"{CONFIG}: {name[:50]} is set, which can't be held here")
    return config


def imported(config: Config, file: TensorFile, base: BaseTensors) -> Imported:
    """Raises CannotImport for what the base model lacks, what peft itself would leave unused, and what is not LoRA."""
    matcher, found = Matcher(config), Imported()
    adapted: dict[str, dict[str, str]] = {}  # module in peft -> ending -> key
    saved: dict[str, list[tuple[str, str]]] = {}  # module in peft -> kind, key
    for key in file.places:
        path = key.removeprefix(PREFIX)
        for ending in (A, B, MAGNITUDE):
            if path.endswith(f".{ending}"):
                adapted.setdefault(path.removesuffix(f".{ending}"), {})[ending] = key
                break
        else:
            module, _, kind = path.rpartition(".")
            if "lora_" in path or kind not in ("weight", "bias"):
                raise CannotImport(f"{WEIGHTS} has {key[:200]}, which can't be held here")
            saved.setdefault(module.removesuffix(".modules_to_save").removesuffix(".base_layer"), []).append(
                (kind, key)
            )
    for module, keys in adapted.items():
        _lora(found, config, matcher, file, base, module, keys)
    for module, kinds in saved.items():
        if not matcher.saves(module):
            raise CannotImport(
                f"{WEIGHTS} has {module[:200]} in full, and {CONFIG} does not name it in modules_to_save"
            )
        _full(found, file, base, module, kinds)
    if not found.tensors:
        raise CannotImport(f"{WEIGHTS} adapts nothing")
    return found


# --- LoRA ------------------------------------------------------------------------------------------------------------


def _lora(
    found: Imported,
    config: Config,
    matcher: "Matcher",
    file: TensorFile,
    base: BaseTensors,
    module: str,
    keys: Mapping[str, str],
) -> None:
    if not matcher.targets(module, base):
        raise CannotImport(f"{WEIGHTS} adapts {module[:200]}, and {CONFIG} does not target it: peft would ignore it")
    wanted = {A, B, MAGNITUDE} if config.use_dora else {A, B}
    if odd := keys.keys() ^ wanted:
        raise CannotImport(f"{module[:200]}: {', '.join(sorted(odd))} and use_dora in {CONFIG} do not fit each other")
    names = _ours(module, base)
    if refused := [name for name in names if name not in base.linear]:
        raise _lacks(refused[0], base)
    rank, width = _matrix(file, keys[A])
    out, also_rank = _matrix(file, keys[B])
    rank_said = matcher.rank(module)
    if not rank == also_rank == rank_said:
        raise CannotImport(f"{module[:200]} has rank {rank} and {also_rank} in its tensors and {rank_said} in {CONFIG}")
    how = LoraMeta(rank=rank, alpha=matcher.alpha(module), rslora=config.use_rslora, dora=config.use_dora)
    size = out // len(names)
    for i, name in enumerate(names):
        if base.shapes[name] != (size, width) or size * len(names) != out:
            raise CannotImport(
                f"{module[:200]} is adapted as [{out}, {width}], and in this model it is "
                f"[{len(names) * base.shapes[name][0]}, {base.shapes[name][1]}]: choose the model it was made for"
            )
        found.lora[name], found.tensors[name] = how, (size, width)
        for ending in keys:
            shape = how.shapes(size, width)[ending]
            rows = None if ending == A or len(names) == 1 else (i * size, (i + 1) * size)
            found.pieces[lora_key(name, ending)] = _part(file, keys[ending], shape, rows)


def _matrix(file: TensorFile, key: str) -> tuple[int, int]:
    shape = file.places[key].shape
    if len(shape) != 2:
        raise CannotImport(f"{key[:200]} is no matrix")
    return shape[0], shape[1]


def _part(file: TensorFile, key: str, shape: tuple[int, ...], rows: tuple[int, int] | None) -> Shaped:
    """All of a tensor, or some of its rows."""
    place = file.places[key]
    if place.shape != (shape if rows is None else (len(SLICES) * shape[0], *shape[1:])):
        raise CannotImport(f"{key[:200]} is {list(place.shape)}, which does not fit its neighbours")
    return Shaped(place.dtype, shape, lambda: file.read(key).rows(*rows) if rows else file.read(key))


def _ours(module: str, base: BaseTensors) -> list[str]:
    """Our names of the weights of a module of peft's: GPT-2's fused one has three."""
    name = module.removeprefix("transformer.") if base.family == "gpt2" else module
    if base.family == "gpt2" and name.endswith(".c_attn"):
        return [f"{name}.{part}.weight" for part in SLICES]
    return [f"{name}.weight"]


def _lacks(name: str, base: BaseTensors) -> CannotImport:
    if name == "lm_head.weight" and base.tied:
        return CannotImport(
            "lm_head is adapted, and this model's head is its embedding, which LoRA does not adapt here"
        )
    there = "can't be adapted by LoRA here" if name in base.shapes else "is not in this model: choose its base model"
    return CannotImport(f"{name.removesuffix('.weight')[:200]} {there}")


# --- in full ---------------------------------------------------------------------------------------------------------


def _full(found: Imported, file: TensorFile, base: BaseTensors, module: str, kinds: list[tuple[str, str]]) -> None:
    for kind, key in kinds:
        names = [f"{name.removesuffix('.weight')}.{kind}" for name in _ours(module, base)]
        if names == ["lm_head.weight"] and base.tied:
            _check_tied(file, base, key)
            continue
        turned = base.family == "gpt2" and kind == "weight" and bool(CONV1D.fullmatch(module.split("transformer.")[-1]))
        for i, name in enumerate(names):
            if name not in base.shapes:
                raise _lacks(name, base)
            shape = base.shapes[name]
            theirs = (len(names) * shape[0], *shape[1:])
            if file.places[key].shape != (theirs[::-1] if turned else theirs):
                raise CannotImport(
                    f"{key[:200]} is {list(file.places[key].shape)}, and in this model {list(theirs)}: a vocabulary of "
                    "another size, or another model"
                )
            if name in found.lora:
                raise CannotImport(f"{module[:200]} is both adapted and saved in full")
            found.tensors[name] = shape
            found.pieces[name] = Shaped(file.places[key].dtype, shape, _reader(file, key, i, shape[0], turned=turned))


def _reader(file: TensorFile, key: str, i: int, size: int, *, turned: bool) -> Callable[[], Piece]:
    def read() -> Piece:
        piece = file.read(key)
        return (piece.transposed if turned else piece).rows(i * size, (i + 1) * size)

    return read


def _check_tied(file: TensorFile, base: BaseTensors, key: str) -> None:
    """A tied head may stand beside the embedding, as we export it, if it is the same."""
    embedding = "transformer.wte" if base.family == "gpt2" else "model.embed_tokens"
    beside = f"{PREFIX}{embedding}.weight"
    if beside not in file.places or file.read(beside) != file.read(key):
        raise CannotImport("lm_head is saved in full, and this model's head is its embedding: both must be the same")


# --- what the config targets -----------------------------------------------------------------------------------------


class Matcher:
    """peft's own rules of matching (tuners_utils.check_target_module_exists, get_pattern_key), against a clock."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._until = time.monotonic() + PATTERNS_S

    def targets(self, module: str, base: BaseTensors) -> bool:
        config = self.config
        if self._among(module, config.exclude_modules):
            return False
        if self.saves(module, embeddings=False):
            return False
        if config.target_modules is None:
            return True
        if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
            return not module.endswith("lm_head") and all(name in base.linear for name in _ours(module, base))
        return self._among(module, config.target_modules) and self._in_layers(module)

    def saves(self, module: str, *, embeddings: bool = True) -> bool:
        """peft also stores embeddings whose size was changed, unnamed."""
        if embeddings and module.rpartition(".")[2] in ("embed_tokens", "lm_head", "wte"):
            return True
        return any(module.endswith(name) for name in self.config.modules_to_save or ())

    def rank(self, module: str) -> int:
        return int(self._pattern(self.config.rank_pattern, module, self.config.r))

    def alpha(self, module: str) -> float:
        return self._pattern(self.config.alpha_pattern, module, self.config.lora_alpha)

    def _left_s(self) -> float:
        """Many quick patterns take as long as a slow one."""
        left_s = self._until - time.monotonic()
        if left_s <= 0:
            raise CannotImport(f"{CONFIG}: its names and patterns take too long to compare: use fewer and simpler ones")
        return left_s

    def _among(self, module: str, wanted: list[str] | str | None) -> bool:
        self._left_s()
        if isinstance(wanted, str):
            return self._search(wanted, module, whole=True) is not None
        return any(module == name or module.endswith(f".{name}") for name in wanted or ())

    def _in_layers(self, module: str) -> bool:
        chosen = self.config.layers_to_transform
        if chosen is None or chosen == []:
            return True
        patterns = self.config.layers_pattern or [r"[^.]*"]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            start = r".*?\." if pattern == r"[^.]*" else r"(?:^|.*?\.)"
            if at := self._search(rf"{start}{pattern}\.(?P<idx>\d+)\.", module):
                index = int(at["idx"])
                return index == chosen if isinstance(chosen, int) else index in chosen
        return False

    def _pattern(self, patterns: Mapping[str, float] | None, module: str, default: float) -> float:
        for pattern, value in (patterns or {}).items():
            if self._search(rf"(.*\.)?({pattern})$", module):
                if not 0 < value < math.inf:
                    raise CannotImport(f"{CONFIG}: {pattern[:100]} has {value}: ranks and alphas are above 0")
                return value
        return default

    def _search(self, pattern: str, module: str, *, whole: bool = False) -> Any:
        left_s = self._left_s()
        try:
            match = regex.fullmatch if whole else regex.match
            return match(pattern, module, timeout=left_s)
        except (regex.error, OverflowError, RecursionError) as exc:
            raise CannotImport(f"{CONFIG}: '{pattern[:100]}' is no regular expression: {exc}") from exc
        except TimeoutError as exc:
            raise CannotImport(f"{CONFIG}: '{pattern[:100]}' takes too long: use names in place of it") from exc
