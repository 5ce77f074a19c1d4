"""The tables, and the states of a job. Portable between SQLite and PostgreSQL.

Times are unix seconds on the relay's clock. Everything that a user makes carries its owner.
"""

from typing import Final, Literal, get_args

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
)

metadata = MetaData()

users = Table(
    "users",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("name", String(100), nullable=False, unique=True),
    Column("created_at", Float, nullable=False),
    Column("credit_s", Float, nullable=False, default=0.0, server_default="0"),  # of gpu time (fairness.py)
    Column("served_at", Float, nullable=False, default=0.0, server_default="0"),  # a job of theirs was claimed last
    Column("disabled_at", Float),
    Column("deleting_at", Float),  # marked: all that is theirs goes, then this row
)

keys = Table(
    "keys",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", ForeignKey("users.id"), nullable=False),
    Column("sha256", String(64), nullable=False, unique=True),  # the key itself is shown once and not kept
    Column("prefix", String(20), nullable=False),  # enough to tell keys apart
    Column("name", String(100)),  # what it is for, in its owner's words
    Column("created_at", Float, nullable=False),
    Column("last_used_at", Float),
    Column("revoked_at", Float),
)

key_rules = Table(
    "key_rules",  # what a key may do less than its user; a key without a row has no limits
    metadata,
    Column("key_id", ForeignKey("keys.id", ondelete="CASCADE"), primary_key=True),
    Column("scopes", JSON, nullable=False),
    Column("expires_at", Float),
    Column("requests_per_minute", Integer),
    Column("tokens_per_month", BigInteger),
    Column("spend_per_month", Float),
)

usage = Table(
    "usage",  # a row for each month, user and key (meter.py); no references: a key is forgotten before what it used
    metadata,
    Column("month", String(7), primary_key=True),  # 2026-11
    Column("user_id", String(40), primary_key=True),
    Column("key_id", String(40), primary_key=True),  # empty: not known
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("trained_tokens", BigInteger, nullable=False),
    Column("gpu_s", Float, nullable=False),
    Index("usage_by_user", "user_id", "month"),
)

passwords = Table(
    "passwords",  # of users who have one
    metadata,
    Column("user_id", ForeignKey("users.id", ondelete="CASCADE"), primary_key=True),
    Column("argon2", String(200), nullable=False),
    Column("changed_at", Float, nullable=False),
)

sessions = Table(
    "sessions",  # of the page: a cookie in place of a key
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("key_sha256", String(64), nullable=False),  # ends with this key, also when the admin's is replaced
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
)

audit = Table(
    "audit",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("at", Float, nullable=False),
    Column("who", String(100), nullable=False),  # a name and no reference: it outlives the user
    Column("action", String(40), nullable=False),
    Column("target", String(400), nullable=False),
    Column("address", String(64), nullable=False),
    Index("audit_by_age", "at"),
)

