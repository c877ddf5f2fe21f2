"""An adapter in PEFT's file format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from selfloop.engine.files.base_copies import BaseTensors, split_copies
from selfloop.engine.files.directory import DirectoryWriter
from selfloop.engine.files.stacked_experts import (
    EXPERT_PARAMETERS,
    ExpertPart,
    Unstacked,
    doubled,
    doubled_rank,
    parameter_names,
    unstack,
)
from selfloop.engine.lora.adapter import AdapterShape
from selfloop.engine.models.spec import HEAD_MODULE, ModelSpec
from selfloop.engine.models.weights import DTYPES
from selfloop.types.errors import OperationFailed
from selfloop.types.lora import MAX_LORA_RANK, LoraTargets
from selfloop.types.safetensors_header import BadSafetensors, StoredTensor, read_header

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_PREFIX = "base_model.model."
_MAX_CONFIG_BYTES = 2**20
# Of an adapter that somebody else made. The product of the matrices is multiplied by alpha / rank.
_MAX_ALPHA = 2.0**20

# Features that change what the files mean; any value but these (or an absent key) is refused.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_rslora": (False,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "lora_bias": (False,),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "megatron_config": (None,),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "ensure_weight_tying": (False, None),
    # The others (pissa, olora, corda, loftq) train against a changed base model.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


# Stacks of experts that are in memory at a time: A and B of both of a layer's.
_STACKS = 4
_EXPERT = re.compile(r"\.experts\.\d+\.")


class Ranks(NamedTuple):
    """Of all matrices, and of stacked experts' gate and up as one."""

    all: int
    gate_up: int

    @classmethod
    def of(cls, rank: int, raw: Mapping[str, Any], file_has: Unstacked) -> "Ranks":
        """Each expert's own matrices, where the file has those, have the rank of all."""
        both = doubled_rank(raw) or rank
        return cls(rank, both if file_has.parts else rank)


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
    base_model: str | None = None,
) -> None:
    """Write both files, in float32, so that ``PeftModel.from_pretrained`` reads them."""
    writer.tensors(WEIGHTS_FILE, {_key(p.name): p.view for p in shape.named(theta_P)})
    writer.json(CONFIG_FILE, _peft_config(shape, alpha, base_model))


def read_peft(directory: Path, spec: ModelSpec, targets: LoraTargets | None = None) -> LoadedAdapter:
    """Read and check an adapter; projections of ``targets`` that it leaves out get B = 0, which changes nothing.

    Without ``targets`` they are every projection of every layer; experts and the output layer if they are there.

    Raises:
        OperationFailed: files are missing or unreadable, use a feature beyond plain LoRA, or do not fit the model.
    """
    rank, alpha, raw = _read_config(directory / CONFIG_FILE)
    if raw.get("modules_to_save"):
        raise _invalid(f"{CONFIG_FILE}: modules_to_save = {raw['modules_to_save']!r} is not supported")
    file_has = unstack(_stored(directory / WEIGHTS_FILE), spec, _PREFIX, raw)
    return _read(directory / WEIGHTS_FILE, file_has, spec, Ranks.of(rank, raw, file_has), alpha, targets)


def read_foreign_peft(directory: Path, spec: ModelSpec, base: BaseTensors) -> LoadedAdapter:
    """As :func:`read_peft`, of an adapter that somebody else made: nothing that it says of itself is believed.

    Copies of the base model's weights, which the PEFT library puts beside an adapter of the output layer, are left
    where they equal ``base``.

    Raises:
        OperationFailed: as above, or such a copy is of another model; nothing large was read by then.
    """
    rank, alpha, raw = _read_config(directory / CONFIG_FILE)
    if rank > MAX_LORA_RANK:
        raise _invalid(f"{CONFIG_FILE}: r must be from 1 to {MAX_LORA_RANK}, is {rank!r}")
    if not 0 < alpha <= _MAX_ALPHA:
        raise _invalid(f"{CONFIG_FILE}: lora_alpha must be more than 0 and at most {_MAX_ALPHA:g}, is {alpha!r}")
    stored, copies = split_copies(_stored(directory / WEIGHTS_FILE), _PREFIX)
    _check_targets(raw, stored)
    file_has = unstack(stored, spec, _PREFIX, raw)
    ranks = Ranks.of(rank, raw, file_has)
    if max(ranks) > MAX_LORA_RANK:
        raise _invalid(f"{CONFIG_FILE}: rank_pattern must be at most {MAX_LORA_RANK}, is {max(ranks)}")
    _check_stored(file_has.stored, _shapes(file_has, spec, ranks, _targets_of(file_has.stored)))
    base.check_copies(copies, raw.get("modules_to_save") or [])
    return _read(directory / WEIGHTS_FILE, file_has, spec, ranks, alpha, None)


