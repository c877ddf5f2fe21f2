"""What a worker needs that the gateway itself does without."""

import importlib.util

ENGINE_LIBRARIES = ("torch", "transformers", "safetensors", "tokenizers", "gguf", "numpy")
# PyPI's torch for Linux brings gigabytes of CUDA libraries; this is PyTorch's own index of builds without them.
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
HOW_TO_INSTALL = (
    f"pip install torch --index-url {CPU_INDEX} && pip install 'selfloop[engine]' for a CPU, "
    "pip install 'selfloop[cuda]' for NVIDIA GPUs"
)


def missing() -> list[str]:
    """Those that are not installed in this Python."""
    return [name for name in ENGINE_LIBRARIES if importlib.util.find_spec(name) is None]
