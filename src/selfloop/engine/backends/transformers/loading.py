"""A model of transformers from a local folder: frozen, with places for adapters, and tried before it is used."""

import logging
import time
import warnings
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as logging_of_transformers

from selfloop.engine.backends.transformers.adapted import AdapterPlaces
from selfloop.engine.backends.transformers.head import ModelHead
from selfloop.engine.backends.transformers.model import TransformersModel
from selfloop.engine.backends.transformers.passes import Passes
from selfloop.engine.backends.transformers.self_test import self_test
from selfloop.engine.models.config import read_object
from selfloop.engine.models.stored import StoredSpec
from selfloop.engine.models.weights import TensorSource
from selfloop.types.errors import model_invalid
from selfloop.types.quantization import read_quantization
from selfloop.types.transformers_models import loaded_as

# As in :mod:`selfloop.types.model_weights`.
_TEXT_NAMES = {
    r"^model\.language_model\.": "model.",
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}

log = logging.getLogger("selfloop.engine")


def load(spec: StoredSpec, source: TensorSource, device: torch.device, dtype: torch.dtype) -> TransformersModel:
    """Raises OperationFailed: transformers cannot load the folder, or the model is not what the engine needs."""
    causal = _read(spec, source, dtype).to(device).eval().requires_grad_(requires_grad=False)
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


def without_progress() -> None:
    """From here on transformers draws no bars: their thread would be one too many for a process that forks."""
    logging_of_transformers.disable_progress_bar()


def _read(spec: StoredSpec, source: TensorSource, dtype: torch.dtype) -> Any:
    """No network, no code of the folder, no pickles; quantised weights are made plain by our own code."""
    folder = str(spec.folder)
    without_progress()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if read_quantization(spec.folder / "config.json") is None:
                causal, report = _from_folder(spec, dtype)
            else:
                causal, report = _from_source(spec, source, dtype)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise model_invalid(f"transformers cannot load {folder}: {error}") from error
    own = {name for name, _ in spec.stored}
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        found = sorted(str(name) for name in report.get(kind) or [])
        if kind == "unexpected_keys":
            # What is not of the text half is left out on purpose.
            found = [name for name in found if name in own]
        if found:
            raise model_invalid(f"{folder} has {len(found)} {kind.replace('_', ' ')} in transformers, e.g. {found[:3]}")
    return causal


def _from_folder(spec: StoredSpec, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """The folder's model, or its text half."""
    folder = str(spec.folder)
    config = _config(spec)
    text = config.get_text_config()
    if text is not config:
        # The two halves may say of the output layer what the other does not; what is stored decides.
        text.tie_word_embeddings = spec.tied
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        config=text,
        key_mapping=None if text is config else _TEXT_NAMES,
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    return loaded


def _from_source(spec: StoredSpec, source: TensorSource, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """The model of the folder's configuration, or its text half, as if its weights were plain."""
    whole = _config(spec)
    config = whole.get_text_config()
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if config is not whole:
        config.tie_word_embeddings = spec.tied
    weights = {name: tensor.to(dtype) for name, tensor in source.read(source.names())}
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return kind.from_pretrained(None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True)


def _config(spec: StoredSpec) -> Any:
    raw = read_object(spec.folder / "config.json")
    kind = loaded_as(raw)
    if kind == raw.get("model_type"):
        return AutoConfig.from_pretrained(str(spec.folder), local_files_only=True, trust_remote_code=False)
    return AutoConfig.for_model(
        kind, **{name: of for name, of in raw.items() if name not in ("model_type", "auto_map")}
    )
