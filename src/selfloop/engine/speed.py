"""What this machine can compute, and what the engine makes of it: ``python -m selfloop.engine.speed [MODEL_DIR]``.

Prints a JSON object after each measurement, the :class:`Speed` as far as it is known. Without a folder the model is one
of SmolLM2-135M's shape with random weights, which cost as much as trained ones.
"""

import argparse
import time
from collections.abc import Callable, Collection, Generator, Iterator
from pathlib import Path

import msgspec
import torch
from msgspec.structs import replace

from selfloop.engine.backends.device import pick_device, synchronize
from selfloop.engine.backends.select import compute_dtype, load_model
from selfloop.engine.engine import Engine
from selfloop.engine.models.quantized.codes import Codes
from selfloop.engine.models.registry import parse_spec, read_spec
from selfloop.engine.models.spec import ModelSpec
from selfloop.engine.models.weights import stored_weights
from selfloop.types.datum import Datum, Tensor
from selfloop.types.operation import AdamParams
from selfloop.types.sampling import AdapterRef, SampleRequest, SamplingParams
from selfloop.types.settings import EngineLimits, KeptAs
from selfloop.types.speed import Rate, Speed

_SHAPE = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_NAME = "SmolLM2-135M's shape, random weights"
_RUN, _RANK = "speed", 32
_NUM_SEQUENCES, _LENGTH = 8, 256
_SMALLEST_LENGTH = 16
_PROMPT_TOKENS, _NEW_TOKENS = 16, 128
# Beyond any cache.
_READ_BYTES = 256 * 2**20
_FEW_ROWS, _MOST_CALLS = 16, 20
# Of the time for all, what each measure has.
_PRODUCT_SHARE, _MEMORY_SHARE, _TRAIN_SHARE, _DECODE_SHARE = 0.05, 0.05, 0.45, 0.2


def measure(model_dir: Path | None, seconds: float) -> Generator[Speed]:
    """Takes about so many seconds, once the model is there; on a slow machine less is computed for it.

    What is known so far comes after each measurement, as a large model may take longer for the least of them.
    """
    device = pick_device("auto")
    engine, spec, weights_in = _engine(model_dir, device)
    speed = Speed(
        model=_NAME if model_dir is None else str(model_dir),
        device=engine.info.device,
        dtype=engine.info.dtype,
        computed_by=engine.info.computed_by,
        num_threads=torch.get_num_threads(),
    )
    # Products in what the engine computes in, and nothing else: those of a type that a CPU has no instructions for can
    # take a thousand times as long.
    gflops = float32 = _gflops(device, torch.float32, _PRODUCT_SHARE * seconds)
    speed = replace(speed, float32_gflops=float32)
    if engine.info.dtype == "bfloat16":
        gflops = _gflops(device, torch.bfloat16, _PRODUCT_SHARE * seconds)
        speed = replace(speed, bfloat16_gflops=gflops)
    memory = _gb_per_s(device, _MEMORY_SHARE * seconds)
    yield (speed := replace(speed, memory_gb_per_s=memory))
    weights = spec.num_linear_weights
    products = gflops * 1e9 / (2 * weights)
    steps = memory * 1e9 / (weights * weights_in.itemsize)
    engine.init_run(_RUN, rank=_RANK, seed=0)
    engine.publish(_RUN, _RUN)
    for num in (1, 32):
        decoded = Rate(num, _decode(engine, num, _DECODE_SHARE * seconds), min(num * steps, products))
        speed = replace(speed, decode_1=decoded) if num == 1 else replace(speed, decode_32=decoded)
        yield speed
    num_tokens, rate = _train(engine, spec, device, _TRAIN_SHARE * seconds)
    yield replace(speed, train=Rate(num_tokens, rate, products / 2))


