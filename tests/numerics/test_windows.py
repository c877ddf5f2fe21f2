"""Attention by blocks of queries (windows, soft caps), and windows in decode steps from buckets and pages alone."""

import pytest
import torch

import tiny_models
from selfloop.engine.backends.base import CacheSlot, Varlen
from selfloop.engine.backends.torch import blocked_attention as blocks
from selfloop.engine.backends.torch.backend import TorchBackend
from selfloop.engine.backends.torch.model import TorchModel
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.models.registry import read_spec
from selfloop.engine.models.weights import SafetensorsSource

NO_ADAPTER = AdapterBatch([])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num", "length"), [(50, 50), (20, 50)])
@pytest.mark.parametrize(
    ("window", "softcap", "sinks"),
    [(2, None, False), (7, 1.5, False), (None, 1.5, False), (7, None, True), (None, None, True)],
)
def test_blocks_of_queries_are_the_whole(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    num: int,
    length: int,
    window: int | None,
    softcap: float | None,
    sinks: bool,
):
    """Four queries a block: value and gradients are those of the formula in float64."""
    monkeypatch.setattr(blocks, "_BLOCK_QUERIES", (4, 4))
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, num, 8), (2, 2, length, 8), (2, 2, length, 8)]
    q, k, v = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)
    sinks_H = torch.tensor([0.5, -1.0, 3.0, 40.0]) if sinks else None
    found = blocks.blocked_attention(q, k, v, blocks.Scoring(window, softcap, 0.5, sinks_H))
    queries, keys = torch.arange(length - num, length)[:, None], torch.arange(length)
    visible = (keys <= queries) & (keys > queries - (window or length))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    scores = 0.5 * exact[0] @ exact[1].repeat_interleave(2, 1).transpose(2, 3)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks_H is not None:
        scores = torch.cat((scores, sinks_H.double().view(1, 4, 1, 1).expand(2, -1, num, 1)), dim=-1)
    weights = scores.softmax(-1)[..., :length]
    expected = weights @ exact[2].repeat_interleave(2, 1)
    slope = torch.randn(expected.shape, generator=generator).to(dtype)
    grads = torch.autograd.grad(found, (q, k, v), slope)
    expected_grads = torch.autograd.grad(expected, exact, slope.double())
    bound = 1e-5 if dtype == torch.float32 else 0.02
    for one, other in zip((found, *grads), (expected, *expected_grads), strict=True):
        assert one.dtype == dtype
        assert float((one.detach().double() - other.detach()).norm() / other.detach().norm()) < bound


@torch.no_grad()
@pytest.mark.parametrize("with_buckets", [True, False])
@pytest.mark.parametrize("family", ["mistral-window", "qwen3-windows"])
def test_steps_see_the_window_from_buckets_and_from_pages(zoo, family: str, with_buckets: bool):
    """Prompts shorter and longer than the window and a page, grown together over the edges of both."""
    spec = read_spec(zoo.folder(family))
    model = TorchBackend("plain").load(
        spec, SafetensorsSource(zoo.folder(family), spec), torch.device("cpu"), torch.float32
    )
    assert isinstance(model, TorchModel)
    cache = model.make_cache(64 * 16)
    if not with_buckets:
        cache.buckets._max_tokens = 0
    sequences = [torch.tensor(tiny_models.random_ids(n + 20, seed=n)) for n in (3, 30, 47)]
    reads = [len(tokens_T) - 20 for tokens_T in sequences]
    slots = [CacheSlot(cache.pool.allocate(5)) for _ in sequences]
    prompts_T = torch.cat([tokens_T[:n] for tokens_T, n in zip(sequences, reads, strict=True)])
    model.forward_cached(Varlen(prompts_T, reads, [0] * 3, slots), cache, NO_ADAPTER)
    growing = [CacheSlot(slot.pages, grows=True, num_in_pages=n) for slot, n in zip(slots, reads, strict=True)]
    whole = [model.forward(Varlen.whole(tokens_T, [len(tokens_T)]), NO_ADAPTER) for tokens_T in sequences]
    for step in range(20):
        starts = [n + step for n in reads]
        tokens_B = torch.stack([tokens_T[at] for tokens_T, at in zip(sequences, starts, strict=True)])
        h_BD = model.forward_cached(Varlen(tokens_B, [1] * 3, starts, growing), cache, NO_ADAPTER)
        expected = torch.stack([h_TD[at] for h_TD, at in zip(whole, starts, strict=True)])
        torch.testing.assert_close(h_BD, expected, atol=1e-4, rtol=1e-4)
    placed = cache.buckets.place(growing, [n + 19 for n in reads])
    assert bool(placed.outside) is not with_buckets
