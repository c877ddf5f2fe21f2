"""What a machine and the engine on it reach, as the engine's process reports it to the command line."""

import msgspec


class Rate(msgspec.Struct, frozen=True):
    """Tokens a second, of ``num`` tokens a step or streams at once; ``roof`` is what the machine's limit would give.

    A token costs two operations a weight of the linear layers forward and as many backward; a step of decoding reads
    every weight once.
    """

    num: int
    tokens_per_s: float
    roof: float


class Speed(msgspec.Struct, frozen=True):
    """Rates of the fastest of a few tries; None where there was no time, or nothing to measure.

    ``computed_by`` says what multiplies by the weights. Bfloat16 products are measured where the engine computes in it.
    """

    model: str
    device: str
    dtype: str
    computed_by: str
    num_threads: int
    float32_gflops: float | None = None
    bfloat16_gflops: float | None = None
    memory_gb_per_s: float | None = None
    decode_1: Rate | None = None
    decode_32: Rate | None = None
    train: Rate | None = None
