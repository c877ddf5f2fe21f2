"""A GGUF file as a model folder: safetensors, ``config.json``, tokenizer. Some rows of one tensor are in memory."""

import json
import math
import re
import shutil
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader

from selfloop.convert.disk_space import check_room
from selfloop.convert.gguf.metadata import refusal
from selfloop.convert.gguf.read import GgufSource
from selfloop.convert.gguf.vocabulary import special_ids, write_templates, write_tokenizer
from selfloop.convert.reports import Report
from selfloop.types.model_folder import GGUF_SUFFIX, PUBLIC_FILES, TOKENIZER_FILE, is_own_file, read_chat_template
from selfloop.types.model_weights import WEIGHTS_FILE

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_OWN_FILES = PUBLIC_FILES - {"config.json", "generation_config.json"}
# Of pictures and sound, beside the model that they belong to.
_PROJECTOR = "clip"


def files_of(path: Path) -> tuple[Path, ...]:
    """The file, or all parts of it; in a folder the one model that it has.

    Raises:
        BadRequest: there is none, there are several, or a part is not there.
    """
    if path.is_dir():
        return files_of(_only_model(path))
    part = _PART.fullmatch(path.name)
    if part is None:
        return (path,)
    names = [f"{part[1]}-{number:05}-of-{part[3]}.gguf" for number in range(1, int(part[3]) + 1)]
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        raise refusal(f"{path} is one part of {len(names)}; {', '.join(missing[:3])} is not beside it")
    return tuple(path.parent / name for name in names)


def convert(paths: tuple[Path, ...], folder: Path, report: Report, dtype: torch.dtype | None = None) -> None:
    """Write the model of a GGUF into ``folder``.

    Args:
        paths: the file, or its parts in their order.
        dtype: of all tensors; None: as the file has them, and float16 for those that it has quantised.

    Raises:
        BadRequest: the architecture, a tensor's type or the tokenizer is not known here; the text names it.
    """
    report("read", 0.0)
    source = GgufSource(*paths)
    dtypes = {name: source.stored_dtype(name) if dtype is None else dtype for name in sorted(source.names())}
    shapes = source.spec.tensors()
    sizes = {name: math.prod(shapes[name]) * dtypes[name].itemsize for name in dtypes}
    check_room(folder, sum(sizes.values()), "the model as safetensors")
    report("tokenizer", 0.05)
    _write_tokenizer(source, paths[0].parent, folder)
    _write_configs(source, dtypes.values(), folder)
    with (folder / WEIGHTS_FILE).open("wb") as file:
        file.write(_header({name: (_DTYPES[dtypes[name]], shapes[name], sizes[name]) for name in dtypes}))
        written, total = 0, sum(sizes.values())
        for name, stored in dtypes.items():
            for part in source.parts(name):
                lowest, highest = torch.aminmax(part)
                if not max(-lowest, highest) <= torch.finfo(stored).max:
                    raise refusal(f"{name} of {paths[0]} has values that are not finite in {_DTYPES[stored]}")
                values = part.to(stored)
                file.write(values.contiguous().view(torch.uint8).numpy().tobytes())
                written += values.nbytes
                report("weights", 0.1 + 0.85 * written / total)
    report("sync", 0.95)


def _only_model(folder: Path) -> Path:
    found = [file for file in sorted(folder.glob(f"*{GGUF_SUFFIX}")) if file.is_file() and _is_model(file)]
    first = [file for file in found if (part := _PART.fullmatch(file.name)) is None or int(part[2]) == 1]
    if len(first) != 1:
        names = ", ".join(file.name for file in first[:8]) or "none"
        raise refusal(f"{folder} has {len(first)} models in GGUF ({names}): name the file that is meant")
    return first[0]


def _is_model(file: Path) -> bool:
    try:
        architecture = GGUFReader(file).fields.get("general.architecture")
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError):
        return True  # Whoever reads it says what is wrong with it.
    return architecture is None or architecture.contents() != _PROJECTOR


def _write_tokenizer(source: GgufSource, beside: Path, folder: Path) -> None:
    """What the metadata says; a ``tokenizer.json`` beside the file, of the original model, is taken as it is."""
    if (beside / TOKENIZER_FILE).is_file():
        for name in sorted(_OWN_FILES):
            if is_own_file(beside, name):
                shutil.copyfile(beside / name, folder / name)
    else:
        write_tokenizer(source.metadata, folder, source.spec.context)
    if read_chat_template(folder) is None or not (beside / TOKENIZER_FILE).is_file():
        write_templates(source.metadata, folder)


def _write_configs(source: GgufSource, dtypes: Collection[torch.dtype], folder: Path) -> None:
    # Slow to import, and not needed to refuse a file.
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    coarsest = next(dtype for dtype in (torch.bfloat16, torch.float16, torch.float32) if dtype in dtypes)
    special = special_ids(source.metadata)
    config = {
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[source.config["model_type"]]],
        **source.config,
        **special,
        "torch_dtype": str(coarsest).removeprefix("torch."),
    }
    for name, content in (("config.json", config), ("generation_config.json", special)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _header(tensors: Mapping[str, tuple[str, tuple[int, ...], int]]) -> bytes:
    """What a safetensors file begins with; the bytes follow in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, size) in tensors.items():
        start, end = end, end + size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded
