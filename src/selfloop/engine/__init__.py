"""The numbers, usable alone: training and sampling of LoRA adapters on one base model (``docs/engine.md``)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfloop.engine.engine import Engine, ModelInfo, SavedState

__all__ = ["Engine", "ModelInfo", "SavedState"]


def __getattr__(name: str) -> Any:
    """The front door's names, when they are asked for: much below it needs no PyTorch, and does not wait for it."""
    if name in __all__:
        from selfloop.engine import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
