"""Quantised base weights as folders have them: which formats are read, and which stored tensors make which weight.

Headers and ``config.json`` alone say it, so both halves of the server ask here. The numbers are made of the parts by
:mod:`selfloop.engine.models.quantized`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import msgspec

from selfloop.types.errors import BadRequest
from selfloop.types.safetensors_header import StoredTensor
from selfloop.types.text_half import text_half

SUPPORTED = (
    "fp8 (block-scaled or weight_scale), compressed-tensors of 8 bits, mxfp4, GPTQ of 4 or 8 bits, AWQ gemm of 4 bits, "
    "bitsandbytes (int8, nf4, fp4)"
)
"""In words."""

Parts = Mapping[str, StoredTensor]
"""What a weight is stored as, by the part's role."""

_FP8, _BYTES, _INTS = frozenset({"F8_E4M3"}), frozenset({"U8"}), frozenset({"I32", "U32"})
# Of activations and caches, which are computed in the compute type here.
_NOT_OF_WEIGHTS = (".input_scale", ".activation_scale", ".output_scale", ".k_scale", ".v_scale", ".q_scale")
_WORD_BITS = 32
_STATE = ".quant_state.bitsandbytes__"
_MXFP4_BLOCK = 32


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a folder's weights are quantised.

    Args:
        method: the format, which a module of that name in ``engine/models/quantized`` reads.
        words: for people.
        bits: of a number.
        group_size: numbers of a row that share a scale; None for the whole row.
        block: rows and columns that share a scale.
        zero_offset: what is added to a stored zero point.
    """

    method: str
    words: str
    bits: int = 8
    group_size: int | None = None
    block: tuple[int, int] | None = None
    zero_offset: int = 0


def read_quantization(config: Path) -> Quantization | None:
    """Of a ``config.json``; None where the weights are plain, or there is no such file.

    Raises:
        BadRequest: they are in a format that is not read here; the text names those that are.
    """
    if not config.is_file():
        return None
    try:
        raw: object = msgspec.json.decode(config.read_bytes())
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _refusal(f"{config} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise _refusal(f"{config} holds no JSON object")
    return parse_quantization(text_half(cast(dict[str, Any], raw)).get("quantization_config"))


def parse_quantization(raw: object) -> Quantization | None:
    """Of the value of ``quantization_config``; raises as :func:`read_quantization` does."""
    if raw is None or raw == {}:
        return None
    if not isinstance(raw, dict):
        raise _refusal(f"quantization_config must be an object, is {type(raw).__name__}")
    config = cast(dict[str, Any], raw)
    method = config.get("quant_method")
    if method is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        method = "bitsandbytes"
    parse = _PARSERS.get(str(method))
    found = None if parse is None else parse(config)
    if found is None:
        kept = {key: value for key, value in config.items() if isinstance(value, str | int | bool)}
        raise _refusal(f"quantized base weights of this kind are not supported: {kept}; supported: {SUPPORTED}")
    return found


def _fp8(config: Mapping[str, Any]) -> Quantization | None:
    block = config.get("weight_block_size")
    if config.get("fmt", "e4m3") != "e4m3":
        return None
    if block is None:
        return Quantization("fp8", "fp8, a scale for each matrix or row")
    return _block_scaled(block)


def _block_scaled(block: Any) -> Quantization | None:
    if not isinstance(block, list) or len(cast(list[Any], block)) != 2:
        return None
    rows, columns = (_positive(size) for size in cast(list[Any], block))
    if rows is None or columns is None:
        return None
    return Quantization("fp8", f"fp8, a scale for each {rows} x {columns}", block=(rows, columns))


def _compressed_tensors(config: Mapping[str, Any]) -> Quantization | None:
    """The groups may name different layers, but all of them are written alike."""
    if config.get("format") not in ("float-quantized", "int-quantized", "naive-quantized"):
        return None
    groups: Any = config.get("config_groups")
    found: list[Quantization | None] = []
    for group in groups.values() if isinstance(groups, dict) else []:
        weights: Any = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or weights.get("num_bits") != 8 or weights.get("symmetric") is False:
            return None
        if weights.get("strategy") == "block":
            found.append(_block_scaled(weights.get("block_structure")))
        elif weights.get("strategy") in ("tensor", "channel"):
            found.append(Quantization("fp8", f"{weights.get('type')} of 8 bits, a scale for each matrix or row"))
        else:
            return None
    return found[0] if found and all(each == found[0] for each in found) else None


def _mxfp4(_config: Mapping[str, Any]) -> Quantization:
    return Quantization("mxfp4", "mxfp4", bits=4, group_size=_MXFP4_BLOCK)


def _gptq(config: Mapping[str, Any]) -> Quantization | None:
    bits, size = config.get("bits"), config.get("group_size", -1)
    layout = config.get("checkpoint_format", "gptq")
    if bits not in (4, 8) or layout not in ("gptq", "gptq_v2"):
        return None
    group = _positive(size)
    if group is None and size != -1:
        return None
    words = f"GPTQ of {bits} bits, {'a scale for each row' if group is None else f'groups of {group}'}"
    return Quantization("gptq", words, bits, group, zero_offset=1 if layout == "gptq" else 0)


def _awq(config: Mapping[str, Any]) -> Quantization | None:
    size = config.get("group_size", config.get("q_group_size", 128))
    group = _positive(size)
    is_gemm = str(config.get("version", "gemm")).lower() == "gemm"
    if config.get("bits", config.get("w_bit")) != 4 or not is_gemm or (group is None and size != -1):
        return None
    words = f"AWQ of 4 bits, {'a scale for each row' if group is None else f'groups of {group}'}"
    return Quantization("awq", words, 4, group)


def _bitsandbytes(config: Mapping[str, Any]) -> Quantization | None:
    if config.get("load_in_8bit") or config.get("_load_in_8bit"):
        return Quantization("bitsandbytes", "bitsandbytes int8")
    kind = config.get("bnb_4bit_quant_type", "fp4")
    return Quantization("bitsandbytes", f"bitsandbytes {kind}", bits=4) if kind in ("nf4", "fp4") else None


_PARSERS: dict[str, Callable[[Mapping[str, Any]], Quantization | None]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "mxfp4": _mxfp4,
    "gptq": _gptq,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
}


class Assembled(msgspec.Struct, frozen=True):
    """The weights of a model, each with its own shape; ``parts`` of those that are quantised, by their names."""

    tensors: dict[str, StoredTensor]
    parts: dict[str, Parts]


def assemble(stored: Mapping[str, StoredTensor], quantization: Quantization) -> Assembled:
    """Put the stored tensors together to weights.

    Raises:
        BadRequest: the parts of a weight do not belong together, or nothing is quantised.
    """
    rest = dict(stored)
    parts: dict[str, Parts] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in sorted(stored):
        found = _GROUPS[quantization.method](name, stored)
        if found is not None:
            weight, roles = found
            parts[weight] = {role: stored[part] for role, part in roles.items()}
            shapes[weight] = _shape(weight, parts[weight], quantization)
            for part in roles.values():
                rest.pop(part, None)
    if not parts:
        raise _refusal(f"config.json says that weights are quantized ({quantization.words}), and none is stored so")
    rest = {name: tensor for name, tensor in rest.items() if not name.endswith(_NOT_OF_WEIGHTS)}
    first = {name: next(iter(own.values())) for name, own in parts.items()}
    made = {name: replace(first[name], name=name, shape=shape, dtype=_DTYPE) for name, shape in shapes.items()}
    return Assembled({**rest, **made}, parts)


_DTYPE = "quantized"
_Group = tuple[str, dict[str, str]]


def _scaled(name: str, stored: Mapping[str, StoredTensor]) -> _Group | None:
    for suffix in ("_scale_inv", "_scale"):
        if name + suffix in stored:
            return name, {"weight": name, "scale": name + suffix}
    return None


def _blocks(name: str, stored: Mapping[str, StoredTensor]) -> _Group | None:
    weight = name.removesuffix("_blocks")
    if weight == name or f"{weight}_scales" not in stored:
        return None
    return weight, {"blocks": name, "scales": f"{weight}_scales"}


def _packed(name: str, stored: Mapping[str, StoredTensor]) -> _Group | None:
    module = name.removesuffix(".qweight")
    if module == name:
        return None
    roles = {role: f"{module}.{role}" for role in ("qweight", "qzeros", "scales", "g_idx")}
    there = {role: part for role, part in roles.items() if part in stored}
    if absent := sorted(roles.keys() - there.keys() - {"g_idx"}):
        raise _refusal(f"{name} is there without {', '.join(f'{module}.{role}' for role in absent)}")
    return f"{module}.weight", there


def _bnb(name: str, stored: Mapping[str, StoredTensor]) -> _Group | None:
    module = name.removesuffix(".weight")
    if module != name and f"{module}.SCB" in stored:
        layout = {"layout": f"{module}.weight_format"} if f"{module}.weight_format" in stored else {}
        return name, {"weight": name, "scale": f"{module}.SCB", **layout}
    state = next((part for part in (f"{name}{_STATE}{kind}" for kind in ("nf4", "fp4")) if part in stored), None)
    if state is None:
        return None
    roles = {role: f"{name}.{role}" for role in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")}
    there = {role: part for role, part in roles.items() if part in stored}
    if absent := sorted({"absmax", "quant_map"} - there.keys()):
        raise _refusal(f"{state} is there without {', '.join(f'{name}.{role}' for role in absent)}")
    return name, {"weight": name, "state": state, **there}


_GROUPS: dict[str, Callable[[str, Mapping[str, StoredTensor]], _Group | None]] = {
    "fp8": _scaled,
    "mxfp4": _blocks,
    "gptq": _packed,
    "awq": _packed,
    "bitsandbytes": _bnb,
}


def _shape(weight: str, parts: Parts, of: Quantization) -> tuple[int, ...]:
    """Of the weight that these parts make, as a model has it."""
    match of.method:
        case "fp8":
            return _scaled_shape(weight, parts["weight"], parts["scale"], of.block)
        case "mxfp4":
            blocks, scales = parts["blocks"], parts["scales"]
            _expect(weight, blocks.dtype in _BYTES and len(blocks.shape) == 4, blocks, "U8 of 4 dimensions")
            _expect(weight, scales.dtype in _BYTES and scales.shape == blocks.shape[:-1], scales, "U8 of its blocks")
            num, out, groups, _ = blocks.shape
            return num, groups * _MXFP4_BLOCK, out
        case "gptq":
            return _packed_shape(weight, parts, of, packed_rows=True)
        case "awq":
            return _packed_shape(weight, parts, of, packed_rows=False)
        case _:
            return _bnb_shape(weight, parts)


def _scaled_shape(
    weight: str, stored: StoredTensor, scale: StoredTensor, block: tuple[int, int] | None
) -> tuple[int, ...]:
    _expect(weight, stored.dtype in _FP8 | {"I8"}, stored, "F8_E4M3 or I8")
    _expect(weight, scale.dtype in ("F32", "BF16", "F16"), scale, "F32, BF16 or F16")
    shape = stored.shape
    if block is not None and scale.count > 1:
        wanted = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
        _expect(weight, scale.shape == wanted, scale, f"{list(wanted)}")
    else:
        wanted = (*shape[:-1], 1)
        fits = scale.count == 1 or scale.shape in (wanted, shape[:-1])
        _expect(weight, fits, scale, f"one number, or {list(wanted)}")
    return shape


def _packed_shape(weight: str, parts: Parts, of: Quantization, *, packed_rows: bool) -> tuple[int, ...]:
    qweight, qzeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    pack = _WORD_BITS // of.bits
    _expect(weight, qweight.dtype in _INTS and len(qweight.shape) == 2, qweight, "I32 of 2 dimensions")
    _expect(weight, scales.dtype in ("F16", "BF16", "F32") and len(scales.shape) == 2, scales, "a matrix of floats")
    rows, columns = qweight.shape
    in_features, out_features = (rows * pack, columns) if packed_rows else (rows, columns * pack)
    groups = -(-in_features // (of.group_size or in_features))
    _expect(weight, scales.shape == (groups, out_features), scales, f"{[groups, out_features]}")
    wanted = (groups, out_features // pack)
    _expect(weight, qzeros.dtype in _INTS and qzeros.shape == wanted, qzeros, f"I32 {list(wanted)}")
    order = parts.get("g_idx")
    _expect(weight, order is None or order.shape == (in_features,), order or qweight, f"{[in_features]}")
    return out_features, in_features


class _State(msgspec.Struct):
    shape: list[int]


def _bnb_shape(weight: str, parts: Parts) -> tuple[int, ...]:
    stored = parts["weight"]
    if "scale" in parts:
        _expect(weight, stored.dtype == "I8", stored, "I8")
        _expect(weight, parts["scale"].shape == stored.shape[:1], parts["scale"], f"{list(stored.shape[:1])}")
        return stored.shape
    state = parts["state"]
    with state.file.open("rb") as file:
        file.seek(state.start)
        try:
            shape = msgspec.json.decode(file.read(state.size), type=_State).shape
        except msgspec.MsgspecError as error:
            raise _refusal(f"{state.name} cannot be read: {error}") from error
    num = 1
    for size in shape:
        num *= size
    _expect(weight, stored.dtype == "U8" and stored.count == -(-num // 2), stored, f"U8 of {-(-num // 2)} numbers")
    return tuple(shape)


def _expect(weight: str, is_so: bool, part: StoredTensor, expected: str) -> None:
    if not is_so:
        raise _refusal(f"{weight}: {part.name} is {part.dtype} {list(part.shape)}, expected {expected}")


def _positive(size: object) -> int | None:
    return size if isinstance(size, int) and not isinstance(size, bool) and size > 0 else None


def _refusal(reason: str) -> BadRequest:
    return BadRequest("base_model", reason)