def _read(
    path: Path, file_has: Unstacked, spec: ModelSpec, ranks: Ranks, alpha: float, targets: LoraTargets | None
) -> LoadedAdapter:
    """What has less than the highest rank gets rows of A that a fresh adapter has, and columns of zeros in B."""
    if targets is None:
        targets = _targets_of(file_has.stored)
    # Memory is taken only for what the file has.
    _check_stored(file_has.stored, _shapes(file_has, spec, ranks, targets))
    shape = AdapterShape(spec, max(ranks), targets)
    theta_P = shape.initial(seed=0)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = _Tensors(file, file_has.parts)
            for parameter in shape.named(theta_P):
                if _key(parameter.name) in file_has.stored:
                    tensor = tensors.get(_key(parameter.name))
                    _check_finite(parameter.name, tensor)
                    rows, columns = tensor.shape
                    parameter.view[:rows, :columns].copy_(tensor)
    except SafetensorError as error:
        raise _invalid(f"{WEIGHTS_FILE} cannot be read: {error}") from error
    return LoadedAdapter(shape, alpha * (shape.rank // ranks.all), theta_P)


class _Tensors:
    """Tensors of an open file, or their parts of its stacks, of which the last ones are kept."""

    def __init__(self, file: Any, parts: Mapping[str, ExpertPart]) -> None:
        self._read = lru_cache(maxsize=_STACKS)(file.get_tensor)
        self._file = file
        self._parts = parts

    def get(self, name: str) -> Tensor:
        part = self._parts.get(name)
        return self._file.get_tensor(name) if part is None else part.of(self._read(part.tensor))


def _targets_of(stored: Mapping[str, StoredTensor]) -> LoraTargets:
    experts = any(_EXPERT.search(name) for name in stored)
    return LoraTargets(unembed=_key(f"{HEAD_MODULE}.lora_A") in stored, experts=experts)


def _shapes(file_has: Unstacked, spec: ModelSpec, ranks: Ranks, targets: LoraTargets) -> dict[str, tuple[int, ...]]:
    """Every tensor that there may be, by its name in the file."""
    shapes = _shapes_of_rank(file_has.stored, spec, ranks.all, targets)
    if ranks.gate_up != ranks.all:
        of_gate_up = _shapes_of_rank(file_has.stored, spec, ranks.gate_up, targets)
        shapes |= {name: of_gate_up[name] for name, part in file_has.parts.items() if part.is_gate_up}
    return shapes


def _shapes_of_rank(
    stored: Mapping[str, StoredTensor], spec: ModelSpec, rank: int, targets: LoraTargets
) -> dict[str, tuple[int, ...]]:
    largest = max((size for tensor in stored.values() for size in tensor.shape), default=0)
    if stored and rank > largest:
        name = next(iter(stored))
        raise _invalid(f"{CONFIG_FILE}: r is {rank}, but {name} has shape {list(stored[name].shape)}")
    shape = AdapterShape(spec, rank, targets)
    nothing_P = torch.empty(shape.num_parameters, device="meta")
    return {_key(parameter.name): tuple(parameter.view.shape) for parameter in shape.named(nothing_P)}


def _check_stored(stored: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    _check_pairs(set(stored))
    unexpected = sorted(stored.keys() - shapes.keys())
    if unexpected:
        raise _invalid(f"adapter has {len(unexpected)} tensors that this model has no place for, e.g. {unexpected[:3]}")
    for name, tensor in stored.items():
        if tensor.shape != shapes[name]:
            raise _invalid(f"{_short(name)} has shape {list(tensor.shape)}, expected {list(shapes[name])}")
        if tensor.dtype not in DTYPES:
            raise _invalid(f"{_short(name)} is {tensor.dtype}; adapters are {', '.join(DTYPES)}")


def _short(key: str) -> str:
    """A name in the file as the rest of the engine has it."""
    return key.removeprefix(_PREFIX).removeprefix("model.").removesuffix(".weight")


def _check_targets(raw: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> None:
    """The PEFT library loads only what ``target_modules`` and ``target_parameters`` name."""
    named, parameters = raw.get("target_modules"), parameter_names(raw)
    if isinstance(named, str):
        return  # "all-linear", or a pattern of PEFT's own
    if named is None and parameters:
        named = []
    if not isinstance(named, list) or not (named or parameters) or not all(isinstance(name, str) for name in named):
        raise _invalid(f"{CONFIG_FILE}: target_modules must be a list of names, is {named!r}")
    # A parameter is named by its own name within a module.
    modules = [*named, *(name.removesuffix(".weight") for name in parameters), *_modules_of(parameters)]
    for key in stored:
        module = key.removeprefix(_PREFIX).partition(".lora_")[0]
        if not any(module == name or module.endswith(f".{name}") for name in modules):
            raise _invalid(f"adapter has {key}, which {CONFIG_FILE}: target_modules does not name")


def _modules_of(parameters: list[str]) -> list[str]:
    """What holds the stacks of experts that ``parameters`` name."""
    stacks = [name for name in parameters if name.rpartition(".")[2] in EXPERT_PARAMETERS]
    return ["mlp.experts", "mlp.experts.base_layer"] if stacks else []


def _invalid(reason: str) -> OperationFailed:
    return OperationFailed(reason, "CheckpointInvalid")


def _key(name: str) -> str:
    return f"{_PREFIX}{name if name.startswith(HEAD_MODULE) else 'model.' + name}.weight"


def _peft_config(shape: AdapterShape, alpha: float, base_model: str | None) -> dict[str, Any]:
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
        "target_modules": shape.module_names,
        **_parameters(shape, alpha),
    }


def _parameters(shape: AdapterShape, alpha: float) -> dict[str, Any]:
    """What PEFT is to adapt besides the modules that are named; as gate and up are one there, they have both ranks."""
    if shape.stacks_experts:
        return {"target_parameters": [f"mlp.experts.{name}" for name in EXPERT_PARAMETERS]} | doubled(shape.rank, alpha)
    return {"target_parameters": shape.parameter_names} if shape.parameter_names else {}


def _read_config(path: Path) -> tuple[int, float, dict[str, Any]]:
    if not path.is_file():
        raise _invalid(f"no {CONFIG_FILE} in the checkpoint")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise _invalid(f"{CONFIG_FILE} cannot be read: it has more than {_MAX_CONFIG_BYTES} bytes")
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _invalid(f"{CONFIG_FILE} cannot be read: {error}") from error
    if not isinstance(raw, dict):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise _invalid(f"{CONFIG_FILE} cannot be read: it holds no object")
    if raw.get("peft_type") != "LORA":
        raise _invalid(f"peft_type {raw.get('peft_type')!r} is not supported")
    for name, plain in _PLAIN.items():
        if name in raw and raw[name] not in plain:
            raise _invalid(f"{CONFIG_FILE}: {name} = {raw[name]!r} is not supported")
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank < 2**31:
        raise _invalid(f"{CONFIG_FILE}: r must be a positive integer, is {rank!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < float("inf"):
        raise _invalid(f"{CONFIG_FILE}: lora_alpha must be a number, is {alpha!r}")
    try:
        return rank, float(alpha), raw
    except OverflowError as error:
        raise _invalid(f"{CONFIG_FILE}: lora_alpha must be a number, is an integer beyond all of them") from error


def _stored(path: Path) -> dict[str, StoredTensor]:
    if not path.is_file():
        raise _invalid(f"no {WEIGHTS_FILE} in the checkpoint")
    try:
        return {tensor.name: tensor for tensor in read_header(path)}
    except BadSafetensors as error:
        raise _invalid(f"{WEIGHTS_FILE} cannot be read: {error}") from error


def _check_pairs(names: set[str]) -> None:
    """Every A needs its B and the other way round."""
    swap = {"lora_A": "lora_B", "lora_B": "lora_A"}
    for name in names:
        for kind, other in swap.items():
            if kind in name and name.replace(kind, other) not in names:
                raise _invalid(f"adapter has {name} without its {other}")


def _check_finite(name: str, tensor: Tensor) -> None:
    if not bool(tensor.isfinite().all()):
        raise _invalid(f"{name} has values that are not finite")
