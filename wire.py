"""Every message between relay and gpu, and how each is signed. Pydantic and the standard library only.

Knows nothing of HTTP servers, databases or torch. Unknown fields are refused: both ends are ours.
"""

import hashlib
import hmac
import json
import re
import secrets
from collections import OrderedDict
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

PROTOCOL = 3  # raised when a message changes in a way that an older peer can't read

SIGNATURE_WINDOW_S = 60.0  # a signed request is good this long, on the relay's clock
SHA256_PATTERN = r"^[0-9a-f]{64}$"
EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()

# What the database can hold; a larger number is refused as any other wrong field.
MAX_COUNT = 2**31 - 1  # INTEGER
MAX_BYTES = 2**53  # within BIGINT, and exact in JSON of any language

MAX_CHUNK_BYTES = 8 * 2**20  # of a checkpoint: what is sent again when a connection breaks
MAX_SAMPLE_PROMPTS = 8
MAX_SAMPLE_CHARS = 2000  # of one sample prompt
REPORT_JSON, REPORT_HTML = "report.json", "report.html"  # of a job that has succeeded

Sha256 = Annotated[str, Field(pattern=SHA256_PATTERN)]
Fence = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Bytes = Annotated[int, Field(ge=0, le=MAX_BYTES)]
Auto = Literal["auto"]
Family = Literal["llama", "gpt2", "sd"]
Quantize = Literal["none", "8bit", "4bit"]

DIALLED = "relay"  # the kind of tunnel of a gpu that opens a WebSocket to its relay: GET /gpu/dial, signed


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# --- what to train ---------------------------------------------------------------------------------------------------

LAYERS_PATTERN = r"(all|(first|last):\d+|\d+(-\d+)?|[a-z_]+(\.\d+(-\d+)?)?)"


class LayerSpec(Message):
    """Which tensors a job trains, and how. Layers count from 0; ranges are inclusive at both ends."""

    method: Literal["full", "lora", "dora"] = "lora"
    quantize: Quantize = "none"  # of the frozen base weights
    parts: list[str] = Field(default=["attn", "mlp"], min_length=1, max_length=32)
    layers: str = Field(default="all", max_length=500)  # all | first:4 | last:8 | 8-15,31 | block names
    match: str | None = Field(default=None, max_length=500)  # regular expression on tensor names; narrows
    component: str | None = None  # unet | text_encoder, where a model has more than one
    rank: int = Field(default=16, ge=1, le=1024)  # lora, dora
    alpha: float | None = Field(default=None, gt=0, le=65536)  # lora, dora; None: twice the rank
    rslora: bool = False  # lora, dora: scaled by alpha / sqrt(rank), not alpha / rank. https://arxiv.org/abs/2312.03732

    @field_validator("layers")
    @classmethod
    def _grammar(cls, text: str) -> str:
        for item in text.split(","):
            if not re.fullmatch(LAYERS_PATTERN, item.strip()):
                raise ValueError(f"'{item}' is no layer range: use all, first:4, last:8, 3, 8-15 or a block name")
        return text

    @field_validator("match")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except (re.error, OverflowError, RecursionError) as exc:
            raise ValueError(f"'{pattern}' is no regular expression: {exc}") from exc
        return pattern


class Hyperparameters(Message):
    """As in the OpenAI API, and more of our own. "auto" is resolved by the gpu, which reports what it chose."""

    n_epochs: Annotated[int, Field(ge=1, le=100)] | Auto = "auto"
    batch_size: Annotated[int, Field(ge=1, le=256)] | Auto = "auto"  # rows an optimizer step sees
    learning_rate_multiplier: Annotated[float, Field(gt=0, le=1000)] | Auto = "auto"
    learning_rate: Annotated[float, Field(gt=0, le=10)] | Auto = "auto"  # before the multiplier
    max_length_tokens: Annotated[int, Field(ge=8, le=MAX_COUNT)] | Auto = "auto"  # longer rows are cut, and counted
    micro_batch_rows: Annotated[int, Field(ge=1, le=256)] | Auto = "auto"  # rows of one slice of training
    schedule: Literal["linear", "cosine", "constant"] | Auto = "auto"  # of the learning rate, after the warm-up
    warmup_ratio: Annotated[float, Field(ge=0, le=0.5)] | Auto = "auto"  # of all steps
    optimizer: Literal["adamw", "adamw_8bit"] | Auto = "auto"
    weight_decay: Annotated[float, Field(ge=0, le=1)] | Auto = "auto"  # of matrices; norms and biases never decay
    max_gradient_norm: Annotated[float, Field(ge=0, le=1e6)] | Auto = "auto"  # 0: gradients are not clipped
    activation_checkpointing: bool | Auto = "auto"  # less memory, a third more time, the same result
    packing: bool | Auto = "auto"  # rows of a slice stand in one sequence, unseen by each other, without padding
    early_stop_patience: Annotated[int, Field(ge=0, le=100)] | Auto = "auto"  # validations in vain; 0: never
    prefix_cache: bool | Auto = "auto"  # the frozen layers' output is computed once and kept on disk
    stream_layers: bool | Auto = "auto"  # the frozen layers are read one at a time, and never all in memory
    train_on: Literal["completions", "all"] | Auto = "auto"  # which tokens are labels
    samples_every_steps: Annotated[int, Field(ge=1, le=MAX_COUNT)] | Auto = "auto"  # answers to the sample prompts
    # Of models that make pictures:
    resolution: Annotated[int, Field(ge=8, le=4096)] | Auto = "auto"  # pixels of a side; pictures are fitted to it
    min_snr_gamma: Annotated[float, Field(ge=0, le=1000)] | Auto = "auto"  # 0: every time weighs the same
    caption_dropout: Annotated[float, Field(ge=0, le=0.9)] | Auto = "auto"  # share of steps that see no caption


