"""What models would take of a device: ``python -m selfloop.engine.fit PATH... [--memory-bytes N]``.

Prints a JSON object a line, the :class:`FitAnswer` of each path: a model folder, or a ``config.json`` alone. No weights
are loaded; the figures are those that an engine that loads the model goes by.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from selfloop.engine.backends.base import Planned
from selfloop.engine.backends.device import (
    cache_bytes,
    default_kv_tokens,
    is_here,
    pick_device,
    total_memory,
)
from selfloop.engine.backends.select import compute_dtype, plan
from selfloop.engine.lora.adapter import AdapterShape
from selfloop.engine.memory_share import MemoryShare
from selfloop.engine.models.config import read_object
from selfloop.engine.models.quantized.codes import weights_bytes
from selfloop.engine.models.registry import parse_spec, read_spec
from selfloop.engine.models.spec import ModelSpec
from selfloop.engine.models.weights import stored_weights
from selfloop.engine.train.memory import PassMemory
from selfloop.types.errors import OperationFailed, model_invalid
from selfloop.types.fit import Fit, FitAnswer, PassPlan
from selfloop.types.lora import LoraTargets
from selfloop.types.model_folder import SUPPORTED_MODEL_TYPES
from selfloop.types.model_weights import ModelWeights
from selfloop.types.settings import BaseDtype, EngineLimits
from selfloop.types.text_half import text_half


@dataclass(frozen=True, slots=True)
class Asked:
    """On which device, and for what run.

    Args:
        memory_bytes: of a device that need not be there; None for what this machine's has.
        context: tokens of the pass to plan; None for the longest.
        limits: as the engine is given them, and ``base_dtype`` likewise.
    """

    device: str = "auto"
    dtype: str = "auto"
    memory_bytes: int | None = None
    rank: int = 32
    context: int | None = None
    limits: EngineLimits = field(default_factory=EngineLimits)
    base_dtype: BaseDtype = "auto"


def fit(path: Path, asked: Asked) -> Fit:
    """Raises OperationFailed: ``path`` is no model that is computed here; the text says what is missing."""
    spec, stored = _read(path)
    return fit_of(spec, asked, stored)


def fit_of(spec: ModelSpec, asked: Asked, stored: ModelWeights | None = None) -> Fit:
    """As :func:`fit`, of a model that is described."""
    device = pick_device(asked.device)
    if asked.memory_bytes is None and not is_here(device):
        raise OperationFailed(f"this machine has no {device} device; say how much memory one has (--memory)")
    memory_bytes = total_memory(device) if asked.memory_bytes is None else asked.memory_bytes
    kept_as = None if asked.base_dtype == "auto" else asked.base_dtype
    dtype = compute_dtype(asked.dtype, spec, device, () if stored is None else stored.dtypes, kept_as)
    choice, planned = plan(spec, device, dtype, kept_as)
    # As a new run has them.
    shape = AdapterShape(spec, asked.rank, LoraTargets(experts=True)) if _takes_adapters(spec) else None
    passes = None if planned is None or shape is None else pass_plan(planned, shape, memory_bytes, asked)
    return Fit(
        model_type=spec.model_type,
        backend=choice.backend.name,
        passed_over={name: lacking.reason for name, lacking in choice.passed_over.items()},
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        base_dtype=asked.base_dtype,
        memory_bytes=memory_bytes,
        num_parameters=spec.num_parameters,
        stored_bytes=None if stored is None else stored.size_bytes,
        quantization="" if stored is None or stored.quantization is None else stored.quantization.words,
        weights_bytes=weights_bytes(spec, dtype, kept_as),
        context=spec.context,
        rank=asked.rank,
        adapter_parameters=0 if shape is None else shape.num_parameters,
        adapted=[] if shape is None else shape.module_names,
        frozen=_frozen_share(spec),
        plan=passes,
    )


def _read(path: Path) -> tuple[ModelSpec, ModelWeights | None]:
    if path.is_file():
        path = path.parent if (path.parent / "model.safetensors").is_file() else path
    config = path / "config.json" if path.is_dir() else path
    if not config.is_file():
        raise model_invalid(f"{path} has no config.json")
    raw = text_half(read_object(config))
    folder = config.parent
    if not any(folder.glob("*.safetensors*")):
        if raw.get("model_type") not in SUPPORTED_MODEL_TYPES:
            raise model_invalid(
                f"{folder} has no *.safetensors, whose headers describe a {raw.get('model_type')!r}; from config.json "
                f"alone: {', '.join(sorted(SUPPORTED_MODEL_TYPES))}"
            )
        return parse_spec(raw, {}), None
    spec = read_spec(folder)
    return spec, stored_weights(folder, spec)


def _takes_adapters(spec: ModelSpec) -> bool:
    return any(layer.groups for layer in spec.layers)


def _frozen_share(spec: ModelSpec) -> float:
    """Of the elements of the layers' matrices, those of matrices that take no adapter."""
    every = [p for layer in spec.layers for block in (layer.mixer, layer.feed_forward) for p in block.projections]
    own = [p for layer in spec.layers for group in layer.groups for p in group.projections]
    sizes = [sum(p.in_features * p.out_features for p in projections) for projections in (every, own)]
    return 1 - sizes[1] / sizes[0] if sizes[0] else 0.0


