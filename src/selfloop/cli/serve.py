"""``selfloop serve``."""

import os
import ssl
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from selfloop.cli import engine_libraries, local
from selfloop.cli.options import command_of
from selfloop.types.client_variables import client_variables
from selfloop.types.errors import BadRequest
from selfloop.types.option_sources import Loaded, load, to_toml
from selfloop.types.options import leaves
from selfloop.types.settings import Settings

KEY_FILE = "api_key"

_HELP = """Run the server.

Each option is also a variable of the environment, SELFLOOP_ and its name, and a key of the file of --config.
"""


def _serve(given: Mapping[str, str], file: Path | None, print_only: bool) -> None:
    try:
        loaded = load(Settings, given, os.environ, file)
        settings = _checked(loaded)
    except BadRequest as error:
        local.complain(str(error))
        sys.exit(2)
    if print_only:
        print(to_toml(loaded), end="")
        return
    _warn_of_open_file(loaded, file)
    key = "$SELFLOOP_API_KEY" if loaded.origin("api_key").startswith("$") else "<the api_key of your file>"
    if missing := engine_libraries.missing():
        local.complain(
            f"{sys.executable} lacks {', '.join(missing)}, without which no model can be loaded: "
            f"{engine_libraries.HOW_TO_INSTALL}"
        )
        sys.exit(1)
    from selfloop.server.serve import serve

    with local.failing_in_one_line():
        serve(settings, lambda made: _announce(settings, made, key))


serve_command = command_of(Settings, _serve, _HELP)


def _checked(loaded: Loaded[Settings]) -> Settings:
    """The settings in their final form. Raises :class:`BadRequest`: what cannot be seen in one value alone."""
    from selfloop.server.hub import hub_url

    settings = loaded.settings
    for problem in _tls_problems(settings.tls_cert, settings.tls_key):
        raise problem
    try:
        hub = hub_url(settings.hub_url, os.environ)
    except ValueError as error:
        raise BadRequest(loaded.origin("hub_url"), str(error)) from None
    return replace(settings, data_dir=settings.data_dir.expanduser().resolve(), hub_url=hub)


def _tls_problems(cert: Path | None, key: Path | None) -> Iterator[BadRequest]:
    """What is wrong with the files of ``--tls-cert`` and ``--tls-key``."""
    if cert is None and key is None:
        return
    if cert is None or key is None:
        yield BadRequest("--tls-cert and --tls-key", "both, or neither")
        return
    try:
        # The password is empty rather than asked for on a terminal that nobody may sit at.
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(cert, key, password="")
    except (OSError, ssl.SSLError) as error:
        yield BadRequest("--tls-cert, --tls-key", f"a PEM certificate chain and its private key ({error})")


def _warn_of_open_file(loaded: Loaded[Settings], file: Path | None) -> None:
    secrets = [
        leaf.key for leaf in leaves(Settings) if leaf.option.secret and loaded.origin(leaf.key).startswith(f"{file}: ")
    ]
    if file is not None and secrets and file.stat().st_mode & 0o077:
        local.complain(f"{file} holds {', '.join(secrets)} and is open to other users: chmod 600 closes it")


def _announce(settings: Settings, made: str | None, given: str) -> None:
    """What a script needs, and that it may come now. The key is readable here once; afterwards only in its own file.

    Args:
        made: the key that was made at this start, if any.
        given: how to write the one that was given, if any.
    """
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
    elif settings.api_key is not None:
        key = given
    elif key_file.exists():
        key = f"$(cat {key_file})"
    else:
        key = "<a key of yours; `selfloop keys create` makes one>"
    print(f"Selfloop serves at {base} (data in {settings.data_dir}). In the shell of your training script:\n")
    for name, value in (client_variables(base, key) | {"TINKER_API_KEY": "tml-$BASETEN_API_KEY"}).items():
        print(f"  export {name}={value}")
    print(
        "\nThese are for the Loops client, the Tinker client and tokenizers; `selfloop exec SCRIPT` sets them for you."
    )
    if made is not None:
        print(f"The key is shown once; it is kept in {key_file} (readable by you only).")
    print("Ready.\n", flush=True)
