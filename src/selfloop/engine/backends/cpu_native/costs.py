"""What a pass by the kernels takes of memory: they say it."""

from collections.abc import Callable

import torch

from selfloop.engine.backends.base import Cost, Costs, LayerCosts
from selfloop.engine.backends.cpu_native.library import LANES, Kernels
from selfloop.engine.backends.cpu_native.pass_parts import PassParts
from selfloop.engine.backends.cpu_native.sizes import Sizes
from selfloop.engine.backends.device import default_train_budget
from selfloop.engine.backends.torch.costs import ends_cost
from selfloop.engine.backends.torch.logprob import chunk_rows
from selfloop.engine.models.spec import ModelSpec


def costs_of(kernels: Kernels, spec: ModelSpec, sizes: Sizes) -> Costs:
    device, itemsize = torch.device("cpu"), kernels.rows.itemsize
    return Costs(
        # Panels are there once more for the backward.
        weights=2 * spec.num_parameters * kernels.weights.itemsize,
        base_weights=spec.num_parameters * kernels.weights.itemsize,
        layers=_layer_costs(PassParts(kernels, sizes)),
        ends=ends_cost(spec, device, itemsize),
        rank_step=LANES,
        adapter_panels=itemsize,
        train_tokens=default_train_budget(device),
        logit_rows=chunk_rows(spec.vocab_size, device),
    )


def _layer_costs(parts: PassParts) -> LayerCosts:
    def cost(part: Callable[[int, int], int]) -> Cost:
        return _fitted(part, (512, 4096), (LANES, 4 * LANES))

    def kept(num: int, rank: int) -> int:
        return parts.bytes_of(num, rank, backward=True, recompute=False).kept

    def work(num: int, rank: int) -> int:
        return parts.bytes_of(num, rank, backward=True, recompute=False).work

    def kept_less(num: int, rank: int) -> int:
        return parts.bytes_of(num, rank, backward=True, recompute=True).kept

    def work_again(num: int, rank: int) -> int:
        return parts.bytes_of(num, rank, backward=True, recompute=True).work

    def forward(num: int, rank: int) -> int:
        return sum(parts.bytes_of(num, rank, backward=False, recompute=False))

    return LayerCosts(cost(forward), cost(kept), cost(work), cost(kept_less), cost(work_again))


def _fitted(bytes_of: Callable[[int, int], int], nums: tuple[int, int], ranks: tuple[int, int]) -> Cost:
    """The cost that gives the bytes of these numbers of tokens and these ranks."""

    def token(rank: int) -> int:
        few, more = (bytes_of(num, rank) for num in nums)
        return -(-(more - few) // (nums[1] - nums[0]))

    few, more = (token(rank) for rank in ranks)
    each = -(-(more - few) // (ranks[1] - ranks[0]))
    cost = Cost(few - each * ranks[0], each, 0)
    return cost._replace(fixed=max(0, bytes_of(nums[1], ranks[0]) - cost.of(nums[1], ranks[0])))