def pass_plan(planned: Planned, shape: AdapterShape, memory_bytes: int, asked: Asked) -> PassPlan:
    """What a run of that shape takes on a device of so much memory, within the limits that are asked for."""
    spec, costs = planned.spec, planned.costs()
    share = MemoryShare.of(planned, asked.limits, memory_bytes)
    memory = PassMemory.unchecked(planned, share.activation_bytes)
    free_bytes = max(0, share.total_bytes - costs.weights)
    token_bytes = spec.cache_elements * planned.dtype.itemsize
    cache_tokens = asked.limits.max_kv_tokens
    if cache_tokens is None:
        cache_tokens = default_kv_tokens(token_bytes, spec.context, planned.device, free_bytes)
    in_cache = cache_bytes(cache_tokens, token_bytes, spec.state_elements)
    longest = max(0, min(spec.context, memory.longest(shape, with_gradient=True)))
    tokens = longest if asked.context is None else asked.context
    recompute = memory.recomputes(tokens, shape)
    return PassPlan(
        weights_bytes=costs.weights,
        pass_limit_bytes=share.activation_bytes,
        kept_limit_bytes=share.forward_cache_bytes,
        run_limit_bytes=share.left_for_runs(planned, in_cache),
        longest_trained=longest,
        longest_kept=max(0, min(spec.context, memory.longest(shape, with_gradient=True, recompute=False))),
        pass_bytes=memory.needed(tokens, shape, with_gradient=True, recompute=recompute),
        pass_tokens=tokens,
        least_pass_bytes=memory.needed(1, shape, with_gradient=True, recompute=True),
        cache_bytes=in_cache,
        cache_tokens=cache_tokens,
        longest_sampled=min(spec.context, cache_tokens, free_bytes // token_bytes),
    )


def answers(paths: list[Path], asked: Asked) -> Iterator[FitAnswer]:
    """Of each path, in their order."""
    for path in paths:
        try:
            yield FitAnswer(fit(path, asked))
        except OperationFailed as error:
            yield FitAnswer(error=str(error))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--base-dtype", default="auto")
    parser.add_argument("--memory-bytes", type=int)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--context", type=int)
    parser.add_argument("--activation-bytes", type=int)
    parser.add_argument("--max-kv-tokens", type=int)
    args = parser.parse_args()
    limits = EngineLimits(activation_bytes=args.activation_bytes, max_kv_tokens=args.max_kv_tokens)
    asked = Asked(args.device, args.dtype, args.memory_bytes, args.rank, args.context, limits, args.base_dtype)
    for answer in answers(args.paths, asked):
        print(msgspec.json.encode(answer).decode(), flush=True)


if __name__ == "__main__":
    main()
