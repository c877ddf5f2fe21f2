"""A frozen weight in every layout, beside the plain product."""

import pytest
import torch

from selfloop.engine.backends.cpu_native.build import kernels
from selfloop.engine.backends.cpu_native.library import Kernels
from selfloop.engine.backends.cpu_native.linear import PanelLinear
from selfloop.engine.backends.torch.linear import FrozenLinear, best_products

SHAPES = [(96, 32), (33, 17), (1, 8), (640, 64), (48, 2600)]
CPU = torch.device("cpu")
needs_blocks = pytest.mark.skipif(
    best_products(CPU, torch.bfloat16) != "blocked", reason="this CPU does not multiply in bfloat16"
)
needs_panels = pytest.mark.skipif(kernels() is None, reason="the kernels are not for this CPU")
LAYOUTS = [pytest.param("blocked", marks=needs_blocks), pytest.param("panels", marks=needs_panels)]


def made(
    shape: tuple[int, int], dtype: torch.dtype, layout: str = "plain", *, bias: bool = True, shared: bool = False
) -> tuple[torch.Tensor, FrozenLinear | PanelLinear]:
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    bias_O = torch.randn(shape[0]).to(dtype) if bias else None
    if layout == "panels":
        found = kernels()
        assert found is not None
        return weight, PanelLinear(Kernels(found.library, found.body, dtype, low_rows=True), weight, bias_O)
    linear = FrozenLinear(weight, bias_O)
    linear.lay_out(layout, shared=shared)
    return weight, linear


@needs_blocks
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_rows", [0, 1, 7, 300])
def test_blocks_change_no_bit(shape: tuple[int, int], num_rows: int):
    x, dy = (torch.randn(num_rows, n).bfloat16() for n in (shape[1], shape[0]))
    _, plain = made(shape, torch.bfloat16)
    _, blocked = made(shape, torch.bfloat16, "blocked")
    assert torch.equal(blocked(x), plain(x))
    assert torch.equal(blocked.input_grad(dy), plain.input_grad(dy))


@needs_panels
@pytest.mark.parametrize("shape", SHAPES)
def test_panels_lose_nothing(shape: tuple[int, int]):
    weight, panels = made(shape, torch.bfloat16, "panels")
    assert torch.equal(panels.plain(), weight)
    assert panels(torch.empty(0, shape[1]).bfloat16()).shape == (0, shape[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_is_the_same_among_few_and_many(layout: str):
    _, linear = made((640, 64), torch.bfloat16, layout)
    x = torch.randn(700, 64).bfloat16()
    for call in (linear, linear.in_float32):
        everything = call(x)
        assert all(torch.equal(call(x[at : at + num]), everything[at : at + num]) for at, num in ((0, 1), (5, 40)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["plain", *LAYOUTS])
def test_bfloat16_summed_in_float32(shape: tuple[int, int], bias: bool, layout: str):
    weight, linear = made(shape, torch.bfloat16, layout, bias=bias)
    x = torch.randn(20, shape[1]).bfloat16()
    exact = x.double() @ weight.double().t()
    if linear.bias_O is not None:
        exact += linear.bias_O.double()
    found = linear.in_float32(x)
    assert found.dtype == torch.float32
    largest = float(exact.abs().max())
    assert float((found - exact).abs().max()) < 2**-15 * largest
    assert float((linear(x) - exact).abs().max()) > 2**-12 * largest, "a plain bfloat16 product is no better"
    grad = linear.input_grad(linear(x))
    torch.testing.assert_close(
        grad.double(), linear(x).double() @ weight.double(), rtol=2**-7, atol=2**-7 * float(grad.abs().max())
    )


def test_float32_is_plain():
    assert best_products(CPU, torch.float32) == "plain"
    weight, linear = made((33, 17), torch.float32, bias=False)
    x = torch.randn(5, 17)
    assert torch.equal(linear(x), x @ weight.t())
    assert torch.equal(linear.in_float32(x), linear(x))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("layout", ["plain", LAYOUTS[0]])
def test_distances_from_a_reference(layout: str, shared: bool):
    weight, linear = made((640, 64), torch.bfloat16, layout, bias=False, shared=shared)
    x, references = torch.randn(20, 64).bfloat16(), torch.randint(640, (20,))
    exact = x.double() @ weight.double().t()
    exact -= exact.gather(1, references[:, None])
    found = linear.up_to_a_shift(x, references)
    assert found.dtype == torch.float32
    distances = found - found.gather(1, references[:, None])
    assert bool(((distances - exact).abs() <= 2**-8 * exact.abs() + 1e-3).all())
