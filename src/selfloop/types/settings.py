"""Every setting of the server, of its workers and of their engines: one tree of options.

A new option is one field here. The command line, the environment, the file of ``--config``, the page of options and
what a worker is started with follow from it (``docs/extending.md``).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from selfloop.types.option_values import mib
from selfloop.types.options import group, option

CONTROL_TITLE = "Data, sessions and recovery"

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16"]
BaseDtype = Literal["auto", "int8", "nf4"]
KeptAs = Literal["int8", "nf4"]
"""A form of fewer bits that base weights are kept in."""

LogFormat = Literal["text", "json"]
StableReinforce = Literal["stand-in", "refuse"]

Offered = Literal["dedicated", "both", "serverless"]
"""Kinds of capacity that a server gives. With the last a run that does not say gets serverless capacity if it can."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What an engine may take of its device. None leaves a limit to the engine, which goes by the device and by what
    the base weights leave of its memory.

    Args:
        memory_parts: engines that share the device's memory alike; no option, as it is the number of workers.
    """

    train_token_budget: int | None = option(
        None,
        "Tokens of a micro-batch, of training and of prefill.",
        minimum=1,
        unset="as many as are fast on the device and fit",
    )
    activation_bytes: int | None = option(
        None,
        "Memory that one pass of training may take for its activations, such as 2GiB; longer sequences than fit are "
        "refused.",
        name="activation-memory",
        minimum=0.001,
        unset="a quarter of what the base weights leave of the device, or of this process's limit",
    )
    forward_cache_bytes: int | None = option(
        None,
        "Memory of the forward cache: what forwards of custom losses may take until their backward; 0 computes them "
        "twice.",
        former="kept-memory",
        minimum=0,
        unset="an eighth of what the base weights leave",
    )
    memory_bytes: int | None = option(
        None,
        "What a model's worker and its fork server may take in all, such as 2.6GiB: runs that do not fit at a time "
        "take turns.",
        name="memory",
        minimum=0.001,
        unset="all of the machine, or of this process's control group",
    )
    max_kv_tokens: int | None = option(
        None, "Tokens that the KV cache holds over all requests.", minimum=1, unset="what fits well on the device"
    )
    memory_parts: int = 1
    max_adapters: int = option(32, "Adapters that a sampler keeps in memory.", minimum=1)


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How a base model is loaded and computed."""

    device: Device = option("auto", "Where to compute: auto takes a GPU if there is one.")
    dtype: Dtype = option(
        "auto", "Compute type: auto is bfloat16 where the device computes in it, or loses nothing by it."
    )
    base_dtype: BaseDtype = option(
        "auto",
        "What the frozen matrices of the base model's layers are kept in, and dequantised from for each product: auto "
        "is the compute type, int8 and nf4 take about a half and a quarter of bfloat16.",
    )
    deterministic: bool = option(False, "Training gives the same bits whatever other runs do meanwhile.")
    num_threads: int | None = option(None, "CPU threads of a worker's computations.", minimum=1, unset="every core")
    limits: EngineLimits = group(EngineLimits, "engine", "Engine")


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """How the worker of a base model runs. A worker is started with this very struct; it holds no secret."""

    training_share: float = option(
        0.5,
        "Part of a device's time that training gets while there is sampling to do, too.",
        minimum=0.01,
        maximum=0.99,
    )
    operation_timeout_s: float = option(
        3600.0, "Seconds after which a worker that is still at one operation is replaced.", minimum=1
    )
    heartbeat_timeout_s: float = option(
        60.0, "Seconds without a heartbeat after which a worker is replaced.", minimum=1
    )
    launcher: str = option(
        "local", "Where workers run: local is this machine; package.module:Launcher is a launcher of your own."
    )
    keep_loaded_s: float = option(
        60.0,
        "Seconds that base models stay in memory when this server dies, for the one started after it.",
        minimum=0,
    )
    engine: EngineSettings = group(EngineSettings, "engine", "Engine")


@dataclass(frozen=True, slots=True)
class QueueSettings:
    """How each run's queue of operations is worked off.

    Args:
        gap_grace_s: how long a missing sequence number is waited for; no option, for tests and measurements.
    """

    snapshot_every_s: float = option(
        1.0, "Seconds of a run's work between two snapshots of it; a recovery repeats so much.", minimum=0
    )
    gap_grace_s: float = 60.0


@dataclass(frozen=True, slots=True)
class CapacitySettings:
    """Which kinds of capacity runs and samplers may have, and which they get if they do not say."""

    offered: Offered = option(
        "dedicated",
        "Kinds of capacity for runs and samplers: dedicated; both (serverless, by their scope); serverless (the "
        "default of those that can have it). Serverless has no ids, and its samples are queued.",
        name="capacity",
    )
    max_rank: int | None = option(
        None, "Largest LoRA rank on serverless capacity.", name="serverless-max-rank", minimum=1, unset="any"
    )
    max_seq_len: int | None = option(
        None,
        "Longest sequences there, in tokens.",
        name="serverless-max-seq-len",
        minimum=1,
        unset="the model's own",
    )

    @property
    def offers_serverless(self) -> bool:
        return self.offered != "dedicated"


