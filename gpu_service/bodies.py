"""OpenAI request bodies as this service takes them, and its answers. Pure translation: no device, no HTTP.

Fields in IGNORED mean nothing here and are let pass, as clients send them by themselves. A field that would change the
answer and is not built is refused unless it holds its neutral value; everything else unknown is refused by name.
https://platform.openai.com/docs/api-reference/chat
"""

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

import wire
from gpu_service import layers
from gpu_service.errors import BadRequest, NotYet
from gpu_service.layers import TensorInfo
from gpu_service.models import Source
from gpu_service.rows import Dials
from gpu_service.sampling import Drawn, Sampling
from gpu_service.text import Finish

IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "wait_s"} | {
    "prompt_cache_retention",
    "parallel_tool_calls",
    "reasoning_effort",
    "verbosity",
}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
}
MOST_ANSWERS = 8  # to one prompt
DEFAULT_CHAT_TOKENS = 2048  # an answer ends here when the caller names no limit, for its memory is set aside at once
DEFAULT_COMPLETION_TOKENS = 16  # as the OpenAI API has it for /v1/completions

Gain = Annotated[float, Field(ge=0, le=100)]
EpsGain = Annotated[float, Field(ge=1e-6, le=1e6)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    ignored: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}


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
    ignored = frozenset(IGNORED)
    neutral = NEUTRAL

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(default=None, max_length=300)
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    ignore_eos: bool = False
    deterministic: bool = False
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

    def sampling(self, max_tokens: int, source: Source, top_logprobs: int | None) -> Sampling:
        """Raises BadRequest for a token that the model lacks."""
        vocab, bias = source.config.vocab_size, {}
        for token, value in (self.logit_bias or {}).items():
            if not token.isdecimal() or len(token) > 9 or int(token) >= vocab:
                raise BadRequest(f"'{token[:50]}' is no token: they are 0 to {vocab - 1}.", param="logit_bias")
            bias[int(token)] = value
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature if self.temperature > 1e-4 else 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=bias,
            seed=self.seed,
            stop=self.stop_strings + (source.stop if isinstance(self, ChatBody) else ()),
            ignore_eos=self.ignore_eos,
            top_logprobs=top_logprobs,
        )


