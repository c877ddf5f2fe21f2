"""Norm and finiteness of flat gradients, against float64."""

import math

import pytest
import torch

from selfloop.engine.train.optim import all_finite, global_norm


@pytest.mark.parametrize("num", [1, 4095, 4096, 4097, 20_000])
def test_the_norm_is_that_of_float64(num: int) -> None:
    values = torch.randn(num, generator=torch.Generator().manual_seed(num)) * 1e-3
    assert global_norm(values) == pytest.approx(float(values.double().norm()), rel=1e-6)


def test_the_norm_of_values_whose_squares_overflow_float32() -> None:
    values = torch.full((5000,), 1e30)
    assert global_norm(values) == pytest.approx(1e30 * math.sqrt(5000), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_values_are_finite_though_their_sum_overflows(dtype: torch.dtype) -> None:
    assert all_finite(torch.full((10,), 3e38, dtype=dtype))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_bad_value_is_seen(bad: float, dtype: torch.dtype) -> None:
    values = torch.ones(10_000, dtype=dtype)
    values[5_000] = bad
    values[7_000] = -bad
    assert not all_finite(values)
