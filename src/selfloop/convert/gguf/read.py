"""A GGUF file as the engine reads a model: its shape out of the metadata, its tensors one at a time."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import Tensor

from selfloop.convert.gguf.names import architecture, checkpoint_names, gguf_name, halved, heads_of
from selfloop.engine.models.config import ModelConfig
from selfloop.types.errors import OperationFailed


class GgufSource:
    """The tensors of a GGUF, by their names in a Hugging Face checkpoint, in float32."""

    def __init__(self, path: Path, like: ModelConfig) -> None:
        self._reader = GGUFReader(path)
        self.config = _config(self._reader, like)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def names(self) -> Collection[str]:
        return checkpoint_names(self._tensors.keys(), self.config)

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            stored = self._tensors[gguf_name(name, self.config) or name]
            values = torch.tensor(dequantize(stored.data, stored.tensor_type))
            heads = heads_of(name, self.config)
            yield name, values if heads is None else halved(values, heads)


def _config(reader: GGUFReader, like: ModelConfig) -> ModelConfig:
    """What the metadata says of the model; what GGUF does not say is as in ``like``."""
    fields: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
    name = architecture(like)
    if fields["general.architecture"] != name:
        raise OperationFailed(f"the file holds a {fields['general.architecture']!r} model, expected {name!r}")
    stored = {tensor.name for tensor in reader.tensors}
    rope = replace(
        like.rope,
        theta=float(fields[f"{name}.rope.freq_base"]),
        head_dim=fields[f"{name}.rope.dimension_count"],
        factor=float(fields.get(f"{name}.rope.scaling.factor", like.rope.factor)),
    )
    return replace(
        like,
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields[f"{name}.embedding_length"],
        intermediate_size=fields[f"{name}.feed_forward_length"],
        num_layers=fields[f"{name}.block_count"],
        num_heads=fields[f"{name}.attention.head_count"],
        num_kv_heads=fields[f"{name}.attention.head_count_kv"],
        head_dim=fields[f"{name}.attention.key_length"],
        rms_norm_eps=float(fields[f"{name}.attention.layer_norm_rms_epsilon"]),
        tie_word_embeddings="output.weight" not in stored,
        rope=rope,
    )
