"""Which models the kernels compute."""

from selfloop.engine.backends.cpu_native.library import LANES, MAX_HEAD_DIM
from selfloop.engine.models.config import ModelConfig


def covers(config: ModelConfig) -> bool:
    """Whether every size of the model is a multiple of the kernels' sixteen lanes."""
    sizes = (config.hidden_size, config.intermediate_size, config.head_dim)
    return all(size % LANES == 0 for size in sizes) and config.head_dim <= MAX_HEAD_DIM
