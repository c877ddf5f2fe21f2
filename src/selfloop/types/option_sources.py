"""Where values of options come from: the command line, else the environment, else a file, else the defaults."""

import difflib
import json
import textwrap
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, cast

from selfloop.types.errors import BadRequest
from selfloop.types.option_values import Scalar
from selfloop.types.options import Leaf, build, leaves

T = TypeVar("T")


class Given(NamedTuple):
    """A value, and where it was found: ``--port``, ``$SELFLOOP_PORT`` or ``selfloop.toml: port``."""

    value: Any
    origin: str


@dataclass(frozen=True, slots=True)
class Loaded(Generic[T]):
    """A tree of settings, and where each value that is not a default comes from, by the option's key."""

    settings: T
    origins: Mapping[str, str]

    def origin(self, key: str) -> str:
        return self.origins.get(key, "default")


def load(root: type[T], flags: Mapping[str, str], environment: Mapping[str, str], file: Path | None) -> Loaded[T]:
    """The settings of these sources.

    Args:
        flags: texts of the command line, by the option's key.
        file: in TOML.

    Raises:
        BadRequest: a value that its option cannot have, or a file that cannot be read.
    """
    options = leaves(root)
    given = read_sources(options, flags, environment, file)
    values = {leaf.path: given[leaf.key].value for leaf in options if leaf.key in given}
    return Loaded(build(root, values), {key: found.origin for key, found in given.items()})


def read_sources(
    options: Iterable[Leaf], flags: Mapping[str, str], environment: Mapping[str, str], file: Path | None
) -> dict[str, Given]:
    """What was given of these options, by their keys; see :func:`load`. An empty variable counts as none."""
    options = list(options)
    found = {} if file is None else read_file(options, file)
    for leaf in options:
        if leaf.key in flags:
            found[leaf.key] = _parsed(leaf, leaf.flag, flags[leaf.key])
            continue
        for each in (leaf, leaf.former):
            if each is not None and (text := environment.get(each.env)):
                found[leaf.key] = _parsed(leaf, f"${each.env}", text)
                break
    return found


def _parsed(leaf: Leaf, origin: str, text: str) -> Given:
    try:
        return Given(leaf.parse(text), origin)
    except ValueError as error:
        raise BadRequest(origin, str(error)) from None


def read_file(options: Iterable[Leaf], file: Path) -> dict[str, Given]:
    """What a TOML file says: options under their group's table, or without one. Raises :class:`BadRequest`."""
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadRequest(str(file), f"a file that can be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise BadRequest(str(file), "text in UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise BadRequest(str(file), f"a TOML file ({error})") from None
    return _File(list(options), file).read(content)


class _File:
    def __init__(self, options: list[Leaf], file: Path) -> None:
        self._file = file
        self._options = {leaf.key: leaf for leaf in options}
        self._options |= {leaf.former.key: leaf for leaf in options if leaf.former is not None}
        self._tables = {leaf.group.table for leaf in options if leaf.group.table}

    def read(self, content: Mapping[str, Any]) -> dict[str, Given]:
        found: dict[str, Given] = {}
        for table, key, value in self._entries(content):
            place = f"{table}.{key}" if table else key
            leaf = self._options.get(key)
            if leaf is None:
                raise self._wrong(place, f"no such option{self._nearest(key, self._options)}")
            if table not in ("", leaf.group.table):
                raise self._wrong(place, f"an option of [{table}]; {key} belongs in {self._home(leaf)}")
            if leaf.key in found:
                raise self._wrong(place, "given once, not with its table and without")
            try:
                found[leaf.key] = Given(leaf.read(value), f"{self._file}: {place}")
            except ValueError as error:
                raise self._wrong(place, str(error)) from None
        return found

    def _entries(self, content: Mapping[str, Any]) -> Iterator[tuple[str, str, Scalar]]:
        for name, value in content.items():
            if not isinstance(value, dict) or name in self._options:
                yield "", name, cast(Scalar, value)
                continue
            if name not in self._tables:
                raise self._wrong(f"[{name}]", f"no such table{self._nearest(name, self._tables)}")
            for key, inner in cast(dict[str, Scalar], value).items():
                yield name, key, inner

    def _wrong(self, place: str, expected: str) -> BadRequest:
        return BadRequest(f"{self._file}: {place}", expected)

    @staticmethod
    def _home(leaf: Leaf) -> str:
        return f"[{leaf.group.table}]" if leaf.group.table else "no table"

    @staticmethod
    def _nearest(name: str, known: Iterable[str]) -> str:
        known = sorted(known)
        near = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
        return f"; did you mean {near[0]}?" if near else f", one of {', '.join(known)}"


def to_toml(loaded: Loaded[Any], *, with_help: bool = False) -> str:
    """Settings as a file that gives the same ones, without the secrets.

    Args:
        with_help: say what each option does, rather than where its value comes from.
    """
    lines: list[str] = []
    table = ""
    for leaf in by_table(leaves(type(loaded.settings))):
        if leaf.group.table != table:
            table = leaf.group.table
            lines += ["", f"[{table}]"]
        if with_help:
            lines += textwrap.wrap(leaf.help, 110, initial_indent="# ", subsequent_indent="# ")
        comment = "" if with_help else f"  # {loaded.origin(leaf.key)}"
        lines.append(_assignment(leaf, leaf.value(loaded.settings)) + comment)
    return "\n".join(lines) + "\n"


def by_table(options: Iterable[Leaf]) -> list[Leaf]:
    """In the order of a file, where what needs no table comes first and a table comes once."""
    options = list(options)
    tables = list(dict.fromkeys(["", *(leaf.group.table for leaf in options)]))
    return [leaf for table in tables for leaf in options if leaf.group.table == table]


def _assignment(leaf: Leaf, value: Any) -> str:
    if value is None:
        return f"# {leaf.key} ="
    if leaf.option.secret:
        return f'# {leaf.key} = "***"'
    scalar = leaf.kind.write(value)
    # JSON's strings are TOML's but for one character.
    text = json.dumps(scalar, ensure_ascii=False).replace("\x7f", "\\u007f")
    return f"{leaf.key} = {text}"
