"""transformers' own code as a backend, for models that no family here describes. It is imported when it is chosen."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from selfloop.engine.backends.base import Lacking
from selfloop.engine.models.spec import ModelSpec
from selfloop.engine.models.stored import StoredSpec
from selfloop.engine.models.weights import TensorSource
from selfloop.types.settings import KeptAs

if TYPE_CHECKING:
    from selfloop.engine.backends.transformers.model import TransformersModel


class TransformersBackend:
    """Computes whatever ``AutoModelForCausalLM`` knows, on any device, without paging and without code of a folder."""

    name = "transformers"

    def lacks(
        self, spec: ModelSpec, device: torch.device, dtype: torch.dtype, kept_as: KeptAs | None = None
    ) -> Lacking | None:
        if kept_as is not None:
            return Lacking(f"base weights in {kept_as} are for models of families of the engine's own (--base-dtype)")
        if find_spec("transformers") is None:
            return Lacking("transformers is not installed", "; pip install transformers")
        # What else there is to say of a type, a folder's own code or quantised weights is said when it is described.
        if not isinstance(spec, StoredSpec):
            return Lacking("it loads models of folders that no family here describes")
        return None

    def plan(self, spec: ModelSpec, device: torch.device, dtype: torch.dtype, kept_as: KeptAs | None = None) -> None:
        """Its costs are counted on what transformers makes of the whole folder."""

    def load(
        self,
        spec: ModelSpec,
        source: TensorSource,
        device: torch.device,
        dtype: torch.dtype,
        kept_as: KeptAs | None = None,
    ) -> "TransformersModel":
        from selfloop.engine.backends.transformers.loading import load

        assert isinstance(spec, StoredSpec)
        assert kept_as is None, "the backend was chosen for weights in a form that it does not know"
        return load(spec, source, device, dtype)
