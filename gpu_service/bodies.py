"""OpenAI request bodies as this service takes them, and its answers. Pure translation: no device, no HTTP.

Fields in IGNORED mean nothing here and are let pass, as clients send them by themselves. A field that would change the
answer and is not built is refused unless it holds its neutral value; everything else unknown is refused by name.
https://platform.openai.com/docs/api-reference/chat
"""

import json
import secrets
import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

import wire
from gpu_service import layers
from gpu_service.device import Device
from gpu_service.errors import BadRequest, NotYet
from gpu_service.layers import TensorInfo
from gpu_service.models import Source
from gpu_service.rows import Dials
from gpu_service.text import Finish, Sampling

IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"} | {
    "prompt_cache_retention",
    "parallel_tool_calls",
    "reasoning_effort",
    "verbosity",
}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
}
PREVIEW_ROWS, PREVIEW_TOKENS = 4, 256  # the micro-batch whose memory a preview states
DEFAULT_COMPLETION_TOKENS = 16  # as the OpenAI API has it for /v1/completions

Gain = Annotated[float, Field(ge=0, le=100)]
EpsGain = Annotated[float, Field(ge=1e-6, le=1e6)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Band(Body):
    layers: str = Field(max_length=500)
    eps: EpsGain = 1.0
    attn: Gain = 1.0
    mlp: Gain = 1.0


class DialsBody(Body):
    eps: EpsGain = 1.0
    attn: Gain = 1.0
    mlp: Gain = 1.0
    bands: list[Band] = Field(default=[], max_length=32)

    def for_layers(self, tensors: tuple[TensorInfo, ...], n_layers: int) -> Dials | None:
        """By layer: the dial times that of each band which covers the layer. None where nothing is turned."""
        eps, attn, mlp = [self.eps] * n_layers, [self.attn] * n_layers, [self.mlp] * n_layers
        for band in self.bands:
            for layer in layers.parse_layers(tensors, band.layers):
                eps[layer] *= band.eps
                attn[layer] *= band.attn
                mlp[layer] *= band.mlp
        dials = Dials(tuple(eps), tuple(attn), tuple(mlp), self.eps)
        return None if dials.neutral else dials


class TextPart(Body):
    type: Literal["text"]
    text: str


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        role = "system" if self.role == "developer" else self.role
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        return {"role": role, "content": text}


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationBody(Body):
    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    dials: str | DialsBody | None = None

    @model_validator(mode="after")
    def _stop_strings(self) -> "GenerationBody":
        if isinstance(self.stop, list) and len(self.stop) > 4:
            raise ValueError("stop takes at most 4 strings")
        if self.stop is not None and "" in self.stop_strings:
            raise ValueError("a stop string must not be empty")
        return self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def dials_for(self, tensors: tuple[TensorInfo, ...], n_layers: int) -> Dials | None:
        if isinstance(self.dials, str):
            raise NotYet(
                f"There is no dial preset '{self.dials}': presets are not built yet. "
                'Give numbers, for example {"attn": 1.1, "bands": [{"layers": "0-7", "mlp": 0.9}]}.',
                param="dials",
            )
        try:
            return self.dials.for_layers(tensors, n_layers) if self.dials else None
        except BadRequest as exc:
            raise BadRequest(exc.message, param="dials", code=exc.code) from exc

    def sampling(self, max_tokens: int) -> Sampling:
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=self.stop_strings,
        )


class ChatBody(GenerationBody):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionBody(GenerationBody):
    prompt: str | list[str]

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens or DEFAULT_COMPLETION_TOKENS

    def text(self) -> str:
        if isinstance(self.prompt, str):
            return self.prompt
        if len(self.prompt) != 1:
            raise NotYet(f"prompt has {len(self.prompt)} texts: send one a request.", param="prompt")
        return self.prompt[0]


class PreviewBody(Body):
    model: str
    layers: wire.LayerSpec | Annotated[list[wire.LayerSpec], Field(min_length=1, max_length=16)]

    @property
    def specs(self) -> list[wire.LayerSpec]:
        return self.layers if isinstance(self.layers, list) else [self.layers]


