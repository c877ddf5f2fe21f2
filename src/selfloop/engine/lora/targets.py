"""Which projections of a layer an adapter changes."""

from selfloop.engine.models.spec import LayerSpec, ProjectionGroup
from selfloop.types.lora import LoraTargets


def adapted_groups(layer: LayerSpec, targets: LoraTargets) -> tuple[ProjectionGroup | None, ...]:
    """The groups of a layer in its own order, None where ``targets`` leaves one as it is."""
    mixer = [group if targets.attn else None for group in layer.mixer.groups]
    feed_forward = [group if _is_adapted(group, targets) else None for group in layer.feed_forward.groups]
    return (*mixer, *feed_forward)


def _is_adapted(group: ProjectionGroup, targets: LoraTargets) -> bool:
    return targets.mlp if group.num_experts is None else targets.experts
