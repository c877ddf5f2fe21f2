"""One settings object for the gateway, made at the edge from flags and environment."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from selfloop.control.capacity.placement import Capacity
from selfloop.control.gateway import ControlConfig
from selfloop.control.observe.billing import Prices
from selfloop.control.queue.scheduler import SchedulerConfig
from selfloop.server.middleware.key_limits import Limits
from selfloop.server.telemetry import LogFormat

StableReinforce = Literal["stand-in", "refuse"]


def default_data_dir() -> Path:
    return Path(os.environ.get("SELFLOOP_DATA_DIR", "~/.selfloop")).expanduser()


def given_database_url() -> str | None:
    """For commands without an option of their own."""
    return os.environ.get("SELFLOOP_DATABASE_URL") or None


def given_store() -> str | None:
    """Likewise."""
    return os.environ.get("SELFLOOP_STORE") or None


@dataclass(frozen=True, slots=True)
class Settings:
    """What ``selfloop serve`` was told.

    Args:
        public_url: base of the URLs in answers, when a proxy hides the address that clients use.
        capacity: which kinds runs and samplers may have, and which they get if they do not say.
        prepare: whether to prepare the embedded model at start, if its package is installed.
        serve_weights: whether ``/hf`` also gives out weight files.
        hub_url: the hub that ``/hf`` hands on to what is not served here; None for none.
        log_format: of standard error; the file in the data directory is always JSON lines.
        metrics_public: whether ``/metrics`` needs no key.
        usd_per_million_tokens: price that Tinker's usage reports are made at; nobody is charged.
        usd_per_gigabyte_month: the same of stored checkpoints.
        stable_reinforce: what answers to the name of a loss that is not published: a stand-in, or a refusal.
        body_memory_bytes: what the bodies of all requests may take of memory; None is an eighth of the machine's.
        key_limits: how much each key may ask for.
        tls_cert: PEM file of the certificate chain, with ``tls_key`` its private key: the server then speaks HTTPS.
        session_timeout_s: how long a Tinker session lives without a heartbeat of its client.
        snapshot_every_s: how much work of a run lies between two snapshots of it.
        training_share: part of a device's time that training gets while there is sampling to do, too.
        deterministic: a run's training gives the same bits whatever is computed together with it.
        activation_bytes: what one pass of training may take of memory; None leaves it to the engine.
        kept_bytes: what forwards of custom losses may take until their backward; None leaves it to the engine.
        memory_bytes: what a worker and its fork server may take together; None is what the machine has for us.
        operation_timeout_s: a worker that has been at one piece of work for longer is replaced.
        heartbeat_timeout_s: so is one that gives no sign of life for so long.
        keep_loaded_s: how long base models stay in memory after our death, for the server that comes next.
        stop_grace_s: from the signal to the end, at most.
        database_url: of a PostgreSQL database, instead of the file in the data directory.
        store: ``s3://bucket/prefix`` for checkpoints, instead of folders in the data directory.
    """

    host: str
    port: int
    data_dir: Path
    device: str = "auto"
    dtype: str = "auto"
    public_url: str | None = None
    serve_weights: bool = False
    hub_url: str | None = None
    prepare: bool = True
    capacity: Capacity = Capacity()  # noqa: RUF009 - frozen
    log_format: LogFormat = "text"
    metrics_public: bool = False
    session_timeout_s: float = 600.0
    snapshot_every_s: float = 1.0
    operation_timeout_s: float = 3600.0
    heartbeat_timeout_s: float = 60.0
    training_share: float = 0.5
    deterministic: bool = False
    activation_bytes: int | None = None
    kept_bytes: int | None = None
    memory_bytes: int | None = None
    keep_loaded_s: float = 60.0
    stop_grace_s: float = 25.0
    stable_reinforce: StableReinforce = "stand-in"
    usd_per_million_tokens: float = 0.0
    usd_per_gigabyte_month: float = 0.0
    database_url: str | None = field(default=None, repr=False)
    body_memory_bytes: int | None = None
    key_limits: Limits = Limits()  # noqa: RUF009 - frozen
    tls_cert: Path | None = None
    tls_key: Path | None = None
    store: str | None = None

    @property
    def close_grace_s(self) -> float:
        """How long requests in flight may go on once we are told to stop; long polls are sent home at once."""
        return min(5.0, self.stop_grace_s / 5)

    @property
    def control(self) -> ControlConfig:
        return ControlConfig(
            self.data_dir,
            self.device,
            self.dtype,
            self.prepare,
            prices=Prices(self.usd_per_million_tokens, self.usd_per_gigabyte_month),
            session_timeout_s=self.session_timeout_s,
            scheduler=SchedulerConfig(snapshot_every_s=self.snapshot_every_s),
            operation_timeout_s=self.operation_timeout_s,
            heartbeat_timeout_s=self.heartbeat_timeout_s,
            training_share=self.training_share,
            deterministic=self.deterministic,
            activation_bytes=self.activation_bytes,
            kept_bytes=self.kept_bytes,
            memory_bytes=self.memory_bytes,
            stop_grace_s=self.stop_grace_s - self.close_grace_s,
            keep_loaded_s=self.keep_loaded_s,
            database_url=self.database_url,
            store=self.store,
            capacity=self.capacity,
        )