class ChatBody(GenerationBody):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _told(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: set that to true, or leave it out")
        return self

    @property
    def wanted_tokens(self) -> int:
        return self.max_completion_tokens or self.max_tokens or DEFAULT_CHAT_TOKENS

    @property
    def names_limit(self) -> bool:
        return bool(self.max_completion_tokens or self.max_tokens)

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(GenerationBody):
    prompt: str | list[str]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    max_tokens: Annotated[int, Field(ge=0)] | None = None  # 0 with echo: only the prompt is read

    @model_validator(mode="after")
    def _something(self) -> "CompletionBody":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 answers nothing: it goes with echo, or let it be 1 or more")
        return self

    @property
    def wanted_tokens(self) -> int:
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def tells_prompt(self) -> bool:
        return self.echo and self.logprobs is not None

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    def text(self) -> str:
        if isinstance(self.prompt, str):
            return self.prompt
        if len(self.prompt) != 1:
            raise NotYet(f"prompt has {len(self.prompt)} texts: send one a request.", param="prompt")
        return self.prompt[0]


AnyModel = TypeVar("AnyModel", bound=BaseModel)


def parse(kind: type[AnyModel], raw: bytes) -> AnyModel:
    """Raises BadRequest naming the field."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise BadRequest(f"The body is not JSON: {exc}", code="not_json") from exc
    if not isinstance(value, dict):
        raise BadRequest(f"The body is a JSON {type(value).__name__}; it must be an object.", code="not_json")
    if b"\\u" in raw:  # JSON can carry half of a character, "\ud83d"; no text can
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as exc:
            raise BadRequest("The body has half of a surrogate pair: send valid Unicode.", code="not_json") from exc
    ours, kept = kind if issubclass(kind, Body) else Body, {}
    for name, item in value.items():
        if name in kind.model_fields:
            kept[name] = item
        elif name in ours.neutral:
            if item is not None and item not in ours.neutral[name]:
                raise NotYet(f"{name} is not built yet: leave it out.", param=name)
        elif name not in ours.ignored:
            kept[name] = item  # refused below, by name
    try:
        return kind.model_validate(kept)
    except ValidationError as exc:
        message, param = wire.validation_message([dict(e) for e in exc.errors()])
        raise BadRequest(message, param=param) from exc


@dataclass
class Answer:
    """One of the answers to a prompt, as it grows."""

    text: str = ""
    drawn: tuple[Drawn, ...] = ()
    offsets: list[int] = field(default_factory=list)  # where in the text each of `drawn` begins
    reason: str | None = None


@dataclass(frozen=True)
class AnswerShape:
    """How one endpoint's answers look; chat and completions differ in little else."""

    chat: bool
    model: str
    token_text: Callable[[int], str]
    id: str
    created: int

    @classmethod
    def new(cls, chat: bool, model: str, token_text: Callable[[int], str]) -> "AnswerShape":
        prefix = "chatcmpl" if chat else "cmpl"
        return cls(chat, model, token_text, f"{prefix}-{secrets.token_hex(12)}", int(time.time()))

    def whole(self, answers: Sequence[Answer], finishes: Sequence[Finish]) -> dict[str, Any]:
        choices = []
        for index, answer in enumerate(answers):
            content: dict[str, Any] = (
                {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
                if self.chat
                else {"text": answer.text}
            )
            logprobs = self._logprobs(answer.drawn, answer.offsets)
            choices.append({"index": index, **content, "logprobs": logprobs, "finish_reason": answer.reason})
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": usage(finishes)}

    def first(self, index: int) -> dict[str, Any] | None:
        return self._chunk(index, {"role": "assistant", "content": ""}) if self.chat else None

    def piece(self, index: int, text: str, drawn: tuple[Drawn, ...] = (), begins: int = 0) -> dict[str, Any]:
        """`begins`: how much of the answer stands before it."""
        content, offsets = {"content": text} if self.chat else text, self.offsets(drawn, text, begins)
        return self._chunk(index, content, logprobs=self._logprobs(drawn, offsets))

    def offsets(self, drawn: tuple[Drawn, ...], text: str, begins: int) -> list[int]:
        """Where each token of this piece of text begins, in characters; parts of one character begin where it does."""
        lengths = accumulate((len(self.token_text(d.token)) for d in drawn[:-1]), initial=0)
        return [begins + min(at, len(text)) for at in lengths] if drawn else []

    def last(self, finish: Finish) -> dict[str, Any]:
        return self._chunk(finish.index, {} if self.chat else "", reason=finish.reason)

    def usage_only(self, finishes: Sequence[Finish]) -> dict[str, Any]:
        return {**self._head(self._chunk_kind), "choices": [], "usage": usage(finishes)}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(
        self,
        index: int,
        content: dict[str, Any] | str,
        *,
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
    ) -> dict[str, Any]:
        name = "delta" if self.chat else "text"
        choice = {"index": index, name: content, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head(self._chunk_kind), "choices": [choice]}

    def _logprobs(self, drawn: tuple[Drawn, ...], offsets: list[int]) -> dict[str, Any] | None:
        if not drawn:
            return None
        if self.chat:
            content = []
            for d in drawn:
                top = [self._named(token, logprob) for token, logprob in d.top]
                content.append({**self._named(d.token, d.logprob), "top_logprobs": top})
            return {"content": content, "refusal": None}
        return {
            "tokens": [self.token_text(d.token) for d in drawn],
            "token_logprobs": [d.logprob for d in drawn],
            "top_logprobs": [
                None if d.logprob is None else {self.token_text(token): logprob for token, logprob in d.top}
                for d in drawn
            ],  # the first of an echoed prompt follows nothing, so nothing was likely
            "text_offset": offsets,
        }

    def _named(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def usage(finishes: Sequence[Finish]) -> dict[str, Any]:
    """The prompt was read once, however many answers it has."""
    prompt, completion = finishes[0].prompt_tokens, sum(f.completion_tokens for f in finishes)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": finishes[0].cached_tokens},
    }
