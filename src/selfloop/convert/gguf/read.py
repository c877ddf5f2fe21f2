"""A GGUF file as the engine reads a model: its shape out of the metadata, its tensors one at a time."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import Tensor

from selfloop.convert.gguf.names import architecture, checkpoint_names, gguf_name, halved, heads_of, layers_of
from selfloop.engine.models.spec import LayerSpec, ModelSpec
from selfloop.types.errors import OperationFailed


class GgufSource:
    """The tensors of a GGUF, by their names in a Hugging Face checkpoint, in float32."""

    def __init__(self, path: Path, like: ModelSpec) -> None:
        self._reader = GGUFReader(path)
        self.spec = _spec(self._reader, like)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def names(self) -> Collection[str]:
        return checkpoint_names(self._tensors.keys(), self.spec)

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            stored = self._tensors[gguf_name(name, self.spec) or name]
            values = torch.tensor(dequantize(stored.data, stored.tensor_type))
            heads = heads_of(name, self.spec)
            yield name, values if heads is None else halved(values, heads)


def _spec(reader: GGUFReader, like: ModelSpec) -> ModelSpec:
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
    eps = float(fields[f"{name}.attention.layer_norm_rms_epsilon"])
    hidden_size = fields[f"{name}.embedding_length"]
    layer, known = like.layers[0], layers_of(like)
    attention = replace(
        known.attention,
        hidden_size=hidden_size,
        num_heads=fields[f"{name}.attention.head_count"],
        num_kv_heads=fields[f"{name}.attention.head_count_kv"],
        head_dim=fields[f"{name}.attention.key_length"],
        qk_norm_eps=None if known.attention.qk_norm_eps is None else eps,
    )
    mlp = replace(known.mlp, hidden_size=hidden_size, inner_size=fields[f"{name}.feed_forward_length"])
    mixer_norm, feed_forward_norm = (replace(norm, size=hidden_size, eps=eps) for norm in layer.norms if norm)
    return replace(
        like,
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=hidden_size,
        layers=(LayerSpec(attention, mlp, (mixer_norm, feed_forward_norm)),) * fields[f"{name}.block_count"],
        final_norm_eps=eps,
        tied="output.weight" not in stored,
        rope=rope,
    )
