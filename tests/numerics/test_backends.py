"""What every backend must give, over every family that it computes: the contract of the model seam.

A backend is held to float64 on its own rounded weights, and to itself: packed is alone, cached is whole, split is
unsplit, and many adapters in one batch are each alone. In float32 it equals transformers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import backend_counts
import tiny_models
from selfloop.engine.backends.base import Backend, CacheSlot, Model, Varlen
from selfloop.engine.backends.cpu_native.backend import NativeBackend
from selfloop.engine.backends.torch.backend import TorchBackend
from selfloop.engine.backends.transformers.backend import TransformersBackend
from selfloop.engine.lora.adapter import Adapter, AdapterShape
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.models.config import read_object
from selfloop.engine.models.registry import read_spec
from selfloop.engine.models.spec import ModelSpec
from selfloop.engine.models.stored import StoredSpec, read_stored_spec
from selfloop.engine.models.weights import SafetensorsSource
from selfloop.types.lora import LoraTargets

CPU = torch.device("cpu")
PAGE = 16
EVERY_LAYER = LoraTargets(experts=True)


def read_stored(folder: Path) -> StoredSpec:
    """As of a model that no family describes, whatever it is."""
    return read_stored_spec(folder, read_object(folder / "config.json"), {})


OWN_FAMILIES = (*tiny_models.FAMILIES, "llama-wide-biased", "qwen2-wide", *tiny_models.MOE_FAMILIES)
KERNEL_FAMILIES = ("llama-wide-biased", "qwen2-wide", "qwen3")
STORED_FAMILIES = (*tiny_models.OTHER_FAMILIES, "llama", "llama-biased", "qwen3-moe")


class Case(NamedTuple):
    """A backend in a type; ``bound`` is how far from float64 its logits may be, as a part of the largest."""

    backend: Backend
    dtype: torch.dtype
    bound: float
    same_bits: bool = False
    families: tuple[str, ...] = OWN_FAMILIES
    read: Callable[[Path], ModelSpec] = read_spec


CASES = {
    "torch": Case(TorchBackend("plain"), torch.float32, 1e-5),
    "onednn": Case(TorchBackend(), torch.bfloat16, 0.05),
    "cpu_native": Case(NativeBackend(), torch.bfloat16, 0.05, same_bits=True),
    "cpu_native-float32": Case(NativeBackend(), torch.float32, 1e-5, same_bits=True, families=KERNEL_FAMILIES),
    # Chunks of a recurrence are computed in float32 by transformers even in a model of float64: 1.2e-5 of it is there.
    "transformers": Case(TransformersBackend(), torch.float32, 2e-5, families=STORED_FAMILIES, read=read_stored),
}
PAIRS = [(name, family) for name, case in CASES.items() for family in case.families]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(params=PAIRS, ids=["-".join(pair) for pair in PAIRS])
def pair(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> tuple[Case, str]:
    record_property(backend_counts.PROPERTY, request.param[0])
    return CASES[request.param[0]], request.param[1]


@pytest.fixture
def model(pair: tuple[Case, str], folders: Path) -> Model:
    """Skipped only where the backend says in words what it lacks, which those in float32 never do."""
    case, family = pair
    folder = folders / f"{family}-{case.dtype}"
    if not folder.exists():
        tiny_models.save_quietly(tiny_models.build(family).to(case.dtype), folder)
    spec = case.read(folder)
    lacking = case.backend.lacks(spec, CPU, case.dtype)
    if lacking is not None:
        assert case.dtype != torch.float32
        pytest.skip(lacking.reason)
    return case.backend.load(spec, SafetensorsSource(folder, spec), CPU, case.dtype)


def ids(num: int, seed: int) -> torch.Tensor:
    return torch.tensor(tiny_models.random_ids(num, seed=seed))


def random_adapter(model: Model, rank: int, seed: int, targets: LoraTargets = EVERY_LAYER) -> Adapter:
    shape = AdapterShape(model.spec, rank, targets)
    noise_P = torch.randn(shape.num_parameters, generator=torch.Generator().manual_seed(seed))
    return shape.adapter(((shape.initial(seed) + 0.05 * noise_P).to(model.dtype)).requires_grad_(), alpha=16.0)


def whole_logits(model: Model, tokens_T: torch.Tensor, adapter: Adapter | None = None) -> torch.Tensor:
    batch = AdapterBatch.of([(len(tokens_T), adapter)])
    with torch.no_grad():
        return model.logits(model.forward(Varlen.whole(tokens_T, [len(tokens_T)]), batch), batch)


def magnifies_rounding(case: Case, family: str) -> bool:
    """Whether rounding may send a row to another expert, or a state may carry it along: then most rows count."""
    return case.dtype == torch.bfloat16 and family in (*tiny_models.MOE_FAMILIES, *tiny_models.RECURRENT_FAMILIES)


def assert_close(pair: tuple[Case, str], found: torch.Tensor, expected: torch.Tensor) -> None:
    """By the relative distance of each row, or of most rows."""
    case, family = pair
    if case.same_bits:
        assert torch.equal(found, expected)
        return
    rows = ((found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-12)).flatten()
    assert float(rows.median() if magnifies_rounding(case, family) else rows.max()) <= case.bound


def test_logits_are_those_of_float64(pair: tuple[Case, str], model: Model):
    case, family = pair
    # Long enough to pass the original context of the scaled ropes.
    tokens_T = ids(150, seed=1)
    reference = tiny_models.build(family).to(case.dtype).double()
    if family in tiny_models.MOE_FAMILIES:
        reference.set_experts_implementation("eager")  # the usual one knows no float64
    with torch.no_grad():
        expected = reference(input_ids=tokens_T[None]).logits[0]
    found = whole_logits(model, tokens_T).double()
    assert expected.abs().max() > 1, "a flat model would hide mistakes"
    rows = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(rows.median() if magnifies_rounding(case, family) else rows.max()) <= case.bound
    if case.dtype == torch.float32:
        with torch.no_grad():
            theirs = tiny_models.build(family)(input_ids=tokens_T[None]).logits[0]
        torch.testing.assert_close(found.float(), theirs, atol=1e-4, rtol=1e-4)


def test_packed_is_alone(pair: tuple[Case, str], model: Model):
    lengths = [7, 1, 20]
    parts = [ids(length, seed) for seed, length in enumerate(lengths)]
    with torch.no_grad():
        h_TD = model.forward(Varlen.whole(torch.cat(parts), lengths), AdapterBatch([]))
    for h_ND, part_N in zip(h_TD.split(lengths), parts, strict=True):
        assert_close(pair, model.logits(h_ND, AdapterBatch([])), whole_logits(model, part_N))


@torch.no_grad()
def test_cached_is_whole_and_split_is_unsplit(pair: tuple[Case, str], model: Model):
    """Two sequences of different adapters: read in parts, then grown together a token at a time."""
    cache = model.make_cache(64 * PAGE)
    adapters = [random_adapter(model, 4, 1), random_adapter(model, 9, 2)]
    sequences, reads = [ids(40, 3), ids(29, 4)], [30, 19]
    slots = [CacheSlot(cache.pool.allocate(4)) for _ in sequences]
    found: list[list[torch.Tensor]] = [[], []]
    for parts in ([0, 11], [11, 12], [12, None]):
        starts, stops = [parts[0]] * 2, [parts[1] or stop for stop in reads]
        lengths = [stop - start for start, stop in zip(starts, stops, strict=True)]
        tokens_T = torch.cat([s[a:b] for s, a, b in zip(sequences, starts, stops, strict=True)])
        lora = AdapterBatch.of(list(zip(lengths, adapters, strict=True)))
        h_TD = model.forward_cached(Varlen(tokens_T, lengths, starts, slots), cache, lora)
        for place, logits in enumerate(model.logits(h_TD, lora).split(lengths)):
            found[place].append(logits)
    growing = [CacheSlot(slot.pages, grows=True, num_in_pages=n) for slot, n in zip(slots, reads, strict=True)]
    for slot, into in zip(slots, growing, strict=True):
        cache.fork(slot, into)
    lora = AdapterBatch.of([(1, adapter) for adapter in adapters])
    for step in range(10):
        starts = [at + step for at in reads]
        tokens_B = torch.stack([s[at] for s, at in zip(sequences, starts, strict=True)])
        h_BD = model.forward_cached(Varlen(tokens_B, [1, 1], starts, growing), cache, lora)
        for place, logits in enumerate(model.logits(h_BD, lora).split(1)):
            found[place].append(logits)
    for parts, tokens_T, adapter in zip(found, sequences, adapters, strict=True):
        assert_close(pair, torch.cat(parts), whole_logits(model, tokens_T, adapter))


@pytest.mark.parametrize("recompute", [False, True])
def test_adapters_of_many_ranks_in_one_batch_are_each_alone(pair: tuple[Case, str], model: Model, recompute: bool):
    lengths = [12, 30, 7, 5]
    adapters = [
        random_adapter(model, 3, 1),
        None,
        random_adapter(model, 20, 2, LoraTargets(mlp=False)),
        random_adapter(model, 8, 3, LoraTargets(unembed=True, experts=True)),
    ]
    parts, targets = [ids(n, n) for n in lengths], [ids(n, n + 50) for n in lengths]

    def scored(chosen: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        own = [lengths[i] for i in chosen]
        lora = AdapterBatch.of([(lengths[i], adapters[i]) for i in chosen])
        h_TD = model.forward(Varlen.whole(torch.cat([parts[i] for i in chosen]), own), lora, recompute=recompute)
        each = zip(chosen, h_TD.split(own), strict=True)
        logprobs = {i: model.score(h_ND, targets[i], 0, adapters[i]).logprobs for i, h_ND in each}
        leaves = {i: adapter.flat_P for i in chosen if (adapter := adapters[i]) is not None}
        grads_of = dict.fromkeys(chosen, torch.zeros(1))
        if leaves:
            loss = torch.stack([logprobs[i].sum() for i in leaves]).sum()
            grads_of |= dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        return [(logprobs[i].detach(), grads_of[i]) for i in chosen]

    for i, (logprobs_N, grad_P) in enumerate(scored([0, 1, 2, 3])):
        ((alone_N, alone_P),) = scored([i])
        assert_close(pair, logprobs_N, alone_N)
        assert_close(pair, grad_P, alone_P)
