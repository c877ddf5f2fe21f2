"""A merged model as one GGUF file, as llama.cpp reads it (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

One tensor at a time is in memory.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, RopeScalingType
from torch import Tensor

from selfloop.convert.gguf.names import ROPE_FREQS, architecture, gguf_name, heads_of, interleaved, layers_of
from selfloop.convert.gguf.tokenizer import add_tokenizer
from selfloop.engine.files.merge import Deltas
from selfloop.engine.files.peft import LoadedAdapter
from selfloop.engine.models.registry import read_spec
from selfloop.engine.models.rope import RopeConfig, inverse_frequencies
from selfloop.engine.models.spec import ModelSpec
from selfloop.engine.models.weights import SafetensorsSource
from selfloop.types.errors import OperationFailed
from selfloop.types.model_weights import EMBEDDING, HEAD

_STORED = {
    torch.float32: (GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    torch.float16: (GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}


def write_gguf(
    path: Path,
    model_dir: Path,
    adapter: LoadedAdapter,
    base_model: str,
    dtype: torch.dtype,
    on_bytes: Callable[[int], None],
) -> None:
    """Write the base model plus ``adapter``; matrices in ``dtype``, the rest in float32.

    ``on_bytes`` hears of each base tensor's size.

    Raises:
        OperationFailed: the format cannot say this model, or a value does not fit ``dtype``.
    """
    spec = read_spec(model_dir)
    source = SafetensorsSource(model_dir, spec)
    deltas = Deltas(adapter)
    stored = {name: name for name in sorted(source.names())}
    if spec.tied and HEAD in deltas:
        stored[HEAD] = EMBEDDING
    with _opened(path, spec) as writer:
        _add_shape(writer, spec)
        add_tokenizer(writer, model_dir, spec.vocab_size, spec.eos_token_ids)
        writer.add_name(base_model.rpartition("/")[2] + "-merged")
        writer.add_file_type(_STORED[dtype][1])
        freqs = _frequency_factors(spec)
        for name, origin in stored.items():
            shape = source.shape(origin)
            _declare(writer, gguf_name(name, spec) or name, shape, _dtype_of(shape, dtype))
        if freqs is not None:
            _declare(writer, ROPE_FREQS, tuple(freqs.shape), torch.float32)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, origin in stored.items():
            ((_, tensor),) = source.read([origin])
            merged = deltas.added(name, tensor, _dtype_of(tuple(tensor.shape), dtype))
            heads = heads_of(name, spec)
            _write(writer, merged if heads is None else interleaved(merged, heads))
            on_bytes(tensor.nbytes)
        if freqs is not None:
            _write(writer, freqs)
    deltas.check_used(model_dir)


@contextmanager
def _opened(path: Path, spec: ModelSpec) -> Generator[gguf.GGUFWriter]:
    writer = gguf.GGUFWriter(path, architecture(spec))
    try:
        yield writer
    finally:
        writer.close()


def _dtype_of(shape: tuple[int, ...], dtype: torch.dtype) -> torch.dtype:
    """llama.cpp computes with norms and biases in float32."""
    return torch.float32 if len(shape) == 1 else dtype


def _declare(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    *outer, inner = shape
    row_bytes = inner * dtype.itemsize
    num_bytes = row_bytes * torch.Size(outer).numel()
    writer.add_tensor_info(name, [*outer, row_bytes], np.dtype(np.uint8), num_bytes, _STORED[dtype][0])


def _write(writer: gguf.GGUFWriter, tensor: Tensor) -> None:
    writer.write_tensor_data(tensor.contiguous().view(torch.uint8).numpy())


def _add_shape(writer: gguf.GGUFWriter, spec: ModelSpec) -> None:
    attention, mlp, eps = layers_of(spec)
    writer.add_vocab_size(spec.vocab_size)
    writer.add_context_length(spec.context)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(spec.num_layers)
    writer.add_feed_forward_length(mlp.inner_size)
    writer.add_head_count(attention.num_heads)
    writer.add_head_count_kv(attention.num_kv_heads)
    writer.add_key_length(attention.head_dim)
    writer.add_value_length(attention.head_dim)
    writer.add_layer_norm_rms_eps(eps)
    writer.add_rope_dimension_count(attention.head_dim)
    writer.add_rope_freq_base(spec.rope.theta)
    rope = spec.rope
    if rope.kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope.kind))
        writer.add_rope_scaling_factor(rope.factor)
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_position)
    plain = RopeConfig(rope.kind, rope.theta, rope.head_dim, rope.factor, rope.original_max_position)
    if rope.kind == "yarn" and rope != plain:
        raise OperationFailed("llama.cpp computes YaRN with its usual betas and attention factor only")


def _frequency_factors(spec: ModelSpec) -> Tensor | None:
    """By what llama.cpp divides each rotary frequency, where it has no name for the scaling."""
    rope = spec.rope
    if rope.kind != "llama3":
        return None
    if architecture(spec) != "llama":
        raise OperationFailed(f"llama.cpp does not scale the rotary frequencies of {spec.model_type} as Llama 3 does")
    plain, _ = inverse_frequencies(RopeConfig("default", rope.theta, rope.head_dim))
    scaled, _ = inverse_frequencies(rope)
    return plain / scaled
