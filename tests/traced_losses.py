"""Losses traced by torch.fx and written as plain data, as the Tinker client uploads them."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import torch
import torch.fx
from torch.fx.node import _get_qualified_name

from selfloop.types.custom_loss import CustomLoss, check


def traced(function: Callable[..., Any], ranks: Mapping[str, int]) -> CustomLoss:
    """The checked graph of ``function``, whose parameters are ``ranks``' names."""
    nodes = [_node(node) for node in torch.fx.symbolic_trace(function).graph.nodes]
    inputs = [{"name": name, "rank": rank} for name, rank in ranks.items()]
    wire = msgspec.json.encode({"name": function.__name__, "inputs": inputs, "nodes": nodes})
    loss = msgspec.json.decode(wire, type=CustomLoss)
    check(loss)
    return loss


def _node(node: torch.fx.Node) -> dict[str, Any]:
    target = _get_qualified_name(node.target) if node.op == "call_function" else str(node.target)
    return {
        "op": node.op,
        "name": node.name,
        "target": target.replace("_operator.", "operator."),
        "args": [encoded(arg) for arg in node.args],
        "kwargs": {name: encoded(arg) for name, arg in node.kwargs.items()},
    }


def encoded(value: Any) -> Any:
    match value:
        case torch.fx.Node():
            return {"ref": value.name}
        case float() if not math.isfinite(value):
            return {"float": str(value)}
        case tuple():
            return {"tuple": [encoded(item) for item in value]}
        case list():
            return [encoded(item) for item in value]
        case dict():
            return {"dict": {key: encoded(item) for key, item in value.items()}}
        case slice():
            return {"slice": [encoded(part) for part in (value.start, value.stop, value.step)]}
        case torch.dtype():
            return {"dtype": str(value).removeprefix("torch.")}
        case torch.device():
            return {"device": str(value)}
        case _ if value is Ellipsis:
            return {"ellipsis": True}
        case _:
            return value