def _train(engine: Engine, spec: ModelSpec, device: torch.device, seconds: float) -> tuple[int, float]:
    """Tokens of a step, up to eight sequences of 256 and as many as fit the time a few times, and tokens a second."""

    def step(num_sequences: int, length: int) -> Callable[[], None]:
        data = [_datum(index, length, spec.vocab_size) for index in range(num_sequences)]

        def train() -> None:
            engine.forward_backward(_RUN, data, "cross_entropy", {})
            engine.optim_step(_RUN, AdamParams(learning_rate=1e-5))

        return train

    most = min(_LENGTH, spec.context)
    end, length = time.perf_counter() + seconds, min(_SMALLEST_LENGTH, most)
    _elapsed(step(1, length), device)  # lays out what only training needs
    took = _elapsed(step(1, length), device)
    affordable = int((end - time.perf_counter()) / 3 / took * length)
    num_sequences = max(1, min(_NUM_SEQUENCES, affordable // most))
    length = max(length, min(most, affordable))
    rate = _per_second(step(num_sequences, length), device, end - time.perf_counter())
    return num_sequences * length, num_sequences * length * rate


class _RandomSource:
    """Weights that no one has trained."""

    def __init__(self, spec: ModelSpec) -> None:
        self._shapes = spec.tensors()

    def names(self) -> Collection[str]:
        return self._shapes.keys()

    def read(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            yield name, torch.empty(self._shapes[name]).normal_(std=0.02)

    def codes(self, names: Collection[str], kept_as: KeptAs) -> Iterator[tuple[str, Codes]]:
        return iter(())


def _engine(model_dir: Path | None, device: torch.device) -> tuple[Engine, ModelSpec, torch.dtype]:
    """The engine, its model, and what its base weights are in."""
    if model_dir is not None:
        spec = read_spec(model_dir)
        stored = stored_weights(model_dir, spec).dtypes
        return Engine.load(model_dir), spec, compute_dtype("auto", spec, device, stored)
    spec = parse_spec(_SHAPE, {})
    dtype = compute_dtype("auto", spec, device, {"BF16"})
    model = load_model(spec, _RandomSource(spec), device, dtype)
    return Engine(model, limits=EngineLimits(max_adapters=1)), spec, dtype


def _datum(index: int, length: int, vocab_size: int) -> Datum:
    ids = _ids(length + 1, vocab_size, index)
    return Datum(Tensor.of(ids[:-1], "int64"), {"target_tokens": Tensor.of(ids[1:], "int64")})


def _ids(num: int, vocab_size: int, seed: int) -> list[int]:
    return torch.randint(vocab_size, (num,), generator=torch.Generator().manual_seed(seed)).tolist()


def _decode(engine: Engine, num: int, seconds: float) -> float:
    """Tokens a second of the fastest step in which all streams grew, once their prompts are read."""
    end = time.perf_counter() + seconds
    prompt_tokens = min(_PROMPT_TOKENS, engine.info.max_position_embeddings // 2)
    new_tokens = min(_NEW_TOKENS, engine.info.max_position_embeddings - prompt_tokens)
    for index in range(num):
        params = SamplingParams(max_tokens=new_tokens, seed=index)
        prompt = _ids(prompt_tokens, engine.info.vocab_size, index)
        engine.submit_sample(SampleRequest(str(index), prompt, 1, params, AdapterRef(_RUN)), stream=True)
    fastest = 0.0
    while engine.num_sampling and (time.perf_counter() < end or fastest == 0.0):
        start = time.perf_counter()
        engine.sample_step()
        took = time.perf_counter() - start
        grown = sum(len(delta.tokens) for deltas in engine.take_sample_deltas().values() for delta in deltas)
        fastest = max(fastest, grown / took)
    for index in range(num):
        engine.cancel_sample(str(index))
    return fastest


def _gflops(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    rows, inner, columns = 2048, 1024, 4096
    end = time.perf_counter() + seconds
    # A few rows first, which tell how many fit the time.
    b = torch.randn(inner, columns, device=device).to(dtype)
    few = torch.randn(_FEW_ROWS, inner, device=device).to(dtype)
    took = min(_elapsed(lambda: few @ b, device) for _ in range(2))
    rows = max(_FEW_ROWS, min(rows, int(_FEW_ROWS * seconds / 3 / took)))
    a = torch.randn(rows, inner, device=device).to(dtype)
    return 2e-9 * rows * inner * columns * _per_second(lambda: a @ b, device, end - time.perf_counter())


def _gb_per_s(device: torch.device, seconds: float) -> float:
    read = torch.ones(_READ_BYTES // 4, device=device)
    return 1e-9 * _READ_BYTES * _per_second(lambda: torch.dot(read, read), device, seconds)


def _per_second(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Calls a second by the fastest of as many as the time allows, after one to warm up where it allows two."""
    end = time.perf_counter() + seconds
    first = took = _elapsed(call, device)
    times: list[float] = []
    while len(times) < _MOST_CALLS and time.perf_counter() + took < end:
        took = _elapsed(call, device)
        times.append(took)
    return 1 / min(times, default=first)


def _elapsed(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path, nargs="?")
    parser.add_argument("--seconds", type=float, default=14)
    args = parser.parse_args()
    for speed in measure(args.model_dir, args.seconds):
        print(msgspec.json.encode(speed).decode(), flush=True)


if __name__ == "__main__":
    main()
