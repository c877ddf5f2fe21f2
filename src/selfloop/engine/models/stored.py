"""A model of no family here: its stored tensors say its matrices and their names, and no more is known of it.

How they are put together only transformers knows, which computes it by code of its own.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from selfloop.engine.models.config import check_quantization, end_tokens, read_size
from selfloop.engine.models.rope import RopeConfig
from selfloop.engine.models.spec import Block, LayerSpec, ModelSpec, Projection, ProjectionGroup, Shapes
from selfloop.types.errors import BadRequest, model_invalid
from selfloop.types.model_weights import EMBEDDING, HEAD, read_weights
from selfloop.types.transformers_models import context_of, num_stored_layers, stored_projections, why_unknown


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """Matrices of a layer, each with an input of its own; its cache is known when the model is loaded."""

    projections: tuple[Projection, ...]

    kind: ClassVar[str] = "block_by_its_tensors_alone"

    @property
    def groups(self) -> tuple[ProjectionGroup, ...]:
        return tuple(ProjectionGroup((projection,)) for projection in self.projections)

    @property
    def num_active_weights(self) -> int:
        """Without what takes no adapter, of which it is not known what a token comes through."""
        return sum(projection.in_features * projection.out_features for projection in self.projections)

    def tensors(self) -> Shapes:
        return {name: shape for projection in self.projections for name, shape in projection.tensors().items()}

    @property
    def cache(self) -> None:
        return None


@dataclass(frozen=True)
class StoredSpec(ModelSpec):
    """What is known of such a model; ``folder`` is where it lies, and ``stored`` every tensor there."""

    folder: Path
    stored: tuple[tuple[str, tuple[int, ...]], ...]

    def tensors(self) -> Shapes:
        return dict(self.stored)


def in_stored_order(spec: ModelSpec) -> ModelSpec:
    """The same matrices in the order of :class:`StoredSpec`, as where no family described the model."""

    def block(of: Block) -> StoredBlock:
        # Of experts, which took no adapters there, nothing is in such an order.
        groups = [group for group in of.groups if group.num_experts is None]
        projections = (projection for group in groups for projection in group.projections)
        return StoredBlock(tuple(sorted(projections, key=lambda projection: projection.name)))

    layers = tuple(LayerSpec(block(layer.mixer), block(layer.feed_forward), norms=()) for layer in spec.layers)
    return replace(spec, layers=layers)


# Only a decoder of ours asks for the rotation and the epsilon; what it made of these would not be finite.
_UNKNOWN_ROPE = RopeConfig("unknown", math.nan, 0)


def read_stored_spec(model_dir: Path, raw: Mapping[str, Any], generation: Mapping[str, Any]) -> StoredSpec:
    """From the configuration and the headers of the weights.

    Raises:
        OperationFailed: transformers does not know the model, or its tensors are not named as a text model's are.
    """
    model_type = str(raw.get("model_type", ""))
    unknown = why_unknown(raw)
    if unknown is not None:
        raise model_invalid(unknown)
    check_quantization(raw)
    context = context_of(raw)
    if context is None:
        raise model_invalid("config.json lacks ['max_position_embeddings']")
    try:
        weights = read_weights(model_dir, tie=bool(raw.get("tie_word_embeddings", True)))
    except BadRequest as error:
        raise model_invalid(error.expected) from error
    embedding = weights.tensors.get(EMBEDDING)
    num_layers = num_stored_layers(weights.tensors)
    if "num_hidden_layers" in raw:
        num_layers = min(num_layers, read_size("num_hidden_layers", raw["num_hidden_layers"]))
    if embedding is None or len(embedding.shape) != 2 or num_layers == 0:
        raise model_invalid(f"{model_dir} lacks {EMBEDDING} or model.layers: its names are not those of a text model")
    blocks: dict[tuple[int, str], list[Projection]] = {}
    for found in stored_projections(weights.tensors, num_layers):
        projection = Projection(found.name, found.in_features, found.out_features, "out", found.bias)
        blocks.setdefault((found.layer, found.part), []).append(projection)
    layers = [
        LayerSpec(*(StoredBlock(tuple(blocks.get((index, part), ()))) for part in ("attn", "mlp")), norms=())
        for index in range(num_layers)
    ]
    return StoredSpec(
        model_type=model_type,
        vocab_size=embedding.shape[0],
        hidden_size=embedding.shape[1],
        layers=tuple(layers),
        final_norm_eps=math.nan,
        tied=HEAD not in weights.tensors,
        rope=_UNKNOWN_ROPE,
        context=read_size("max_position_embeddings", context),
        eos_token_ids=end_tokens(generation) or end_tokens(raw),
        folder=model_dir,
        stored=tuple((name, tensor.shape) for name, tensor in weights.tensors.items()),
    )
