"""The whole engine on a pretended CUDA device: no tensor on a wrong one, and budgets of what costs time there.

The budgets are what is reached, so that none of it is lost unseen; whoever makes a path shorter lowers its number.
"""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import tiny_models
from pretended_cuda import Counts, MixedDevices, PretendedCuda
from selfloop.engine.engine import Engine
from selfloop.types.operation import ForwardBackward
from selfloop.types.sampling import AdapterRef, SampleRequest, SamplingParams
from selfloop.types.settings import EngineLimits

LIMITS = EngineLimits(max_kv_tokens=2048, train_token_budget=512)
LENGTHS = (6, 9, 12, 15)
NUM_RUNS = 3


class Budget(NamedTuple):
    """The most launches of a model of two layers, its embedding, output layer and sampling included.

    Args:
        decode: of a step of six rows, by how many adapters they have between them: 0, 1, 3.
        train: of one sequence of one run, four sequences of one run, four of each of three.
    """

    decode: tuple[int, int, int]
    train: tuple[int, int, int]


BUDGETS = {
    "qwen3": Budget((109, 131, 145), (346, 377, 735)),
    "gemma2-own": Budget((127, 149, 163), (511, 898, 2224)),
    "qwen3_5-own": Budget((145, 168, 183), (632, 665, 1007)),
    "qwen3-moe": Budget((240, 262, 281), (583, 668, 1058)),
}
MOST_UPLOADS, MOST_WAITS = 9, 3
# The rows of each expert are counted on the host, in each of two layers.
MOE_WAITS = 6


def of_runs(num_runs: int, num_sequences: int) -> list[tuple[str, ForwardBackward]]:
    data = [tiny_models.next_token_datum(tiny_models.random_ids(n, seed=n)) for n in LENGTHS[:num_sequences]]
    return [(f"run{run}", ForwardBackward(data, "cross_entropy", {})) for run in range(num_runs)]


def with_runs(folder: Path, device: str, dtype: str) -> Engine:
    engine = Engine.load(folder, device=device, dtype=dtype, limits=LIMITS)
    for run in range(NUM_RUNS):
        engine.init_run(f"run{run}", rank=(4, 8, 2)[run], seed=run)
    return engine


def decode_counts(engine: Engine, cuda: PretendedCuda, num_adapters: int) -> Counts:
    """Of a step that only decodes."""
    for row in range(6):
        adapter = AdapterRef(f"weights{row % num_adapters}") if num_adapters else None
        params = SamplingParams(max_tokens=8, seed=row)
        prompt = tiny_models.random_ids(10 + row, seed=row)
        engine.submit_sample(SampleRequest(f"{num_adapters}/{row}", prompt, 1, params, adapter))
    for _ in range(3):
        engine.sample_step()
    with cuda.counted() as counts:
        engine.sample_step()
    while engine.num_sampling:
        engine.sample_step()
    assert engine.take_failed_samples() == []
    return counts


@pytest.mark.parametrize(("family", "budget"), BUDGETS.items(), ids=BUDGETS)
def test_budgets_of_training_and_decoding(family, budget, tmp_path):
    folder = tiny_models.save(family, tmp_path)
    with PretendedCuda() as cuda:
        engine = with_runs(folder, "cuda", "bfloat16")
        launches = []
        for num_runs, num_sequences in ((1, 1), (1, 4), (3, 4)):
            with cuda.counted() as counts:
                engine.compute(of_runs(num_runs, num_sequences))
            launches.append(counts.totals[0])
        assert all(found <= most for found, most in zip(launches, budget.train, strict=True)), launches
        for run in range(NUM_RUNS):
            engine.publish(f"run{run}", f"weights{run}")
        for num_adapters, most in zip((0, 1, 3), budget.decode, strict=True):
            counts = decode_counts(engine, cuda, num_adapters)
            launches, uploads, waits = counts.totals
            assert launches <= most, (launches, counts.launches)
            assert uploads <= MOST_UPLOADS, counts.uploads
            assert waits <= MOST_WAITS + (MOE_WAITS if "moe" in family else 0), counts.waits


def test_the_numbers_are_those_of_the_cpu(tmp_path):
    folder = tiny_models.save("gemma2-own", tmp_path)
    found = with_runs(folder, "cpu", "float32").compute(of_runs(NUM_RUNS, 4))
    with PretendedCuda():
        pretended = with_runs(folder, "cuda", "float32").compute(of_runs(NUM_RUNS, 4))
    for here, there in zip(found, pretended, strict=True):
        assert there.metrics["loss"] == pytest.approx(here.metrics["loss"], rel=1e-5)


def test_a_tensor_of_the_cpu_beside_one_of_the_device_is_refused():
    with PretendedCuda():
        there = torch.ones(3, device="cuda")
        assert str(there.device) == "cuda:0"
        with pytest.raises(MixedDevices, match=r"tensor of the CPU \(3,\) beside one of cuda:0"):
            there + torch.ones(3)
        assert (there + torch.ones(())).tolist() == [2.0, 2.0, 2.0]


def test_launches_uploads_and_waits_are_counted_apart():
    with PretendedCuda() as cuda:
        x = torch.zeros(2, 3, device="cuda")
        with cuda.counted() as counts:
            y = torch.tensor([[1.0, 2.0, 3.0]], device="cuda") + x.view(2, 3)[:1].t().t()
            y.sum().item()
    assert counts.totals == (2, 1, 1)
