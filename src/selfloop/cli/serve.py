"""``selfloop serve``."""

import os
import re
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast, get_args

from selfloop.cli import engine_libraries, local
from selfloop.control.capacity.placement import Capacity, Offered
from selfloop.server.middleware.key_limits import Limits
from selfloop.server.settings import Settings, default_data_dir

KEY_FILE = "api_key"


def serve_command(
    host: str,
    port: int,
    data_dir: Path | None,
    device: str,
    dtype: str,
    public_url: str | None,
    serve_weights: bool,
    hub_url: str | None,
    prepare: bool,
    capacity: str,
    serverless_max_rank: int | None,
    serverless_max_seq_len: int | None,
    log_format: str,
    metrics_public: bool,
    session_timeout_s: float,
    snapshot_every_s: float,
    operation_timeout_s: float,
    heartbeat_timeout_s: float,
    training_share: float,
    deterministic: bool,
    activation_memory_gib: float | None,
    kept_memory_gib: float | None,
    memory: str | None,
    stop_grace_s: float,
    keep_loaded_s: float,
    usd_per_million_tokens: float,
    usd_per_gigabyte_month: float,
    stable_reinforce: str,
    database_url: str | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    body_memory_gib: float | None,
    key_limits: Limits,
    store: str | None,
) -> None:
    from selfloop.server.hub import hub_url as hub_to_ask
    from selfloop.server.serve import serve

    for name, value, known in (("device", device, ("auto", "cpu", "cuda")),
                               ("dtype", dtype, ("auto", "float32", "bfloat16")),
                               ("capacity", capacity, get_args(Offered)),
                               ("stable-reinforce", stable_reinforce, ("stand-in", "refuse")),
                               ("log-format", log_format, ("text", "json"))):  # fmt: skip
        if value not in known:
            local.complain(f"--{name}: one of {', '.join(known)}, got {value}")
            sys.exit(2)
    for problem in _tls_problems(tls_cert, tls_key):
        local.complain(problem)
        sys.exit(2)
    try:
        hub = hub_to_ask(hub_url, os.environ)
    except ValueError as error:
        local.complain(f"--hub-url: {error}")
        sys.exit(2)
    try:
        memory_bytes = None if memory is None else parse_bytes(memory)
    except ValueError as error:
        local.complain(f"--memory: {error}")
        sys.exit(2)
    if missing := engine_libraries.missing():
        local.complain(
            f"{sys.executable} lacks {', '.join(missing)}, without which no model can be loaded: "
            f"{engine_libraries.HOW_TO_INSTALL}"
        )
        sys.exit(1)
    settings = Settings(
        host=host,
        port=port,
        data_dir=(data_dir or default_data_dir()).expanduser().resolve(),
        device=device,
        dtype=dtype,
        public_url=public_url,
        serve_weights=serve_weights,
        hub_url=hub,
        prepare=prepare,
        capacity=Capacity(cast(Offered, capacity), serverless_max_rank, serverless_max_seq_len),
        log_format="json" if log_format == "json" else "text",
        metrics_public=metrics_public,
        session_timeout_s=session_timeout_s,
        snapshot_every_s=snapshot_every_s,
        operation_timeout_s=operation_timeout_s,
        heartbeat_timeout_s=heartbeat_timeout_s,
        training_share=training_share,
        deterministic=deterministic,
        activation_bytes=_bytes(activation_memory_gib),
        kept_bytes=_bytes(kept_memory_gib),
        memory_bytes=memory_bytes,
        stop_grace_s=stop_grace_s,
        keep_loaded_s=keep_loaded_s,
        usd_per_million_tokens=usd_per_million_tokens,
        usd_per_gigabyte_month=usd_per_gigabyte_month,
        database_url=database_url,
        store=store,
        stable_reinforce="refuse" if stable_reinforce == "refuse" else "stand-in",
        body_memory_bytes=_bytes(body_memory_gib),
        key_limits=key_limits,
        tls_cert=tls_cert,
        tls_key=tls_key,
    )
    given = os.environ.get("SELFLOOP_API_KEY") or None

    def listening(made: str | None) -> None:
        _announce(settings, given, made)

    with local.failing_in_one_line():
        serve(settings, given, listening)


def parse_bytes(text: str) -> int:
    """``2.6GiB``, ``900MiB``, or a number of GiB; raises ValueError saying what was expected."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(MiB|GiB)?", text.strip())
    if found is None or float(found[1]) == 0:
        raise ValueError(f"a size such as 2.6GiB or 900MiB, got {text!r}")
    return int(float(found[1]) * (2**20 if found[2] == "MiB" else 2**30))


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else round(gib * 2**30)


def _tls_problems(cert: Path | None, key: Path | None) -> Iterator[str]:
    """What is wrong with the files of ``--tls-cert`` and ``--tls-key``."""
    if cert is None and key is None:
        return
    if cert is None or key is None:
        yield "--tls-cert and --tls-key: both, or neither"
        return
    try:
        # The password is empty rather than asked for on a terminal that nobody may sit at.
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(cert, key, password="")
    except (OSError, ssl.SSLError) as error:
        yield f"--tls-cert, --tls-key: a PEM certificate chain and its private key ({error})"


def _announce(settings: Settings, given: str | None, made: str | None) -> None:
    """The three lines a user needs. The key is readable here once; afterwards only in its own file."""
    key_file = settings.data_dir / KEY_FILE
    if made is not None:
        descriptor = os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w") as file:
            file.write(made + "\n")
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    scheme = "http" if settings.tls_cert is None else "https"
    base = settings.public_url or f"{scheme}://{host}:{settings.port}"
    if made is not None:
        key = made
    elif given is not None:
        key = "$SELFLOOP_API_KEY"
    elif key_file.exists():
        key = f"$(cat {key_file})"
    else:
        key = "<a key of yours; `selfloop keys create` makes one>"
    print(f"Selfloop serves at {base} (data in {settings.data_dir}). In the shell of your training script:\n")
    print(f"  export LOOPS_BASE_URL={base}")
    print(f"  export BASETEN_API_KEY={key}")
    print(f"  export HF_ENDPOINT={base}/hf\n", flush=True)
    if made is not None:
        print(f"This key is shown once; it is kept in {key_file} (readable by you only).\n", flush=True)
