"""Is a merged model what was served, the base model with its adapter beside it? Both read a few tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from selfloop.engine.backends.base import Varlen
from selfloop.engine.backends.select import open_reference
from selfloop.engine.files.peft import LoadedAdapter
from selfloop.engine.lora.adapter import Adapter
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.models.registry import read_spec
from selfloop.engine.models.spec import ModelSpec
from selfloop.engine.models.weights import SafetensorsSource, TensorSource
from selfloop.types.errors import OperationFailed

# The largest difference of logits, as a part of the largest logit, that rounding to the base's dtype may make.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_NUM_TOKENS = 24


Logits = Callable[[Tensor], Tensor]
"""A model's logits (T, V) in float32 of tokens T."""


class ModelOnDisk(NamedTuple):
    """A model's shape, and where its weights are read from."""

    spec: ModelSpec
    tensors: TensorSource


class Comparison(NamedTuple):
    """Of the logits, in float32.

    Args:
        difference: the largest between the merged model and base plus adapter.
        tolerance: what it may be.
        effect: the largest between base plus adapter and the base alone.
    """

    difference: float
    tolerance: float
    effect: float


@torch.inference_mode()
def compare(base: ModelOnDisk, adapter: LoadedAdapter, merged: Logits, stored: torch.dtype) -> Comparison:
    """Logits of ``merged``, whose weights are kept in ``stored``, beside those of ``base`` plus ``adapter``.

    Raises:
        OperationFailed: one of them is not a whole model.
    """
    num = min(_NUM_TOKENS, base.spec.context)
    tokens_T = torch.randint(base.spec.vocab_size, (num,), generator=torch.Generator().manual_seed(0))
    multiplied = adapter.shape.adapter(adapter.theta_P, adapter.alpha)
    expected_TV, base_TV = logits_on_disk(base, tokens_T, multiplied), logits_on_disk(base, tokens_T)
    merged_TV = merged(tokens_T)
    if merged_TV.shape != expected_TV.shape:
        raise OperationFailed(f"the merged model gives logits {list(merged_TV.shape)}, not {list(expected_TV.shape)}")
    limit = _TOLERANCE[stored] * float(expected_TV.abs().max())
    return Comparison(_largest(merged_TV - expected_TV), limit, _largest(expected_TV - base_TV))


def model_in(folder: Path) -> ModelOnDisk:
    """The model of a Hugging Face folder."""
    spec = read_spec(folder)
    return ModelOnDisk(spec, SafetensorsSource(folder, spec))


@torch.inference_mode()
def logits_on_disk(model: ModelOnDisk, tokens_T: Tensor, adapter: Adapter | None = None) -> Tensor:
    """Logits (T, V) in float32, of our own decoder, as it serves the model."""
    reference, num = open_reference(model.spec, model.tensors), len(tokens_T)
    batch = AdapterBatch.of([(num, adapter)])
    h_TD = reference.forward(Varlen.whole(tokens_T, [num]), batch)
    return reference.logits(h_TD, batch)


def _largest(difference_TV: Tensor) -> float:
    """The largest magnitude; infinite when a value is not a number."""
    largest = float(difference_TV.abs().max())
    return largest if largest == largest else float("inf")
