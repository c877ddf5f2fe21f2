"""The CPU kernels as a backend."""

import torch

from selfloop.engine.backends.base import Lacking, Plan
from selfloop.engine.backends.cpu_native.build import kernels, look
from selfloop.engine.backends.cpu_native.costs import costs_of
from selfloop.engine.backends.cpu_native.library import Kernels
from selfloop.engine.backends.cpu_native.model import NativeModel
from selfloop.engine.backends.cpu_native.sizes import sizes_of
from selfloop.engine.backends.torch.weights import load_weights
from selfloop.engine.models.spec import ModelSpec, unlike_dense
from selfloop.engine.models.weights import TensorSource
from selfloop.types.settings import KeptAs


class NativeBackend:
    """Computes dense models on CPUs; where those do not multiply bfloat16, only base weights are in it."""

    name = "cpu_native"

    def lacks(
        self, spec: ModelSpec, device: torch.device, dtype: torch.dtype, kept_as: KeptAs | None = None
    ) -> Lacking | None:
        if kept_as is not None:
            return Lacking(f"it computes with base weights in bfloat16 or float32, not in {kept_as}")
        if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float32):
            return Lacking("it computes bfloat16 and float32 on a CPU")
        if words := unlike_dense(spec):
            return Lacking(f"it computes layers of full attention and a dense MLP, without {', '.join(words)}")
        if sizes_of(spec) is None:
            return Lacking("it computes layers whose sizes are multiples of 16")
        found = look()
        return found if isinstance(found, Lacking) else None

    def plan(self, spec: ModelSpec, device: torch.device, dtype: torch.dtype, kept_as: KeptAs | None = None) -> Plan:
        assert kept_as is None, "the backend was chosen for weights in a form that it does not know"
        found, sizes = _kernels(dtype), sizes_of(spec)
        assert sizes is not None, "the backend was chosen for a model that it does not compute"
        return Plan(spec, device, found.rows, costs_of(found, spec, sizes))

    def load(
        self,
        spec: ModelSpec,
        source: TensorSource,
        device: torch.device,
        dtype: torch.dtype,
        kept_as: KeptAs | None = None,
    ) -> NativeModel:
        assert kept_as is None, "the backend was chosen for weights in a form that it does not know"
        found = _kernels(dtype)
        return NativeModel(found, spec, load_weights(spec, source, device, found.weights))


def _kernels(dtype: torch.dtype) -> Kernels:
    found = kernels()
    assert found is not None, "the backend was chosen where it has no kernels"
    return found.of(dtype)