# Those that only one kind of model has; of the others they stay "auto".
OF_TEXT = frozenset({"activation_checkpointing", "max_length_tokens", "packing", "prefix_cache", "stream_layers"})
OF_TEXT |= {"train_on"}
OF_PICTURES = frozenset({"resolution", "min_snr_gamma", "caption_dropout"})

SamplePrompt = Annotated[str, StringConstraints(min_length=1, max_length=MAX_SAMPLE_CHARS)]


class FileRef(Message):
    """A blob, by content."""

    name: str = Field(min_length=1, max_length=200)
    sha256: Sha256
    bytes: Bytes


class ChunkRef(Message):
    """A piece of a checkpoint's file, a blob of its own."""

    sha256: Sha256
    bytes: Annotated[int, Field(ge=1, le=MAX_CHUNK_BYTES)]


class ChunkedFile(Message):
    """A file as its chunks in order. `sha256` and `bytes` are of the whole."""

    name: str = Field(min_length=1, max_length=200)
    sha256: Sha256
    bytes: Bytes
    chunks: list[ChunkRef] = Field(max_length=65_536)


class Checkpoint(Message):
    """What a job needs to go on elsewhere, as after `step` optimizer steps. It exists once the relay has it."""

    step: int = Field(ge=0, le=MAX_COUNT)
    total_steps: int = Field(ge=1, le=MAX_COUNT)
    validation_loss: float | None = Field(default=None, allow_inf_nan=False)  # the last one: the least is the best
    made_on: str = Field(max_length=100)  # device kind and precision: elsewhere the same ones resume bit for bit
    files: list[ChunkedFile] = Field(min_length=1, max_length=16)


class AdapterManifest(Message):
    """What a fine-tune produced: the trained tensors and the JSON that says what they are."""

    base_model: str
    base_revision: str
    files: list[FileRef] = Field(min_length=1, max_length=16)


class TunedModel(Message):
    """Reply of GET /gpu/models/{id}: what to fetch in order to serve a tuned model."""

    id: str
    adapter: AdapterManifest


class Concept(Message):
    """What a few pictures without captions show: DreamBooth, https://arxiv.org/abs/2208.12242."""

    prompt: str = Field(min_length=1, max_length=MAX_SAMPLE_CHARS)  # of each of them: "a photo of sks dog"
    class_prompt: str | None = Field(default=None, min_length=1, max_length=MAX_SAMPLE_CHARS)  # "a photo of a dog"
    class_pictures: int = Field(default=24, ge=1, le=500)  # that the model makes of it first, and keeps knowing
    prior_weight: float = Field(default=1.0, ge=0, le=100)  # of those in the loss

    @property
    def n_of_class(self) -> int:
        return self.class_pictures if self.class_prompt else 0


class JobSpec(Message):
    """Everything that a gpu needs to run one fine-tune."""

    job_id: str
    base_model: str
    layers: list[LayerSpec] = Field(min_length=1, max_length=16)
    hyperparameters: Hyperparameters
    seed: int = Field(ge=0, lt=2**31)
    training_file: FileRef
    validation_file: FileRef | None = None
    sample_prompts: list[SamplePrompt] = Field(default=[], max_length=MAX_SAMPLE_PROMPTS)
    concept: Concept | None = None  # of models that make pictures, where the training file has no captions
    continue_from: TunedModel | None = None  # trained further, with the same base model beneath
    rate_factor: float = Field(default=1.0, gt=0, le=1)  # of the learning rate: the training diverged and goes on
    checkpoints: list[Checkpoint] = Field(default=[], max_length=8)  # newest first: if one is damaged, the next


