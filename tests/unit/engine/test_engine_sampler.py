"""Drawing one token: masks, greedy, the distribution itself."""

import pytest
import torch

from selfloop.engine.backends.base import Row
from selfloop.engine.backends.cpu_native.draw import draw
from selfloop.engine.sample.sampler import sample_generator
from selfloop.types.sampling import SamplingParams

LOGITS = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()


def frequencies(logits, num=2000, **params):
    """How often each token comes when the uniform number takes ``num`` even steps."""
    rows = [Row(SamplingParams(max_tokens=1, **params), (step + 0.5) / num) for step in range(num)]
    tokens = draw(logits.repeat(num, 1), rows).tokens
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / num


def probabilities(**params):
    return pytest.approx(frequencies(LOGITS, **params).tolist(), abs=1e-3)


def test_no_filter_is_the_distribution():
    assert probabilities() == [0.5, 0.2, 0.15, 0.1, 0.05]


def test_temperature_sharpens():
    squares = [p**2 for p in (0.5, 0.2, 0.15, 0.1, 0.05)]
    assert [s / sum(squares) for s in squares] == probabilities(temperature=0.5)


def test_top_k_keeps_k():
    assert probabilities(top_k=2) == [5 / 7, 2 / 7, 0, 0, 0]


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.01, 1), (0.49, 1), (0.51, 2), (0.69, 2), (0.71, 3), (0.94, 4), (0.96, 5), (1.0, 5)]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    assert int((frequencies(LOGITS, top_p=top_p) > 0).sum()) == kept


def test_top_p_counts_after_top_k():
    # Of the two kept by top_k the first has 5/7.
    assert int((frequencies(LOGITS, top_k=2, top_p=0.7) > 0).sum()) == 1


def test_rows_are_drawn_each_by_its_own_parameters():
    settings = [{"top_k": 1}, {"temperature": 0}, {}, {"top_k": 3}, {"top_p": 0.6}]
    rows = [Row(SamplingParams(max_tokens=1, **params), 0.999) for params in settings]
    assert draw(LOGITS.repeat(5, 1), rows).tokens == [0, 0, 4, 2, 1]


def test_a_large_vocabulary_is_drawn_as_its_distribution_says():
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 2
    expected = (logits.double() / 0.7).softmax(-1).cumsum(-1)
    rows = [Row(SamplingParams(max_tokens=1, temperature=0.7), u) for u in torch.linspace(0, 0.9999, 300).tolist()]
    for row, token in zip(rows, draw(logits.repeat(300, 1), rows).tokens, strict=True):
        assert token == pytest.approx(int(torch.searchsorted(expected, row.uniform)), abs=0) or (
            abs(float(expected[min(token, int(torch.searchsorted(expected, row.uniform)))]) - row.uniform) < 1e-6
        )


@pytest.mark.parametrize("top_p", [0.2, 0.9, 0.999])
def test_top_p_looks_beyond_the_likeliest_thousand_where_it_must(top_p):
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(2)) * 0.5
    drawn = draw(logits[None], [Row(SamplingParams(max_tokens=1, top_p=top_p), 1 - 2**-40)]).tokens[0]
    probs, order = logits.double().softmax(-1).sort(descending=True)
    last = int((probs.cumsum(-1) < top_p).sum())
    assert drawn == int(order[last])


def test_uniform_numbers_walk_the_distribution():
    uniforms = [0.0, 0.49, 0.51, 0.69, 0.71, 0.9999999]
    drawn = draw(LOGITS.repeat(len(uniforms), 1), [Row(SamplingParams(max_tokens=1), u) for u in uniforms])
    assert drawn.tokens == [0, 0, 1, 1, 2, 4]


def test_logprobs_are_untempered_and_unfiltered():
    params = [
        SamplingParams(max_tokens=1, temperature=0),
        SamplingParams(max_tokens=1, temperature=0.1, top_k=1),
    ]
    drawn = draw(LOGITS.repeat(2, 1) + 3.0, [Row(p, 0.5) for p in params])
    assert drawn.tokens == [0, 0]
    assert drawn.logprobs == pytest.approx([float(LOGITS[0])] * 2, abs=1e-6)


def test_streams_are_stable_and_differ():
    def first(seed, index):
        return float(torch.rand((), generator=sample_generator(seed, index)))

    assert first(1, 0) == first(1, 0)
    assert len({first(seed, index) for seed in (0, 1, -5, 2**80) for index in range(4)}) == 16
    assert first(None, 0) != first(None, 0)


def test_rows_drawn_in_several_passes_are_the_same(monkeypatch):
    mask = torch.tensor([False, True, False, True, True])
    rows = [
        Row(SamplingParams(max_tokens=1), 0.1, num_top=2),
        Row(SamplingParams(max_tokens=1, temperature=0), 0.6),
        Row(SamplingParams(max_tokens=1), 0.95, mask, num_top=5),
    ]
    at_once = draw(LOGITS.repeat(3, 1), rows)
    monkeypatch.setattr("selfloop.engine.sample.sampler._MAX_ELEMENTS", 2 * len(LOGITS))
    assert draw(LOGITS.repeat(3, 1), rows) == at_once


def test_a_mask_holds_for_its_row_only_and_leaves_logprobs_alone():
    mask = torch.tensor([False, False, True, False, True])
    greedy, free = SamplingParams(max_tokens=1, temperature=0), SamplingParams(max_tokens=1)
    rows = [Row(greedy, 0.0, mask), Row(greedy, 0.0), Row(free, 0.74, mask), Row(free, 0.76, mask), Row(free, 0.74)]
    drawn = draw(LOGITS.repeat(5, 1), rows)
    assert drawn.tokens == [2, 0, 2, 4, 2]
    assert drawn.logprobs == pytest.approx([float(LOGITS[token]) for token in drawn.tokens], abs=1e-6)


@pytest.mark.parametrize("top_p", [0.3, 1.0])
def test_the_largest_uniform_number_never_draws_what_is_masked(top_p):
    mask = torch.tensor([True, True, False, False, False])
    row = Row(SamplingParams(max_tokens=1, top_p=top_p), 1 - 2**-53, mask)
    assert draw(LOGITS[None], [row]).tokens[0] in (0, 1)


def test_the_likeliest_tokens_come_first():
    rows = [Row(SamplingParams(max_tokens=1), 0.99, num_top=k) for k in (0, 2, 9)]
    tops = draw(LOGITS.repeat(3, 1), rows).tops
    assert [[token for token, _ in top] for top in tops] == [[], [0, 1], [0, 1, 2, 3, 4]]
    assert [logprob for _, logprob in tops[2]] == pytest.approx(LOGITS.tolist(), abs=1e-6)
