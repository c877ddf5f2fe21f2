"""What a worker needs that the gateway itself does without."""

import importlib.util

ENGINE_LIBRARIES = ("torch", "transformers", "safetensors", "tokenizers", "gguf", "numpy")
HOW_TO_INSTALL = "pip install 'selfloop[engine]'"


def missing() -> list[str]:
    """Those that are not installed in this Python."""
    return [name for name in ENGINE_LIBRARIES if importlib.util.find_spec(name) is None]