# --- batches ---------------------------------------------------------------------------------------------------------

BatchEndpoint = Literal["/v1/chat/completions", "/v1/completions"]
MAX_BATCH_ROWS = 50_000


class RowSpan(Message):
    """Rows of a batch's file, which count from 0; both ends belong to it."""

    first: int = Field(ge=0, lt=MAX_BATCH_ROWS)
    last: int = Field(ge=0, lt=MAX_BATCH_ROWS)


class BatchSpec(Message):
    """Everything that a gpu needs to answer the rows of a batch that nobody has answered yet."""

    job_id: str
    base_model: str
    endpoint: BatchEndpoint
    input_file: FileRef
    total: int = Field(ge=1, le=MAX_BATCH_ROWS)
    tuned: TunedModel | None = None  # the model of all rows, where that is not the base model
    done: list[RowSpan] = Field(default=[], max_length=MAX_BATCH_ROWS)
    is_last_try: bool = False  # leases before this one ended without an answer: now rows take what they get


class RowAnswer(Message):
    """What came of one row: a line of a part. A part is a blob, sent as a chunk, of rows that nobody had answered."""

    row: int = Field(ge=0, lt=MAX_BATCH_ROWS)
    status_code: int = Field(ge=100, le=599)
    request_id: str = Field(max_length=100)
    body: dict[str, Any]  # as of the live endpoint, an error included


# --- enrolment and heartbeat -----------------------------------------------------------------------------------------


class Device(Message):
    kind: Literal["cpu", "cuda", "mps"]
    name: str = Field(max_length=200)
    memory_bytes: Bytes
    free_bytes: Bytes
    precision: str = Field(max_length=20)
    precision_why: str = Field(max_length=200)


class OfferedModel(Message):
    """A base model that this gpu can serve and train without asking anyone."""

    id: str = Field(min_length=1, max_length=200)
    family: Family
    n_layers: int = Field(ge=1, le=MAX_COUNT)
    context_tokens: int = Field(ge=1, le=MAX_COUNT)
    loaded: bool


class HeldLease(Message):
    job_id: str
    fence: Fence


class EnrolRequest(Message):
    """POST /gpu/enrol, with the enrol token as bearer. Said again whenever the URL changes or the relay forgot us."""

    protocol: int = PROTOCOL
    instance: str = Field(min_length=32, max_length=128)  # secret of this data folder: who re-enrols is the same gpu
    process: str = Field(min_length=8, max_length=64)  # new at every start: a new process holds none of the old leases
    name: str = Field(min_length=1, max_length=100)
    url: str | None = Field(default=None, max_length=500)  # None: alive but not reachable
    tunnel: str = Field(max_length=20)
    device: Device
    families: list[Family]
    models: list[OfferedModel] = Field(max_length=200)
    leases: list[HeldLease] = Field(default=[], max_length=100)
    runtime_ends_at: float | None = None  # unix time, where the provider says


class EnrolReply(Message):
    gpu_id: str
    epoch: int
    signing_key: str
    relay_time: float
    heartbeat_s: float  # the relay holds a heartbeat back this long when it has nothing to say
    lease_s: float


class Challenge(Message):
    """POST /challenge on the gpu, through the tunnel. The relay signs the request as any other."""

    nonce: str = Field(min_length=16, max_length=128)


class ChallengeReply(Message):
    proof: str


class Heartbeat(Message):
    free_bytes: Bytes
    models: list[OfferedModel] = Field(max_length=200)
    leases: list[HeldLease] = Field(max_length=100)
    active_requests: int = Field(ge=0, le=MAX_COUNT)
    draining: bool = False  # as it was told


class GrantLease(Message):
    kind: Literal["grant"] = "grant"
    fence: int
    job: JobSpec


class GrantBatch(Message):
    kind: Literal["batch"] = "batch"
    fence: int
    job: BatchSpec


class CancelLease(Message):
    """Stop work on this lease: cancelled by its owner, or given to another gpu."""

    kind: Literal["cancel"] = "cancel"
    job_id: str
    fence: int


class PauseLease(Message):
    """Store a checkpoint, then release the lease as "paused"."""

    kind: Literal["pause"] = "pause"
    job_id: str
    fence: int


class Drain(Message):
    """Take no more live requests, end those that run, checkpoint and release the leases as "drained"."""

    kind: Literal["drain"] = "drain"


