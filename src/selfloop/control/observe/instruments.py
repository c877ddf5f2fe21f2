"""Prometheus instruments. Labels are route templates, kinds and states: their number does not grow with use."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

# A time of creation beside each series would double their number.
disable_created_metrics()

REGISTRY = CollectorRegistry()

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

REQUESTS = Counter("selfloop_requests", "HTTP requests answered.", ("method", "route", "status"), registry=REGISTRY)
REQUEST_SECONDS = Histogram(
    "selfloop_request_seconds",
    "Time from a request to its whole answer; long polls are held on purpose.",
    ("method", "route"),
    buckets=_SECONDS,
    registry=REGISTRY,
)
ACCEPTED = Counter("selfloop_operations_accepted", "Operations accepted.", ("kind",), registry=REGISTRY)
FINISHED = Counter("selfloop_operations_finished", "Operations that gave a result.", ("kind",), registry=REGISTRY)
FAILED = Counter(
    "selfloop_operations_failed", "Operations that ended without a result.", ("kind", "how"), registry=REGISTRY
)
OPERATION_SECONDS = Histogram(
    "selfloop_operation_seconds",
    "Time from acceptance to outcome.",
    ("kind",),
    buckets=_SECONDS,
    registry=REGISTRY,
)
SAMPLE_REQUESTS = Counter("selfloop_samples", "Sampling requests answered.", registry=REGISTRY)
TOKENS = Counter(
    "selfloop_tokens",
    "Tokens: trained, forwarded (trained ones included), prefilled, cached (of those), sampled.",
    ("use",),
    registry=REGISTRY,
)
COMPUTE_SECONDS = Counter(
    "selfloop_compute_seconds", "Time that workers computed, by kind of work.", ("work",), registry=REGISTRY
)
PUBLISH_GAP = Histogram(
    "selfloop_publish_logprob_gap",
    "Mean absolute difference of the trainer's and the sampler's logprobs of a short text after a publish, in nats.",
    buckets=(1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.2, 0.5, 1.0, 5.0),
    registry=REGISTRY,
)
PUBLISHES_OUT_OF_BOUNDS = Counter(
    "selfloop_publishes_out_of_bounds",
    "Publishes after which the sampler's logprobs were too far from the trainer's, or not finite.",
    registry=REGISTRY,
)
LAST_QUANTITIES = (
    "train/loss_mean",
    "train/tokens_per_s",
    "train/sampler_logprob_gap",
    "optim/grad_norm",
    "optim/learning_rate",
)
LAST_VALUE = Gauge(
    "selfloop_last_value",
    "The last that a run of a base model measured; a run's own curves are at /v1/loops/runs/<run_id>/metrics.",
    ("model", "quantity"),
    registry=REGISTRY,
)
WORKER_STARTS = Counter("selfloop_worker_starts", "Worker processes that became ready.", registry=REGISTRY)
WORKER_RESTARTS = Counter("selfloop_worker_restarts", "Workers lost and replaced.", registry=REGISTRY)

QUEUED = Gauge("selfloop_queued_operations", "Operations without an outcome yet.", registry=REGISTRY)
WAITING_POLLS = Gauge("selfloop_waiting_polls", "Requests held for an operation's outcome.", registry=REGISTRY)
WORKERS = Gauge("selfloop_workers", "Workers by state.", ("state",), registry=REGISTRY)
RESIDENT = Gauge("selfloop_resident_bytes", "Resident memory.", ("process",), registry=REGISTRY)
CHECKPOINT_BYTES = Gauge("selfloop_checkpoint_bytes", "Bytes of checkpoints stored now.", registry=REGISTRY)
