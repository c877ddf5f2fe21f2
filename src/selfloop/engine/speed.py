"""What this machine can compute, and what the engine makes of it: ``python -m selfloop.engine.speed [MODEL_DIR]``.

Prints one JSON object, a :class:`Speed`. Without a folder the model is one of SmolLM2-135M's shape with random weights,
which cost as much as trained ones.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from selfloop.engine.device import pick_device, pick_dtype
from selfloop.engine.engine import Engine
from selfloop.engine.files.base_weights import random_base_weights
from selfloop.engine.limits import EngineLimits
from selfloop.engine.lora.targets import linear_groups
from selfloop.engine.models.config import ModelConfig, parse_config, read_config
from selfloop.engine.models.decoder import Decoder
from selfloop.engine.models.linear import best_layout
from selfloop.types.datum import Datum, Tensor
from selfloop.types.operation import AdamParams
from selfloop.types.sampling import AdapterRef, SampleRequest, SamplingParams
from selfloop.types.speed import Speed

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
_PROMPT_TOKENS, _NEW_TOKENS = 64, 32
# Beyond any cache.
_READ_BYTES = 256 * 2**20


def measure(model_dir: Path | None, tries: int) -> Speed:
    device = pick_device("auto")
    dtype = pick_dtype("auto", device)
    float32, bfloat16 = (_gflops(device, kind, tries) for kind in (torch.float32, torch.bfloat16))
    memory = _gb_per_s(device, tries)
    engine, config = _engine(model_dir, device, dtype)
    engine.init_run(_RUN, rank=_RANK, seed=0)
    data = [_datum(index, config.vocab_size) for index in range(_NUM_SEQUENCES)]

    def train() -> None:
        engine.forward_backward(_RUN, data, "cross_entropy", {})
        engine.optim_step(_RUN, AdamParams(learning_rate=1e-5))

    trained = _NUM_SEQUENCES * _LENGTH * _per_second(train, device, tries)
    engine.publish(_RUN, _RUN)
    alone, batched = (
        num * _NEW_TOKENS * _per_second(lambda num=num: _sample(engine, num), device, tries) for num in (1, 32)
    )
    weights = _linear_weights(config)
    gflops = (float32 if dtype == torch.float32 else bfloat16) * 1e9
    steps = memory * 1e9 / (weights * dtype.itemsize)
    return Speed(
        model=_NAME if model_dir is None else str(model_dir),
        device=engine.info.device,
        dtype=engine.info.dtype,
        num_threads=torch.get_num_threads(),
        float32_gflops=float32,
        bfloat16_gflops=bfloat16,
        memory_gb_per_s=memory,
        train_tokens_per_s=trained,
        train_roof=gflops / (4 * weights),
        decode_1_tokens_per_s=alone,
        decode_1_roof=min(steps, gflops / (2 * weights)),
        decode_32_tokens_per_s=batched,
        decode_32_roof=min(32 * steps, gflops / (2 * weights)),
    )


def _engine(model_dir: Path | None, device: torch.device, dtype: torch.dtype) -> tuple[Engine, ModelConfig]:
    if model_dir is not None:
        return Engine.load(model_dir), read_config(model_dir)
    config = parse_config(_SHAPE, {})
    decoder = Decoder(config, random_base_weights(config, device, dtype, best_layout(config, device, dtype)))
    return Engine(decoder, limits=EngineLimits(max_adapters=1)), config


def _datum(index: int, vocab_size: int) -> Datum:
    ids = _ids(_LENGTH + 1, vocab_size, index)
    return Datum(Tensor.of(ids[:-1], "int64"), {"target_tokens": Tensor.of(ids[1:], "int64")})


def _ids(num: int, vocab_size: int, seed: int) -> list[int]:
    return torch.randint(vocab_size, (num,), generator=torch.Generator().manual_seed(seed)).tolist()


def _sample(engine: Engine, num: int) -> None:
    for index in range(num):
        params = SamplingParams(max_tokens=_NEW_TOKENS, seed=index)
        prompt = _ids(_PROMPT_TOKENS, engine.info.vocab_size, index)
        engine.submit_sample(SampleRequest(str(index), prompt, 1, params, AdapterRef(_RUN, "")))
    while engine.num_sampling:
        engine.sample_step()


def _linear_weights(config: ModelConfig) -> int:
    layer = sum(g.in_features * sum(t.out_features for t in g.targets) for g in linear_groups(config))
    return config.num_layers * layer + config.vocab_size * config.hidden_size


def _gflops(device: torch.device, dtype: torch.dtype, tries: int) -> float:
    rows, inner, columns = 2048, 1024, 4096
    a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((rows, inner), (inner, columns)))
    return 2e-9 * rows * inner * columns * _per_second(lambda: a @ b, device, 5 * tries)


def _gb_per_s(device: torch.device, tries: int) -> float:
    read = torch.ones(_READ_BYTES // 4, device=device)
    return 1e-9 * _READ_BYTES * _per_second(lambda: torch.dot(read, read), device, 5 * tries)


def _per_second(call: Callable[[], object], device: torch.device, tries: int) -> float:
    """Calls a second by the fastest of ``tries``, after one to warm up."""
    times: list[float] = []
    for _ in range(tries + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1 / min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path, nargs="?")
    parser.add_argument("--tries", type=int, default=2)
    args = parser.parse_args()
    print(msgspec.json.encode(measure(args.model_dir, args.tries)).decode())


if __name__ == "__main__":
    main()
