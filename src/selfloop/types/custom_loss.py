"""Losses that a client uploads: a traced graph as plain data, checked here before it is kept.

Nothing of a graph is ever executed as code. A node names one of :data:`selfloop.types.custom_loss_ops.OPERATIONS`, and
its arguments are numbers, short words, earlier nodes, or lists of those; the engine computes it by its own table.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from selfloop.types.custom_loss_ops import ATTRIBUTES, DTYPES, KINDS, OPERATIONS, Signature, called_name
from selfloop.types.errors import BadRequest

MAX_NODES = 1024
MAX_INPUTS = 16
MAX_NUMBER = 2**53
_MAX_ITEMS = 256
_MAX_DEPTH = 6
_MAX_WORD = 64
_LOGPROBS = "logprobs"
_INPUT_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")
_NODE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_METRIC = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")
_DEVICE = re.compile(r"(cpu|cuda)(:[0-9]{1,2})?")
_REDUCTIONS = ("none", "mean", "sum")


class LossInput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An input of the graph, the model's ``logprobs`` first; a scalar, (T,) or (T, K)."""

    name: str
    rank: int


class Node(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One step, as torch.fx records it. ``args`` and ``kwargs`` are encoded: see :func:`decode`."""

    op: Literal["placeholder", "get_attr", "call_function", "call_method", "call_module", "output"]
    name: str
    target: str
    args: list[Any] = []
    kwargs: dict[str, Any] = {}


class CustomLoss(msgspec.Struct, frozen=True):
    """A checked graph: per datum, from ``inputs`` to a loss and metrics."""

    name: str
    inputs: list[LossInput]
    nodes: list[Node]


@dataclass(frozen=True, slots=True)
class Ref:
    """An earlier node's value, not known before the graph runs."""

    name: str


@dataclass(frozen=True, slots=True)
class DTypeName:
    name: str


@dataclass(frozen=True, slots=True)
class DeviceName:
    name: str


class GraphError(Exception):
    """What is wrong with a node."""


def check(loss: CustomLoss) -> None:
    """Raises :class:`BadRequest` naming the input or node that cannot be served, and what may be there."""
    _check_inputs(loss.inputs)
    if not 2 <= len(loss.nodes) <= MAX_NODES:
        raise BadRequest("graph.nodes", f"2 to {MAX_NODES} nodes, got {len(loss.nodes)}")
    known: set[str] = set()
    for index, node in enumerate(loss.nodes):
        try:
            _check_node(loss, index, known)
        except GraphError as error:
            raise BadRequest(f"graph.nodes[{index}]", f"node {node.name[:100]!r}: {error}") from None
        known.add(node.name)


def _check_inputs(inputs: list[LossInput]) -> None:
    if not 1 <= len(inputs) <= MAX_INPUTS:
        raise BadRequest("inputs", f"1 to {MAX_INPUTS} inputs, got {len(inputs)}")
    for index, given in enumerate(inputs):
        field = f"inputs[{index}]"
        if not _INPUT_NAME.fullmatch(given.name) or given.name in [other.name for other in inputs[:index]]:
            raise BadRequest(f"{field}.name", "a lowercase name of its own, of letters, digits and underscores")
        if (given.name == _LOGPROBS) != (index == 0):
            raise BadRequest(f"{field}.name", "logprobs first, and there alone")
        if not (index == 0) <= given.rank <= 2:
            raise BadRequest(f"{field}.rank", f"{1 if index == 0 else 0} to 2, got {given.rank}")


def _check_node(loss: CustomLoss, index: int, known: set[str]) -> None:
    node = loss.nodes[index]
    if not _NODE_NAME.fullmatch(node.name) or node.name in known:
        raise GraphError("a name of its own, of letters, digits and underscores")
    expected = "placeholder" if index < len(loss.inputs) else "output" if index == len(loss.nodes) - 1 else "call"
    if expected != ("call" if node.op in ("call_function", "call_method") else node.op):
        raise GraphError(
            "first a placeholder for each input in order, then calls of functions and methods, last the output; "
            f"got {node.op} where {expected} belongs"
        )
    if node.op == "placeholder":
        if node.target != loss.inputs[index].name or node.args or node.kwargs:
            raise GraphError(f"the placeholder of input {loss.inputs[index].name!r}, without a default")
    elif node.op == "output":
        output_of(node, _earlier(known))
    else:
        bind(node, _earlier(known), lambda _value: False)


def _earlier(known: set[str]) -> Callable[[str], object]:
    def lookup(name: str) -> object:
        if name not in known:
            raise GraphError(f"refers to {name[:100]!r}, which is no earlier node")
        return Ref(name)

    return lookup


def output_of(node: Node, lookup: Callable[[str], object]) -> tuple[object, dict[str, object]]:
    """The values of the loss and of its metrics. Raises :class:`GraphError` unless it is such a pair."""
    pair = decode(node.args[0], lookup) if len(node.args) == 1 and not node.kwargs else None
    if not isinstance(pair, tuple | list):
        raise GraphError("returns (loss, metrics)")
    match list(pair):  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        case [loss, dict(metrics)] if isinstance(node.args[0], list | dict):
            pass
        case _:
            raise GraphError("returns (loss, metrics), where metrics is a dict")
    for name, value in metrics.items():
        if not _METRIC.fullmatch(str(name)):
            raise GraphError(f"metric {str(name)[:100]!r} must be named custom/<name>:sum or custom/<name>:mean")
        if isinstance(value, str | tuple | list | dict | slice) or value is None:
            raise GraphError(f"metric {name!r} must be a tensor of one number")
    if isinstance(loss, str | tuple | list | dict | slice | int | float) or loss is None:
        raise GraphError("the loss must be a tensor")
    return loss, metrics


def signature_of(node: Node) -> Signature:
    """Raises :class:`GraphError` naming what is allowed."""
    called = called_name(node.op, node.target)
    if called not in OPERATIONS:
        family = called.rpartition(".")[0] + "."
        alike = sorted(name for name in OPERATIONS if name.rpartition(".")[0] + "." == family)
        allowed = alike or ["functions of torch, torch.nn.functional, math and operator, methods of tensors"]
        raise GraphError(f"{node.target[:100]!r} is not among the operations of a loss: {', '.join(allowed)}")
    return OPERATIONS[called]


def bind(
    node: Node, lookup: Callable[[str], object], is_tensor: Callable[[object], bool]
) -> tuple[Signature, list[object], dict[str, object]]:
    """An operation and its arguments: the required ones in order, the others by name where they are given.

    Raises:
        GraphError: an argument is missing, unknown, or not of its parameter's kind.
    """
    signature = signature_of(node)
    parameters = signature.parameters
    values = [decode(arg, lookup) for arg in node.args]
    if parameters[-1].kind == "s" or (len(parameters) > 1 and parameters[0].kind == "s"):
        values = _with_shape(values, next(i for i, p in enumerate(parameters) if p.kind == "s"))
    if len(values) > len(parameters):
        raise GraphError(f"{node.target} takes at most {len(parameters)} arguments, got {len(values)}")
    given = dict(zip((parameter.name for parameter in parameters), values, strict=False))
    for name, arg in node.kwargs.items():
        if name in given or name not in [parameter.name for parameter in parameters]:
            takes = ", ".join(parameter.name for parameter in parameters)
            raise GraphError(f"{node.target} takes {takes}; got {name[:100]!r}")
        given[name] = decode(arg, lookup)
    required: list[object] = []
    optional: dict[str, object] = {}
    for parameter in parameters:
        value = given.get(parameter.name)
        if value is None and not parameter.required:
            continue
        if parameter.name not in given or not _fits(parameter.kind, value, is_tensor):
            raise GraphError(f"{parameter.name} of {node.target} must be {KINDS[parameter.kind]}")
        if parameter.required:
            required.append(value)
        elif parameter.kind not in "k0f":
            optional[parameter.name] = value
    return signature, required, optional


def _with_shape(values: list[object], at: int) -> list[object]:
    """Integers one after another are one shape."""
    tail = values[at:]
    if len(tail) == 1 and isinstance(tail[0], tuple | list):
        return values
    return [*values[:at], tuple(tail)] if tail else values


def _fits(kind: str, value: object, is_tensor: Callable[[object], bool]) -> bool:
    if isinstance(value, Ref):
        return True
    is_int = isinstance(value, int) and not isinstance(value, bool)
    match kind:
        case "t":
            return is_tensor(value)
        case "l":
            return _each(value, lambda item: is_tensor(item) or isinstance(item, Ref))
        case "o":
            return is_tensor(value) or isinstance(value, int | float)
        case "n":
            return isinstance(value, int | float)
        case "i":
            return is_int
        case "b":
            return isinstance(value, bool)
        case "d":
            return is_int or _are_ints(value)
        case "s":
            return _are_ints(value)
        case "q":
            return is_tensor(value) or is_int or _are_ints(value)
        case "w":
            return is_tensor(value) or isinstance(value, tuple)
        case "p":
            return isinstance(value, int | float) or value == "fro"
        case "c":
            return isinstance(value, DTypeName | DeviceName) or is_tensor(value)
        case "x":
            return _is_index(value, is_tensor) or (
                isinstance(value, tuple) and all(_is_index(item, is_tensor) for item in value)  # pyright: ignore[reportUnknownVariableType]
            )
        case _:
            return _is_word(kind, value)


def _is_word(kind: str, value: object) -> bool:
    words: dict[str, tuple[object, ...]] = {
        "r": _REDUCTIONS,
        "e": ("constant",),
        "u": (None, "floor", "trunc"),
        "a": ATTRIBUTES,
        "0": (None,),
    }
    if kind in words:
        return (value is None or isinstance(value, str)) and value in words[kind]
    if kind == "f":
        return value is False
    if kind == "k":
        return value is None or isinstance(value, int)
    return isinstance(value, DTypeName if kind == "y" else DeviceName)


def _each(value: object, test: Callable[[object], bool]) -> bool:
    return isinstance(value, tuple | list) and len(value) <= _MAX_ITEMS and all(map(test, value))  # pyright: ignore[reportUnknownArgumentType]


def _are_ints(value: object) -> bool:
    return _each(value, lambda item: isinstance(item, Ref) or (isinstance(item, int) and not isinstance(item, bool)))


def _is_index(value: object, is_tensor: Callable[[object], bool]) -> bool:
    if isinstance(value, slice):
        parts: list[object] = [value.start, value.stop, value.step]
        return all(part is None or isinstance(part, Ref) or type(part) is int for part in parts)
    if isinstance(value, list):
        return _are_ints(value)  # pyright: ignore[reportUnknownArgumentType]
    return value is None or value is Ellipsis or type(value) is int or isinstance(value, Ref) or is_tensor(value)


def decode(value: object, lookup: Callable[[str], object], depth: int = 0) -> object:
    """An argument as the client encodes it: scalars, words and lists are themselves, the rest is ``{kind: ...}``.

    Raises:
        GraphError: it is none of these, or too large.
    """
    if depth > _MAX_DEPTH:
        raise GraphError(f"arguments are nested at most {_MAX_DEPTH} deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise GraphError(f"integers are at most {MAX_NUMBER}")
        return value
    if isinstance(value, str):
        if len(value) > _MAX_WORD:
            raise GraphError(f"words have at most {_MAX_WORD} characters")
        return value
    if isinstance(value, list):
        return _items(value, lookup, depth)  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(value, dict) and len(value) == 1:  # pyright: ignore[reportUnknownArgumentType]
        ((kind, inner),) = value.items()  # pyright: ignore[reportUnknownVariableType]
        return _tagged(kind, inner, lookup, depth)
    raise GraphError("arguments are scalars, words, lists, or objects of one key as the client writes them")


def _items(values: list[object], lookup: Callable[[str], object], depth: int) -> list[object]:
    if len(values) > _MAX_ITEMS:
        raise GraphError(f"lists have at most {_MAX_ITEMS} items")
    return [decode(item, lookup, depth + 1) for item in values]


def _tagged(kind: object, inner: Any, lookup: Callable[[str], object], depth: int) -> object:
    match kind, inner:
        case "ref", str():
            return lookup(inner)
        case "tuple", list():
            return tuple(_items(inner, lookup, depth))
        case "slice", [start, stop, step]:
            return slice(*_items([start, stop, step], lookup, depth))
        case "dict", dict():
            if len(inner) > _MAX_ITEMS:
                raise GraphError(f"dicts have at most {_MAX_ITEMS} items")
            return {str(key): decode(item, lookup, depth + 1) for key, item in inner.items()}
        case "ellipsis", True:
            return Ellipsis
        case "float", "inf" | "-inf" | "nan":
            return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[inner]
        case "dtype", str() if inner in DTYPES:
            return DTypeName(inner)
        case "device", str() if _DEVICE.fullmatch(inner):
            return DeviceName(inner)
        case _:
            raise GraphError(
                "an object must be one of ref, tuple, slice, dict, ellipsis, float (inf, -inf, nan), device, "
                f"dtype ({', '.join(DTYPES)})"
            )
