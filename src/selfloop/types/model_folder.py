"""What a served model folder holds, read from its config and its safetensors headers alone."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from selfloop.types.errors import BadRequest
from selfloop.types.model_weights import read_weights, weight_paths
from selfloop.types.quantization import read_quantization
from selfloop.types.routes import ExpertCounts
from selfloop.types.text_half import text_half
from selfloop.types.transformers_models import context_of, why_unknown
from selfloop.types.vision import TEXT_ONLY, TextOnly, VisionFacts, read_vision

T = TypeVar("T")

INSTALLED_FAMILIES = {point.name: point for point in entry_points(group="selfloop.model_families")}
"""Families of installed packages by ``model_type``, not loaded; each is a ``spec`` as in ``engine/models/llama``."""

SUPPORTED_MODEL_TYPES = frozenset(
    {
        "gemma2",
        "gemma3_text",
        "glm4",
        "glm4_moe",
        "gpt_oss",
        "granite",
        "llama",
        "minimax_m2",
        "mistral",
        "mixtral",
        "olmo2",
        "olmo3",
        "olmoe",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_moe",
        "qwen3_next",
        "smollm3",
        *INSTALLED_FAMILIES,
    }
)
"""Those that the engine's own decoder computes; others are computed by transformers, where it knows them."""

EXPERTS_STAY = frozenset({"gpt_oss"})
"""Of those, the ones whose experts, which lie in stacks, take no adapters."""

TIED_UNLESS_SAID = frozenset({"gemma2", "gemma3_text", "smollm3"})
"""Of those, the ones whose output layer is the embedding where ``config.json`` does not say ``tie_word_embeddings``."""

PUBLIC_FILES = frozenset(
    {
        "added_tokens.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
    }
)
"""Names a client needs for tokenizing and for counting an image; whoever reaches the server may read them."""

NO_EXPERTS = "the served model has no experts to route to"

GGUF_SUFFIX = ".gguf"
TOKENIZER_FILE = "tokenizer.json"
CHAT_TEMPLATES_FOLDER = "additional_chat_templates"
_TOKENIZER_SOURCES = (TOKENIZER_FILE, "tokenizer.model", "vocab.json")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the rest of the server must know of a model without loading it.

    Args:
        num_parameters: distinct parameters: a tied output layer counts once.
        num_tied: those that the embedding and the output layer share; 0 where each has its own.
        size_bytes: of the weight files.
        eos_token_ids: every id that ends a sample, ascending.
        no_routes: why it cannot be recorded which experts it chose, in words; empty where it can.
        vision: how it sees images, or why it sees none.
    """

    path: Path
    model_type: str
    vocab_size: int
    max_position_embeddings: int
    num_parameters: int
    num_tied: int
    size_bytes: int
    eos_token_ids: tuple[int, ...]
    no_routes: str
    vision: VisionFacts | TextOnly = TEXT_ONLY

    def to_json(self) -> bytes:
        return msgspec.json.encode(self, enc_hook=str)


class _Config(ExpertCounts):
    model_type: str = ""
    vocab_size: int = 0
    max_position_embeddings: int = 0
    tie_word_embeddings: bool | None = None
    eos_token_id: int | list[int] | None = None


class _GenerationConfig(msgspec.Struct):
    eos_token_id: int | list[int] | None = None


class _NamedTemplate(msgspec.Struct):
    name: str
    template: str


class _TokenizerConfig(msgspec.Struct):
    chat_template: str | list[_NamedTemplate] | None = None


def read_facts(path: Path) -> ModelFacts:
    """Facts of the model in ``path``.

    Raises:
        BadRequest: the folder is not a model that can be served; the text says what is missing.
    """
    path = path.expanduser().absolute()
    if not path.is_dir():
        raise _refusal(f"{path} is not a folder")
    config = _read_config(path)
    if not any((path / name).is_file() for name in _TOKENIZER_SOURCES):
        raise _refusal(f"{path} has no tokenizer (none of {', '.join(_TOKENIZER_SOURCES)})")
    tie = config.tie_word_embeddings
    weights = read_weights(path, tie=config.model_type in TIED_UNLESS_SAID if tie is None else tie)
    return ModelFacts(
        path=path,
        model_type=config.model_type,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        num_parameters=weights.num_parameters,
        num_tied=weights.num_tied,
        size_bytes=weights.size_bytes,
        eos_token_ids=_eos_token_ids(path, config),
        no_routes=_no_routes(config),
        vision=read_vision(path),
    )


def is_gguf(path: Path) -> bool:
    """Whether this is a GGUF file, or a folder that has such files and no model as Hugging Face keeps it."""
    if path.is_dir():
        return not (path / "config.json").exists() and any(path.glob(f"*{GGUF_SUFFIX}"))
    return path.is_file() and path.suffix == GGUF_SUFFIX


def check_config(path: Path) -> None:
    """Refuse a folder by its ``config.json`` alone, before any weights are fetched (:class:`BadRequest`)."""
    _read_config(path)


def computed_by(path: Path) -> str:
    """Whose code computes the folder's model, and why where it is not the engine's own; empty where that is unclear."""
    try:
        model_type = _read_config(path).model_type
        quantization = read_quantization(path / "config.json")
    except BadRequest:
        return ""
    own = model_type in SUPPORTED_MODEL_TYPES
    dequantised = "" if quantization is None else f", dequantised from {quantization.words}"
    return ("selfloop" if own else f"transformers (selfloop has no {model_type})") + dequantised


def _no_routes(config: _Config) -> str:
    if not config.has_experts:
        return NO_EXPERTS
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        return f"transformers computes the served model ({config.model_type}), and does not say which experts it chose"
    return ""


def tokenizer_files(path: Path) -> list[str]:
    """Names in ``path`` that may be served to anyone, sorted. Never weights."""
    return sorted(name for name in PUBLIC_FILES if is_own_file(path, name))


def weight_files(path: Path) -> list[str]:
    """Names of the files that hold the weights of ``path`` and of their index, sorted; none if that is not clear."""
    try:
        files, index = weight_paths(path)
    except BadRequest:
        return []
    names = [file.name for file in files] + ([] if index is None else [index.name])
    return sorted(name for name in names if is_own_file(path, name))


def read_chat_template(path: Path) -> str | None:
    """The text of the folder's chat template, as its tokenizer would choose it when tools are given."""
    for file in (path / CHAT_TEMPLATES_FOLDER / "tool_use.jinja", path / "chat_template.jinja"):
        if file.is_file():
            return file.read_text(encoding="utf-8")
    config = path / "tokenizer_config.json"
    template = _decode(config, _TokenizerConfig).chat_template if config.is_file() else None
    if isinstance(template, list):
        by_name = {entry.name: entry.template for entry in template}
        return by_name.get("tool_use") or by_name.get("default")
    return template


