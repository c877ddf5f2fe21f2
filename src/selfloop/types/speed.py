"""What a machine and the engine on it reach, as the engine's process tells the command line."""

import msgspec


class Speed(msgspec.Struct, frozen=True):
    """Rates of the fastest of a few tries; a roof is what the machine's limit would give, all else free.

    A token costs two operations a weight of the linear layers forward and as many backward; a step of decoding reads
    every weight once.
    """

    model: str
    device: str
    dtype: str
    num_threads: int
    float32_gflops: float
    bfloat16_gflops: float
    memory_gb_per_s: float
    train_tokens_per_s: float
    train_roof: float
    decode_1_tokens_per_s: float
    decode_1_roof: float
    decode_32_tokens_per_s: float
    decode_32_roof: float
