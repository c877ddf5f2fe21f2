"""A model of transformers from a local folder: frozen, with places for adapters, and tried before it is used."""

import logging
import time
import warnings
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from selfloop.engine.backends.transformers.adapted import AdapterPlaces
from selfloop.engine.backends.transformers.head import ModelHead
from selfloop.engine.backends.transformers.model import TransformersModel
from selfloop.engine.backends.transformers.passes import Passes
from selfloop.engine.backends.transformers.self_test import self_test
from selfloop.engine.models.stored import StoredSpec
from selfloop.types.errors import model_invalid

log = logging.getLogger("selfloop.engine")


def load(spec: StoredSpec, device: torch.device, dtype: torch.dtype) -> TransformersModel:
    """Raises OperationFailed: transformers cannot load the folder, or the model is not what the engine needs."""
    causal = _read(spec, dtype).to(device).eval().requires_grad_(requires_grad=False)
    decoder: Any = getattr(causal, "model", None)
    for name, module in (("model", decoder), ("model.layers", getattr(decoder, "layers", None))):
        if not isinstance(module, nn.Module):
            raise model_invalid(f"{spec.model_type} has no {name} in transformers")
    if type(getattr(causal, "lm_head", None)) is not nn.Linear:
        raise model_invalid(f"{spec.model_type} has no plain linear lm_head in transformers")
    if getattr(causal.config, "attn_logit_softcapping", None) is not None:
        # Of PyTorch's fused attention nothing can be capped.
        causal.set_attn_implementation("eager")
    passes = Passes(decoder, causal.config, AdapterPlaces(spec, decoder))
    start = time.perf_counter()
    findings = self_test(spec, passes, dtype, device)
    name = f"{type(causal).__name__}, {causal.config._attn_implementation}"
    model = TransformersModel(spec, passes, ModelHead(causal), findings, name, dtype)
    log.info("tried %s in %.1f s", name, time.perf_counter() - start)
    return model


def _read(spec: StoredSpec, dtype: torch.dtype) -> Any:
    """No network, no code of the folder, no pickles."""
    folder = str(spec.folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise model_invalid(f"transformers cannot load {folder}: {error}") from error
    causal, report = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        found = sorted(str(name) for name in report.get(kind) or [])
        if found:
            raise model_invalid(f"{folder} has {len(found)} {kind.replace('_', ' ')} in transformers, e.g. {found[:3]}")
    return causal