def content_hash(file: Path) -> str:
    """Hex sha256 of a small file's content, computed once for each state of the file."""
    state = file.stat()
    return _content_hash(file, state.st_size, state.st_mtime_ns)


def weights_tag(file: Path) -> str:
    """Stands for a weight file's content without reading gigabytes: hex sha256 of name, size and mtime."""
    state = file.stat()
    return hashlib.sha256(f"{file.name}\0{state.st_size}\0{state.st_mtime_ns}".encode()).hexdigest()


def snapshot_sha(path: Path) -> str:
    """The folder's 40-hex revision: changes with any public file's content and with weight names or sizes."""
    digest = hashlib.sha1(usedforsecurity=False)
    for name in tokenizer_files(path):
        digest.update(f"{name}\0{content_hash(path / name)}\n".encode())
    for name in weight_files(path):
        digest.update(f"{name}\0{(path / name).stat().st_size}\n".encode())
    return digest.hexdigest()


@lru_cache(maxsize=1024)
def _content_hash(file: Path, size: int, mtime_ns: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_config(path: Path) -> _Config:
    file = path / "config.json"
    if not file.is_file():
        raise _refusal(f"{path} has no config.json")
    raw = text_half(_decode(file, dict[str, Any]))
    config = _converted(file, raw)
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        unknown = why_unknown(raw)
        if unknown is not None:
            known = ", ".join(sorted(SUPPORTED_MODEL_TYPES))
            raise _refusal(f"{unknown} (supported: {known}, and the text models that transformers knows)")
    config.max_position_embeddings = context_of(raw) or 0
    read_quantization(file)
    if config.vocab_size < 1 or config.max_position_embeddings < 1:
        raise _refusal(f"{file} gives no vocab_size or no max_position_embeddings")
    return config


def _eos_token_ids(path: Path, config: _Config) -> tuple[int, ...]:
    file = path / "generation_config.json"
    generation = _decode(file, _GenerationConfig) if file.is_file() else _GenerationConfig()
    return tuple(sorted({*_as_ids(config.eos_token_id), *_as_ids(generation.eos_token_id)}))


def _as_ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else value


def _decode(file: Path, type_: type[T]) -> T:
    try:
        return msgspec.json.decode(file.read_bytes(), type=type_)
    except msgspec.MsgspecError as error:
        raise _refusal(f"{file} cannot be read: {error}") from error


def _converted(file: Path, raw: Mapping[str, Any]) -> _Config:
    try:
        return msgspec.convert(raw, _Config)
    except msgspec.MsgspecError as error:
        raise _refusal(f"{file} cannot be read: {error}") from error


def _refusal(reason: str) -> BadRequest:
    return BadRequest("base_model", reason)


def is_own_file(folder: Path, name: str) -> bool:
    """Whether ``folder`` has a file of this name inside it.

    Files in the ``blobs`` of a Hugging Face cache count, which a snapshot there is links to.
    """
    file = folder / name
    if not file.is_file():
        return False
    root = folder.resolve()
    homes = [root]
    if root.parent.name == "snapshots":
        homes.append(root.parent.parent / "blobs")
    return any(file.resolve().is_relative_to(home) for home in homes)


def check_links(folder: Path, field: str) -> None:
    """Raises :class:`BadRequest` for ``field`` if a link in ``folder``, which somebody else made, leads out of it."""
    for file in sorted(folder.iterdir()):
        if file.is_symlink() and file.is_file() and not is_own_file(folder, file.name):
            raise BadRequest(field, f"a folder whose files lie in it; {file} is a link to {file.resolve()}")