def preview(source: Source, body: PreviewBody, device: Device) -> dict[str, Any]:
    """What a layer spec trains and what it costs, in a batch of PREVIEW_ROWS x PREVIEW_TOKENS."""
    selection = layers.select(source.tensors, body.specs, tied=source.tied)
    cost = source.cost(selection, PREVIEW_ROWS, PREVIEW_TOKENS, device.precision.dtype.itemsize)
    lora = {t.tensor.name: t for t in selection.lora}
    tensors = [
        {
            "name": tensor.name,
            "shape": list(tensor.shape),
            "part": tensor.part,
            "layer": tensor.layer,
            "method": "lora" if tensor.name in lora else "full",
            "parameters": lora[tensor.name].n_params if tensor.name in lora else tensor.n_params,
        }
        for tensor in [*selection.full, *(t.tensor for t in selection.lora)]
    ]
    return {
        "object": "layers.preview",
        "model": source.id,
        "summary": layers.summary(selection, cost),
        "selected_tensors": selection.n_tensors,
        "total_tensors": selection.total_tensors,
        "trainable_parameters": selection.n_trainable,
        "total_parameters": selection.total_params,
        "lowest_layer": selection.lowest_layer,
        "memory_bytes": {
            "weights": cost.weights_bytes,
            "gradients": cost.gradients_bytes,
            "optimizer": cost.optimizer_bytes,
            "activations": cost.activations_bytes,
            "adapter": cost.adapter_bytes,
            "total": cost.total,
        },
        "batch": {"rows": PREVIEW_ROWS, "tokens": PREVIEW_TOKENS},
        "notes": list(selection.notes),
        "tensors": tensors,
    }


AnyModel = TypeVar("AnyModel", bound=BaseModel)


def parse(kind: type[AnyModel], raw: bytes) -> AnyModel:
    """Raises BadRequest naming the field."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise BadRequest(f"The body is not JSON: {exc}", code="not_json") from exc
    if not isinstance(value, dict):
        raise BadRequest(f"The body is a JSON {type(value).__name__}; it must be an object.", code="not_json")
    kept = {}
    for name, item in value.items():
        if name in kind.model_fields:
            kept[name] = item
        elif issubclass(kind, GenerationBody) and name in NEUTRAL:
            if item is not None and item not in NEUTRAL[name]:
                raise NotYet(f"{name} is not built yet: leave it out.", param=name)
        elif not (issubclass(kind, GenerationBody) and name in IGNORED):
            kept[name] = item  # refused below, by name
    try:
        return kind.model_validate(kept)
    except ValidationError as exc:
        message, param = wire.validation_message([dict(e) for e in exc.errors()])
        raise BadRequest(message, param=param) from exc


@dataclass(frozen=True)
class AnswerShape:
    """How one endpoint's answers look; chat and completions differ in little else."""

    chat: bool
    model: str
    id: str
    created: int

    @classmethod
    def new(cls, chat: bool, model: str) -> "AnswerShape":
        return cls(chat, model, f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}", int(time.time()))

    def whole(self, text: str, finish: Finish) -> dict[str, Any]:
        content: dict[str, Any] = (
            {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        )
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish.reason}
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": [choice], "usage": usage(finish)}

    def first(self) -> dict[str, Any] | None:
        return self._chunk({"role": "assistant", "content": ""}) if self.chat else None

    def piece(self, text: str) -> dict[str, Any]:
        return self._chunk({"content": text} if self.chat else text)

    def last(self, finish: Finish) -> dict[str, Any]:
        return self._chunk({} if self.chat else "", finish.reason)

    def usage_only(self, finish: Finish) -> dict[str, Any]:
        return {**self._head(self._chunk_kind), "choices": [], "usage": usage(finish)}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(self, content: dict[str, Any] | str, reason: str | None = None) -> dict[str, Any]:
        name = "delta" if self.chat else "text"
        choice = {"index": 0, name: content, "logprobs": None, "finish_reason": reason}
        return {**self._head(self._chunk_kind), "choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def usage(finish: Finish) -> dict[str, int]:
    return {
        "prompt_tokens": finish.prompt_tokens,
        "completion_tokens": finish.completion_tokens,
        "total_tokens": finish.prompt_tokens + finish.completion_tokens,
    }