class Undrain(Message):
    """Take live requests again."""

    kind: Literal["undrain"] = "undrain"


class LoadModel(Message):
    """Have this base model in memory: somebody waits for it."""

    kind: Literal["load"] = "load"
    model: str


Command = Annotated[
    GrantLease | GrantBatch | CancelLease | PauseLease | Drain | Undrain | LoadModel, Field(discriminator="kind")
]


class HeartbeatReply(Message):
    """Commands are derived from the database each time, so a lost reply loses nothing; carry each out at most once."""

    relay_time: float
    reachable: bool
    commands: list[Command]


class Goodbye(Message):
    """POST /gpu/goodbye: this gpu stops. Its leases are queued again at once, which costs them no attempt."""

    reason: str = Field(max_length=200)


# --- a job's life ----------------------------------------------------------------------------------------------------


class JobEvent(Message):
    seq: int = Field(ge=0, le=MAX_COUNT)  # counts from 0 within one lease: a batch sent twice is stored once
    at: float  # unix time, on the relay's clock as the gpu knows it
    type: Literal["message", "metrics"] = "message"
    level: Literal["info", "warn", "error"] = "info"
    message: str = Field(max_length=2000)
    data: dict[str, Any] = {}


class JobEvents(Message):
    """POST /gpu/jobs/{id}/events. Renews the lease, even when empty. 409: the lease is lost, stop."""

    fence: Fence
    events: list[JobEvent] = Field(max_length=1000)


class Reservation(Message):
    """POST /gpu/jobs/{id}/reserve, before the first step: the most that the job will store, and how long it takes.

    The relay sets that much of the owner's quota and of its disk aside, or refuses at once.
    """

    fence: Fence
    checkpoint_bytes: Bytes
    result_bytes: Bytes
    estimated_s: float = Field(ge=0, le=1e9, allow_inf_nan=False)  # of the whole job, on this gpu


class CheckpointStored(Message):
    """POST /gpu/jobs/{id}/checkpoints, once all of its chunks are stored: from here on it exists."""

    fence: Fence
    checkpoint: Checkpoint


class PartStored(Message):
    """POST /gpu/jobs/{id}/parts, once its blob is stored: from here on its rows are answered, and never again."""

    fence: Fence
    sha256: Sha256
    bytes: Annotated[int, Field(ge=1, le=MAX_CHUNK_BYTES)]


class PartReply(Message):
    done: int  # rows that are answered now
    total: int


class Release(Message):
    """POST /gpu/jobs/{id}/release: the lease is given back on purpose, after a checkpoint where one could be made.

    "paused" pauses the job, the others queue it again; none costs an attempt.
    """

    fence: Fence
    reason: Literal["paused", "drained", "leaving"]


class JobError(Message):
    """In the terms of the public error shape. `retry`: another gpu may do better.

    `needed_bytes`: one with as much memory may, and this one can't; that costs the job no attempt.
    """

    message: str = Field(max_length=4000)
    code: str = Field(max_length=100)
    param: str | None = None
    retry: bool = False
    needed_bytes: Bytes | None = None


class JobResult(Message):
    """POST /gpu/jobs/{id}/finish, once the adapter's blobs are stored. Exactly one of `adapter` and `error`.

    Of a batch neither: all of its rows are answered. An error of it is the batch's own, not a row's.
    """

    fence: Fence
    adapter: AdapterManifest | None = None
    error: JobError | None = None
    trained_tokens: int = Field(default=0, ge=0, le=MAX_BYTES)
    hyperparameters: Hyperparameters | None = None  # as resolved: "auto" only where it is of another kind of model
    reports: list[FileRef] = Field(default=[], max_length=4)  # REPORT_JSON and REPORT_HTML, blobs like the adapter's

    @field_validator("reports")
    @classmethod
    def _each_once(cls, reports: list[FileRef]) -> list[FileRef]:
        names = [report.name for report in reports]
        if len(set(names)) < len(names) or not set(names) <= {REPORT_JSON, REPORT_HTML}:
            raise ValueError(f"give {REPORT_JSON} and {REPORT_HTML}, each once at most")
        return reports


# --- errors, in the OpenAI shape -------------------------------------------------------------------------------------


