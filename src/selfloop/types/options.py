"""Options as fields of dataclasses: name, type, default, limits and help are said in the field and nowhere else.

:func:`option` makes such a field, :func:`group` one that holds a dataclass of further options. The command line, the
environment, the file of ``--config`` and the page of options are derived from the tree (:func:`leaves`), and all of
them read a value with the one :class:`~selfloop.types.option_values.Kind` of its option.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from selfloop.types.option_values import Kind, Scalar, kind_of, text_of

T = TypeVar("T")

_OPTION = "option"
_GROUP = "group"
ENV_PREFIX = "SELFLOOP_"
# Units that are in a field's name and not in the option's.
_UNITS = ("_s", "_bytes")


@dataclass(frozen=True, slots=True)
class Option:
    """What a field says of its option besides type and default; see :func:`option`."""

    help: str
    name: str | None
    env: str | None
    unset: str
    minimum: float | None
    maximum: float | None
    kind: Kind | None
    secret: bool
    flag: bool
    former: str | None


@dataclass(frozen=True, slots=True)
class Group:
    """A part of the tree: its table in a file, and its heading in the help."""

    table: str
    title: str


def option(
    default: Any,
    help: str,
    *,
    name: str | None = None,
    env: str | None = None,
    unset: str = "",
    minimum: float | None = None,
    maximum: float | None = None,
    kind: Kind | None = None,
    secret: bool = False,
    flag: bool = True,
    former: str | None = None,
) -> Any:
    """A field that is an option.

    Args:
        default: in the field's own unit.
        help: what it does, in a sentence or two that do not repeat name and default.
        name: with dashes, when it is not the field's name less its unit (``_s``, ``_bytes``).
        env: variable of the environment, when it is not ``SELFLOOP_`` and the name.
        unset: what holds without a value, in words, for an option whose default is None.
        minimum: smallest value, in the unit that a user writes.
        maximum: largest, likewise.
        kind: how a value is read, when the field's type and the unit in its name do not determine it.
        secret: never shown, logged or repeated in an error.
        flag: whether it may be on the command line, which every user of the machine can read.
        former: the name that it had, which is still taken wherever the name is.
    """
    found = Option(help, name, env, unset, minimum, maximum, kind, secret, flag, former)
    return field(default=default, repr=not secret, metadata={_OPTION: found})


def group(kind: type[Any], table: str, title: str) -> Any:
    """A field that holds further options, which are those of the dataclass ``kind``; two groups may share a table."""
    return field(default_factory=kind, metadata={_GROUP: Group(table, title)})


@dataclass(frozen=True, slots=True)
class Leaf:
    """One option in its place.

    Args:
        path: names of the attributes that lead to it from the root.
        group: where a user finds it.
        default: in the field's own unit.
    """

    path: tuple[str, ...]
    group: Group
    option: Option
    kind: Kind
    default: Any

    @property
    def name(self) -> str:
        if self.option.name is not None:
            return self.option.name
        name = self.path[-1]
        for unit in _UNITS:
            name = name.removesuffix(unit)
        return name.replace("_", "-")

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        return f"--{self.name}"

    @property
    def key(self) -> str:
        """Its name in a file."""
        return self.name.replace("-", "_")

    @property
    def env(self) -> str:
        """Its name in the environment."""
        return self.option.env or ENV_PREFIX + self.key.upper()

    @property
    def former(self) -> "Leaf | None":
        """The option under the name that it had, None if it always had this one."""
        if self.option.former is None:
            return None
        return replace(self, option=replace(self.option, name=self.option.former, env=None, former=None))

    @property
    def expected(self) -> str:
        """What a value may be, in words."""
        return self.kind.expected(self.option.minimum, self.option.maximum)

    @property
    def default_text(self) -> str:
        """What holds when nobody says, in words; empty for nothing."""
        return self.option.unset if self.default is None else text_of(self.kind.write(self.default))

    @property
    def help(self) -> str:
        """What it does, with the words that it takes, and what holds when nobody says."""
        parts = [self.option.help]
        if not all(word in self.option.help for word in self.kind.choices):
            parts.append(f"One of {', '.join(self.kind.choices)}.")
        if self.default_text:
            parts.append(f"Default: {self.default_text}.")
        return " ".join(parts)

    def parse(self, text: str) -> Any:
        """The value of a text of the command line or the environment. Raises ValueError saying what is expected."""
        return self._checked(self.kind.parse, text)

    def read(self, given: Scalar) -> Any:
        """The value of a text in a file. Raises ValueError with what is expected."""
        return self._checked(self.kind.read, given)

    def _checked(self, read: Callable[[Any], Any], given: object) -> Any:
        try:
            value = read(given)
            if not self._is_within(value):
                raise ValueError
        except ValueError:
            raise ValueError(self.expected + ("" if self.option.secret else f", got {_shown(given)}")) from None
        return value

    def value(self, settings: Any) -> Any:
        """Its value in a tree."""
        for name in self.path:
            settings = getattr(settings, name)
        return settings

    def _is_within(self, value: Any) -> bool:
        least, most = self.option.minimum, self.option.maximum
        if least is None and most is None:
            return True
        amount: float = value / self.kind.unit[1]
        return (least is None or amount >= least) and (most is None or amount <= most)


def _shown(given: object) -> str:
    if isinstance(given, str) and given and given.isprintable():
        return given
    return str(given).lower() if isinstance(given, bool) else repr(given)


ROOT_GROUP = Group("", "Server")


def leaves(root: type[Any]) -> list[Leaf]:
    """Every option of a tree: those of a dataclass before those of its groups."""
    found = list(_leaves(root, ROOT_GROUP, ()))
    keys = [each.key for leaf in found for each in (leaf, leaf.former) if each is not None]
    assert len(set(keys)) == len(keys), "two options of one name"
    assert not set(keys) & {leaf.group.table for leaf in found}, "an option with the name of a table"
    return found


def _leaves(kind: type[Any], in_group: Group, path: tuple[str, ...]) -> Iterator[Leaf]:
    hints = get_type_hints(kind)
    for each in fields(kind):
        if (found := each.metadata.get(_OPTION)) is not None:
            of_value = found.kind or kind_of(each.name, _without_none(hints[each.name]))
            yield Leaf((*path, each.name), in_group, found, of_value, each.default)
    for each in fields(kind):
        if (found := each.metadata.get(_GROUP)) is not None:
            yield from _leaves(hints[each.name], found, (*path, each.name))


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (kind for kind in get_args(hint) if kind is not NoneType)
    return hint


def build(root: type[T], values: Mapping[tuple[str, ...], Any]) -> T:
    """A tree with these values at these paths, and defaults elsewhere."""
    return _build(root, values, ())


def _build(kind: type[T], values: Mapping[tuple[str, ...], Any], path: tuple[str, ...]) -> T:
    hints = get_type_hints(kind)
    given: dict[str, Any] = {}
    for each in fields(cast(Any, kind)):
        here = (*path, each.name)
        if _GROUP in each.metadata:
            given[each.name] = _build(hints[each.name], values, here)
        elif here in values:
            given[each.name] = values[here]
    return kind(**given)
