"""An adapter in PEFT's file format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from selfloop.engine.files.directory import DirectoryWriter
from selfloop.engine.lora.adapter import AdapterShape
from selfloop.engine.lora.targets import HEAD, adapted_groups, head_group
from selfloop.engine.models.config import ModelConfig
from selfloop.types.errors import OperationFailed
from selfloop.types.lora import LoraTargets

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_PREFIX = "base_model.model."

# Features that change what the files mean; any value but these (or an absent key) is refused.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_rslora": (False,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "lora_bias": (False,),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "megatron_config": (None,),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    # The others (pissa, olora, corda, loftq) train against a changed base model.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter from files: flat float32 parameters on the CPU, in the engine's layout."""

    shape: AdapterShape
    alpha: float
    theta_P: Tensor


def write_peft(
    writer: DirectoryWriter,
    shape: AdapterShape,
    theta_P: Tensor,
    alpha: float,
    config: ModelConfig,
    base_model: str | None = None,
) -> None:
    """Write both files, in float32, so that ``PeftModel.from_pretrained`` reads them."""
    writer.tensors(WEIGHTS_FILE, {_key(p.name): p.view for p in shape.named(theta_P)})
    writer.json(CONFIG_FILE, _peft_config(shape, alpha, config, base_model))


def read_peft(directory: Path, config: ModelConfig, targets: LoraTargets | None = None) -> LoadedAdapter:
    """Read and check an adapter; projections of ``targets`` that it leaves out get B = 0, which changes nothing.

    Without ``targets`` they are every projection of every layer, and the output layer if it is there.

    Raises:
        OperationFailed: files are missing or unreadable, use a feature beyond plain LoRA, or do not fit the model.
    """
    rank, alpha = _read_config(directory / CONFIG_FILE)
    tensors = _read_tensors(directory / WEIGHTS_FILE)
    _check_pairs(set(tensors))
    if targets is None:
        targets = LoraTargets(unembed=_key(f"{HEAD}.lora_A") in tensors)
    shape = AdapterShape(config, rank, targets)
    theta_P = shape.initial(seed=0)
    for parameter in shape.named(theta_P):
        tensor = tensors.pop(_key(parameter.name), None)
        if tensor is not None:
            _check(parameter.name, tensor, parameter.view)
            parameter.view.copy_(tensor)
    if tensors:
        raise OperationFailed(
            f"adapter has {len(tensors)} tensors that this model has no place for, e.g. {sorted(tensors)[:3]}",
            "CheckpointInvalid",
        )
    return LoadedAdapter(shape, alpha, theta_P)


def _key(name: str) -> str:
    return f"{_PREFIX}{name if name.startswith(HEAD) else 'model.' + name}.weight"


def _peft_config(shape: AdapterShape, alpha: float, config: ModelConfig, base_model: str | None) -> dict[str, Any]:
    groups = [*adapted_groups(config, shape.targets), head_group(config) if shape.targets.unembed else None]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": shape.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "target_modules": [target.name for group in groups if group for target in group.targets],
    }


def _read_config(path: Path) -> tuple[int, float]:
    if not path.is_file():
        raise OperationFailed(f"no {CONFIG_FILE} in the checkpoint", "CheckpointInvalid")
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OperationFailed(f"{CONFIG_FILE} cannot be read: {error}", "CheckpointInvalid") from error
    if raw.get("peft_type") != "LORA":
        raise OperationFailed(f"peft_type {raw.get('peft_type')!r} is not supported", "CheckpointInvalid")
    for name, plain in _PLAIN.items():
        if name in raw and raw[name] not in plain:
            raise OperationFailed(f"{CONFIG_FILE}: {name} = {raw[name]!r} is not supported", "CheckpointInvalid")
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1:
        raise OperationFailed(f"{CONFIG_FILE}: r must be a positive integer, is {rank!r}", "CheckpointInvalid")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise OperationFailed(f"{CONFIG_FILE}: lora_alpha must be a number, is {alpha!r}", "CheckpointInvalid")
    return rank, float(alpha)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise OperationFailed(f"no {WEIGHTS_FILE} in the checkpoint", "CheckpointInvalid")
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise OperationFailed(f"{WEIGHTS_FILE} cannot be read: {error}", "CheckpointInvalid") from error


def _check_pairs(names: set[str]) -> None:
    """Every A needs its B and the other way round."""
    swap = {"lora_A": "lora_B", "lora_B": "lora_A"}
    for name in names:
        for kind, other in swap.items():
            if kind in name and name.replace(kind, other) not in names:
                raise OperationFailed(f"adapter has {name} without its {other}", "CheckpointInvalid")


def _check(name: str, tensor: Tensor, place: Tensor) -> None:
    if tensor.shape != place.shape:
        raise OperationFailed(
            f"{name} has shape {list(tensor.shape)}, expected {list(place.shape)}", "CheckpointInvalid"
        )
    if not bool(tensor.isfinite().all()):
        raise OperationFailed(f"{name} has values that are not finite", "CheckpointInvalid")
