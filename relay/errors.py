"""Everything that can go wrong for a caller. Rendered once, in app.py, in the OpenAI shape.

RelayError
├── InvalidRequest        400  the caller's mistake; `param` names the field
│   ├── InvalidTrainingFile    with line numbers
│   ├── InvalidBatchFile       likewise
│   └── BadGpuUrl              a gpu enrolled with a URL that we will not call
├── InvalidKey            401  a user without a valid API key
├── InvalidEnrolToken     401  a gpu without the enrol token
├── BadSignature          401  a gpu's request that is not signed as it must be
├── UnknownGpu            401  a gpu or epoch that we do not know: enrol again
├── Forbidden             403  signed in, and still not allowed
│   └── MissingScope           the key is not for this
├── NotFound              404  no such thing, or it belongs to somebody else
│   └── ModelNotFound          names those that exist
├── LeaseLost             409  a gpu wrote about a job that is not its any more: stop
├── JobOver               409  a job that has ended can't be cancelled
├── TooLarge              413  a body over its limit
│   ├── QuotaExceeded          it fits, but not beside what this user has stored
│   └── OverReservation        a gpu sends more of a job than was set aside for it
├── TooMany               429  more at once than one user may have
│   ├── RateLimited            more a minute than this key may have
│   └── LimitSpent             more a month than this key may use or spend
├── NewerDatabase         500  at the start only: a later version of the relay has been here
├── WrongFolder           500  at the start only: the data folder is that of another database
├── DiskFull              507  no room for what was sent
└── Unavailable           503  try again later
    ├── NoGpu                  nothing runs that could answer
    ├── GpuUnreachable         it runs, or did, but its tunnel does not answer
    ├── Stopping               this process is being restarted
    ├── DatabaseBusy           another process, such as the command line, has been writing for long
    ├── DatabaseAway           its server can't be reached
    ├── StorageUnavailable     the bucket of the blobs can't be reached, or refuses
    └── NotReady               /readyz: the database, the disk, the bucket, or a restart
"""

import math
from collections.abc import Mapping

import wire

RETRY_AFTER_S = 10


class RelayError(Exception):
    status = 500
    type = "server_error"
    code = "internal_error"
    # The official client retries 409 and 503 by itself, up to three times, unless told that it is no use.
    headers: Mapping[str, str] = {}

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.code

    def body(self) -> dict[str, object]:
        return wire.error_body(self.message, type=self.type, code=self.code, param=self.param)


class InvalidRequest(RelayError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class InvalidTrainingFile(InvalidRequest):
    code = "invalid_training_file"


class WrongKindOfFile(InvalidRequest):
    code = "wrong_kind_of_file"


class InvalidBatchFile(InvalidRequest):
    code = "invalid_batch_file"


class BadGpuUrl(InvalidRequest):
    code = "bad_gpu_url"


class InvalidKey(RelayError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"
    headers = {"www-authenticate": "Bearer"}  # noqa: RUF012  never changed


class InvalidEnrolToken(InvalidKey):
    code = "invalid_enrol_token"


class BadSignature(RelayError):
    status = 401
    type = "invalid_request_error"
    code = "bad_signature"


class UnknownGpu(RelayError):
    status = 401
    type = "invalid_request_error"
    code = "unknown_gpu"


class Forbidden(RelayError):
    status = 403
    type = "invalid_request_error"
    code = "forbidden"


class MissingScope(Forbidden):
    code = "missing_scope"


class NotFound(RelayError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class LeaseLost(RelayError):
    status = 409
    type = "invalid_request_error"
    code = "lease_lost"
    headers = {"x-should-retry": "false"}  # noqa: RUF012


class JobOver(LeaseLost):
    code = "job_is_over"


class TooLarge(RelayError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class QuotaExceeded(TooLarge):
    code = "quota_exceeded"


class OverReservation(TooLarge):
    code = "over_reservation"


class TooMany(RelayError):
    status = 429
    type = "rate_limit_error"
    code = "too_many"
    headers: Mapping[str, str] = {"retry-after": str(RETRY_AFTER_S)}


class RateLimited(TooMany):
    code = "rate_limit_exceeded"

    def __init__(self, message: str, headers: Mapping[str, str]) -> None:
        super().__init__(message)
        self.headers = headers


class LimitSpent(TooMany):
    type = "insufficient_quota"
    code = "insufficient_quota"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.headers = {"retry-after": str(math.ceil(retry_after_s)), "x-should-retry": "false"}


class DiskFull(RelayError):
    status = 507
    type = "server_error"
    code = "disk_full"
    headers = {"x-should-retry": "false"}  # noqa: RUF012


class Unavailable(RelayError):
    status = 503
    type = "server_error"
    code = "unavailable"
    headers = {"retry-after": str(RETRY_AFTER_S), "x-should-retry": "false"}  # noqa: RUF012


class NoGpu(Unavailable):
    code = "no_gpu"


class GpuUnreachable(Unavailable):
    code = "gpu_unreachable"


class Stopping(Unavailable):
    code = "relay_stopping"


class DatabaseBusy(Unavailable):
    code = "database_busy"


class DatabaseAway(Unavailable):
    code = "database_unavailable"


class StorageUnavailable(Unavailable):
    code = "storage_unavailable"


class NotReady(Unavailable):
    code = "not_ready"


class NewerDatabase(RelayError):
    """Met by whoever starts the relay, never by a caller."""


class WrongFolder(RelayError):
    """Met by whoever starts the relay, never by a caller."""
