"""Prints what a client offers, as JSON: run it with the client's own Python.

python docs/clients/surface.py baseten|baseten-loops|baseten-loops-tinker|truss

``methods`` are public methods with their parameters, ``routes`` what they call, ``fields`` the fields of what is
sent, ``commands`` those of a command line with their options.
"""

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator

Surface = dict[str, dict[str, list[str]]]

# What a script of the Loops client builds by hand and the client sends as it is.
_SENT_BY_LOOPS = (
    "TensorData",
    "EncodedTextChunk",
    "ImageChunk",
    "ImageAssetPointerChunk",
    "ModelInput",
    "Datum",
    "ExternalRef",
    "SamplingParams",
    "AdamParams",
)


def baseten() -> Surface:
    """The Loops methods of the management client, and the models that they send."""
    from baseten.client.managementapi import _models
    from baseten.client.managementapi._client import ApiClient

    methods: dict[str, list[str]] = {}
    routes: dict[str, list[str]] = {}
    fields: dict[str, list[str]] = {}
    for name, method in inspect.getmembers(ApiClient, inspect.isfunction):
        if "_loops_" not in name:
            continue
        methods[name] = _parameters(method)
        source = inspect.getsource(method)
        routes[name] = re.findall(r'method="(\w+)"', source) + re.findall(r'path_fmt="([^"]+)"', source)
        for annotation in method.__annotations__.values():
            model = getattr(_models, str(annotation).split(" ")[0], None)
            if model is not None and str(annotation).split(" ")[0].endswith(("Params", "Request")):
                fields[model.__name__] = list(model.model_fields)
    return {"methods": methods, "fields": fields, "routes": routes}


def baseten_loops() -> Surface:
    """The three clients of a training script, and the models that it builds."""
    from baseten.loops import models
    from baseten.loops.sampling_client import SamplingClient
    from baseten.loops.service_client import ServiceClient
    from baseten.loops.training_client import TrainingClient

    fields = {name: list(getattr(models, name).model_fields) for name in _SENT_BY_LOOPS}
    return {"methods": dict(_methods(ServiceClient, TrainingClient, SamplingClient)), "fields": fields}


def baseten_loops_tinker() -> Surface:
    """The shim that gives a training script the ``tinker`` names."""
    import tinker

    return {"methods": dict(_methods(tinker.ServiceClient, tinker.TrainingClient, tinker.SamplingClient))}


def truss() -> Surface:
    """``truss loops`` and everything below it."""
    from truss.cli import loops_commands

    def walk(command: object, name: str) -> Iterator[tuple[str, list[str]]]:
        inner: dict[str, object] = getattr(command, "commands", {})
        if not inner:
            yield name, sorted(option for p in command.params for option in p.opts if option != "--help")  # type: ignore[attr-defined]
        for word, sub in sorted(inner.items()):
            yield from walk(sub, f"{name} {word}")

    return {"commands": dict(walk(loops_commands.loops, "truss loops"))}


def _methods(*classes: type) -> Iterator[tuple[str, list[str]]]:
    for kind in classes:
        for name, method in inspect.getmembers(kind, inspect.isfunction):
            if name == "__init__" or not name.startswith("_"):
                yield f"{kind.__name__}.{name}", _parameters(method)


def _parameters(method: Callable[..., object]) -> list[str]:
    return [name for name in inspect.signature(method).parameters if name not in ("self", "args", "kwargs")]


CLIENTS: dict[str, Callable[[], Surface]] = {
    "baseten": baseten,
    "baseten-loops": baseten_loops,
    "baseten-loops-tinker": baseten_loops_tinker,
    "truss": truss,
}

if __name__ == "__main__":
    print(json.dumps(CLIENTS[sys.argv[1]](), indent=1))
