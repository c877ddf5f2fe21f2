"""The launchers, by the name that ``--launcher`` gives.

A launcher of your own needs no change here: ``--launcher my_package.my_module:MyLauncher`` names what is called with
the path of the data directory and returns a :class:`Launcher`. Its module must be importable by the server.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import cast

from selfloop.types.errors import BadRequest
from selfloop.worker.launchers.base import Launcher

# Each is imported when it is asked for only: what it needs may be large, or not installed.
LAUNCHERS = {
    "local": "selfloop.worker.launchers.local:LocalLauncher",
}


def make_launcher(name: str, data_dir: Path) -> Launcher:
    """The launcher of that name, or at that ``module:attribute``. Raises :class:`BadRequest` if there is none."""
    address = LAUNCHERS.get(name, name)
    module, separator, attribute = address.partition(":")
    if not separator:
        raise BadRequest("--launcher", f"{', '.join(LAUNCHERS)} or module:attribute; got {name!r}")
    try:
        make = cast("Callable[[Path], Launcher]", getattr(import_module(module), attribute))
    except (ImportError, AttributeError) as error:
        raise BadRequest("--launcher", f"a launcher that can be imported; {name}: {error}") from error
    return make(data_dir)
