"""Routers by their formulas, and rows that are sorted by expert by one at a time."""

import pytest
import torch

from selfloop.engine.backends.torch.expert_rows import ExpertRows, SortedExperts
from selfloop.engine.backends.torch.linear import FrozenLinear
from selfloop.engine.backends.torch.router import choose, weigh
from selfloop.engine.lora.experts import expert_segments
from selfloop.engine.lora.grouped_matmul import LoraSegment, lora_linear
from selfloop.engine.models.mixture_of_experts import Router

NUM, TOP, WIDTH = 8, 3, 6
ROUTERS = {
    "softmax": Router(WIDTH, NUM, TOP),
    "softmax, normalised": Router(WIDTH, NUM, TOP, normalised=True),
    "softmax of the chosen": Router(WIDTH, NUM, TOP, "softmax_of_chosen"),
    "sigmoid, corrected": Router(WIDTH, NUM, TOP, "sigmoid", normalised=True, scale=2.5, correction="bias"),
    "sigmoid, of groups": Router(WIDTH, NUM, TOP, "sigmoid", correction="bias", groups=(4, 2)),
}


def by_hand(router: Router, logits: list[float], correction: list[float]) -> dict[int, float]:
    """Weights by expert, of one row."""
    exps = [torch.tensor(z, dtype=torch.float64).exp().item() for z in logits]
    scores = [e / (1 + e) if router.scoring == "sigmoid" else e / sum(exps) for e in exps]
    ranked = [s + c for s, c in zip(scores, correction, strict=True)] if router.correction else scores
    num_groups, num_best = router.groups
    size = NUM // num_groups
    groups = sorted(range(num_groups), key=lambda g: -sum(sorted(ranked[g * size : (g + 1) * size])[-2:]))
    allowed = [e for e in range(NUM) if e // size in groups[:num_best]]
    chosen = sorted(allowed, key=lambda e: -ranked[e])[:TOP]
    if router.scoring == "softmax_of_chosen":
        return {e: exps[e] / sum(exps[c] for c in chosen) for e in chosen}
    total = sum(scores[e] for e in chosen) if router.normalised else 1.0
    return {e: scores[e] / total * router.scale for e in chosen}


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_chooses_and_weighs_as_its_formula(name: str):
    generator = torch.Generator().manual_seed(3)
    logits, correction = torch.randn(40, NUM, generator=generator), torch.randn(NUM, generator=generator) / 2
    router = ROUTERS[name]
    experts = choose(router, logits, correction if router.correction else None)
    weights = weigh(router, logits, experts)
    for row in range(len(logits)):
        expected = by_hand(router, logits[row].tolist(), correction.tolist())
        assert experts[row].tolist() == sorted(expected)
        torch.testing.assert_close(weights[row], torch.tensor([expected[e] for e in sorted(expected)]))


def test_a_correction_chooses_and_does_not_weigh():
    logits = torch.tensor([[0.0, 0.1, 0.2, 0.3]])
    router = Router(WIDTH, 4, 1, "sigmoid", correction="bias")
    experts = choose(router, logits, torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert experts.tolist() == [[0]]
    assert weigh(router, logits, experts).item() == 0.5


def rows_and_segments(num_segments: int) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    generator = torch.Generator().manual_seed(num_segments)
    experts = torch.rand(14, NUM, generator=generator).topk(TOP).indices.sort(dim=-1).values
    experts[experts == 5] = 4
    experts[:, 2] = 7
    experts[:, 1] = experts[:, 1].clamp(min=1, max=6)
    experts[:, 0] = 0
    return experts, {0: [], 1: [(0, 14)], 2: [(1, 6), (9, 14)]}[num_segments]


@pytest.mark.parametrize("num_segments", [0, 1, 2])
def test_sorted_rows_give_what_each_row_gives_alone(num_segments: int):
    """Also to the gradients of the rows and of the adapters; some experts have no rows."""
    experts_TK, ranges = rows_and_segments(num_segments)
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    linears = [FrozenLinear(randn(5, WIDTH)) for _ in range(NUM)]
    ab = [(randn(NUM, 2, WIDTH).requires_grad_(), randn(NUM, 5, 2).requires_grad_()) for _ in ranges]
    segments = [LoraSegment(*rows, 0.7, a, (b,)) for rows, (a, b) in zip(ranges, ab, strict=True)]
    x_TD, weights_TK = randn(14, WIDTH).requires_grad_(), randn(14, TOP).requires_grad_()
    leaves = [x_TD, weights_TK, *(leaf for pair in ab for leaf in pair)]

    rows = ExpertRows(experts_TK, NUM, segments)
    y_NO = lora_linear(rows.spread(x_TD), SortedExperts(linears, rows), expert_segments(segments, rows.spans))
    found = rows.added(y_NO * rows.spread_weights(weights_TK))

    out = []
    for row, (experts, x_D) in enumerate(zip(experts_TK.tolist(), x_TD, strict=True)):
        y_O = torch.zeros(5, dtype=torch.float64)
        for place, expert in enumerate(experts):
            weight = linears[expert].plain()
            for segment in segments:
                if segment.start <= row < segment.stop:
                    weight = weight + segment.scaling * segment.b[0][expert] @ segment.a[expert]
            y_O = y_O + weights_TK[row, place] * (weight @ x_D)
        out.append(y_O)
    expected = torch.stack(out)
    torch.testing.assert_close(found, expected)
    slope = randn(14, 5)
    for of_found, of_expected in zip(
        torch.autograd.grad(found, leaves, slope), torch.autograd.grad(expected, leaves, slope), strict=True
    ):
        torch.testing.assert_close(of_found, of_expected)
    spans = rows.spans
    assert [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])]
    assert spans[-1].stop == experts_TK.numel()