def error_body(message: str, *, type: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The one error shape. https://platform.openai.com/docs/guides/error-codes"""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def validation_message(errors: list[dict[str, Any]]) -> tuple[str, str | None]:
    """Pydantic's errors as one sentence that names each field, and the first field as `param`."""
    parts = []
    for error in errors[:5]:
        # Names of union members stand in the location too; they mean nothing to a caller.
        path = ".".join(str(p) for p in error["loc"] if isinstance(p, int) or not re.search(r"[\[\]()-]|Spec$", p))
        parts.append(f"{path or 'body'}: {error['msg'].removeprefix('Value error, ')}")
    first = errors[0]["loc"] if errors else ()
    return "; ".join(parts), (str(first[0]) if first else None)


# --- signatures ------------------------------------------------------------------------------------------------------

HEADER_GPU = "x-imfine-gpu"
HEADER_EPOCH = "x-imfine-epoch"
HEADER_TIME = "x-imfine-time"
HEADER_NONCE = "x-imfine-nonce"
HEADER_BODY = "x-imfine-body-sha256"
HEADER_SIGNATURE = "x-imfine-signature"
HEADER_USAGE = "x-imfine-usage"  # of a whole answer: "prompt_tokens,completion_tokens"; not passed on
USAGE_COMMENT = b": usage "  # of a stream: a comment with the same two, at its begin and at its end; not passed on
HEADER_CALLER = "x-imfine-caller"  # not signed: whom the relay speaks for, opaque; the gpu is fair between callers


class BadSignature(Exception):
    """The message says which check failed; it is meant for a log, and tells a forger nothing that helps."""


class SeenNonces:
    """Nonces of the last window, so that a signed request works once. Not shared between processes."""

    def __init__(self, window_s: float = SIGNATURE_WINDOW_S) -> None:
        self._window_s = window_s
        self._expiry: OrderedDict[str, float] = OrderedDict()  # in order of expiry; a dict's first is slow to find

    def add(self, nonce: str, now: float) -> bool:
        """False if it was seen within the window."""
        while self._expiry and self._expiry[oldest := next(iter(self._expiry))] < now:
            del self._expiry[oldest]
        if nonce in self._expiry:
            return False
        self._expiry[nonce] = now + 2 * self._window_s  # a clock may be a window ahead
        return True


def body_sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


class SignedBy(Message):
    """Who signed; the key is looked up by these two."""

    gpu_id: str
    epoch: int = Field(ge=0, le=MAX_COUNT)

    @classmethod
    def claimed(cls, headers: Mapping[str, str]) -> Self:
        try:
            return cls(gpu_id=headers[HEADER_GPU], epoch=int(headers[HEADER_EPOCH]))
        except (KeyError, ValueError) as exc:  # ValidationError is a ValueError
            raise BadSignature("the request is not signed") from exc


def _mac(key: str, *fields: str) -> str:
    # JSON keeps the fields apart: no two different requests have the same text to sign.
    return hmac.digest(key.encode(), json.dumps(fields).encode(), "sha256").hex()


def sign(key: str, by: SignedBy, method: str, target: str, sha256: str, now: float) -> dict[str, str]:
    """Headers for a request. `target` is the path with its query, as sent; `now` is the relay's time."""
    nonce, time_text = secrets.token_hex(16), f"{now:.3f}"
    mac = _mac(key, method, target, sha256, time_text, nonce, by.gpu_id, str(by.epoch))
    return {
        HEADER_GPU: by.gpu_id,
        HEADER_EPOCH: str(by.epoch),
        HEADER_TIME: time_text,
        HEADER_NONCE: nonce,
        HEADER_BODY: sha256,
        HEADER_SIGNATURE: mac,
    }


def verify(
    key: str, by: SignedBy, method: str, target: str, headers: Mapping[str, str], now: float, seen: SeenNonces
) -> str:
    """Check all but the body, and return the body's promised SHA-256, which the caller must compare while reading.

    Raises BadSignature. The nonce is remembered only after the signature holds, so a forger can't fill the memory.
    """
    try:
        time_text, nonce, sha256 = headers[HEADER_TIME], headers[HEADER_NONCE], headers[HEADER_BODY]
        signature, sent_at = headers[HEADER_SIGNATURE], float(time_text)
    except (KeyError, ValueError) as exc:
        raise BadSignature("the request is not signed") from exc
    mac = _mac(key, method, target, sha256, time_text, nonce, by.gpu_id, str(by.epoch))
    if not hmac.compare_digest(mac.encode(), signature.encode()):
        raise BadSignature("the signature does not fit the request")
    if not abs(now - sent_at) <= SIGNATURE_WINDOW_S:
        raise BadSignature(f"the request is {now - sent_at:.0f} s old by the relay's clock")
    if not seen.add(nonce, now):
        raise BadSignature("the request was sent before")
    return sha256


def challenge_proof(key: str, nonce: str, by: SignedBy) -> str:
    """What only the gpu that was enrolled can answer to the relay's nonce."""
    return _mac(key, "challenge", nonce, by.gpu_id, str(by.epoch))
