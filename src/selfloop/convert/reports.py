"""What a conversion says on its stdout, a line of JSON at a time, to the server that started it."""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import msgspec

Report = Callable[[str, float], None]
"""Called with a stage and the fraction of the whole that is done."""

Facts = dict[str, Any]
"""What is to be known of what was made."""


def print_progress(stage: str, fraction: float) -> None:
    print(json.dumps({"stage": stage, "fraction": round(fraction, 4)}), flush=True)


def print_done(facts: Mapping[str, Any] | msgspec.Raw) -> None:
    """The last line of one that has made it."""
    print(msgspec.json.encode({"stage": "done", "fraction": 1.0, "facts": facts}).decode(), flush=True)


def exit_with_error(error: Exception | str) -> NoReturn:
    """The last line of one that has not, and its end."""
    print(json.dumps({"error": str(error)}), flush=True)
    sys.exit(1)
