"""What can go wrong for a caller or a job, each with its HTTP status and a message that says what to do next.

    GpuError
    ├── BadRequest            400   the caller's input; `param` names the field
    │   ├── PromptTooLong
    │   ├── NoSuchLayer
    │   ├── NotFinite             dials turned so far that nothing can be computed
    │   ├── OtherKind             a model of text asked for a picture, or the other way round
    │   ├── NotYet            400   a part of the language that this version does not carry out
    │   ├── UnsupportedModel
    │   └── BadDataset
    ├── Unauthorized          401
    ├── NoSuchModel           404
    ├── BodyTooLarge          413
    ├── TooBusy               429
    ├── RelayUnavailable      503   an adapter has to be fetched and the relay does not answer
    ├── BadAdapter            502   an adapter's files are damaged, or made for another model
    ├── BadBlob               502   what was fetched is not what its hash promised
    ├── BadCheckpoint         502   damaged, or another job's: the one before it is used
    ├── OutOfMemory           503
    ├── ModelUnreadable       503   a drive that went away, or files that are cut
    └── Stopping              503

Rendered once, in app.py; a job's error travels in the same terms (`wire.JobError`).
"""

from collections.abc import Iterable
from typing import Any

import wire


class GpuError(Exception):
    status = 500
    type = "server_error"
    code = "internal_error"
    retry = False  # of a job: another gpu may do better

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code:
            self.code = code

    def body(self) -> dict[str, Any]:
        return wire.error_body(self.message, type=self.type, code=self.code, param=self.param)

    def for_job(self) -> wire.JobError:
        return wire.JobError(message=self.message[:4000], code=self.code, param=self.param, retry=self.retry)


class BadRequest(GpuError):
    status, type, code = 400, "invalid_request_error", "invalid_value"


class PromptTooLong(BadRequest):
    code = "context_length_exceeded"

    def __init__(self, prompt_tokens: int, context_tokens: int, *, param: str, answer: bool = True) -> None:
        left = ", and at least one must be left for the answer" if answer else ""
        super().__init__(
            f"The prompt has {prompt_tokens:,} tokens; this model's context is {context_tokens:,} tokens{left}. "
            "Shorten the prompt.",
            param=param,
        )


class NoSuchLayer(BadRequest):
    code = "no_such_layer"


class NotFinite(BadRequest):
    code = "not_finite"

    def __init__(self, missing: str = "next token", *, dialled: bool, tuned: bool = False) -> None:
        if dialled:
            advice = "turn the dials back towards 1"
        elif tuned:
            advice = "the tuned model is damaged by its training, so use its base model, or train again at a lower rate"
        else:
            advice = "start the gpu with GPU_PRECISION=fp32, for this model's numbers do not fit the precision here"
        super().__init__(
            f"The model's numbers overflowed, so there is no {missing}: {advice}.",
            param="dials" if dialled else "model",
        )


class OtherKind(BadRequest):
    code = "wrong_kind_of_model"


class NotYet(BadRequest):
    code = "not_supported_yet"


class UnsupportedModel(BadRequest):
    code = "unsupported_model"


class BadDataset(BadRequest):
    code = "invalid_training_file"


class Unauthorized(GpuError):
    status, type, code = 401, "authentication_error", "invalid_api_key"


class NoSuchModel(GpuError):
    status, type, code = 404, "invalid_request_error", "model_not_found"

    def __init__(self, model: str, existing: Iterable[str]) -> None:
        names = ", ".join(sorted(existing)) or "none"
        super().__init__(f"There is no model '{model}' here. Models: {names}.", param="model")


class BodyTooLarge(GpuError):
    status, type, code = 413, "invalid_request_error", "request_too_large"


class TooBusy(GpuError):
    status, type, code = 429, "rate_limit_error", "gpu_busy"


class RelayUnavailable(GpuError):
    status, type, code = 503, "server_error", "relay_unavailable"
    retry = True


class BadAdapter(GpuError):
    status, type, code = 502, "server_error", "bad_adapter"


class BadBlob(GpuError):
    status, type, code = 502, "server_error", "bad_blob"
    retry = True


class BadCheckpoint(GpuError):
    status, type, code = 502, "server_error", "bad_checkpoint"
    retry = True


class OutOfMemory(GpuError):
    status, type, code = 503, "server_error", "out_of_memory"
    retry = True


class ModelUnreadable(GpuError):
    status, type, code = 503, "server_error", "model_unreadable"
    retry = True


class Withheld(GpuError):
    status, type, code = 503, "server_error", "model_is_streamed"
    retry = True


class Stopping(GpuError):
    status, type, code = 503, "server_error", "gpu_stopping"
    retry = True
