"""How the value of an option is written: on the command line, in the environment and in a TOML file alike."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

Scalar = str | int | float | bool

_SIZES = {"MiB": 2**20, "GiB": 2**30}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_SWITCH = {"on": True, "true": True, "yes": True, "1": True, "off": False, "false": False, "no": False, "0": False}


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to write values.

    Args:
        word: what help shows in the place of a value.
        words: what a value is, in an error.
        types: what a value may be in a file.
        parse: reads the text of a value; raises ValueError.
        write: the text of a value in a file; parsed again it is the same value.
        unit: what limits are counted in, and how much of a value one of it is.
        choices: the only values, where they are a few words.
    """

    word: str
    words: str
    types: tuple[type[Scalar], ...]
    parse: Callable[[str], Any]
    write: Callable[[Any], Scalar]
    unit: tuple[str, float] = ("", 1.0)
    choices: tuple[str, ...] = ()

    def read(self, given: Scalar) -> Any:
        """The value of a text in a file. Raises ValueError without a message."""
        # By its very type: a bool is an int to Python.
        if type(given) not in self.types:
            raise ValueError
        return self.parse(text_of(given))

    def expected(self, minimum: float | None, maximum: float | None) -> str:
        """What a value may be, in words."""
        name, _ = self.unit
        least, most = (None if limit is None else f"{limit:g}{name}" for limit in (minimum, maximum))
        if least is None:
            return self.words if most is None else f"{self.words} of at most {most}"
        return f"{self.words} of at least {least}" if most is None else f"{self.words} from {least} to {most}"


def text_of(value: Scalar) -> str:
    """As it is written on the command line and in the environment."""
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def kind_of(name: str, hint: Any) -> Kind:
    """How the values of a field are written, by its type and the unit in its name."""
    if hint is bool:
        return SWITCH
    if get_origin(hint) is Literal:
        return one_of(*get_args(hint))
    if name.endswith("_bytes"):
        return size()
    if name.endswith("_s") and not name.endswith("_per_s"):
        return DURATION
    return {int: WHOLE, float: NUMBER, str: TEXT, Path: PATH}[hint]


def one_of(*words: str) -> Kind:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError
        return text

    return Kind("WORD", f"one of {', '.join(words)}", (str,), parse, str, choices=words)


def size() -> Kind:
    """Bytes as ``2.6GiB`` or ``900MiB``, or as a number of GiB."""

    def write(value: int) -> str:
        unit = "MiB" if value < 2**30 and value % 2**30 else "GiB"
        return f"{value / _SIZES[unit]!r}".removesuffix(".0") + unit

    words = "a size such as 2.6GiB or 900MiB"
    return Kind(
        "SIZE", words, (str, int, float), lambda text: round(_measured(text, _SIZES, "GiB")), write, ("GiB", 2**30)
    )


def mib() -> Kind:
    """Bytes, or bytes a second, as a plain number of MiB."""
    return Kind("NUMBER", "a number", (int, float), lambda text: _number(text) * 2**20, _write_mib, ("", 2**20))


def _write_mib(value: float) -> float:
    return _short(value / 2**20)


def _short(value: float) -> float:
    return int(value) if value.is_integer() else value


def _measured(text: str, units: dict[str, int], usual: str) -> float:
    found = re.fullmatch(rf"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*({'|'.join(units)})?", text.strip())
    if found is None:
        raise ValueError
    return _number(found[1]) * units[found[2] or usual]


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _switch(text: str) -> bool:
    if text.lower() not in _SWITCH:
        raise ValueError
    return _SWITCH[text.lower()]


def _text(text: str) -> str:
    if not text:
        raise ValueError
    return text


def _path(text: str) -> Path:
    return Path(_text(text))


SWITCH = Kind("on|off", "on or off", (bool,), _switch, bool)
WHOLE = Kind("NUMBER", "a whole number", (int,), int, int)
NUMBER = Kind("NUMBER", "a number", (int, float), _number, _short)
TEXT = Kind("TEXT", "some text", (str,), _text, str)
PATH = Kind("PATH", "a path", (str,), _path, str)
DURATION = Kind(
    "SECONDS",
    "a time such as 90, 90s or 15m",
    (str, int, float),
    lambda text: _measured(text, _SECONDS, "s"),
    _short,
    ("s", 1.0),
)