enrol_tokens = Table(
    "enrol_tokens",  # those that were made; the fixed one is in the settings
    metadata,
    Column("id", String(40), primary_key=True),
    Column("sha256", String(64), nullable=False, unique=True),  # the token itself is shown once and not kept
    Column("prefix", String(20), nullable=False),
    Column("name", String(100)),
    Column("reusable", Boolean, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("revoked_at", Float),
    Column("used_at", Float),
    Column("instance_sha256", String(64)),  # that used it last; a one-time token is this one's for good
)

gpus = Table(
    "gpus",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("instance_sha256", String(64), nullable=False, unique=True),
    Column("epoch", Integer, nullable=False),
    Column("signing_key", String(64), nullable=False),
    Column("process", String(64), nullable=False),
    Column("name", String(100), nullable=False),
    Column("url", String(500)),
    Column("tunnel", String(20), nullable=False),
    Column("device", JSON, nullable=False),
    Column("families", JSON, nullable=False),
    Column("free_bytes", BigInteger, nullable=False),
    Column("active_requests", Integer, nullable=False, default=0),
    Column("runtime_ends_at", Float),
    Column("draining", Boolean, nullable=False, default=False, server_default=false()),  # gets nothing new
    Column("enrolled_at", Float, nullable=False),
    Column("last_seen_at", Float, nullable=False),
    Column("enrol_token", String(40)),  # the id of the one that it came with; null: the fixed one
    Column("relay_id", String(40)),  # the process that holds the socket by which it dialled in, where there are several
)

relays = Table(
    "relays",  # processes that live, where there may be several, or workers beside (peers.py)
    metadata,
    Column("id", String(40), primary_key=True),
    Column("url", String(500)),  # where the others ask it; null: they can't
    Column("secret", String(64), nullable=False),  # what they ask is signed with
    Column("seen_at", Float, nullable=False),
    Column("since", Float, nullable=False),  # it has been seen all the while
)

folders = Table(
    "folders",  # the one data folder that belongs to this database (folder.py)
    metadata,
    Column("id", String(40), primary_key=True),
)

base_models = Table(
    "base_models",  # every base model that was ever offered: known, though perhaps no gpu has it now
    metadata,
    Column("id", String(200), primary_key=True),
    Column("family", String(20), nullable=False),
    Column("n_layers", Integer, nullable=False),
    Column("context_tokens", Integer, nullable=False),
    Column("created_at", Float, nullable=False),
)

offers = Table(
    "offers",  # which gpu has which base model
    metadata,
    Column("gpu_id", ForeignKey("gpus.id", ondelete="CASCADE"), primary_key=True),
    Column("model_id", ForeignKey("base_models.id"), primary_key=True),
    Column("loaded", Boolean, nullable=False),
    Index("offers_by_model", "model_id"),
)

files = Table(
    "files",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", ForeignKey("users.id"), nullable=False),
    Column("filename", String(200), nullable=False),
    Column("purpose", String(40), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("rows", Integer, nullable=False),
    Column("kind", String(12), nullable=False, default="text", server_default="text"),  # or pictures
    Column("captioned", Integer),  # of pictures: how many, which is all of them or none
    Column("report", JSON),  # of pictures, as found at upload: they never change
    Column("created_at", Float, nullable=False),
    Index("files_by_owner", "owner", "created_at"),
    Index("files_by_blob", "sha256"),
)

webhooks = Table(
    "webhooks",  # whom to tell when a job of their owner's ends
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", ForeignKey("users.id"), nullable=False),
    Column("name", String(100), nullable=False),
    Column("url", String(2000), nullable=False),
    Column("event_types", JSON, nullable=False),
    Column("secret", String(80), nullable=False),  # shown once, and needed for each signature
    Column("created_at", Float, nullable=False),
    Index("webhooks_by_owner", "owner"),
)

webhook_deliveries = Table(
    "webhook_deliveries",  # an outbox (outbox.py), and then the log of what came of it
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("event_id", String(40), nullable=False),
    Column("webhook_id", ForeignKey("webhooks.id", ondelete="CASCADE"), nullable=False),
    Column("job_id", String(40), nullable=False),  # no reference: it outlives the job
    Column("event_type", String(40), nullable=False),
    Column("body", Text, nullable=False),  # what is signed, to the byte
    Column("created_at", Float, nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("next_at", Float),  # null: delivered or given up
    Column("delivered_at", Float),
    Column("last_status", Integer),
    Column("last_error", String(100)),
    Index("webhook_deliveries_due", "next_at"),
    Index("webhook_deliveries_by_webhook", "webhook_id", "id"),
)

# The states of a job, and who moves it:
#
#   queued     -> leased      the dispatcher claims it for a gpu; the fence rises
#   leased     -> running     the gpu's first report
#   running    -> finalizing  the gpu's first blob of the result (from leased too, where a job is that short)
#   finalizing -> succeeded   the gpu's result (from leased and running too)
#   leased | running | finalizing -> failed     an error of the job's own, or the third lost attempt
#   leased | running | finalizing -> queued     the lease is over, the gpu came back without it, or it asks for a retry
#   queued     -> paused      its owner
#   leased | running | finalizing -> paused     its owner asked, and the gpu gave the job back, or was lost
#   paused     -> queued      its owner
#   failed     -> queued      its owner, where the training had diverged, with a lower learning rate
#   queued | paused | leased | running | finalizing -> cancelled    its owner; the fence rises
#
# A lease (gpu_id, gpu_epoch, lease_until, leased_at) exists in LEASED states and in no other.
# Checkpoints exist while it is OPEN, and for a week after its training has diverged.
#
# A batch goes the same ways, but for the diverged one, and one more: what is OPEN -> failed when its window is over. It
# is OPEN or its rows are all answered, or it ended before; once it has ended, its two files are written (files_at).
Status = Literal["queued", "leased", "running", "finalizing", "paused", "succeeded", "failed", "cancelled"]
STATUSES: Final[tuple[Status, ...]] = get_args(Status)
LEASED: Final[tuple[Status, ...]] = ("leased", "running", "finalizing")
OPEN: Final[tuple[Status, ...]] = ("queued", *LEASED, "paused")

Kind = Literal["fine-tune", "batch"]

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", ForeignKey("users.id"), nullable=False),
    Column("kind", String(12), nullable=False, default="fine-tune", server_default="fine-tune"),
    Column("status", String(20), nullable=False),
    Column("base_model", ForeignKey("base_models.id"), nullable=False),
    Column("suffix", String(64)),
    Column("layers", JSON, nullable=False),  # list of wire.LayerSpec
    Column("hyperparameters", JSON, nullable=False),  # as asked for, then as resolved by the gpu
    Column("seed", Integer, nullable=False),
    Column("training_file", String(40), nullable=False),
    Column("validation_file", String(40)),
    Column("training_blob", JSON, nullable=False),  # wire.FileRef: a job goes on when its file is deleted
    Column("validation_blob", JSON),
    Column("sample_prompts", JSON),  # list of texts
    Column("concept", JSON),  # wire.Concept, of pictures without captions
    Column("continue_from", JSON),  # wire.TunedModel: a job goes on when the model that it began at is deleted
    Column("behind", Integer, nullable=False, default=0, server_default="0"),  # its priority, negated: for the index
    Column("rate_factor", Float, nullable=False, default=1.0, server_default="1"),  # of the learning rate, once resumed
    Column("created_at", Float, nullable=False),
    Column("finished_at", Float),
    Column("estimated_finish", Float),
    Column("key_id", String(40)),  # that made it, and is charged for it
    Column("fence", Integer, nullable=False, default=0),  # counts claims; a write with an older one changes nothing
    Column("gpu_id", ForeignKey("gpus.id")),
    Column("gpu_epoch", Integer),
    Column("lease_until", Float),
    Column("leased_at", Float),  # what its owner paid for and did not use is given back
    Column("last_gpu_id", String(40)),  # where it ran last, for the record and to try another first
    Column("attempts", Integer, nullable=False, default=0),  # leases lost in a row without a new checkpoint
    Column(
        "saved_step", Integer, nullable=False, default=0, server_default="0"
    ),  # of the newest checkpoint; of a batch, the rows that are answered
    Column("lost_step", Integer, nullable=False, default=0, server_default="0"),  # saved_step when a gpu was lost last
    Column("pause_asked_at", Float),  # its owner waits for the gpu to give the job back
    Column(
        "reserved_bytes", BigInteger, nullable=False, default=0, server_default="0"
    ),  # of its owner's quota, while it is OPEN
    Column("estimated_s", Float),  # of gpu time, as the gpu saw it; of pictures, by their number until then
    Column("needed_bytes", BigInteger),  # of gpu memory, as a gpu found that has less; null: none has
    Column("result", JSON),  # wire.JobResult as received: the same one again is no conflict
    Column("error", JSON),  # code, message, param
    Column("fine_tuned_model", String(400)),
    Column("trained_tokens", BigInteger),
    Index("jobs_by_owner", "owner", "created_at"),
    Index("jobs_by_status", "status", "created_at"),
    Index("jobs_by_turn", "status", "base_model", "owner", "behind", "created_at"),
    Index("jobs_by_gpu", "gpu_id"),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("step", Integer, primary_key=True),
    Column("fence", Integer, nullable=False),
    Column("validation_loss", Float),
    Column("bytes", BigInteger, nullable=False),
    Column("manifest", JSON, nullable=False),  # wire.Checkpoint
    Column("created_at", Float, nullable=False),
)

batches = Table(
    "batches",  # what a job has more that is a batch
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("endpoint", String(40), nullable=False),
    Column("model", String(400), nullable=False),  # of all rows, as they name it
    Column("completion_window", String(10), nullable=False),  # as asked for: 24h
    Column("metadata", JSON),  # its owner's own words
    Column("total", Integer, nullable=False),  # rows
    Column("completed", Integer, nullable=False, default=0),
    Column("failed", Integer, nullable=False, default=0),
    Column("prompt_tokens", BigInteger, nullable=False, default=0),
    Column("cached_tokens", BigInteger, nullable=False, default=0),  # of those
    Column("completion_tokens", BigInteger, nullable=False, default=0),
    Column("done", JSON, nullable=False),  # which rows are answered: [[first, last], ...]
    Column("in_progress_at", Float),  # a gpu got it first
    Column("expires_at", Float, nullable=False),
    Column("expired", Boolean, nullable=False, default=False, server_default=false()),
    Column("files_at", Float),  # its files were written, after its end; null: they still have to be
    Column("output_file", String(40)),
    Column("error_file", String(40)),
    Index("batches_without_files", "files_at", "expires_at"),
)

batch_parts = Table(
    "batch_parts",  # answers as they came, until the files are written
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("sha256", String(64), primary_key=True),
    Column("fence", Integer, nullable=False),
    Column("rows", Integer, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", Float, nullable=False),
)

job_reports = Table(
    "job_reports",  # of jobs whose model is here
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("name", String(200), primary_key=True),
    Column("sha256", String(64), nullable=False),
    Column("bytes", BigInteger, nullable=False),
)

job_events = Table(
    "job_events",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("job_id", ForeignKey("jobs.id"), nullable=False),
    Column("fence", Integer, nullable=False),
    Column("seq", Integer),  # the gpu's count within its lease; null in events of our own
    Column("created_at", Float, nullable=False),
    Column("level", String(10), nullable=False),
    Column("type", String(10), nullable=False),
    Column("message", Text, nullable=False),
    Column("data", JSON, nullable=False),
    UniqueConstraint("job_id", "fence", "seq"),
    Index("job_events_by_job", "job_id", "id"),
)

models = Table(
    "models",  # tuned ones
    metadata,
    Column("id", String(400), primary_key=True),
    Column("owner", ForeignKey("users.id"), nullable=False),
    Column("base_model", ForeignKey("base_models.id"), nullable=False),
    Column("job_id", ForeignKey("jobs.id"), unique=True),  # null: imported
    Column("adapter", JSON, nullable=False),  # wire.AdapterManifest
    Column("created_at", Float, nullable=False),
    Index("models_by_owner", "owner", "created_at"),
)

blob_refs = Table(
    "blob_refs",  # what keeps a blob alive (refs.py): without a row here it goes
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("kind", String(12), primary_key=True),
    Column("holder", String(400), primary_key=True),  # the id of the row that names it
    Column("owner", ForeignKey("users.id"), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Index("blob_refs_by_holder", "kind", "holder"),
    Index("blob_refs_by_owner", "owner", "kind", "bytes"),  # all that a sum needs
)
