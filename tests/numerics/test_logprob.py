"""Logprobs of targets, and the likeliest tokens, against float64."""

import math

import pytest
import torch

from selfloop.engine.backends.torch.linear import FrozenLinear
from selfloop.engine.backends.torch.logprob import score


@pytest.mark.parametrize("vocab_size", [50, 100_000])
def test_target_logprobs_against_float64(vocab_size):
    """Value and gradient, over more rows than one chunk, against an independent float64 softmax."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(300, 8, generator=generator)
    head = torch.randn(vocab_size, 8, generator=generator)
    targets = torch.randint(0, vocab_size, (300,), generator=generator)
    weights = torch.randn(300, generator=generator)

    h32 = h.clone().requires_grad_()
    logprobs = score(h32, FrozenLinear(head), targets, 0).logprobs
    (logprobs * weights).sum().backward()

    h64 = h.double().requires_grad_()
    logits = h64 @ head.double().t()
    shifted = logits - logits.max(-1, keepdim=True).values.detach()
    expected = shifted[torch.arange(300), targets] - shifted.exp().sum(-1).log()
    (expected * weights.double()).sum().backward()

    torch.testing.assert_close(logprobs.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(h32.grad.double(), h64.grad, atol=1e-4, rtol=1e-4)


def test_cross_entropy_of_a_uniform_model_is_log_vocabulary():
    logprobs = score(torch.zeros(3, 4), FrozenLinear(torch.randn(10, 4)), torch.tensor([0, 5, 9]), 0).logprobs
    torch.testing.assert_close(logprobs, torch.full((3,), -math.log(10)))


@pytest.mark.parametrize(("vocab_size", "num_targets"), [(50, 1), (50, 5), (100_000, 3)])
def test_several_targets_a_row_against_float64(vocab_size, num_targets):
    """Some targets twice in a row, some rows without any gradient, over more rows than one chunk."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(300, 8, generator=generator)
    head = torch.randn(vocab_size, 8, generator=generator)
    targets = torch.randint(0, vocab_size, (300, num_targets), generator=generator)
    targets[:50] = targets[:50, :1]
    weights = torch.randn(300, num_targets, generator=generator)
    weights[60:70] = 0

    h32 = h.clone().requires_grad_()
    logprobs = score(h32, FrozenLinear(head), targets, 0).logprobs
    (logprobs * weights).sum().backward()

    h64 = h.double().requires_grad_()
    expected = (h64 @ head.double().t()).log_softmax(-1).gather(1, targets)
    (expected * weights.double()).sum().backward()

    torch.testing.assert_close(logprobs.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(h32.grad.double(), h64.grad, atol=1e-4, rtol=1e-4)
    if num_targets == 1:
        flat = h.clone().requires_grad_()
        single = score(flat, FrozenLinear(head), targets[:, 0], 0).logprobs
        (single * weights[:, 0]).sum().backward()
        assert torch.equal(single, logprobs[:, 0])
        torch.testing.assert_close(h32.grad, flat.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("num_targets", [None, 2])
@pytest.mark.parametrize("num_top", [1, 7, 60])
def test_the_likeliest_tokens_against_float64(num_targets, num_top):
    generator = torch.Generator().manual_seed(0)
    h, head = torch.randn(300, 8, generator=generator), torch.randn(50, 8, generator=generator)
    targets = torch.zeros((300,) if num_targets is None else (300, num_targets), dtype=torch.int64)
    leaf = h.clone().requires_grad_()
    scores = score(leaf, FrozenLinear(head), targets, num_top)
    expected = (h.double() @ head.double().t()).log_softmax(-1).topk(min(num_top, 50), dim=1)
    torch.testing.assert_close(scores.top_logprobs_NJ.double(), expected.values, atol=1e-5, rtol=1e-5)
    assert torch.equal(scores.top_tokens_NJ, expected.indices)
    plain = h.clone().requires_grad_()
    scores.logprobs.sum().backward()
    score(plain, FrozenLinear(head), targets, 0).logprobs.sum().backward()
    assert torch.equal(leaf.grad, plain.grad)
