"""Weights quantised by a writing of each format of its own: loops over numbers, after the formats' descriptions.

Each writer gives the tensors that a folder has for a weight, and the weight that they stand for.
"""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Written = tuple[dict[str, Tensor], Tensor]
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word, counted from its low end, its n-th column is
FP4 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)


def fp8_blocks(name: str, weight: Tensor, size: int = 16) -> Written:
    rows, columns = weight.shape
    stored, plain = torch.empty(rows, columns, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    scales = torch.empty(math.ceil(rows / size), math.ceil(columns / size))
    for r in range(scales.shape[0]):
        for c in range(scales.shape[1]):
            block = slice(r * size, (r + 1) * size), slice(c * size, (c + 1) * size)
            scales[r, c] = weight[block].abs().max() / 448
            stored[block] = (weight[block] / scales[r, c]).to(torch.float8_e4m3fn)
            plain[block] = stored[block].float() * scales[r, c]
    return {name: stored, f"{name}_scale_inv": scales}, plain


def fp8_rows(name: str, weight: Tensor) -> Written:
    scale = weight.abs().amax(1, keepdim=True) / 448
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {name: stored, f"{name}_scale": scale}, torch.stack(
        [stored[r].float() * scale[r] for r in range(len(scale))]
    )


def fp8_matrix(name: str, weight: Tensor) -> Written:
    scale = weight.abs().max().reshape(1) / 448
    stored = (weight / scale).to(torch.float8_e4m3fn)
    extra = {f"{name.removesuffix('.weight')}.input_scale": torch.ones(1)}
    return {name: stored, f"{name}_scale": scale, **extra}, stored.float() * scale


def int8_rows(name: str, weight: Tensor) -> Written:
    """As compressed-tensors has it."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    stored = torch.round(weight / scale).to(torch.int8)
    return {name: stored, f"{name}_scale": scale}, stored.float() * scale


def _words(columns: list[list[int]], bits: int, places: tuple[int, ...]) -> list[list[int]]:
    """Each run of numbers as one signed word of 32 bits."""
    pack, rows = 32 // bits, list[list[int]]()
    for numbers in columns:
        row: list[int] = []
        for start in range(0, len(numbers), pack):
            word = 0
            for n, number in enumerate(numbers[start : start + pack]):
                word |= number << (bits * places[n])
            row.append(word - 2**32 if word >= 2**31 else word)
        rows.append(row)
    return rows


def _grouped(weight: Tensor, bits: int, group_of: list[int], *, sym: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numbers (O, I), zero points (G, O), float16 scales (G, O), and the weight that they mean."""
    out, inner = weight.shape
    num, most = max(group_of) + 1, 2**bits - 1
    q, z = torch.empty(out, inner, dtype=torch.int64), torch.empty(num, out, dtype=torch.int64)
    s, plain = torch.empty(num, out, dtype=torch.float16), torch.empty(out, inner)
    for o in range(out):
        for g in range(num):
            members = [i for i in range(inner) if group_of[i] == g]
            values = [float(weight[o, i]) for i in members]
            low, high = min(*values, 0.0), max(*values, 0.0)
            if sym:
                high = max(-low, high)
                low = -high
            s[g, o] = (high - low) / most
            step = float(s[g, o])
            z[g, o] = 2 ** (bits - 1) if sym else min(most, round(-low / step))
            for i, value in zip(members, values, strict=True):
                q[o, i] = min(most, max(0, round(value / step) + int(z[g, o])))
                plain[o, i] = step * (int(q[o, i]) - int(z[g, o]))
    return q, z, s, plain


def gptq(
    name: str,
    weight: Tensor,
    *,
    bits: int = 4,
    group_size: int = 16,
    sym: bool = True,
    shuffled: bool = False,
    v2: bool = False,
) -> Written:
    module, inner = name.removesuffix(".weight"), weight.shape[1]
    group_of = [i // group_size for i in range(inner)]
    if shuffled:
        random.Random(0).shuffle(group_of)
    q, z, s, plain = _grouped(weight, bits, group_of, sym=sym)
    in_order = tuple(range(32 // bits))
    stored_z = z if v2 else (z - 1) % 2**bits
    return {
        f"{module}.qweight": torch.tensor(_words(q.tolist(), bits, in_order), dtype=torch.int32).t().contiguous(),
        f"{module}.qzeros": torch.tensor(_words(stored_z.tolist(), bits, in_order), dtype=torch.int32),
        f"{module}.scales": s,
        f"{module}.g_idx": torch.tensor(group_of, dtype=torch.int32),
    }, plain


def awq(name: str, weight: Tensor, group_size: int = 16) -> Written:
    module, inner = name.removesuffix(".weight"), weight.shape[1]
    q, z, s, plain = _grouped(weight, 4, [i // group_size for i in range(inner)], sym=False)
    return {
        f"{module}.qweight": torch.tensor(_words(q.t().tolist(), 4, AWQ_PLACES), dtype=torch.int32),
        f"{module}.qzeros": torch.tensor(_words(z.tolist(), 4, AWQ_PLACES), dtype=torch.int32),
        f"{module}.scales": s,
    }, plain


def bnb_int8(name: str, weight: Tensor) -> Written:
    module = name.removesuffix(".weight")
    largest = weight.abs().amax(1)
    stored = torch.round(weight / largest[:, None] * 127).to(torch.int8)
    layout = torch.tensor(0, dtype=torch.uint8)
    return {name: stored, f"{module}.SCB": largest, f"{module}.weight_format": layout}, torch.stack(
        [stored[r].float() * (largest[r] / 127) for r in range(len(largest))]
    )


def nf4(
    name: str,
    weight: Tensor,
    *,
    nested: bool = False,
    block: int = 64,
    nested_block: int = 4,
    table: tuple[float, ...] | None = None,
) -> Written:
    table = torch.linspace(-1, 1, 16) ** 3 if table is None else torch.tensor(table)
    flat = weight.flatten().tolist()
    blocks = [flat[start : start + block] for start in range(0, len(flat), block)]
    absmax = torch.tensor([max(map(abs, values)) for values in blocks])
    state: dict[str, object] = {
        "quant_type": "nf4",
        "blocksize": block,
        "dtype": "float32",
        "shape": list(weight.shape),
    }
    extra: dict[str, Tensor] = {"absmax": absmax}
    if nested:
        nested_table, offset = torch.linspace(-1, 1, 256), float(absmax.mean())
        rest = absmax - offset
        tops = torch.stack([part.abs().max() for part in rest.split(nested_block)])
        numbers = [int((nested_table - rest[n] / tops[n // nested_block]).abs().argmin()) for n in range(len(rest))]
        absmax = torch.tensor(
            [float(nested_table[k] * tops[n // nested_block]) + offset for n, k in enumerate(numbers)]
        )
        extra = {
            "absmax": torch.tensor(numbers, dtype=torch.uint8),
            "nested_absmax": tops,
            "nested_quant_map": nested_table,
        }
        state |= {"nested_blocksize": nested_block, "nested_dtype": "float32", "nested_offset": offset}
    numbers = [int((table - value / absmax[n // block]).abs().argmin()) for n, value in enumerate(flat)]
    plain = torch.tensor([float(table[k] * absmax[n // block]) for n, k in enumerate(numbers)]).view(weight.shape)
    packed = [16 * first + second for first, second in zip(numbers[::2], numbers[1::2], strict=True)]
    written = {f"{name}.{role}": tensor for role, tensor in extra.items()}
    written[f"{name}.quant_map"] = table
    written[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {name: torch.tensor(packed, dtype=torch.uint8)[:, None], **written}, plain


def mxfp4(name: str, weight: Tensor) -> Written:
    """Of experts (E, I, O)."""
    rows = weight.transpose(1, 2).reshape(-1, 32)
    numbers, exponents, plain = list[list[int]](), list[int](), list[list[float]]()
    for values in rows.tolist():
        power = math.ceil(math.log2(max(map(abs, values)) / 6))
        found = [min(range(16), key=lambda k: abs(FP4[k] * 2.0**power - value)) for value in values]
        plain.append([FP4[k] * 2.0**power for k in found])
        numbers.append([low + 16 * high for low, high in zip(found[::2], found[1::2], strict=True)])
        exponents.append(power + 127)
    experts, inner, out = weight.shape
    return {
        f"{name}_blocks": torch.tensor(numbers, dtype=torch.uint8).view(experts, out, inner // 32, 16),
        f"{name}_scales": torch.tensor(exponents, dtype=torch.uint8).view(experts, out, inner // 32),
    }, torch.tensor(plain).view(experts, out, inner).transpose(1, 2).contiguous()


def quantize_folder(
    plain: Path,
    into: Path,
    write: Callable[[str, Tensor], Written],
    config: dict[str, object],
    parts: tuple[str, ...] = ("_proj",),
) -> None:
    """Quantise the matrices of ``plain`` with one of ``parts`` in their names; ``plain`` gets what these stand for."""
    tensors = load_file(plain / "model.safetensors")
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if any(part in name for part in parts) and tensor.dim() > 1:
            written, tensors[name] = write(name, tensor)
            stored |= written
        else:
            stored[name] = tensor
    into.mkdir()
    for file in plain.iterdir():
        if file.suffix == ".json":
            (into / file.name).write_bytes(file.read_bytes())
    raw = json.loads((plain / "config.json").read_text()) | {"quantization_config": config}
    (into / "config.json").write_text(json.dumps(raw))
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, into / "model.safetensors")
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