@dataclass(frozen=True, slots=True)
class Prices:
    """In US dollars: of a million tokens, whatever they were for, and of a gigabyte (10^9 bytes) kept for 720 hours."""

    usd_per_million_tokens: float = option(
        0.0, "Price of tokens in the usage reports of Tinker's client; nobody is charged.", minimum=0
    )
    usd_per_gigabyte_month: float = option(0.0, "The same of stored checkpoints.", minimum=0)


@dataclass(frozen=True, slots=True)
class ControlSettings:
    """What happens behind the routes: where things are kept, and how long is waited for what."""

    database_url: str | None = option(
        None,
        "Keep the rows in PostgreSQL: postgresql://user@host/db.",
        secret=True,
        unset="a file in the data directory",
    )
    store: str | None = option(
        None,
        "Keep checkpoints in an S3-compatible bucket: s3://bucket/prefix.",
        unset="folders in the data directory",
    )
    prepare: bool = option(True, "Prepare the embedded model at start, once.")
    session_timeout_s: float = option(
        600.0, "Seconds that a Tinker session lives without a heartbeat of its client.", minimum=1
    )
    num_workers: int = option(
        1,
        "Worker groups of each base model, each with its part of the cores and of the memory: a run lives in the one "
        "with the fewest.",
        name="workers",
        minimum=1,
    )
    stop_grace_s: float = option(25.0, "Seconds after SIGTERM to finish and store the work in progress.", minimum=1)
    queue: QueueSettings = group(QueueSettings, "control", CONTROL_TITLE)
    capacity: CapacitySettings = group(CapacitySettings, "serverless", "Serverless capacity")
    prices: Prices = group(Prices, "prices", "Prices in usage reports")
    worker: WorkerSettings = group(WorkerSettings, "worker", "Workers")

    @property
    def requests_grace_s(self) -> float:
        """Of the time to stop in, what requests in flight may take; long polls are sent home at once."""
        return min(5.0, self.stop_grace_s / 5)

    @property
    def work_grace_s(self) -> float:
        """Of the time to stop in, what running operations, their snapshots and the workers' end may take."""
        return self.stop_grace_s - self.requests_grace_s


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """How much each key may ask for; 0 is any amount."""

    requests_per_s: float = option(
        0.0,
        "Requests a second of each key, long polls apart; faster ones wait. 0: any.",
        name="key-requests-per-second",
        minimum=0,
    )
    body_bytes_per_s: float = option(
        0.0,
        "MiB a second that each key may send in bodies; more has to wait. 0: any.",
        name="key-mib-per-second",
        kind=mib(),
        minimum=0,
    )
    open_requests: int = option(
        0, "Requests, polls and streams of each key at a time. 0: any.", name="key-open-requests", minimum=0
    )


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of ``selfloop serve``."""

    host: str = option("127.0.0.1", "Address to listen on.")
    # Not SELFLOOP_PORT: Kubernetes sets that, to something else, where a service is called selfloop.
    port: int = option(8000, "Port to listen on.", minimum=1, maximum=65535, env="SELFLOOP_HTTP_PORT")
    data_dir: Path = option(Path("~/.selfloop"), "The data directory, which holds everything.")
    api_key: str | None = option(
        None,
        "A key that the server accepts, for the default team; added at start if it is new.",
        secret=True,
        flag=False,
        unset="one is made for a new data directory",
    )
    public_url: str | None = option(
        None, "Base of the URLs in answers, behind a proxy that hides it.", unset="the address that the client used"
    )
    tls_cert: Path | None = option(None, "PEM file of a certificate chain: serve HTTPS.")
    tls_key: Path | None = option(None, "PEM file of its private key.")
    log_format: LogFormat = option("text", "Of standard error; the files in the data directory are always JSON lines.")
    metrics_public: bool = option(False, "Let /metrics be read without a key.")
    body_memory_bytes: int | None = option(
        None,
        "Memory that the bodies of all requests may take at a time while they are read, decoded and stored; further "
        "requests get Retry-After.",
        name="body-memory",
        minimum=0.2,
        unset="an eighth of the machine's memory, and half a GiB at least",
    )
    serve_weights: bool = option(False, "Let /hf serve weight files too.")
    hub_url: str | None = option(
        None,
        "The hub to which /hf forwards what is not served here, so that data sets load; off: none.",
        unset="https://huggingface.co unless $HF_HUB_OFFLINE is set",
    )
    stable_reinforce: StableReinforce = option(
        "stand-in", "Tinker's unpublished loss of that name: compute a stand-in, or refuse it."
    )
    key_limits: KeyLimits = group(KeyLimits, "keys", "Limits of each key")
    control: ControlSettings = group(ControlSettings, "control", CONTROL_TITLE)
